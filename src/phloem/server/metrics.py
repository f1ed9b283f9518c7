"""Prometheus metrics, collected when scraped: nothing here runs per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from phloem.client.client import EngineClient

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
        stats = self.client.connection.stats
        total = stats.total_tokens or 1
        for name, text, value in (
            ("num_running_reqs", "Requests that a step works on.", stats.running),
            ("num_queue_reqs", "Requests that wait.", stats.waiting),
            ("num_used_tokens", "KV tokens held by running requests.", stats.used_tokens),
            ("token_usage", "Share of the KV pool held by running requests.", stats.used_tokens / total),
            ("cache_hit_rate", "Cached prompt tokens over prompt tokens since start.", stats.cache_hit_rate),
            ("gen_throughput", "Continuation tokens per second.", stats.gen_throughput),
            ("kv_available_tokens", "Free KV tokens.", stats.available_tokens),
            ("kv_evictable_tokens", "Cached KV tokens that nobody uses.", stats.evictable_tokens),
            ("kv_used_tokens", "KV tokens held by running requests.", stats.used_tokens),
            ("outside_forward_ratio", "Share of step time outside the forward pass.", stats.outside_forward),
            ("spec_accept_length", "Tokens of a decode step of a request.", stats.spec_accept_length),
            ("spec_accept_rate", "Accepted drafts over drafts.", stats.spec_accept_rate),
            ("engine_up", "1 while the engine is ready.", int(self.client.connection.ready is not None)),
        ):
            family = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric(self.labels, value)
            yield family

    def _totals(self, prefix: str) -> Iterator[Any]:
        counters, stats = self.client.counters, self.client.connection.stats
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of finished requests.", counters.prompt_tokens),
            ("generation_tokens", "Continuation tokens.", counters.generation_tokens),
            ("cached_tokens", "Prompt tokens found in the cache.", counters.cached_tokens),
            ("evicted_tokens", "Cached tokens that made room.", stats.evicted_tokens),
            ("num_requests", "Finished requests.", counters.requests),
            ("num_aborted_requests", "Requests that clients ended or left.", counters.aborted),
            ("num_preemptions", "Requests that lost their pages and were computed again.", stats.preemptions),
            ("spec_verify_calls", "Steps of a request that verified drafts.", stats.spec_verify_calls),
            ("spec_draft_tokens", "Drafts that were verified.", stats.spec_drafted),
            ("spec_accepted_tokens", "Drafts that were accepted.", stats.spec_accepted),
            ("pictures_encoded", "Pictures that the model's tower was run for.", stats.pictures_encoded),
            ("encoder_cache_hits", "Pictures whose embeddings the encoder cache had.", stats.pictures_found),
            ("num_out_of_memory", "Steps that failed for lack of memory and ran again, smaller.", stats.out_of_memory),
        ):
            family = CounterMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric(self.labels, value)
            yield family

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
            ("image_pixels", "Pixels of finished pictures.", counters.image_pixels),
        ):
            total = CounterMetricFamily(prefix + name, text, labels=["model_name"])
            total.add_metric(self.labels, value)
            yield total
        rate = GaugeMetricFamily(prefix + "image_pixels_per_second", "Pixels finished a second.", labels=["model_name"])
        rate.add_metric(self.labels, self.client.connection.stats.pixel_throughput)
        yield rate
