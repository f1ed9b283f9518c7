"""Figures out of a trace in Chrome's format: how long a device worked, how long it waited, and for what it was used.

Times are in microseconds, as in the trace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]

# What the profiler calls work of a device, and calls of its driver by the host.
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("_runtime", "_driver")


@dataclass(frozen=True)
class Span:
    name: str
    start: float
    end: float


def covered(intervals: Iterable[Interval], window: Interval | None = None) -> float:
    """Length of the union of intervals, which may overlap and come in any order; of its part inside the window."""
    low, high = window if window is not None else (float("-inf"), float("inf"))
    total, reached = 0.0, low
    for start, end in sorted(intervals):
        start, end = max(start, reached), min(end, high)
        if end > start:
            total += end - start
            reached = end
    return total


def idle_share(intervals: Iterable[Interval], window: Interval | None = None) -> float:
    """The share of the window in which no interval runs, 0 to 1; default window: first start to last end.

    Raises:
        ValueError: if there is neither an interval nor a window, or the window has no length.
    """
    known = list(intervals)
    if window is None:
        if not known:
            raise ValueError("without intervals there is no window")
        window = min(start for start, _ in known), max(end for _, end in known)
    length = window[1] - window[0]
    if length <= 0:
        raise ValueError(f"the window {window} has no length")
    return 1.0 - covered(known, window) / length


def _events(trace: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (event for event in trace.get("traceEvents", []) if event.get("ph") == "X" and "dur" in event)


def device_spans(trace: dict[str, Any]) -> list[Span]:
    """What ran on the device, copies included, in order of start."""
    spans = [
        Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in _events(trace)
        if event.get("cat") in _DEVICE
    ]
    return sorted(spans, key=lambda span: span.start)


def launch_count(trace: dict[str, Any]) -> int:
    """Calls by which the host gave kernels or whole graphs to the device."""
    return sum(
        str(event.get("cat", "")).endswith(_CALLS) and "launch" in str(event["name"]).lower()
        for event in _events(trace)
    )


def device_figures(trace: dict[str, Any], steps: int, top: int = 8) -> dict[str, Any] | None:
    """Per step, on average: milliseconds between first start and last end, milliseconds busy, the idle share, launches,
    kernels, and the `top` kernels by time. None where nothing ran on a device.
    """
    spans = device_spans(trace)
    if not spans:
        return None
    intervals = [(span.start, span.end) for span in spans]
    window = intervals[0][0], max(end for _, end in intervals)
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span.end - span.start)
    largest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]
    return {
        "device_wall_ms": (window[1] - window[0]) / steps / 1e3,
        "device_busy_ms": covered(intervals) / steps / 1e3,
        "device_idle": idle_share(intervals, window) if window[1] > window[0] else 0.0,
        "launches": launch_count(trace) / steps,
        "kernels": len(spans) / steps,
        "top": [{"name": name, "ms": sum(times) / steps / 1e3, "count": len(times) / steps} for name, times in largest],
    }


def host_ops(trace: dict[str, Any], steps: int, top: int = 8) -> list[dict[str, Any]]:
    """The `top` of torch's operators on the host by their own time, what they call not counted: milliseconds and calls
    per step, on average."""
    own: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in _events(trace):
        if event.get("cat") == "cpu_op":
            threads[event.get("tid")].append(event)
    for events in threads.values():
        around: list[dict[str, Any]] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if around:
                own[around[-1]["name"]] -= event["dur"]
            own[event["name"]] += event["dur"]
            calls[event["name"]] += 1
            around.append(event)
    largest = sorted(own.items(), key=lambda item: -item[1])[:top]
    return [{"name": name, "ms": time / steps / 1e3, "count": calls[name] / steps} for name, time in largest]
