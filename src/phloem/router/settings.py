"""Every setting of the gateway, once: the command line is made from it. Names are those of SGLang's router."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from phloem.core.errors import BadRequest, ConfigError
from phloem.router.address import parse_url

BOOTSTRAP_PORT = 8998
_KEY = re.compile(r"[!-~]+")
_LABEL = re.compile(r"[A-Za-z0-9._/-]{1,317}=[A-Za-z0-9._-]{0,63}")


def opt(group: str, default: Any, text: str, *also: str) -> Any:
    """A field with its group and help. `also`: names that users of other gateways know it by."""
    return field(default=default, metadata={"group": group, "help": text, "also": also})


@dataclass(frozen=True)
class Settings:
    """Times are in seconds unless a name ends in `_ms`."""

    host: str = opt("address", "127.0.0.1", "Address to listen on.")
    port: int = opt("address", 30000, "Port to listen on; 0 takes a free one.")
    max_payload_size: int = opt("address", 64 << 20, "Largest request body, in bytes.", "max_body_bytes")
    max_bodies_bytes: int = opt("address", 1 << 30, "Most bytes of all request bodies that are held.")
    header_timeout: float = opt("address", 30.0, "Time that a connection may take for a request's header.")
    body_timeout: float = opt("address", 30.0, "Time for which a request's body may stop.")
    drain_timeout: float = opt("address", 30.0, "Time that requests in flight get after SIGTERM.")
    log_level: str = opt("address", "info", "How much is logged: debug, info, warning, error.")
    log_requests: bool = opt("address", False, "Log a line per request: model, worker, why it was chosen, times.")

    otlp_traces_endpoint: str | None = opt(
        "address", None, "Send OpenTelemetry spans of requests to this collector: OTLP over HTTP, a URL or HOST:PORT."
    )

    worker_urls: tuple[str, ...] = opt("workers", (), "Servers, as http://host:port; more can be added while it runs.")
    worker_api_key: str | None = opt(
        "workers", None, "Key that is sent to the servers instead of the client's; PHLOEM_WORKER_API_KEY sets it too."
    )
    connect_timeout: float = opt("workers", 5.0, "Time to open a connection to a server.")
    first_byte_timeout: float = opt("workers", 600.0, "Time to the first byte of an answer.", "request_timeout_secs")
    stall_timeout: float = opt("workers", 300.0, "Time for which an answer may stop once it has begun.")
    health_check_interval_secs: float = opt("workers", 5.0, "Time between two looks at a server.")
    health_check_timeout_secs: float = opt("workers", 5.0, "Time that a server has to say that it is well.")
    health_check_endpoint: str = opt("workers", "/health", "What is asked.")
    health_failure_threshold: int = opt("workers", 3, "Failed looks in a row after which nothing is sent there.")
    health_success_threshold: int = opt("workers", 2, "Good looks in a row after which it serves again.")

    pd_disaggregation: bool = opt(
        "pairs",
        False,
        "Send prompts to prefill servers and answer from decode servers; --prefill and --decode imply it.",
    )
    prefill: tuple[str, ...] = opt(
        "pairs", (), "A prefill server, and the port of its bootstrap server (8998): URL [PORT]. May be repeated."
    )
    decode: tuple[str, ...] = opt("pairs", (), "A decode server: URL. May be repeated.")

    service_discovery: bool = opt("pods", False, "Find servers that are pods, through Kubernetes' API.")
    selector: tuple[str, ...] = opt("pods", (), "Labels of their pods, as app=llm; of several, all.")
    prefill_selector: tuple[str, ...] = opt("pods", (), "Of pairs: labels of pods that compute prompts,")
    decode_selector: tuple[str, ...] = opt("pods", (), "and of those that answer.")
    service_discovery_port: int = opt("pods", 30000, "Port at which pods serve.")
    service_discovery_namespace: str | None = opt("pods", None, "Namespace of the pods; default: the gateway's own.")
    bootstrap_port_annotation: str = opt(
        "pods", "sglang.ai/bootstrap-port", "Annotation of prefill pods with the port of their bootstrap server."
    )
    kubernetes_api: str | None = opt("pods", None, "URL of the API; default: as pods are told.")
    kubernetes_account: str = opt(
        "pods", "/var/run/secrets/kubernetes.io/serviceaccount", "Folder of the service account: token, ca.crt."
    )

    policy: str = opt(
        "policy", "cache_aware", "cache_aware, power_of_two, round_robin, random, consistent_hashing or manual."
    )
    cache_threshold: float = opt("policy", 0.3, "Share of a prompt that must be known for it to count, without events.")
    balance_abs_threshold: int = opt("policy", 64, "Requests by which the fullest server may exceed the emptiest one,")
    balance_rel_threshold: float = opt("policy", 1.5, "and how many times; beyond both, reuse counts for nothing.")
    max_tree_size: int = opt("policy", 1 << 20, "Most pieces of prompts that are remembered.")
    session_headers: tuple[str, ...] = opt(
        "policy", ("x-session-id", "x-smg-routing-key", "x-user-id"), "Headers whose value keeps requests together."
    )
    model_path: str | None = opt(
        "policy", None, "Tokenise here, as this model's servers do, to match texts with cache events exactly.", "model"
    )
    kv_events: bool = opt("policy", True, "Follow the cache events of servers that publish them.")

    retry_max_retries: int = opt("retries", 5, "Tries beyond the first one; all before the first byte.")
    retry_initial_backoff_ms: float = opt("retries", 50.0, "Wait before the second try at a server that was tried.")
    retry_max_backoff_ms: float = opt("retries", 5000.0, "Longest wait.")
    retry_backoff_multiplier: float = opt("retries", 1.5, "Growth of the wait.")
    retry_jitter_factor: float = opt("retries", 0.2, "Share of the wait that is left to chance.")
    disable_retries: bool = opt("retries", False, "Try once.")
    cb_failure_threshold: int = opt("retries", 5, "Failures within the window that open a server's circuit.")
    cb_window_duration_secs: float = opt("retries", 60.0, "The window.")
    cb_timeout_duration_secs: float = opt("retries", 30.0, "Time until one request tries it again.")
    cb_success_threshold: int = opt("retries", 2, "Successes that close it.")
    disable_circuit_breaker: bool = opt("retries", False, "Send to failing servers as if nothing were.")

    max_concurrent_requests: int = opt("limits", -1, "Requests in flight at all servers; -1: as many as come.")
    queue_size: int = opt("limits", 128, "Requests that wait beyond those; more are refused with 429.")
    queue_timeout_secs: float = opt("limits", 30.0, "Time that they wait at most; then 408.")
    rate_limit_tokens_per_second: int = opt(
        "limits", 0, "Predicted tokens a second of each API key; 0: no limit.", "key_rate_limit"
    )
    rate_limit_burst_tokens: int = opt("limits", 0, "Tokens that a quiet key may take at once; 0: ten seconds' worth.")
    api_key: tuple[str, ...] = opt(
        "limits", (), "Keys that clients must send, PHLOEM_API_KEY where none is given; without any, none is asked for."
    )
    slo_ttft_ms: float = opt(
        "limits", 0.0, "Refuse with 429 what would wait longer for its first token; a client's x-slo-ttft-ms wins."
    )

    @property
    def tries(self) -> int:
        return 1 if self.disable_retries else 1 + self.retry_max_retries

    @property
    def paired(self) -> bool:
        pods = self.prefill_selector or self.decode_selector
        return self.pd_disaggregation or bool(self.prefill or self.decode or pods)

    def _check_pairs(self) -> None:
        for text in self.prefill:
            prefill_of(text)
        for url in self.decode:
            try:
                parse_url(url)
            except BadRequest as error:
                raise ConfigError(f"decode: {error.message}", param="decode") from None
        if self.paired and self.worker_urls:
            raise ConfigError("worker_urls: pairs are made of --prefill and --decode alone", param="worker_urls")

    def _check_pods(self) -> None:
        labels = (*self.selector, *self.prefill_selector, *self.decode_selector)
        if labels and not self.service_discovery:
            raise ConfigError("selector: needs service_discovery", param="selector")
        if self.service_discovery and not labels:
            raise ConfigError("service_discovery: selector says which pods, as app=llm", param="selector")
        if self.paired and self.selector:
            raise ConfigError("selector: of pairs give prefill_selector and decode_selector", param="selector")
        for label in labels:
            if not _LABEL.fullmatch(label):
                raise ConfigError(f"selector: {label!r:.100} is no label: NAME=VALUE", param="selector")
        if not 0 < self.service_discovery_port <= 65535:
            text = f"service_discovery_port: {self.service_discovery_port} is not in 1 to 65535"
            raise ConfigError(text, param="service_discovery_port")

    def checked(self) -> Settings:
        """Itself. Raises ConfigError, naming the setting."""
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{spec.name}: {value} is no number of use", param=spec.name)
            signed = spec.name in ("max_concurrent_requests",)
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0 and not signed:
                raise ConfigError(f"{spec.name}: {value} is below 0", param=spec.name)
        for name in (
            "queue_timeout_secs",
            "first_byte_timeout",
            "stall_timeout",
            "connect_timeout",
            "health_check_interval_secs",
            "health_check_timeout_secs",
            "health_failure_threshold",
            "health_success_threshold",
            "cb_failure_threshold",
            "max_payload_size",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: {getattr(self, name)} must be above 0", param=name)
        if self.max_concurrent_requests == 0:
            text = "max_concurrent_requests: 0 lets nobody in; -1 lets in as many as come"
            raise ConfigError(text, param="max_concurrent_requests")
        theirs = () if self.worker_api_key is None else (self.worker_api_key,)
        for name, keys in (("api_key", self.api_key), ("worker_api_key", theirs)):
            if not all(_KEY.fullmatch(key) for key in keys):
                raise ConfigError(f"{name}: a key is printable ASCII without spaces, and not empty", param=name)
        for url in self.worker_urls:
            try:
                parse_url(url)
            except BadRequest as error:
                raise ConfigError(f"worker_urls: {error.message}", param="worker_urls") from None
        self._check_pairs()
        self._check_pods()
        if not self.cache_threshold <= 1:
            raise ConfigError(f"cache_threshold: {self.cache_threshold} is not in 0 to 1", param="cache_threshold")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} is not in 0 to 65535", param="port")
        return self


def prefill_of(text: str) -> tuple[str, int]:
    """A prefill server's address and the port of its bootstrap server. Raises ConfigError."""
    url, _, port = text.partition(" ")
    try:
        parse_url(url)
    except BadRequest as error:
        raise ConfigError(f"prefill: {error.message}", param="prefill") from None
    if port in ("", "none"):
        return url, BOOTSTRAP_PORT
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"prefill: {port!r:.100} is no port: URL [PORT]", param="prefill")
    return url, int(port)
