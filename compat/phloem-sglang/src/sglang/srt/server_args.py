"""`ServerArgs`, a dataclass of SGLang's settings, and what Phloem makes of them (`_settings.py`)."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from phloem.core.config import flat_fields
from phloem.core.errors import ConfigError
from sglang._missing import PAGE, log, missing
from sglang.srt._settings import SETTINGS

_Fields = make_dataclass(
    "_Fields",
    [(SETTINGS[0].name, str), *((one.name, Any, field(default=one.default)) for one in SETTINGS[1:])],
)
_ALSO = {
    "model_path": ("--model",),
    "context_length": ("--max-model-len",),
    "tp_size": ("--tensor-parallel-size", "--tp"),
    "pp_size": ("--pipeline-parallel-size", "--pp"),
    "dp_size": ("--data-parallel-size", "--dp"),
    "ep_size": ("--expert-parallel-size", "--ep"),
    "dist_init_addr": ("--nccl-init-addr",),
}
_LISTS = ("lora_paths", "encoder_urls", "lora_target_modules", "cuda_graph_bs", "warmups")
_WHOLE = (
    "context_length", "max_running_requests", "max_total_tokens", "chunked_prefill_size", "page_size", "random_seed",
    "nccl_port", "max_queued_requests", "max_lora_rank", "max_loaded_loras", "speculative_num_steps",
    "speculative_eagle_topk", "speculative_num_draft_tokens", "cuda_graph_max_bs", "dist_timeout",
    "remote_instance_weight_loader_seed_instance_service_port", "disaggregation_decode_tp",
    "kt_num_gpu_experts", "kt_cpuinfer", "kt_max_deferred_experts_per_token", "kt_gpu_prefill_token_threshold",
)  # fmt: skip
_FLAGS = ("enable_lora", "enable_multimodal", "enable_lora_overlap_loading")  # None: not said
_DTYPES = {"half": "float16", "float": "float32"}
_LEVELS = {"warn": "warning", "critical": "error", "fatal": "error", "notset": "debug", "trace": "debug"}
_EMPTY = (None, "", "none", {}, [])


@dataclass
class ServerArgs(_Fields):
    """Fields and defaults are SGLang's. Each is honoured, left out with a line in the log, or refused: `settings`."""

    def __new__(cls, *_: Any, **given: Any) -> ServerArgs:
        unknown = sorted(set(given) - {spec.name for spec in dataclasses.fields(_Fields)})
        if unknown:
            raise TypeError(f"phloem-sglang has no setting {', '.join(unknown)} ({PAGE})")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.tokenizer_path = self.tokenizer_path or self.model_path
        self.served_model_name = self.served_model_name or self.model_path

    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    def settings(self) -> dict[str, Any]:
        """Phloem's settings. What is left out is logged.

        Raises:
            ConfigError: a setting asks for what is not there; the text names it.
        """
        found: dict[str, Any] = {"logprobs_mode": "temperature"}  # as SGLang has log probabilities
        known = flat_fields()
        for one in SETTINGS:
            value = getattr(self, one.name)
            if value == one.default or value in _EMPTY:
                continue
            if one.name == "chunked_prefill_size" and value == -1:
                log.info("chunked_prefill_size=-1 is left out: long prompts are always computed in chunks")
                continue
            if one.fate == "!":
                raise ConfigError(f"{one.name}={value!r} is not supported: {one.text} ({PAGE})", param=one.name)
            if one.fate == "-":
                log.info("%s=%r is left out: %s", one.name, value, one.text)
                continue
            if one.text not in known:
                raise ConfigError(f"{one.name}={value!r} is not supported by this Phloem", param=one.name)
            found[one.text] = _translated(one.name, value)
        if found.get("tokenizer_path") == self.model_path:
            del found["tokenizer_path"]
        if found.get("served_model_name") == self.model_path:
            del found["served_model_name"]
        return found

    @staticmethod
    def add_cli_args(parser: Any) -> None:
        """A flag for each field: `--tp-size`, with SGLang's other names."""
        for one in SETTINGS:
            flags = (f"--{one.name.replace('_', '-')}", *_ALSO.get(one.name, ()))
            text = one.text.replace("%", "%%")
            if isinstance(one.default, bool) or one.name in _FLAGS:
                parser.add_argument(*flags, action="store_true", default=one.default, help=text)
            elif one.name in _LISTS:
                parser.add_argument(*flags, nargs="*", default=one.default, help=text)
            else:
                whole = one.name in _WHOLE or isinstance(one.default, int)
                real = isinstance(one.default, float) or one.name == "mem_fraction_static"
                parser.add_argument(
                    *flags,
                    type=int if whole else float if real else str,
                    default=one.default,
                    required=one.name == "model_path",
                    help=text,
                )

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> ServerArgs:
        names = {spec.name for spec in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in vars(args).items() if name in names})


def _translated(name: str, value: Any) -> Any:
    if name == "is_embedding":
        return "embed"
    if name == "rl_on_policy_target":
        return True
    if name == "dtype":
        return _DTYPES.get(value, value)
    if name == "log_level":
        return _LEVELS.get(str(value).lower(), str(value).lower())
    if name == "model_impl":
        return "phloem" if value == "sglang" else value
    if name == "lora_paths":
        pairs = value.items() if isinstance(value, dict) else None
        return list(value) if pairs is None else [f"{key}={path}" for key, path in pairs]
    return value


@dataclass
class PortArgs:
    """Phloem's processes find each other by themselves: there is nothing in it."""

    @staticmethod
    def init_new(server_args: ServerArgs, dp_rank: int | None = None) -> PortArgs:
        del server_args, dp_rank
        return PortArgs()


def prepare_server_args(argv: list[str]) -> ServerArgs:
    """From a command line."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(argv))


def server_args_of(settings: dict[str, Any]) -> tuple[ServerArgs, dict[str, Any]]:
    """Keywords of an engine: those of SGLang, and the rest, which are Phloem's own.

    Raises:
        ConfigError: neither knows a name.
    """
    names = {spec.name for spec in dataclasses.fields(ServerArgs)}
    unknown = set(settings) - names - set(flat_fields())
    if unknown:
        raise ConfigError(
            f"unknown setting {sorted(unknown)[0]!r}: neither sglang.ServerArgs nor Phloem has it ({PAGE})"
        )
    own = {name: value for name, value in settings.items() if name not in names}
    return ServerArgs(**{name: value for name, value in settings.items() if name in names}), own


__getattr__ = missing(__name__)
