"""The gateway's own metrics, collected when scraped."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from phloem.client.counters import E2E_BUCKETS, TTFT_BUCKETS, Histogram

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phloem.router.fleet import Fleet
    from phloem.router.limits import Gate

PREFIX = "phloem_router:"
OVERHEAD_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


class Metrics:
    """Counts as plain numbers; families are made for who asks."""

    def __init__(self, fleet: Fleet, gate: Gate) -> None:
        self.fleet, self.gate = fleet, gate
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.sent: Counter[str] = Counter()  # by worker
        self.failed: Counter[tuple[str, str]] = Counter()  # (worker, kind)
        self.refused: Counter[str] = Counter()  # by reason
        self.retries = 0
        self.broken_streams = 0
        self.left = 0
        self.bytes_relayed = 0
        self.prompt_tokens = 0.0
        self.cached_tokens = 0.0
        self.first_byte = Histogram(TTFT_BUCKETS)
        self.duration = Histogram(E2E_BUCKETS)
        self.overhead = Histogram(OVERHEAD_BUCKETS)
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def describe(self) -> list[Any]:
        """Nothing: registering must not collect."""
        return []

    def collect(self) -> Iterator[Any]:
        yield from self._counters()
        yield from self._gauges()
        yield from self._by_worker()
        for name, text, histogram in (
            (
                "time_to_first_byte_seconds",
                "From a request's arrival to the first byte of its answer.",
                self.first_byte,
            ),
            ("request_duration_seconds", "From a request's arrival to its end.", self.duration),
            ("overhead_seconds", "From a request's whole arrival until it is sent on.", self.overhead),
        ):
            family = HistogramMetricFamily(PREFIX + name, text)
            family.add_metric([], buckets=histogram.buckets(), sum_value=histogram.sum)
            yield family

    def _counters(self) -> Iterator[Any]:
        requests = CounterMetricFamily(PREFIX + "requests", "Answered requests.", labels=["route", "status"])
        for (route, status), count in self.requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        refused = CounterMetricFamily(PREFIX + "refused", "Requests that no worker saw.", labels=["reason"])
        for reason, count in self.refused.items():
            refused.add_metric([reason], count)
        yield refused
        for name, text, value in (
            ("retries", "Requests that were sent again, before their first byte.", self.retries),
            ("broken_streams", "Answers that were cut off by their worker after the first byte.", self.broken_streams),
            ("clients_left", "Requests whose clients hung up.", self.left),
            ("relayed_bytes", "Bytes of answers that were passed on.", self.bytes_relayed),
            ("prompt_tokens", "Predicted tokens of prompts.", self.prompt_tokens),
            ("cached_tokens", "Of these, tokens that the chosen worker was taken to have.", self.cached_tokens),
        ):
            family = CounterMetricFamily(PREFIX + name, text)
            family.add_metric([], value)
            yield family

    def _gauges(self) -> Iterator[Any]:
        workers = list(self.fleet.workers.values())
        for name, text, value in (
            ("requests_in_flight", "Requests that have been let in.", self.gate.inside),
            ("requests_queued", "Requests that wait to be let in.", self.gate.waiting),
            ("workers", "Workers.", len(workers)),
            ("workers_ready", "Workers that are well.", sum(worker.healthy for worker in workers)),
        ):
            family = GaugeMetricFamily(PREFIX + name, text)
            family.add_metric([], value)
            yield family

    def _by_worker(self) -> Iterator[Any]:
        now = asyncio.get_running_loop().time()
        workers = list(self.fleet.workers.values())
        for name, text, values in (
            ("worker_up", "1 while the worker is well.", [float(worker.healthy) for worker in workers]),
            ("worker_circuit_open", "1 while its circuit is open.",
             [float(worker.breaker.state(now) != "closed") for worker in workers]),
            ("worker_requests_running", "Requests in flight there.", [float(worker.running) for worker in workers]),
            ("worker_pending_tokens", "Prompt tokens sent there and not answered.", [w.pending for w in workers]),
            ("worker_prefill_tokens_per_second", "How fast it computes prompts.", [w.rate for w in workers]),
            ("worker_cached_pages", "Pages that its events say are cached.",
             [float(self.fleet.cached.pages(worker.bit)) for worker in workers]),
        ):  # fmt: skip
            family = GaugeMetricFamily(PREFIX + name, text, labels=["worker"])
            for worker, value in zip(workers, values, strict=True):
                family.add_metric([worker.url], value)
            yield family
        sent = CounterMetricFamily(PREFIX + "worker_requests", "Requests sent there.", labels=["worker"])
        for url, count in self.sent.items():
            sent.add_metric([url], count)
        yield sent
        failed = CounterMetricFamily(PREFIX + "worker_errors", "What failed there.", labels=["worker", "kind"])
        for (url, kind), count in self.failed.items():
            failed.add_metric([url, kind], count)
        yield failed
