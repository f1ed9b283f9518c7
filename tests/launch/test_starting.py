"""The phases of an engine's start."""

from __future__ import annotations

from phloem.core.messages import FromEngine, Progress
from phloem.launch.starting import Starting


def test_each_phase_is_told_when_it_has_ended_and_none_is_counted_twice() -> None:
    told: list[FromEngine] = []
    starting = Starting(told.append)
    starting.end("device")
    starting.took("weights", 2.5)
    starting.end("memory")
    assert [message.phase for message in told if isinstance(message, Progress)] == ["device", "weights", "memory"]
    assert list(starting.seconds) == ["device", "weights", "memory"] and starting.seconds["weights"] == 2.5
    assert [message.seconds for message in told if isinstance(message, Progress)] == list(starting.seconds.values())
    assert all(seconds >= 0 for seconds in starting.seconds.values())
