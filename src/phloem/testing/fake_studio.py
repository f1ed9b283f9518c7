"""An engine of pictures without a model, behind the same link: one colour for each seed, held or refused on request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phloem.core.messages import Abort, Draw, Painted, Ready, ToEngine
from phloem.testing.fake_engine import FakeEngine

FACTS = {
    "family": "fake",
    "grid": 8,
    "width": 16,
    "height": 8,
    "steps": 4,
    "guidance": 3.5,
    "max_pixels": 4096,
    "negative": True,
    "batches": True,
}
EDITS = {**FACTS, "pictures": 2, "needs_pictures": True, "masks": True}
FILMS = {**FACTS, "films": True, "frames": 9, "frame_grid": 4, "max_frames": 33, "fps": 8.0, "pictures": 1}


@dataclass
class FakeStudio(FakeEngine):
    """Every picture is all steps at once, unless `hold`: then it stays at its first step. `refuse_draw`: (status, text,
    field) for every picture."""

    hold: bool = False
    facts: dict[str, Any] = field(default_factory=lambda: FACTS)
    refuse_draw: tuple[int, str, str] | None = None
    draws: list[Draw] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        ready, self.ready = self.ready, False
        super().__post_init__()
        self.ready = ready
        if ready:
            self.say(Ready(info={"pictures": self.facts, "decisions": []}))

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Draw):
            self.draws.append(message)
            self._draw(message)
            self._wake.set()
            return
        if isinstance(message, Abort):
            self.dropped.append(message.id)
        super().send(message)

    def _draw(self, draw: Draw) -> None:
        if self.refuse_draw is not None:
            status, text, param = self.refuse_draw
            self.say(Painted(id=draw.id, done=True, error=text, status=status, param=param, code="told_so"))
            return
        if draw.film:
            self.say(Painted(id=draw.id, steps=draw.steps or 4))
        width, height, steps = draw.width or 16, draw.height or 8, draw.steps or 4
        colour = bytes((draw.seed % 256, draw.seed // 256 % 256, 7))
        for step in range(1, 2 if self.hold else steps + 1):
            told = Painted(id=draw.id, step=step, steps=steps)
            if step <= draw.previews and step < steps:
                told = Painted(
                    id=draw.id,
                    step=step,
                    steps=steps,
                    preview=step - 1,
                    width=width,
                    height=height,
                    pixels=bytes(3) * (width * height),
                )
            self.say(told)
        if not self.hold:
            for at in range(draw.frames if draw.film else 0):
                shade = bytes((draw.seed % 256, 0, min(255, 20 * at))) * (width * height)
                self.say(Painted(id=draw.id, frame=at, frames=draw.frames, width=width, height=height, pixels=shade))
            self.say(
                Painted(
                    id=draw.id,
                    step=steps,
                    steps=steps,
                    width=width,
                    height=height,
                    pixels=b"" if draw.film else colour * (width * height),
                    frames=draw.frames if draw.film else 0,
                    done=True,
                    queue_seconds=0.25,
                    text_tokens=5,
                    image_tokens=width * height // 64,
                )
            )
