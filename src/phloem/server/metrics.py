"""Prometheus metrics, collected when scraped: nothing here runs per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.client.client import EngineClient
    from phloem.core.messages import Replica, Stats

# Name, help, field of `Stats`: of each engine.
_GAUGES = (
    ("num_running_reqs", "Requests that a step works on.", "running"),
    ("num_queue_reqs", "Requests that wait.", "waiting"),
    ("num_used_tokens", "KV tokens held by running requests.", "used_tokens"),
    ("cache_hit_rate", "Cached prompt tokens over prompt tokens since start.", "cache_hit_rate"),
    ("gen_throughput", "Continuation tokens per second.", "gen_throughput"),
    ("kv_available_tokens", "Free KV tokens.", "available_tokens"),
    ("kv_evictable_tokens", "Cached KV tokens that nobody uses.", "evictable_tokens"),
    ("kv_used_tokens", "KV tokens held by running requests.", "used_tokens"),
    ("outside_forward_ratio", "Share of step time outside the forward pass.", "outside_forward"),
    ("spec_accept_length", "Tokens of a decode step of a request.", "spec_accept_length"),
    ("spec_accept_rate", "Accepted drafts over drafts.", "spec_accept_rate"),
    ("dllm_tokens_per_forward", "Tokens of a pass over a request's canvas (diffusion).", "dllm_tokens_per_forward"),
)
_TOTALS = (
    ("evicted_tokens", "Cached tokens that made room.", "evicted_tokens"),
    ("num_preemptions", "Requests that lost their pages and were computed again.", "preemptions"),
    ("spec_verify_calls", "Steps of a request that verified drafts.", "spec_verify_calls"),
    ("spec_draft_tokens", "Drafts that were verified.", "spec_drafted"),
    ("spec_accepted_tokens", "Drafts that were accepted.", "spec_accepted"),
    ("dllm_passes", "Passes over canvases of requests (diffusion).", "dllm_passes"),
    ("pictures_encoded", "Pictures that the model's tower was run for.", "pictures_encoded"),
    ("encoder_cache_hits", "Pictures whose embeddings the encoder cache had.", "pictures_found"),
    ("num_out_of_memory", "Steps that failed for lack of memory and ran again, smaller.", "out_of_memory"),
)

# The same of `Stats.tiers`, where there are any: the key is the name.
_TIER_GAUGES = {
    "hicache_host_used_tokens": "Tokens whose pages are in host memory.",
    "hicache_host_total_tokens": "Tokens whose pages host memory can hold.",
    "hicache_storage_used_tokens": "Tokens whose pages are in the store.",
    "hicache_storage_used_bytes": "Bytes that the store takes.",
}
_TIER_TOTALS = {
    "backuped_tokens": "Tokens written to the last tier.",
    "backup_dropped_tokens": "Tokens that were to be written and were not.",
    "load_back_tokens": "Tokens copied into the KV pool.",
    "load_back_bytes": "Bytes copied into the KV pool.",
    "load_back_duration_seconds": "Seconds of these copies.",
    "prefetched_tokens": "Tokens read from the store.",
    "storage_prefetch_hit_tokens": "Of these, tokens that the request had which they were read for.",
    "storage_prefetch_unfulfilled_tokens": "Tokens that the store knew and did not give in time.",
    "storage_failures": "Reads and writes of the store that failed, and pages that were not what was written.",
}

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The door's counters and the engine's last `Stats`, under each prefix."""

    def __init__(self, client: EngineClient, model_name: str, prefixes: tuple[str, ...]) -> None:
        self.client = client
        self.labels = [model_name]
        self.prefixes = prefixes
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def describe(self) -> list[Any]:
        """Nothing: registering must not collect."""
        return []

    def collect(self) -> Iterator[Any]:
        for prefix in self.prefixes:
            yield from self._gauges(prefix)
            yield from self._totals(prefix)
            yield from self._times(prefix)
            if self.client.info.draws:
                yield from self._pictures(prefix)

    def _gauges(self, prefix: str) -> Iterator[Any]:
        for name, text, field in _GAUGES:
            yield self._by_rank(
                GaugeMetricFamily, prefix + name, text, lambda stats, field=field: getattr(stats, field)
            )
        usage: Callable[[Stats], float] = lambda stats: stats.used_tokens / (stats.total_tokens or 1)  # noqa: E731
        text = "Share of the KV pool held by running requests."
        yield self._by_rank(GaugeMetricFamily, prefix + "token_usage", text, usage)
        yield from self._tiers(prefix, GaugeMetricFamily, _TIER_GAUGES)
        up = GaugeMetricFamily(prefix + "engine_up", "1 while the engine is ready.", labels=self._names())
        for one in self.client.connection.replicas:
            up.add_metric(self._of(one), int(one.ready is not None))
        yield up

    def _names(self) -> list[str]:
        """Of labels: the replica has one where there are several."""
        return ["model_name", "dp_rank"] if len(self.client.connection.replicas) > 1 else ["model_name"]

    def _of(self, one: Replica) -> list[str]:
        return [*self.labels, str(one.rank)] if len(self.client.connection.replicas) > 1 else self.labels

    def _by_rank(self, kind: Any, name: str, text: str, value: Callable[[Stats], float]) -> Any:
        """What each engine tells of itself."""
        family = kind(name, text, labels=self._names())
        for one in self.client.connection.replicas:
            family.add_metric(self._of(one), value(one.stats))
        return family

    def _totals(self, prefix: str) -> Iterator[Any]:
        for name, text, field in _TOTALS:
            yield self._by_rank(
                CounterMetricFamily, prefix + name, text, lambda stats, field=field: getattr(stats, field)
            )
        yield from self._tiers(prefix, CounterMetricFamily, _TIER_TOTALS)
        counters = self.client.counters
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of finished requests.", counters.prompt_tokens),
            ("generation_tokens", "Continuation tokens.", counters.generation_tokens),
            ("num_requests", "Finished requests.", counters.requests),
            ("num_aborted_requests", "Requests that clients ended or left.", counters.aborted),
        ):
            family = CounterMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric(self.labels, value)
            yield family
        text = "Prompt tokens found in the cache, by where: in the pool (device), in host memory, or in a store."
        cached = CounterMetricFamily(prefix + "cached_tokens", text, labels=["model_name", "cache_source"])
        for source, count in counters.cached_tokens.items():
            cached.add_metric([*self.labels, source], count)
        yield cached

    def _tiers(self, prefix: str, kind: Any, names: dict[str, str]) -> Iterator[Any]:
        replicas = self.client.connection.replicas
        for name, text in names.items():
            if any(name in one.stats.tiers for one in replicas):
                yield self._by_rank(kind, prefix + name, text, lambda stats, name=name: stats.tiers.get(name, 0.0))

    def _times(self, prefix: str) -> Iterator[Any]:
        counters = self.client.counters
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", counters.ttft),
            ("inter_token_latency_seconds", "Between tokens of a request.", counters.itl),
            ("e2e_request_latency_seconds", "From arrival to the end.", counters.e2e),
            ("grammar_compilation_time_seconds", "Compiling a grammar.", counters.grammar),
        ):
            family = HistogramMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric(self.labels, buckets=histogram.buckets(), sum_value=histogram.sum)
            yield family

    def _pictures(self, prefix: str) -> Iterator[Any]:
        counters = self.client.counters
        for name, text, histogram in (
            ("image_queue_time_seconds", "From arrival to the first work on a picture.", counters.image_queue),
            ("image_step_time_seconds", "One denoising step of all pictures in it.", counters.image_steps),
            ("image_e2e_latency_seconds", "From arrival to the finished picture.", counters.image_e2e),
        ):
            family = HistogramMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric(self.labels, buckets=histogram.buckets(), sum_value=histogram.sum)
            yield family
        for name, text, value in (
            ("images", "Finished pictures.", counters.images),
            ("videos", "Finished films.", counters.videos),
            ("image_pixels", "Pixels of finished pictures, and of the frames of films.", counters.image_pixels),
        ):
            total = CounterMetricFamily(prefix + name, text, labels=["model_name"])
            total.add_metric(self.labels, value)
            yield total
        rate = GaugeMetricFamily(prefix + "image_pixels_per_second", "Pixels finished a second.", labels=["model_name"])
        rate.add_metric(self.labels, self.client.connection.stats.pixel_throughput)
        yield rate
