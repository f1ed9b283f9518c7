"""A rank of a model that is not the first: it runs what it is told (`parallel`), and holds no state of requests."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.adapters._shares import unpacked
from phloem.distributed.comm import StepUndone
from phloem.engine.apart import cut
from phloem.engine.inputs import Step
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.ranks.contexts import run_rows
from phloem.engine.ranks.parallel import Busy, Capture, Chosen, End, Go, Moved, Placed, entrance_of, run_shared
from phloem.engine.ranks.plans import Plan, Unpacking, ints
from phloem.engine.transfer import LastTokens
from phloem.engine.wanted import Wanted
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.adapters._sites import Sites
    from phloem.attention import AttentionBackend
    from phloem.core.batch import Batch
    from phloem.distributed.comm import Undoing
    from phloem.engine.ranks.parallel import Told
    from phloem.engine.ranks.stages import Together
    from phloem.engine.recorded.choice import SharedWay
    from phloem.engine.recorded.flexible import FlexibleSteps
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.platforms import Platform

_log = log.get("engine")


class Executor:
    """A rank that is not the first: runs what it is told, and holds no state of requests.

    A step for which it, or another rank, has no memory never happened: it waits for the next one.
    """

    def __init__(
        self,
        whole: Together,
        backend: AttentionBackend,
        pool: KVPool,
        ops: Ops,
        slots: int,
        shift: Callable[[Moved], object],
        busy: Callable[[float], None] = lambda _: None,
        recorded: FlexibleSteps | None = None,
        sites: Sites | None = None,
        platform: Platform | None = None,
        ways: Sequence[SharedWay] = (),
    ) -> None:
        """`shift`: what is to be done when experts move. `busy`: says how long this stage has computed. `sites`: where
        adapters go, if any are served. `platform`: of ranks with a device each; `ways`: in which
        these record steps."""
        self._ways = ways
        self._recorded, self._rank, self._sites = recorded, whole.rank, sites
        self._shift, self._busy = shift, busy
        self._whole, self._backend, self._pool = whole, backend, pool
        streams = None if platform is None else platform.streams
        self._last = LastTokens(slots, pool.device, platform is None, streams, ops)
        self._last.spread = None if platform is None else entrance_of(whole)
        self._unpacking = Unpacking()
        self._plans: list[Batch] = []
        self._hidden_LN: Tensor | None = None

    def run(self, receive: Callable[[], Told]) -> None:
        """Until `End`. Raises what a step raises, but for lack of memory where all ranks can leave the step."""
        with torch.inference_mode():
            while not isinstance(told := receive(), End):
                if isinstance(told, Plan):
                    self._plans.append(self._unpacking.unpack(told))
                elif isinstance(told, Go | Chosen):
                    self._undoably(told)
                elif isinstance(told, Capture):
                    self._ways[told.way].graphs.once(told.size)
                elif isinstance(told, Moved):
                    self._shift(told)
                elif isinstance(told, Placed):
                    assert self._sites is not None
                    self._sites.put(told.entry, unpacked(told.fits))
                elif isinstance(told, Busy):
                    self._busy(self._whole.busy)

    def _undoably(self, told: Go | Chosen) -> None:
        undoing = self._whole.undoing
        try:
            if isinstance(told, Chosen):
                self._choose(told)
            else:
                self._go(told, undoing)
            return
        except Exception as error:
            if undoing is None or not is_out_of_memory(error):
                raise
            why = "" if isinstance(error, StepUndone) else first_line(error)
            self._whole.leave()
        # Only here, where the error has gone, can what its frames hold be given back.
        self._hidden_LN = None
        gc.collect(1)
        if why:
            _log.warning("rank %d has no memory for a step, which all leave: %s", self._rank, why)

    def _go(self, told: Go, undoing: Undoing | None) -> None:
        while self._plans:
            batch = self._plans.pop(0)  # those before it never happened
            if (batch.step, batch.epoch) == (told.step, told.epoch):
                break
        else:
            raise ValueError(f"step {told.step} was never planned")
        self._whole.begin(told.head)
        if undoing is not None:
            if undoing.count > told.undone:  # somebody has left a step since it was said: rank 0 will see that
                self._hidden_LN = None
                self._whole.leave()
                return
            undoing.resume(told.undone)
        batch = replace(batch, input_ids=np.frombuffer(told.ids, np.int64).astype(np.int32))
        rows, batch_cut = self._whole.rows, cut(batch, ints(told.lens))
        if rows is not None:
            self._hidden_LN = run_rows(self._whole, rows, self._backend, self._pool, batch_cut, self._last)
            return
        step = Step(batch_cut, Wanted.of(batch), self._pool, self._last)
        if told.way < 0:
            self._hidden_LN = run_shared(self._whole, self._backend, self._pool, step, self._recorded)
        else:
            way = self._ways[told.way]
            self._hidden_LN = way.replayed(step, way.graphs.of(told.size), lambda: None)
        if told.head and self._whole.comm is not None:
            self._whole.headed(self._hidden_LN, told.head)

    def _choose(self, told: Chosen) -> None:
        if self._hidden_LN is None:  # of a step that was left
            self._whole.unchosen()
            return
        like = self._hidden_LN
        if not self._whole.staged:  # of a pipeline rank 0 sends how many there are
            like = like.new_empty((told.rows, like.shape[1]))
        self._whole.chosen(like, told.kind)
