"""Experts over ranks by how often they are chosen: counted, and moved while serving; `counts.py` has the start.

Rank 0 sees every choice, as each rank does. Between two steps it tells the others where the experts of one layer lie
from the next step on; each reads what it lacks, and where one cannot, all stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.errors import BadRequest
from phloem.core.resolve import Decision
from phloem.distributed.balance import balanced, balancedness, settled
from phloem.engine.memory import first_line
from phloem.engine.ranks.counts import check_counted
from phloem.engine.ranks.parallel import Moved
from phloem.models._common import Decoder
from phloem.models._moves import ExpertMoves
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.distributed.comm import Comm
    from phloem.engine.ranks.parallel import Team, Told
    from phloem.layers.spread import Spread
    from phloem.models import Model

_log = log.get("engine.experts")

WORTH = 1.05  # a layer's experts move where its fullest rank then has so many times less to do


def settle(
    config: Config,
    spread: Spread | None,
    model: Model,
    checkpoint: Checkpoint,
    team: Team | None,
    decisions: list[Decision],
) -> Balancer | None:
    """Of rank 0, when all weights are there. Raises ConfigError for a model without experts."""
    if spread is None:
        return None
    own, ep = config.experts, config.runtime.ep_size
    check_counted(own, spread, model, checkpoint.model_type)
    assert isinstance(model, Decoder), "as was just asked"
    experts = spread.layers[0].experts
    where = "by the counts given" if own.init_expert_location not in (None, "trivial") else "in their order"
    moves = f"moved every {own.eplb_rebalance_num_iterations} steps" if own.enable_eplb else "where they stay"
    if ep > 1:
        slots = experts + spread.redundant
        why = f"{experts} experts in {slots} slots, {slots // ep} on each of {ep} (ep_size), {where}, {moves}"
        decisions.append(Decision("ep_num_redundant_experts", spread.redundant, why))
    every = own.eplb_rebalance_num_iterations if own.enable_eplb else None
    if team is None:
        return Balancer(spread, lambda moved: False, every)
    shifter = Shifter(model, checkpoint, team.groups.tp)
    tell = team.tell

    def moved_on_all(moved: Moved) -> bool:
        tell(moved)
        return shifter.shift(moved)

    return Balancer(spread, moved_on_all, every)


def shifter_of(model: Model, checkpoint: Checkpoint, spread: Spread | None, team: Team) -> Callable[[Moved], object]:
    """What a rank beside the first does when experts move."""
    if spread is None or not isinstance(model, Decoder):

        def refuse(told: Told) -> None:
            raise ValueError(f"no experts move here: {told!r:.100}")

        return refuse
    return Shifter(model, checkpoint, team.groups.tp).shift


class Shifter:
    """Moves experts on one rank, together with the others."""

    def __init__(self, model: Decoder, checkpoint: Checkpoint, comm: Comm | None) -> None:
        self._moves, self._comm = ExpertMoves(model, checkpoint), comm

    def shift(self, moved: Moved) -> bool:
        """Whether the experts lie there now. Nobody changes anything unless all have what they need."""
        arrived, failed = None, torch.zeros(1)
        try:
            arrived = self._moves.read(moved.layer, moved.ranks)
        except Exception as error:  # whatever it is: the others wait for word
            _log.error("experts of layer %d cannot move: %s", moved.layer, first_line(error))
            failed += 1
        failed = failed if self._comm is None else self._comm.host.all_reduce(failed)
        if arrived is None or float(failed) > 0:
            return False
        self._moves.install(moved.layer, arrived)
        return True


class Balancer:
    """Looks between steps at what is chosen, and has experts moved so that ranks have alike to do (`runner.Mover`).

    Args:
        move: has the experts of a layer moved on all ranks; whether they were.
        every: steps between two looks; None: never.
    """

    def __init__(self, spread: Spread, move: Callable[[Moved], bool], every: int | None) -> None:
        self._spread, self._shift, self._every = spread, move, every
        self._looked = 0
        self._base = spread.counts()  # at the last look
        self._queue: list[Moved] = []
        self._asked = False  # `move` has been called for, and has not run
        self._record: tuple[Any, Any] | None = None  # counts at the start of recording, and at its end
        self.moved_layers, self.rebalances, self.failed = 0, 0, 0

    def due(self) -> bool:
        """Whether to call `move` behind the steps that were launched: one layer at a time."""
        if self._every is None or self._asked:
            return False
        self._asked = bool(self._queue) or self._spread.steps - self._looked >= self._every
        return self._asked

    def move(self) -> int:
        """For the thread that runs the steps, between two of them. How many layers have changed."""
        try:
            if not self._queue:
                self._look()
            if not self._queue:
                return 0
            if not self._shift(self._queue.pop(0)):
                self._queue.clear()
                self.failed += 1
                return 0
            self.moved_layers += 1
            return 1
        finally:
            self._asked = False

    def _look(self) -> None:
        self._looked, spread = self._spread.steps, self._spread
        now = spread.counts()
        window, self._base = (now - self._base).astype(np.float64), now
        gains: list[str] = []
        for layer in spread.layers:
            load, before = window[layer.number], layer.ranks
            if not load.any():
                continue
            slots = sum(len(held) for held in before)
            found = settled(balanced(load, slots, len(before)), before)
            old, new = balancedness(load, before), balancedness(load, found)
            if new >= WORTH * old:
                self._queue.append(Moved(layer.number, found))
                gains.append(f"{layer.number}: {old:.2f} to {new:.2f}")
        if gains:
            self.rebalances += 1
            shown = ", ".join(gains[:8])
            _log.info("experts of %d layers move; mean over the most of a rank, by layer: %s", len(gains), shown)

    # ---- the recorder, between steps

    def record(self, action: str) -> dict[str, Any]:
        """`start`, `stop` or `dump` what SGLang calls the distribution of experts.

        Raises:
            BadRequest: there is nothing to dump.
        """
        spread = self._spread
        if action == "start":
            spread.counting, self._record = True, (spread.counts(), None)
            return {}
        if self._record is None:
            raise BadRequest("nothing is recorded: /start_expert_distribution_record comes first")
        begun, ended = self._record
        if action == "stop":
            spread.counting = self._every is not None
            self._record = begun, spread.counts() if ended is None else ended
            return {}
        counts = (spread.counts() if ended is None else ended) - begun
        return {"logical_count": counts.tolist()}

    def facts(self) -> dict[str, Any]:
        """For the server's information."""
        spread, counts = self._spread, self._spread.counts()
        layers = spread.layers
        even = [balancedness(counts[layer.number].astype(np.float64), layer.ranks) for layer in layers]
        return {
            "redundant_experts": spread.redundant,
            "balancedness": round(float(np.mean(even)), 4),
            "rebalances": self.rebalances,
            "moved_layers": self.moved_layers,
            "failed_moves": self.failed,
            "ranks": [layer.ranks for layer in layers],
            "counts": counts.tolist(),
        }
