"""A runner around a runner that fills canvases which are drawn anew at every pass (`core.renoising`).

As `canvas.CanvasRunner`, of which it has the requests. What each pass adds to the next one's embeddings stays with the
inner runner (`engine.canvases.refill`). A step that had no memory begins the canvas anew: draws are of the request's
seed, the place and the pass, so it gives the same tokens.

Legend: C places of a canvas, L places of a step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from phloem.core.batch import Places
from phloem.engine.canvases.canvas import PASS, FillingRunner, Launched, Text
from phloem.engine.sampling.sampler import uniforms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phloem.core.batch import Admission, Batch, Filled, Pending, PositionLogprobs, Runner, StepOutput
    from phloem.core.renoising import Renoising

_NOISE = 1 << 62  # set in a draw's position: it is of the noise, not of what the model says


@dataclass(slots=True)
class Noise:
    """One canvas while it is filled."""

    start: int  # its first position
    seed: int
    ids: NDArray[np.int32]  # [C] what the next pass reads
    passes: int = 0
    said: NDArray[np.int32] | None = None  # [C] the likeliest tokens of the last pass
    before: deque[NDArray[np.int32]] = field(default_factory=deque)  # and of the passes before it
    logprobs: dict[int, PositionLogprobs] = field(default_factory=dict)  # by place


@dataclass(slots=True)
class Noisy(Text):
    """A running request."""

    seed: int = 0
    noise: Noise | None = None

    @staticmethod
    def of(admission: Admission) -> Noisy:
        text = Text.of(admission)
        facts = text.request_id, text.known, text.num_prompt, text.limit, text.ends, text.logprobs
        return Noisy(*facts, seed=admission.seed)


class RenoisingRunner(FillingRunner):
    """One that fills canvases as `settings` say, of tokens of a vocabulary of this size."""

    def __init__(self, inner: Runner, settings: Renoising, vocab_size: int) -> None:
        super().__init__(inner)
        self._settings, self._vocab = settings, vocab_size
        self._texts: dict[int, Noisy] = {}

    def launch(self, batch: Batch) -> Pending[StepOutput]:
        for admission in batch.admissions:
            self._texts[admission.slot] = Noisy.of(admission)
        if batch.canvas is None or not batch.canvas.any():
            return self.inner.launch(replace(batch, canvas=None))
        rows = np.flatnonzero(batch.canvas).tolist()
        texts = {row: self._texts[int(batch.slots[row])] for row in rows}
        return Launched(self, self.inner.launch(self._drawn(batch, texts)), batch, texts)

    def _drawn(self, batch: Batch, texts: dict[int, Noisy]) -> Batch:
        """The batch with what the canvases hold, and all of their places."""
        size, ids, ends = self._settings.canvas, batch.input_ids.copy(), np.cumsum(batch.query_lens)
        at: list[NDArray[np.int64]] = []
        draws: list[NDArray[np.int64]] = []
        heats: list[float] = []
        places = np.arange(size)
        for row, text in texts.items():
            first, canvas = int(ends[row]) - size, text.noise
            start = int(batch.prefix_lens[row] + batch.query_lens[row]) - size
            if canvas is None:
                canvas = text.noise = Noise(start, text.seed, self._noise(text.seed, start, 0))
            assert canvas.start == start, "a canvas is filled where it began"
            ids[first : first + size] = canvas.ids
            at.append(first + places)
            draws.append((start + places) | (canvas.passes << PASS))
            heats.append(self._settings.heat(canvas.passes))
        rows = np.repeat(np.array(list(texts), np.int64), size)
        heat_L = np.repeat(np.array(heats, np.float32), size)
        asked = Places(rows, np.concatenate(at), np.concatenate(draws), -1, heat_L)
        return replace(batch, input_ids=ids, canvas=None, places=asked)

    def _noise(self, seed: int, start: int, number: int) -> NDArray[np.int32]:
        """Tokens drawn at random for pass `number` of the canvas that begins there."""
        at = (start + np.arange(self._settings.canvas)) | (number << PASS) | _NOISE
        seeds = np.full(len(at), seed & (2**64 - 1), np.uint64)
        drawn = uniforms(seeds, at.astype(np.uint64)).astype(np.float64) * self._vocab
        return drawn.astype(np.int32)

    def landed(self, batch: Batch, texts: dict[int, Noisy], output: StepOutput) -> StepOutput:
        """Take what the step said; the likeliest tokens of canvases that are done are what it yields."""
        del batch
        filled, size = output.filled, self._settings.canvas
        assert filled is not None, "a step with canvases says what is at their places"
        found: list[NDArray[np.int32]] = []
        for number, (row, text) in enumerate(texts.items()):
            if row in output.failed:
                continue
            canvas, span = text.noise, slice(number * size, (number + 1) * size)
            assert canvas is not None
            self._passes += 1
            if not self._accept(canvas, filled, span):
                continue
            assert canvas.said is not None
            count = _needed(text, canvas)
            new = canvas.said[:count]
            text.known += new.tolist()
            text.noise = None
            found.append(new)
            output.counts[row] = count
            self._tokens += count
            if text.logprobs:
                output.logprobs[row] = [canvas.logprobs[place] for place in range(count)]
        output.tokens = np.concatenate(found) if found else np.zeros(0, np.int32)
        return output

    def _accept(self, canvas: Noise, filled: Filled, span: slice) -> bool:
        """Take a pass; whether the canvas is done."""
        settings, entropy_C = self._settings, filled.confidence[span]
        assert filled.best is not None
        said = filled.best[span]
        stable = settings.stability_threshold
        # What was likeliest in each of the last passes; before the first of them nothing was.
        same = len(canvas.before) == stable and all(np.array_equal(one, said) for one in canvas.before)
        canvas.before.append(said)
        while len(canvas.before) > stable:
            canvas.before.popleft()
        canvas.said, canvas.passes = said, canvas.passes + 1
        asked = range(span.start, span.stop)
        canvas.logprobs = {at - span.start: filled.logprobs[at] for at in asked if at in filled.logprobs}
        if (same and settings.sure(entropy_C)) or canvas.passes >= settings.max_denoising_steps:
            return True
        noise = self._noise(canvas.seed, canvas.start, canvas.passes)
        canvas.ids = np.where(settings.accepted(entropy_C), filled.tokens[span], noise)
        return False


def _needed(text: Text, canvas: Noise) -> int:
    """How many of the canvas's tokens the answer has: up to its first end, or its limit."""
    assert canvas.said is not None
    ends = (place for place, token in enumerate(canvas.said.tolist()) if token in text.ends)
    return min(next(ends, len(canvas.said)) + 1, len(canvas.said), text.limit - canvas.start)
