"""The ranks of a model that draws as processes: started by the first one, which is the engine itself (`tp_comm`).

The first one sends the rows of each pass to the others; all compute it, each with a part of the tokens
(`diffusion.sequence`). A pass that fails on one rank fails on all, with that one's reason, and they meet anew. A rank
that ends fails the pass, and takes the others with it: the next pass starts them again.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from concurrent.futures import Future, wait
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ConfigError, EngineDead, PhloemError
from phloem.diffusion import wire
from phloem.diffusion.sequence import SECONDS, Share, check_ranks, refuse_cache
from phloem.distributed.choose import choose, connect
from phloem.launch.child import LEAVE_SECONDS, Child, Said, end, meeting_place, watch
from phloem.utils import log
from phloem.utils.ipc import frame

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.caching import StepCaching
    from phloem.core.config import Config
    from phloem.diffusion.family import Family, Row
    from phloem.diffusion.request import Job
    from phloem.distributed.comm import Comm
    from phloem.platforms import Platform

_log = log.get("launch")

MODULE = "phloem.launch.picture_rank"
LOOK = 0.1  # seconds between looks at ranks that may have gone


def device_of(platform: Platform, rank: int, size: int) -> torch.device:
    """Where a rank computes: the devices in their order from the first one's, or the processor. Raises ConfigError."""
    if platform.facts.on_host or rank == 0:
        return platform.device
    count = torch.accelerator.device_count()
    if count < size:
        raise ConfigError(f"tp_size: {size} ranks need as many devices, and {count} are there", param="tp_size")
    kind, _, index = str(platform.device).partition(":")
    return torch.device(f"{kind}:{(int(index or 0) + rank) % count}")


class PictureRanks:
    """Who computes with the painter (`diffusion.twin.Company`).

    Args:
        painter: the first rank's, before any adapter stands in its transformers.

    Raises:
        PhloemError: its tokens cannot be shared out, or a rank does not come.
    """

    def __init__(self, config: Config, painter: Family) -> None:
        check_ranks(painter, config.runtime.tp_size)
        self._config, self._painter = config, painter
        self._name, why = choose(config.runtime.tp_comm)
        self.reason = f"processes that meet by {self._name} ({why})"
        self._number = 0
        self._team: _Team | None = _Team(config, self._name)
        self._share = Share(painter, self._team.comm)

    @property
    def processes(self) -> list[int]:
        """Ids of the other ranks', where they run."""
        return [] if self._team is None else [child.process.pid for child in self._team.children]

    def close(self) -> None:
        if self._team is not None:
            self._team.end()
            self._team = None

    def take(self, job: Job, rule: StepCaching) -> None:
        """Raises BadRequest."""
        refuse_cache(rule)

    def forward(self, rows: Sequence[Row], negative: Sequence[bool]) -> list[Tensor]:
        """v of each row. Raises what any rank raises, once none computes any more."""
        if self._team is None:
            self._team = _Team(self._config, self._name)
        team, self._share.comm = self._team, self._team.comm
        self._number += 1
        order: wire.Pass | None = None
        try:
            order = team.sender.order(self._number, rows)
            team.tell(order)
            return self._painter.forward(rows)
        except Exception as error:
            found = self._after(team, error, told=order is not None)
            if found is error:
                raise
            raise found from error

    def _after(self, team: _Team, error: Exception, *, told: bool) -> Exception:
        """What the pass has failed of, with the ranks ready for the next one, or gone."""
        team.comm.abort()
        try:
            team.tell(wire.Leave())
            why = team.settled(self._number) if told else ""
            team.meet()
        except PhloemError as gone:
            team.end()
            self._team = None
            _log.error("%s; the ranks are started again for the next pass", gone.message)
            return gone
        return RuntimeError(why) if why and isinstance(error, EngineDead) else error


class _Team:
    """One start of the other ranks; they are there, and have met.

    Raises:
        PhloemError: one of them has gone.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.size, self._name = config.runtime.tp_size, name
        self.sender = wire.Sender()
        self._comm: Comm | None = None
        self.children: list[Child] = []
        self._changed, self._said = threading.Condition(), dict[int, Said]()  # by rank, what it has said last
        self._gone, self._over, self._meetings = "", False, 0
        self._place = meeting_place()
        order: dict[str, Any] = {"config": config.flat(), "comm": name}
        try:
            for rank in range(1, self.size):
                self.children.append(Child(rank, self._heard, self._ended, MODULE))
                self.children[-1].begin(order)
            threading.Thread(target=self._watch, name="phloem-ranks", daemon=True).start()
            self._all_said({"loaded"}, 0, None)
            for child in self.children:
                child.patience(config.schedule.watchdog_timeout)
            self.meet()
        except BaseException:
            self.end()
            raise

    @property
    def comm(self) -> Comm:
        """The first rank's end."""
        assert self._comm is not None
        return self._comm

    def meet(self) -> None:
        """All find each other anew, and begin from nothing. Raises PhloemError when one has gone."""
        self.sender = wire.Sender()
        self._meetings += 1
        place = self._place / str(self._meetings)
        found: Future[Comm] = Future()
        self.tell(wire.Meet(str(place)))

        def find() -> None:
            try:
                found.set_result(connect(self._name, 0, self.size, place, SECONDS))
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=find, name="phloem-ranks-meet", daemon=True).start()
        while not wait([found], LOOK).done:
            self._check()
        try:
            self._comm = found.result()
        except EngineDead as error:
            raise PhloemError(error.message) from None
        place.unlink(missing_ok=True)

    def tell(self, order: wire.Order) -> None:
        """Raises PhloemError when a rank has gone, or reads nothing."""
        framed = frame(wire.encode(order))
        for child in self.children:
            self._check()
            try:
                child.send(framed)
            except OSError as error:
                self._ended(child, f"it takes no message: {error}")
                self._check()

    def settled(self, number: int) -> str:
        """Wait until no rank computes this pass any more: what one of them has failed of by itself, or nothing.

        Raises:
            PhloemError: one has gone.
        """
        self._all_said({"done", "broke"}, number, SECONDS)
        reasons = [(rank, said.why) for rank, said in sorted(self._said.items()) if said.why]
        return f"rank {reasons[0][0]} of {self.size}: {reasons[0][1]}" if reasons else ""

    def end(self) -> None:
        if not self._gone:
            with contextlib.suppress(PhloemError):
                self.tell(wire.End())
        self._over = True
        end(self.children, 0.0 if self._gone else LEAVE_SECONDS)
        if self._comm is not None:
            self._comm.abort()
        shutil.rmtree(self._place, ignore_errors=True)

    def _check(self) -> None:
        if self._gone:
            raise PhloemError(self._gone)

    def _all_said(self, what: set[str], number: int, timeout: float | None) -> None:
        until = None if timeout is None else monotonic() + timeout
        for child in self.children:
            with self._changed:
                while not ((said := self._said.get(child.rank)) and said.what in what and said.number == number):
                    self._check()
                    if until is not None and monotonic() > until:
                        raise PhloemError(f"rank {child.rank} of {self.size} has not answered within {timeout:g} s")
                    self._changed.wait(LOOK)

    # --- in threads of those who tell of it

    def _heard(self, child: Child, said: Said) -> None:
        if said.what == "broke" and self._comm is not None:
            self._comm.abort()  # the first rank would wait for it
        with self._changed:
            self._said[child.rank] = said
            self._changed.notify_all()

    def _ended(self, child: Child, why: str) -> None:
        if self._over or self._gone:
            return
        self._gone = f"rank {child.rank} of {self.size} has gone: {why}"
        if self._comm is not None:
            self._comm.abort()
        with self._changed:
            self._changed.notify_all()

    def _watch(self) -> None:
        watch(self.children, lambda: bool(self._over or self._gone), self._ended)
