"""Waiting for a queue, for a time."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from phloem.utils.queues import within


def test_what_is_there_comes_at_once_and_what_comes_later_is_waited_for() -> None:
    source: queue.SimpleQueue[int] = queue.SimpleQueue()
    source.put(1)
    assert within(source, 0) == 1
    with pytest.raises(queue.Empty):
        within(source, 0)
    with pytest.raises(queue.Empty):
        within(source, 0.001)
    later = threading.Timer(0.02, source.put, (2,))
    later.start()
    assert within(source, None) == 2
    later.join()


def test_a_lock_that_was_left_open_is_closed_before_it_waits() -> None:
    """Else CPython 3.11 may wait for ever (`SimpleQueue.get` with a rest of less than nothing)."""

    class Source:
        asked: list[str] = []

        def get_nowait(self) -> Any:
            self.asked.append("now")
            raise queue.Empty

        def get(self, timeout: float | None = None) -> Any:
            self.asked.append(f"within {timeout}")
            raise queue.Empty

    source: Any = Source()
    with pytest.raises(queue.Empty):
        within(source, 0.5)
    assert source.asked == ["now", "within 0.5"]
