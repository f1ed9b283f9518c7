"""A runner around a runner that fills the canvases of a model of diffusion.

The scheduler asks for canvases (`Batch.canvas`); here stands what each of them holds. A launched step is given the
tokens of its canvases, and the inner runner says what it would put at their masked places; from the result some of that
is accepted (`core.denoising`), and a canvas without masks yields its tokens. The next step of that row computes them
again, as known tokens, in one pass with the next canvas: under the mask of blocks these see nothing of it, so what is
then kept of them is final. Both `launch` and `result` run in the scheduler's thread: nothing here is shared.

Legend: B places of a canvas, L places of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from phloem.core.batch import Places
from phloem.engine.around import RunnerAround

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from phloem.core.batch import Admission, Batch, Filled, Pending, PositionLogprobs, Runner, StepOutput
    from phloem.core.denoising import Denoising

PASS = 32  # bits of a draw's position: the pass counts above them


@dataclass(slots=True)
class Canvas:
    """One block while it is filled; where a text is seen whole, among all of the text."""

    start: int  # its first position
    ids: NDArray[np.int32]  # [B]
    masked: NDArray[np.bool_]  # [B] by place, as a text may hold the mask token itself; behind the block none is
    first: int  # places before it were known
    until: int  # behind the last place of the block
    passes: int = 0
    logprobs: dict[int, PositionLogprobs] = field(default_factory=dict)  # by place

    @staticmethod
    def over(text: Text, start: int, size: int, how: Denoising) -> Canvas:
        """The positions from `start` on, of a text of which so much is known."""
        fixed = text.known[start : start + size]
        ids = np.full(size, how.mask, np.int32)
        ids[: len(fixed)] = fixed
        until = size
        if how.whole:  # its blocks are those of the answer
            until = min(size, len(fixed) + how.block - (len(fixed) - text.num_prompt) % how.block)
        places = np.arange(size)
        return Canvas(start, ids, (places >= len(fixed)) & (places < until), len(fixed), until)


@dataclass(slots=True)
class Text:
    """What a running request's canvases follow from."""

    request_id: str
    known: list[int]
    num_prompt: int
    limit: int  # tokens at which it ends
    ends: frozenset[int]
    logprobs: bool
    canvas: Canvas | None = None

    @staticmethod
    def of(admission: Admission) -> Text:
        most = admission.params.max_new_tokens
        limit = 1 << 62 if most is None else admission.num_prompt + most
        known: list[int] = admission.tokens.tolist()
        return Text(
            admission.request_id,
            known,
            admission.num_prompt,
            limit,
            frozenset(admission.eos_ids),
            admission.return_logprob,
        )

    def done(self, canvas: Canvas) -> int:
        """How many of the canvas's places its answer is sure to need no more than, all of them filled; 0: it goes on.

        Accepted tokens never change, so what follows an end of the text, or its limit, need not be filled.
        """
        open_places = np.flatnonzero(canvas.masked)
        filled = int(open_places[0]) if len(open_places) else canvas.until
        for place in range(canvas.first, filled):
            if int(canvas.ids[place]) in self.ends or canvas.start + place + 1 >= self.limit:
                return place + 1
        return filled if filled == canvas.until else 0


Kind = TypeVar("Kind", bound=Text)


class Filling(Protocol[Kind]):
    """What takes the results of steps with canvases."""

    def landed(self, batch: Batch, texts: dict[int, Kind], output: StepOutput, /) -> StepOutput: ...


class Launched(Generic[Kind]):
    """A step of the inner runner, and the canvases that it fills (`core.batch.Pending`)."""

    def __init__(self, runner: Filling[Kind], inner: Pending[StepOutput], batch: Batch, texts: dict[int, Kind]) -> None:
        self._runner, self._inner, self._batch, self._texts = runner, inner, batch, texts
        self._output: StepOutput | None = None

    def done(self) -> bool:
        return self._inner.done()

    def result(self) -> StepOutput:
        if self._output is None:
            self._output = self._runner.landed(self._batch, self._texts, self._inner.result())
        return self._output


class FillingRunner(RunnerAround):
    """What those that fill canvases have in common: no drafts, and counts of passes."""

    def __init__(self, inner: Runner) -> None:
        super().__init__(inner)
        self._passes = self._tokens = 0  # of canvases, and what they yielded

    @property
    def draft_room(self) -> int:
        return 0

    @property
    def prepared(self) -> dict[str, Any]:
        per_pass = round(self._tokens / self._passes, 3) if self._passes else 0.0
        found = {"passes": self._passes, "tokens": self._tokens, "tokens_per_forward": per_pass}
        return {**self.inner.prepared, "denoising": found}


class CanvasRunner(FillingRunner):
    """One that fills canvases as `settings` say."""

    def __init__(self, inner: Runner, settings: Denoising) -> None:
        super().__init__(inner)
        self._settings = settings
        self._texts: dict[int, Text] = {}

    def launch(self, batch: Batch) -> Pending[StepOutput]:
        for admission in batch.admissions:
            before, text = self._texts.get(admission.slot), Text.of(admission)
            if before is not None and before.request_id == text.request_id and before.known == text.known:
                text.canvas = before.canvas  # a step had no memory: it goes on from what was accepted
            self._texts[admission.slot] = text
        if batch.canvas is None or not batch.canvas.any():
            return self.inner.launch(replace(batch, canvas=None))
        rows = np.flatnonzero(batch.canvas).tolist()
        texts = {row: self._texts[int(batch.slots[row])] for row in rows}
        return Launched(self, self.inner.launch(self._drawn(batch, batch.canvas, texts)), batch, texts)

    def _drawn(self, batch: Batch, sizes: NDArray[np.int32], texts: dict[int, Text]) -> Batch:
        """The batch with what the canvases hold, and their masked places."""
        settings, ids = self._settings, batch.input_ids.copy()
        ends = np.cumsum(batch.query_lens)
        rows: list[int] = []
        at: list[NDArray[np.int64]] = []
        draws: list[NDArray[np.int64]] = []
        for row, text in texts.items():
            size = int(sizes[row])
            first = int(ends[row]) - size
            start = int(batch.prefix_lens[row] + batch.query_lens[row]) - size
            canvas = text.canvas
            if canvas is None:
                canvas = text.canvas = Canvas.over(text, start, size, settings)
            assert canvas.start == start, "a canvas is filled where it began"
            ids[first : first + size] = canvas.ids
            places = np.flatnonzero(canvas.masked)
            rows += [row] * len(places)
            at.append(first + places - settings.shifted)
            draws.append((start + places) | (canvas.passes << PASS))
        asked = Places(np.array(rows, np.int64), np.concatenate(at), np.concatenate(draws), settings.mask)
        return replace(batch, input_ids=ids, canvas=None, places=asked)

    def landed(self, batch: Batch, texts: dict[int, Text], output: StepOutput) -> StepOutput:
        """Accept what the step said; the tokens of canvases that are done are what it yields."""
        filled = output.filled
        assert filled is not None, "a step with canvases says what is at their places"
        found: list[NDArray[np.int32]] = []
        for row, text, span in _spans(texts):
            canvas = text.canvas
            assert canvas is not None
            if row in output.failed:
                continue
            self._accept(canvas, filled, span)
            self._passes += 1
            count = text.done(canvas)
            if count:
                new = canvas.ids[canvas.first : count]
                text.known += new.tolist()
                text.canvas = None
                found.append(new)
                output.counts[row] = len(new)
                self._tokens += len(new)
                if text.logprobs:
                    output.logprobs[row] = [canvas.logprobs[place] for place in range(canvas.first, count)]
        output.tokens = np.concatenate(found) if found else np.zeros(0, np.int32)
        return output

    def _accept(self, canvas: Canvas, filled: Filled, span: slice) -> None:
        taken = self._settings.accepted(filled.confidence[span], canvas.passes)
        places = np.flatnonzero(canvas.masked)
        for at in np.flatnonzero(taken).tolist():
            if span.start + at in filled.logprobs:
                canvas.logprobs[int(places[at])] = filled.logprobs[span.start + at]
        canvas.ids[places[taken]] = filled.tokens[span][taken]
        canvas.masked[places[taken]] = False
        canvas.passes += 1


def _spans(texts: dict[int, Text]) -> Iterator[tuple[int, Text, slice]]:
    """(Row, its text, which of the step's places are its) in the order in which they were asked for."""
    begin = 0
    for row, text in texts.items():
        count = 0 if text.canvas is None else int(text.canvas.masked.sum())
        yield row, text, slice(begin, begin + count)
        begin += count
