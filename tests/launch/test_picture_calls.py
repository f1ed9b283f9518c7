"""Calls to an engine of pictures that fail in ways nobody foresaw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from phloem.core.messages import Control, ControlReply
from phloem.launch.pictures import PictureCore


class Broken:
    def use(self, args: dict[str, Any]) -> None:
        raise OverflowError("int too large")


def test_a_call_that_fails_is_answered_and_does_not_end_the_engine() -> None:
    told: list[ControlReply] = []
    core: Any = PictureCore.__new__(PictureCore)
    core._send, core.studio = told.append, SimpleNamespace(wardrobe=Broken(), jobs={})
    core._control(Control(id="1", name="set_lora"))
    assert [(reply.id, reply.ok, reply.message) for reply in told] == [("1", False, "OverflowError: int too large")]
