"""The runner that speculates: around another runner, with the same face.

Where a batch gives room, a row's drafts are put behind its token, and the inner runner verifies them. What the
controller learns comes from the results, as the scheduler takes them: both `launch` and `result` run in its thread, so
nothing here is shared between threads.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from phloem.core.batch import FROM_DEVICE, Batch, StepOutput
from phloem.engine.around import RunnerAround
from phloem.speculation.controller import Chain
from phloem.speculation.texts import Text, Texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.batch import Pending, Runner
    from phloem.speculation.controller import Controller
    from phloem.speculation.drafters import Draft, Drafter

T = TypeVar("T")
IDLE = 0.01  # seconds between a result and the next launch after which the engine was idle


class Launched:
    """A step of the inner runner, and what is learned from its result (`core.batch.Pending`)."""

    def __init__(self, runner: SpeculativeRunner, inner: Pending[StepOutput], batch: Batch, texts: list[Text]) -> None:
        self._runner, self._inner, self._taken = runner, inner, False
        self.batch, self.texts = batch, texts
        self.drafts: NDArray[np.int32] | None = None  # [R] that are verified; None: nobody was asked
        self.chains: dict[int, Chain] = {}  # by row
        self.began: float | None = None  # when, after a pause

    def done(self) -> bool:
        return self._inner.done()

    def result(self) -> StepOutput:
        if self._taken:
            return self._inner.result()
        self._taken = True
        try:
            output = self._inner.result()
        except BaseException:
            self._runner.failed()
            raise
        self._runner.landed(self, output)
        return output


class SpeculativeRunner(RunnerAround):
    """One that sends drafts along. `room`: drafts of a row, at most. `clock`: seconds."""

    def __init__(
        self,
        inner: Runner,
        drafter: Drafter,
        controller: Controller,
        room: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(inner)
        self.drafter, self.controller = drafter, controller
        self._room, self._clock = room, clock
        self._texts = Texts(inner.max_slots, drafter.ended)
        self._inflight = 0
        self._last = 0.0  # when a result came

    @property
    def draft_room(self) -> int:
        """Changes from step to step: while drafts do not pay, steps are planned ahead as if there were none."""
        return self._room if self.controller.on else 0

    @property
    def prepared(self) -> dict[str, Any]:
        return {**self.inner.prepared, "speculation": {**self.controller.facts(), **self.drafter.facts()}}

    def launch(self, batch: Batch) -> Launched:
        texts = self._texts.of(batch)
        drafts, verified = self._drafts(batch, texts) if batch.drafts is not None else ({}, None)
        sent = with_drafts(batch, {row: draft.tokens for row, draft in drafts.items()}) if drafts else batch
        now = self._clock()
        launched = Launched(self, self.inner.launch(sent), batch, texts)
        launched.drafts = verified
        launched.chains = {row: _chain(draft, texts[row]) for row, draft in drafts.items()}
        if not self._inflight:
            launched.began = now if now - self._last > IDLE else self._last
        self._inflight += 1
        return launched

    # before a step

    def _drafts(self, batch: Batch, texts: Sequence[Text]) -> tuple[dict[int, Draft], NDArray[np.int32]]:
        """The drafts of each row that has some, and how many each row has."""
        verified = np.zeros(batch.num_rows, np.int32)
        rows, found = list[int](), list["Draft | None"]()
        for row, room in enumerate(() if batch.embeds or batch.drafts is None else batch.drafts.tolist()):
            if batch.outputs[row] == 1 and (room or batch.query_lens[row] == 1):
                rows.append(row)
                known = len(texts[row].tokens) == batch.prefix_lens[row] + batch.query_lens[row]
                found.append(self.drafter.draft(texts[row], room) if room and known else None)
        if not rows:
            return {}, verified
        chains = [None if draft is None else _chain(draft, texts[row]) for row, draft in zip(rows, found, strict=True)]
        easy = all(texts[row].easy for row in rows)
        lengths = self.controller.lengths(chains, easy, batch.num_tokens - len(rows))
        drafts: dict[int, Draft] = {}
        for row, draft, length in zip(rows, found, lengths, strict=True):
            if draft is not None and length:
                del draft.tokens[length:]
                drafts[row], verified[row] = draft, length
        return drafts, verified

    # after it

    def failed(self) -> None:
        """A step gave nothing: every request is admitted anew before its next row."""
        self._inflight -= 1
        self._last = self._clock()

    def landed(self, launched: Launched, output: StepOutput) -> None:
        """A step's result has come."""
        now, batch, texts = self._clock(), launched.batch, launched.texts
        seconds = now - (self._last if launched.began is None else launched.began)
        self._inflight, self._last = self._inflight - 1, now
        tokens, at = output.tokens.tolist(), 0
        if len(tokens) == len(texts) and launched.drafts is None:
            for text, token in zip(texts, tokens, strict=True):
                text.tokens.append(token)
        else:
            for text, count in zip(texts, output.counts.tolist(), strict=True):
                text.tokens += tokens[at : at + count]
                at += count
        output.verified = launched.drafts
        for row, chain in launched.chains.items():
            if output.counts[row]:
                self.controller.judged(chain, chain.length, int(output.counts[row]) - 1)
        decodes = batch.num_tokens == batch.num_rows == int(batch.outputs.sum()) and not batch.admissions
        if decodes and not output.failed:
            self._learn(launched, len(tokens), seconds)

    def _learn(self, launched: Launched, tokens: int, seconds: float) -> None:
        texts, controller = launched.texts, self.controller
        easy, rows = all(text.easy for text in texts), len(texts)
        if launched.drafts is not None:
            controller.verified(rows, rows + int(launched.drafts.sum()), easy, tokens, seconds)
        elif launched.batch.drafts is None:
            controller.plain(rows, easy, seconds)
            if controller.looks(rows, easy):
                found = [(text, self.drafter.draft(text, self._room)) for text in texts]
                controller.look([None if draft is None else _chain(draft, text) for text, draft in found], easy)


def _chain(draft: Draft, text: Text) -> Chain:
    return Chain(len(draft.tokens), draft.source, draft.matched, draft.sure, text.tally)


def with_drafts(batch: Batch, drafts: dict[int, list[int]]) -> Batch:
    """The batch with drafts behind the tokens of these rows (see `core.batch.Batch`)."""
    more = np.zeros(batch.num_rows, np.int32)
    rows = sorted(drafts)
    more[rows] = [len(drafts[row]) for row in rows]
    ends = np.cumsum(batch.query_lens)
    ids = [token for row in rows for token in drafts[row]]
    assert FROM_DEVICE not in ids
    return replace(
        batch,
        query_lens=batch.query_lens + more,
        outputs=batch.outputs + more,
        input_ids=np.insert(batch.input_ids, np.repeat(ends, more), np.array(ids, np.int32)),
        drafts=None,
    )
