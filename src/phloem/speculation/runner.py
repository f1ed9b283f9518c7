"""The runner that speculates: around another runner, with the same face.

Where a batch gives room, a row's drafts are put behind its token, and the inner runner verifies them. What the
controller learns comes from the results, as the scheduler takes them: both `launch` and `result` run in its thread, so
nothing here is shared between threads. Nothing computes between the result of a step with room for drafts and the next
launch, so what such a step teaches is taken in behind that.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from phloem.core.batch import Batch, StepOutput
from phloem.engine.around import RunnerAround
from phloem.engine.drafts.drafting import with_drafts
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
        self.sent = batch  # with what speculation adds to it
        self.drafts: NDArray[np.int32] | None = None  # [R] that are verified; None: nobody was asked
        self.chains: dict[int, Chain] = {}  # by row
        self.began: float | None = None  # when, after a pause
        self.passes = 0  # of a model that drafted within the step
        self.drafting = 0.0  # seconds that they took
        self.learns = True  # its time is like others'

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
        drafter.likely = controller.acceptance.of
        self._room, self._clock = room, clock
        self._texts = Texts(inner.max_slots, drafter.ended)
        self._inflight = 0
        self._last = 0.0  # when a result came
        self._late: Callable[[], None] | None = None  # what is learned behind the next launch
        self._skip = self._skipped = 0  # plain steps that are not told of from now on, and that were not

    @property
    def draft_room(self) -> int:
        """Changes from step to step: while drafts do not pay, steps are planned ahead as if there were none."""
        return self._room if self.controller.on else 0

    @property
    def prepared(self) -> dict[str, Any]:
        self._learn_late()
        return {**self.inner.prepared, "speculation": {**self.controller.facts(), **self.drafter.facts()}}

    def launch(self, batch: Batch) -> Launched:
        texts = self._texts.of(batch)
        sent, verified, chains = self.prepared_for(batch, texts)
        now = self._clock()
        launched = Launched(self, self.inner.launch(sent), batch, texts)
        launched.sent, launched.drafts, launched.chains = sent, verified, chains
        if not self._inflight:
            launched.began = now if now - self._last > IDLE else self._last
        self._inflight += 1
        self._learn_late()
        return launched

    # before a step

    def prepared_for(
        self, batch: Batch, texts: Sequence[Text]
    ) -> tuple[Batch, NDArray[np.int32] | None, dict[int, Chain]]:
        """(What the inner runner is given, [R] how many drafts each row has, what the controller knows of them)."""
        if batch.drafts is None:
            return batch, None, {}
        drafts, verified = self._drafts(batch, texts)
        sent = with_drafts(batch, {row: draft.tokens for row, draft in drafts.items()}) if drafts else batch
        return sent, verified, {row: _chain(draft, texts[row]) for row, draft in drafts.items()}

    def seen(self, text: Text) -> Chain | None:
        """What may be drafted behind a text, though nothing is."""
        draft = self.drafter.draft(text, self._room)
        return None if draft is None else _chain(draft, text)

    def may_draft(self, batch: Batch, texts: Sequence[Text]) -> list[tuple[int, int]]:
        """(Row, room) of each row that decodes; room 0: nothing may be drafted for it."""
        rows = list[tuple[int, int]]()
        for row, room in enumerate(() if batch.embeds or batch.drafts is None else batch.drafts.tolist()):
            if batch.outputs[row] == 1 and (room or batch.query_lens[row] == 1):
                known = len(texts[row].tokens) == batch.prefix_lens[row] + batch.query_lens[row]
                rows.append((row, room if known else 0))
        return rows

    def _drafts(self, batch: Batch, texts: Sequence[Text]) -> tuple[dict[int, Draft], NDArray[np.int32]]:
        """The drafts of each row that has some, and how many each row has."""
        verified = np.zeros(batch.num_rows, np.int32)
        may = self.may_draft(batch, texts)
        rows = [row for row, _ in may]
        found = [self.drafter.draft(texts[row], room) if room else None for row, room in may]
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
        now, texts = self._clock(), launched.texts
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
        if self._skip and launched.drafts is None:
            self._skip, self._skipped = self._skip - 1, self._skipped + 1
            return
        output.verified, launched.drafting = launched.drafts, output.drafting_seconds
        if launched.drafts is None or self.controller.probing:  # a probe says at once whether the next step drafts
            self._learn(launched, output, len(tokens), seconds)
        else:
            self._learn_late()
            self._late = partial(self._learn, launched, output, len(tokens), seconds)

    def _learn_late(self) -> None:
        late, self._late = self._late, None
        if late is not None:
            late()

    def _learn(self, launched: Launched, output: StepOutput, tokens: int, seconds: float) -> None:
        batch, texts, controller = launched.batch, launched.texts, self.controller
        if launched.drafts is not None:
            self._judge(launched, output)
        rows = len(texts)
        decodes = batch.num_tokens == rows and (tokens == rows or int(batch.outputs.sum()) == rows)
        if not decodes or batch.admissions or not launched.learns or output.failed:
            return
        easy = all([text.easy for text in texts])
        if launched.drafts is not None:
            total, passes = rows + int(launched.drafts.sum()), launched.passes
            controller.verified(rows, total, easy, tokens, seconds, passes, launched.drafting)
        elif batch.drafts is None:
            controller.plain(rows, easy, seconds, 1 + self._skipped)
            if controller.looks(rows, easy):
                controller.look([self.seen(text) for text in texts], easy)
            self._skip, self._skipped = controller.skips(rows), 0

    def _judge(self, launched: Launched, output: StepOutput) -> None:
        """Which drafts were right, and how many passes of a model made them."""
        assert launched.drafts is not None
        deepest = (chain.passes(int(launched.drafts[row])) for row, chain in launched.chains.items())
        launched.passes = max(deepest, default=0) if output.drafting_seconds else 0
        for row, chain in launched.chains.items():
            if row in output.branches and output.counts[row]:
                self.controller.judged_tree(chain, chain.length, output.branches[row])
            elif output.counts[row]:
                self.controller.judged(chain, chain.length, int(output.counts[row]) - 1)


def _chain(draft: Draft, text: Text) -> Chain:
    return Chain(len(draft.tokens), draft.source, draft.matched, draft.sure, text.tally)
