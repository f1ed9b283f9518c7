"""An engine of pictures without a model, behind the same link: one colour for each seed, held or refused on request."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class FakeStudio(FakeEngine):
    """Every picture is all steps at once, unless `hold`: then it stays at its first step. `refuse_draw`: (status, text,
    field) for every picture."""

    hold: bool = False
    refuse_draw: tuple[int, str, str] | None = None
    draws: list[Draw] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        ready, self.ready = self.ready, False
        super().__post_init__()
        self.ready = ready
        if ready:
            self.say(Ready(info={"pictures": FACTS, "decisions": []}))

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
            self.say(Painted(id=draw.id, done=True, error=text, status=status, param=param))
            return
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
            self.say(
                Painted(
                    id=draw.id,
                    step=steps,
                    steps=steps,
                    width=width,
                    height=height,
                    pixels=colour * (width * height),
                    done=True,
                    queue_seconds=0.25,
                    text_tokens=5,
                    image_tokens=width * height // 64,
                )
            )
