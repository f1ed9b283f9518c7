"""A runner around another one: what is not its own matter is the inner one's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.batch import Batch, Follower, Pending, Runner, StepOutput
    from phloem.core.memory import Group

T = TypeVar("T")


class RunnerAround:
    """`core.batch.Runner` by another one, `inner`."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.groups: tuple[Group, ...] = inner.groups
        self.num_pages, self.page_size, self.max_slots = inner.num_pages, inner.page_size, inner.max_slots

    @property
    def draft_room(self) -> int:
        return self.inner.draft_room

    @property
    def prepared(self) -> dict[str, Any]:
        return self.inner.prepared

    @property
    def graph_bytes(self) -> int:
        return self.inner.graph_bytes

    def launch(self, batch: Batch) -> Pending[StepOutput]:
        return self.inner.launch(batch)

    def constrain(self, slot: int, follower: Follower | None) -> None:
        self.inner.constrain(slot, follower)

    def between(self, work: Callable[[], T]) -> Pending[T]:
        return self.inner.between(work)

    def read_weight(self, name: str, rows: int) -> NDArray[np.float32]:
        return self.inner.read_weight(name, rows)

    def close(self) -> None:
        self.inner.close()
