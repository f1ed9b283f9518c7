"""The groups of ranks that one model's ranks meet in: those of a stage, and those that pass on from stage to stage.

A pipeline's first rank plans and chooses tokens; its last stage has the head. What passes on goes by groups of two, as
a broadcast by the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phloem.core.errors import EngineDead
from phloem.distributed.comm import StepUndone, Threads

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.comm import Comm


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of the world that meet, the one that speaks first of all."""

    name: str
    members: tuple[int, ...]


def groups_of(pp: int, tp: int, dp: int = 1) -> list[Group]:
    """All of them, in the order in which each rank joins its own: so nobody waits for one that waits elsewhere.
    `dp`: of the `tp` ranks of a stage, groups that attend to rows of their own."""
    found = [Group(f"stage{stage}", tuple(range(stage * tp, (stage + 1) * tp))) for stage in range(pp if tp > 1 else 0)]
    each = tp // dp
    if dp > 1 and each > 1:
        found += [Group(f"attn{first // each}", tuple(range(first, first + each))) for first in range(0, pp * tp, each)]
    for stage in range(pp - 1):
        found += [Group(f"link{stage}-{at}", (stage * tp + at, (stage + 1) * tp + at)) for at in range(tp)]
    if pp > 1:
        last = (pp - 1) * tp
        found += [Group("down", (0, *range(last, last + tp))), Group("up", (last, 0))]
    return found


Join = Callable[[Group, int], "Comm"]  # a rank's end of a group, by its place in it


@dataclass(frozen=True, slots=True)
class Groups:
    """One rank's ends. `down`: from rank 0 to the last stage; `up`: from the last stage's first rank to rank 0."""

    rank: int = 0
    tp: Comm | None = None
    before: Comm | None = None  # what the stage before gives
    after: Comm | None = None
    down: Comm | None = None
    up: Comm | None = None
    attn: Comm | None = None  # those that attend to the same rows, where not all of a stage do

    @staticmethod
    def join(rank: int, pp: int, tp: int, make: Join, dp: int = 1) -> Groups:
        """Meets the other ranks. Raises EngineDead when one does not come."""
        ends: dict[str, Comm] = {}
        for group in groups_of(pp, tp, dp):
            if rank in group.members:
                place = group.members.index(rank)
                kind = group.name.rstrip("0123456789-")
                ends[("after", "before")[place] if kind == "link" else kind] = make(group, place)
        return Groups(rank, *(ends.get(name) for name in ("stage", "before", "after", "down", "up", "attn")))

    @staticmethod
    def threads(pp: int, tp: int, timeout: float = 60.0, dp: int = 1) -> list[Groups]:
        """Those of all ranks, each of which is a thread of this process."""
        ends = {group.name: Threads.group(len(group.members), timeout) for group in groups_of(pp, tp, dp)}
        return [Groups.join(rank, pp, tp, lambda group, at: ends[group.name][at], dp) for rank in range(pp * tp)]

    @property
    def ends(self) -> list[Comm]:
        """All of this rank's."""
        return [end for end in (self.tp, self.before, self.after, self.down, self.up, self.attn) if end is not None]

    def check(self) -> None:
        """Raises EngineDead where a group was ended: what a device has given since is worth nothing."""
        for end in self.ends:
            end.check()

    def abort(self) -> None:
        """Let nobody wait any longer, in any of them."""
        for end in self.ends:
            end.abort()


_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
MOST = 2  # tensors in one go
UNDONE = -1  # in the place of how many there are


def give(comm: Comm, tensors: list[Tensor] | None) -> None:
    """At most two tensors of at most two dimensions, from the first of a group to the others: who `take` them.

    None: the step that they are of never happened. How many and how large is said on the host, so that who takes them
    is ahead of its device.
    """
    head = torch.zeros(1 + 4 * MOST, dtype=torch.int64)
    head[0] = UNDONE if tensors is None else len(tensors)
    whole = [x.contiguous() for x in tensors or ()]
    for at, x in enumerate(whole):
        about = (_TYPES.index(x.dtype), x.dim(), *x.shape)
        head[1 + 4 * at : 1 + 4 * at + len(about)] = torch.tensor(about)
    comm.host.broadcast(head)
    for x in whole:
        if x.numel():
            comm.broadcast(x)


def take(comm: Comm) -> list[Tensor]:
    """What the first of the group gives.

    Raises:
        StepUndone: the step never happened.
        EngineDead: as the comm, or for what is given there is no memory here.
    """
    head = comm.host.broadcast(torch.zeros(1 + 4 * MOST, dtype=torch.int64)).tolist()
    if head[0] == UNDONE:
        raise StepUndone("another stage found no memory")
    found: list[Tensor] = []
    for at in range(head[0]):
        kind, dims, *shape = head[1 + 4 * at : 5 + 4 * at]
        try:
            made = torch.empty(shape[:dims], dtype=_TYPES[kind], device=comm.device)
        except RuntimeError as error:  # who gives it is on its way, and cannot be told
            raise EngineDead(f"no memory for what another stage gives: {error}") from None
        found.append(comm.broadcast(made) if made.numel() else made)
    return found
