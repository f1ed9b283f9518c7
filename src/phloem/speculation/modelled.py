"""The runner that speculates with a model: it says for which rows, how far, and what that model has still to read.

The drafts themselves are made by the inner runner, within the step that verifies them
(`engine/drafts/drafting.py`): tokens need not come here in between.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.batch import Batch, Drafting
from phloem.speculation.controller import Chain
from phloem.speculation.drafters._base import Drafter
from phloem.speculation.marks import Marks
from phloem.speculation.runner import Launched, SpeculativeRunner
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.batch import Runner, StepOutput
    from phloem.core.speculation import Wanted
    from phloem.engine.drafts.branches import TreeShape
    from phloem.speculation.controller import Controller
    from phloem.speculation.drafters._base import Draft
    from phloem.speculation.texts import Text

_log = log.get("speculation")

CATCH_UP = 512  # known tokens that the drafting model reads in one step, at most
USUAL_READ = 48  # more of them make a step unlike others
ENOUGH_STEPS = 200  # that verify, after which the accept length says something
LEAST_LENGTH = 1.05


class Unasked(Drafter):
    """In the place of a drafter that looks at texts: there is nothing to look at."""

    def __init__(self, wanted: Wanted | None = None) -> None:
        del wanted

    def draft(self, text: Text, room: int) -> Draft | None:
        del text, room
        return None

    def ended(self, text: Text) -> None:
        del text

    def facts(self) -> dict[str, int]:
        return {}


class ModelledRunner(SpeculativeRunner):
    """One whose inner runner has a model that drafts.

    Args:
        source: the drafter's name.
        shift: 1 where it reads, at a position, the token behind it.
        group: of the memory that it keeps.
        tree: of what shape its drafts are; None: chains.
        once: all drafts come of one pass.
    """

    def __init__(
        self,
        inner: Runner,
        source: str,
        shift: int,
        group: int,
        controller: Controller,
        room: int,
        tree: TreeShape | None = None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        once: bool = False,
    ) -> None:
        super().__init__(inner, Unasked(), controller, room, clock)
        self._source, self._shift, self._group, self._tree, self._once = source, shift, group, tree, once
        self.marks = Marks(inner.num_pages[group], inner.page_size)
        self._steps = self._tokens = 0  # rows that verified drafts, and what they gave

    @property
    def prepared(self) -> dict[str, Any]:
        found = super().prepared
        length = round(self._tokens / self._steps, 3) if self._steps else 1.0
        return {**found, "speculation": {**found["speculation"], "accept_length": length}}

    def seen(self, text: Text) -> Chain | None:
        return self._chain(text, self._room)

    def _chain(self, text: Text, room: int) -> Chain:
        deep = 0 if self._tree is None else self._tree.depth
        return Chain(room, self._source, 0, True, text.tally, modelled=True, deep=deep, once=self._once)

    def prepared_for(
        self, batch: Batch, texts: Sequence[Text]
    ) -> tuple[Batch, NDArray[np.int32] | None, dict[int, Chain]]:
        if batch.drafts is None:
            self._written(batch, batch.query_lens)
            return batch, None, {}
        may = self.may_draft(batch, texts)
        chains = [self._chain(texts[row], room) if room else None for row, room in may]
        verified = np.zeros(batch.num_rows, np.int32)
        if may:
            easy = all(texts[row].easy for row, _ in may)
            lengths = self.controller.lengths(chains, easy, batch.num_tokens - len(may))
            verified[[row for row, _ in may]] = lengths
        plan = self._plan(batch, texts, verified)
        verified = verified if plan is None else plan.counts
        self._written(batch, batch.query_lens + verified)
        kept: dict[int, Chain] = {}
        for (row, _), chain in zip(may, chains, strict=True):
            if chain is not None and verified[row]:
                chain.length = int(verified[row])
                kept[row] = chain
        return replace(batch, drafting=plan), verified, kept

    def _plan(self, batch: Batch, texts: Sequence[Text], wants: NDArray[np.int32]) -> Drafting | None:
        """What is read before anything is drafted; a row with too much of it drafts in a later step."""
        rows = np.flatnonzero(wants).tolist()
        if not rows:
            return None
        counts = wants.copy()
        starts, lens = np.zeros_like(wants), np.zeros_like(wants)
        ids, left, table = list[int](), CATCH_UP, batch.tables[self._group]
        for row in rows:
            tokens = texts[row].tokens
            end = len(tokens) - self._shift  # behind the last position that can be read
            start = min(self.marks.known(table[row], end), end - 1)
            count = min(end - start, left)
            if start + count < end:
                counts[row] = 0
            starts[row], lens[row], left = start, count, left - count
            ids += tokens[start + self._shift : start + self._shift + count]
            self.marks.computed(table[row], start, start + count)
        return Drafting(counts, starts, lens, np.array(ids, np.int32))

    def _written(self, batch: Batch, counts: NDArray[np.int32]) -> None:
        self.marks.written(batch.tables[self._group], batch.prefix_lens, counts)

    def failed(self) -> None:
        super().failed()
        self.marks.forget()

    def launch(self, batch: Batch) -> Launched:
        launched = super().launch(batch)
        plan = launched.sent.drafting
        launched.learns = plan is None or len(plan.ids) <= USUAL_READ
        return launched

    def landed(self, launched: Launched, output: StepOutput) -> None:
        super().landed(launched, output)
        batch = launched.batch
        for row, chain in launched.chains.items():
            count = int(output.counts[row])
            if not count:
                continue
            self._steps, self._tokens = self._steps + 1, self._tokens + count
            if not self._shift:
                # It has read its own drafts but for the last one: those that were right stay.
                # (Those of a tree it has read in other pages.)
                known = int(batch.prefix_lens[row] + batch.query_lens[row])
                end = known + (min(count - 1, chain.length - 1) if self._tree is None else 0)
                self.marks.computed(batch.tables[self._group][row], known - 1, end)
            if self._steps == ENOUGH_STEPS:
                self._warn()

    def _warn(self) -> None:
        length = self._tokens / self._steps
        if length < LEAST_LENGTH:
            _log.warning(
                "%s: %.2f tokens a step after %d steps that verified drafts: almost none is right. Likely causes: it "
                "was trained for another model or chat template, its hidden states come from other layers (see the "
                "decision speculative_draft), its vocabulary map is another one's, texts are longer than it has seen",
                self._source,
                length,
                self._steps,
            )
