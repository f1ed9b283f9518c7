"""Weights that change and memory that is lent out, as the scheduler sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from phloem.core.batch import Pending

TAGS = ("weights", "kv_cache", "cuda_graph")  # what memory can be given back
SOURCES = ("tensors", "blobs", "disk", "group", "ipc", "random")


class Keeper(Protocol):
    """Called in the scheduler's thread alone; methods that say so are work for `Runner.between`."""

    version: str  # what its user calls the weights
    epoch: int  # how often they have changed
    nameless: str  # like no other: the last change came without a name; "": it had one, or there was none
    unfit: str  # why they cannot serve; "": they can
    asleep: frozenset[str]  # tags of what has been given back

    def read(self, source: str, args: dict[str, Any]) -> Pending[int]:
        """New weights, read, checked and made ready beside the steps: how many tensors. One at a time.

        `source`: tensors (args: tensors, [(name, Tensor)]), blobs (blobs, load_format), disk (path, load_format),
        group (group, names, dtypes, shapes, load_format), ipc (handles, {device: socket}), random. Between `begin` and
        `end` they are collected.

        Raises:
            BadRequest: at once, or of the work: naming what is wrong. Nothing has changed then.
        """
        ...

    def receive(self, args: dict[str, Any]) -> Pending[Any]:
        """Tensors that a trainer broadcasts (args: group, names, dtypes, shapes, load_format): [(name, Tensor)].

        Raises:
            BadRequest: there is no such group, or they are larger than weights may be.
        """
        ...

    @property
    def collecting(self) -> bool: ...

    def begin(self) -> None:
        """Collect what comes until `end`. Raises BadRequest: that is so already."""
        ...

    def end(self) -> Pending[int]:
        """Make ready what was collected. Raises BadRequest: nothing is collected."""
        ...

    def drop(self) -> int:
        """Forget what was collected: how many tensors. Raises BadRequest: nothing is collected."""
        ...

    def put(self) -> None:
        """Put in place what was made ready last. For `between`."""
        ...

    def changed(self, version: str | None, error: Exception | None = None) -> None:
        """`put` has run. A `version` of None keeps the name."""
        ...

    def join(self, args: dict[str, Any]) -> Pending[None]:
        """Join a trainer's group (args: name, address, rank, world, backend, timeout). Raises BadRequest."""
        ...

    def leave(self, name: str) -> None:
        """Raises BadRequest: there is no such group."""
        ...

    def digests(self, skip: list[str]) -> dict[str, str]:
        """Of each tensor as the checkpoint would have it. For `between`."""
        ...

    def release(self, tags: frozenset[str]) -> int:
        """Give memory back; bytes. For `between`, with nothing in the cache."""
        ...

    def resume(self, tags: frozenset[str]) -> None:
        """Take it again. For `between`."""
        ...
