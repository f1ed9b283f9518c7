"""When a recording is left: whether somebody waits is looked at between the layers of what is recorded.

So nobody waits for a recording to end, but for the longest stretch of one in which nobody looks. How long that is, and
how long recordings take, is known from the last ones.

Legend: T tokens, H heads, D head size.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING

from phloem.kernels.graph import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

    from phloem.kernels.calls import IndexCall, LatentCall
    from phloem.layers.context import AttentionSpec, Heads, States, StepMemory

RECENT = 4  # recordings that tell how long the next one takes


class Looks:
    """Of one way of running steps by recordings, used by its thread alone. `clock`: seconds, for tests. `leaves`:
    recordings may be left; not where other ranks make them too, so that nobody looks while one is made."""

    def __init__(self, clock: Callable[[], float] = perf_counter, leaves: bool = True) -> None:
        self.clock, self._leaves = clock, leaves
        self.waiting: Callable[[], bool] = lambda: False  # whether a step waits
        self._until = inf  # a recording that requests wait for is left then
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._stretches: deque[float] = deque(maxlen=RECENT)
        self._begun = self._last = self._stretch = 0.0
        self._recording, self._ended = False, 0

    @property
    def seconds(self) -> float | None:
        """What the next recording takes, probably; None: there was none."""
        return max(self._seconds, default=None)

    @property
    def stretch(self) -> float | None:
        """The longest stretch of it in which nobody looks, in seconds; None: there was none."""
        return max(self._stretches, default=None)

    @contextmanager
    def recording(self) -> Generator[None]:
        """Around one attempt, whether it succeeds, fails or is left."""
        self._begun = self._last = self.clock()
        self._stretch, self._recording, left = 0.0, True, False
        try:
            yield
        except Interrupted:
            left = True
            raise
        finally:
            now = self.clock()
            self._recording = False
            if self._ended == 1:  # the first one compiles and collects what no other does
                self._seconds.clear()
                self._stretches.clear()
            self._ended += 1
            self._stretches.append(max(self._stretch, now - self._last))
            if not left or now > self._until:
                self._seconds.append(now - self._begun)

    @contextmanager
    def for_at_most(self, seconds: float) -> Generator[None]:
        """Meanwhile recordings are left after so many seconds, and not because a step waits: it is known to."""
        self._until, waiting = self.clock() + seconds, self.waiting
        self.waiting = lambda: False
        try:
            yield
        finally:
            self._until, self.waiting = inf, waiting

    def look(self) -> None:
        """Between two layers. Raises `Interrupted` where a recording is to be left; else nothing happens."""
        if not (self._recording and self._leaves):
            return
        now = self.clock()
        self._stretch, self._last = max(self._stretch, now - self._last), now
        if now > self._until or self.waiting():
            raise Interrupted


class Watched:
    """What layers attend by while a step is recorded (`layers.context.StepMemory`), with a look at each layer."""

    def __init__(self, memory: StepMemory, looks: Looks) -> None:
        self._memory, self._look = memory, looks.look

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        self._look()
        return self._memory.attend(spec, heads)

    def attend_latent(
        self,
        pool: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        call: LatentCall,
        chosen: Tensor | None = None,
        /,
    ) -> Tensor:
        self._look()
        return self._memory.attend_latent(pool, q_nope, q_rope, latent, call, chosen)

    def choose(self, pool: int, call: IndexCall, /) -> Tensor | None:
        return self._memory.choose(pool, call)

    def keep(self, pool: int, x_TN: Tensor, /) -> None:
        self._memory.keep(pool, x_TN)

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        return self._memory.kept(pool)

    def state(self, pool: int) -> States:
        self._look()
        return self._memory.state(pool)
