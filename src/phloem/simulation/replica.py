"""One replica: the real scheduler and cache over a runner whose steps only take time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from phloem.core.batch import StepOutput
from phloem.core.errors import BadRequest
from phloem.core.memory import Paged, groups_of
from phloem.core.messages import Tokens
from phloem.core.targets import Fair, Targets
from phloem.kvcache.events import Feed, as_map
from phloem.kvcache.manager import CacheManager
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings
from phloem.simulation.traces import ANSWER, VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.core.batch import Batch, Follower
    from phloem.core.messages import FromEngine, ToEngine
    from phloem.kvcache.events import Event
    from phloem.router.cached import Cached
    from phloem.simulation.clockwork import StepTime

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """Of every replica: its KV memory in tokens, and its scheduler's settings."""

    kv_tokens: int = 400_000
    page_size: int = 64
    max_running: int = 256
    context: int = 32_768
    chunk: int = 8192
    schedule_policy: str = "lpm"
    max_queue_seconds: float = 0.0  # as of `ScheduleSettings`, and so are these
    mixed: int | None = None
    targets: Targets = Targets()
    fair: Fair = "none"


class Clock:
    """A replica's own time in seconds: it is ahead of the fleet's while the step that it waits for runs."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Pending(Generic[T]):
    __slots__ = ("_clock", "_output", "_ready")

    def __init__(self, output: T, ready: float, clock: Clock) -> None:
        self._output, self._ready, self._clock = output, ready, clock

    def done(self) -> bool:
        return self._clock.now >= self._ready

    def result(self) -> T:
        self._clock.now = max(self._clock.now, self._ready)
        return self._output


class VirtualRunner:
    """Implements `core.batch.Runner`: every row that yields has the token `ANSWER`."""

    graph_bytes = draft_room = 0
    groups = groups_of((Paged(1, 1, 1),))

    def __init__(self, size: Size, seconds: StepTime, clock: Clock) -> None:
        self.page_size, self.max_slots = size.page_size, size.max_running
        self.num_pages: tuple[int, ...] = (size.kv_tokens // size.page_size + 1,)
        self.busy = 0.0  # seconds
        self._seconds, self._clock, self._free = seconds, clock, 0.0
        self._answers = np.full(size.max_running, ANSWER, np.int32)

    @property
    def prepared(self) -> dict[str, Any]:
        return {}

    def launch(self, batch: Batch) -> _Pending[StepOutput]:
        rows, tokens = batch.num_rows, batch.num_tokens
        prefix, yields = batch.prefix_lens, batch.outputs
        given = rows if tokens == rows and batch.is_decode else int(yields.sum())
        if given == tokens:
            taken = self._seconds(tokens, rows, rows, int(prefix.sum()) + rows, 0, 0)
        else:
            news = batch.query_lens
            prompts = news > 1
            many, before = news[prompts].astype(np.int64), prefix[prompts].astype(np.int64)
            decodes = rows - len(many)
            read = int(prefix.sum()) - int(before.sum()) + decodes
            pairs = int((many * before + many * many // 2).sum())
            taken = self._seconds(tokens, given, decodes, read, pairs, int((before + many).sum()))
        self._free = max(self._free, self._clock.now) + taken
        self.busy += taken
        output = StepOutput(batch.step, yields, self._answers[:given], forward_seconds=taken)
        return _Pending(output, self._free, self._clock)

    def constrain(self, slot: int, follower: Follower | None) -> None:
        pass

    def between(self, work: Callable[[], T]) -> _Pending[T]:
        return _Pending(work(), self._free, self._clock)

    def read_weight(self, name: str, rows: int) -> NDArray[np.float32]:
        raise BadRequest(f"no weight is called {name!r}", param="name")

    def close(self) -> None:
        pass


class _Sink:
    """Cache events reach the gateway's index at once."""

    def __init__(self, cached: Cached, bit: int, page_size: int) -> None:
        self._cached, self._bit, self._size = cached, bit, page_size
        self.sequence = 0

    def put(self, events: list[Event]) -> bool:
        self._cached.take(self._bit, [as_map(event, self._size) for event in events])
        self.sequence += 1
        return True


class Replica:
    """`turn` is one turn of the engine's loop: what has arrived, one step, and the news of the step before."""

    def __init__(self, number: int, size: Size, seconds: StepTime, cached: Cached | None = None) -> None:
        self.number = number
        self.clock = Clock()
        self.runner = VirtualRunner(size, seconds, self.clock)
        self.cache = CacheManager(self.runner.groups, self.runner.num_pages, size.page_size, chunk=size.chunk)
        settings = ScheduleSettings(
            max_running_requests=size.max_running,
            context_length=size.context,
            vocab_size=VOCABULARY,
            chunked_prefill_size=size.chunk,
            schedule_policy=size.schedule_policy,
            max_queue_seconds=size.max_queue_seconds,
            mixed_prefill_size=size.mixed,
            targets=size.targets,
            fair=size.fair,
            random_seed=number,
        )
        self.scheduler = Scheduler(self.runner, settings, self.cache, self._take, self.clock)
        if cached is not None:
            self.scheduler.feed = Feed(self.cache.tree, _Sink(cached, number, size.page_size))
        self.inbox: list[ToEngine] = []
        self.news: list[Tokens] = []
        self.awake = False

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Tokens):
            self.news.append(message)

    def turn(self, now: float) -> bool:
        """False: nothing is left to do until something arrives. Its clock then says when the turn ended."""
        clock = self.clock
        clock.now = max(clock.now, now)
        if self.inbox:
            for message in self.inbox:
                self.scheduler.receive(message)
            self.inbox.clear()
        return self.scheduler.step()
