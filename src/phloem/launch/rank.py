"""A rank's process beside rank 0's: `python -m phloem.launch.rank`, its order on standard input. It executes steps."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.describe import described
from phloem.core.resolve import Decision
from phloem.engine.ranks import cards
from phloem.engine.ranks.parallel import End, Team, decode_told, mesh_of
from phloem.engine.worker import build_executor
from phloem.launch.rank_pipe import RankPipe, carried_out, ordered
from phloem.launch.ranks import Way, join
from phloem.launch.ring import RingReader

if TYPE_CHECKING:
    from phloem.engine.ranks.parallel import Told


class _Pipe(RankPipe):
    """For steps of a model of text; rank 0 tells them through a ring where it is on the same node."""

    def __init__(self, descriptor: int, rank: int, ring: tuple[str, int] | None) -> None:
        """`ring`: its file, and how many ranks read it."""
        super().__init__(descriptor)
        self._ring = None if ring is None else RingReader(Path(ring[0]), ring[1], rank - 1, self._socket)

    def loaded(self, bytes_read: int) -> None:
        self.say("loaded", bytes_read=bytes_read)

    def measured(self, free: int, total: int) -> None:
        self.say("measured", memory=(free, total))

    def busy(self, seconds: float) -> None:
        self.say("busy", seconds=seconds)

    def receive(self) -> Told:
        """The next message; `End` when rank 0 has gone."""
        data = self.next() if self._ring is None else self._ring.read()
        return End() if data is None else decode_told(data)

    def tell(self, told: Told) -> None:
        raise ValueError(f"only rank 0 tells the others: {told!r:.100}")


def main() -> int:
    found = ordered()
    if found is None:
        return 1
    order, config, rank = found
    pipe = _Pipe(order["pipe"], rank, order["ring"])

    def work() -> None:
        cards.take(config, rank)
        pipe.say("here")
        board = order["board"]
        way = Way(order["comm"], Path(order["place"]), None if board is None else (*board,), order["here"])
        groups = join(config, rank, way)
        decision = Decision("tp_size", config.runtime.tp_size, "as rank 0 says")
        says: dict[str, Any] = {"busy": pipe.busy, "measured": pipe.measured}
        team = Team(mesh_of(config, rank), groups, pipe.tell, pipe.loaded, decision, **says)
        executor = build_executor(config, described(config.model), team, pipe.receive)
        gc.freeze()
        executor.run(pipe.receive)

    return carried_out(work, pipe)


if __name__ == "__main__":
    sys.exit(main())
