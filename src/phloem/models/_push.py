"""New values for a model that serves: checked whole, made ready beside the steps, put in place between two of them.

Nothing is written before everything has been checked and made ready; putting it in place only copies then. Dense
weights are overwritten, packed ones filled anew where the table can: recorded steps stay right. What a packed layout is
of float numbers in another order is packed straight into the old one's memory (`Ops.rewriting`): whoever handed over
tensors of the model's own type waits until they are in place, and nothing is kept of them in between. Of all else an
update takes as much memory as what it brings, until it is in place (`Ops.refill`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.models._index import open_sources
from phloem.models._sources import TensorSource
from phloem.models._stored import check_pushed, may_stand_for, some
from phloem.quant._source import LARGEST, out_of_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.layers.weight import Weight
    from phloem.models._index import WeightIndex
    from phloem.quant._source import Source

    Rename = Callable[[str], str | None]


@dataclass(slots=True)
class _Job:
    """What is new of one weight: `rows` of a dense one, the whole of a packed one."""

    weight: Weight
    sources: dict[str, Source] = field(default_factory=dict)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # target, values
    write: Callable[[], None] | None = None  # of a packed one, in place of `made`
    made: Any = None
    ready: bool = False


@dataclass(slots=True)
class _Told:
    """What is wrong with what has come."""

    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises ModelLoadError."""
        unknown = self.unknown
        if unknown:
            more = f" (and {len(unknown) - 1} more: {some(unknown[1:])})" if len(unknown) > 1 else ""
            raise ModelLoadError(f"no weight is called {unknown[0]!r:.300}; see weight_names(){more}")
        if self.wrong:
            raise ModelLoadError(some(self.wrong))


class Push:
    """One update. `rename`: our name of a checkpoint's tensor, None: knowingly left out; default: they are the same.
    `foreign`: whether a tensor of this name is a tower's of transformers' code, which files alone bring."""

    def __init__(
        self, index: WeightIndex, rename: Rename | None = None, foreign: Callable[[str], bool] | None = None
    ) -> None:
        self.names: set[str] = set()
        self._index, self._rename, self._foreign = index, rename, foreign
        self._jobs: dict[int, _Job] = {}
        self._ahead = 0

    def add(self, tensors: Iterable[tuple[str, Tensor]], *, sound: bool = False) -> None:
        """Whole tensors, of which this rank keeps its share. All or none of them is taken.

        Args:
            sound: their numbers have been looked at.

        Raises:
            ModelLoadError: naming those that are unknown, of another shape or type, or no weights (`_unsound`).
        """
        found: list[tuple[str, Source]] = []
        told = _Told()
        for theirs, tensor in tensors:
            name = self._slot(theirs, tensor.dtype, tuple(tensor.shape), told)
            if name is None:
                continue
            if not sound and (why := self._unsound(name, tensor)):
                told.wrong.append(f"{theirs} {why}")
            else:
                shape = self._index.stored_shape(name)
                found.append((name, TensorSource(name, shape, tensor=tensor.reshape(shape))))
        told.check()
        for name, source in found:
            self._take(name, source)

    def expect(self, announced: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        """What `add` would refuse of tensors before their numbers are there, by name, type and shape. Raises
        ModelLoadError."""
        told = _Told()
        for theirs, kind, shape in announced:
            self._slot(theirs, kind, tuple(shape), told)
        told.check()

    def _slot(self, theirs: str, kind: torch.dtype, seen: tuple[int, ...], told: _Told) -> str | None:
        """Our name of a tensor; None: it is left out knowingly, or `told` has what is wrong with it."""
        if self._foreign is not None and self._foreign(theirs):
            raise ModelLoadError(
                f"{theirs:.300}: the tower is run by transformers' code, and is updated from disk alone; "
                "send the language model's tensors"
            )
        name = self._ours(theirs)
        if name is None:
            return None
        if name not in self._index.slots:
            told.unknown.append(theirs)
            return None
        shape = self._index.stored_shape(name)
        check_pushed(theirs, kind)
        if seen != (1, *shape) and not may_stand_for(seen, shape):
            told.wrong.append(f"{theirs} is {list(seen)}, expected {list(shape)}")
            return None
        return name

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A whole checkpoint; it is read when it is made ready. Raises ModelLoadError, as loading does."""
        sources, _ = open_sources(checkpoint, self._index, self._rename or (lambda name: name))
        self._index.join(sources)
        self._index.check(sources, str(checkpoint.path))
        for name in self._index.slots:
            self._take(name, sources[name])

    def look(self) -> None:
        """Look at the numbers of a checkpoint that was added, where they are stored as floats. It is read for that: not
        between steps any more. Raises ModelLoadError: some are no weights."""
        wrong: list[str] = []
        for job in self._jobs.values():
            for name, source in job.sources.items():
                values = source.stored_values()
                if values is not None and (why := self._unsound(name, values)):
                    wrong.append(f"{source.name} {why}")
        if wrong:
            raise ModelLoadError(some(wrong))

    def _unsound(self, name: str, values: Tensor) -> str:
        """Why numbers cannot be a weight's, as they come or in the type that is served; "": they can. A model computes
        nothing but NaN from then on, for all who ask."""
        most, kind = LARGEST, self._index.ctx.dtype
        if kind == torch.float16 and any(weight.role == "matrix" for weight, _ in self._index.slots[name]):
            most = torch.finfo(kind).max
        return f"has numbers that are NaN, infinite or beyond {most:g}" if out_of_range(values, most) else ""

    def _ours(self, name: str) -> str | None:
        """Our name; None: it is left out knowingly."""
        found = name if name in self._index.slots or self._rename is None else self._rename(name)
        return None if found is None or (found not in self._index.slots and self._index.ignores(found)) else found

    def _take(self, name: str, source: Source) -> None:
        for weight, _ in self._index.slots[name]:
            job = self._jobs.setdefault(id(weight), _Job(weight))
            job.sources[name] = source
            job.ready = False
        self._ahead = 0
        self.names.add(name)

    def clear(self) -> None:
        """Forget what has come."""
        self._jobs, self.names, self._ahead = {}, set(), 0

    @property
    def whole(self) -> bool:
        """Whether every tensor of the model is in it."""
        return len(self.names) == len(self._index.slots)

    def prepare(self, until: float = inf) -> bool:
        """Make ready what is left, at least one weight, until perf_counter is `until`; True once all of it is.

        Raises:
            ModelLoadError: a file is damaged, or of a packed weight only shares are here.
        """
        jobs = list(self._jobs.values())
        while self._ahead < len(jobs):
            job = jobs[self._ahead]
            if not job.ready:
                self._ready(job)
            self._ahead += 1
            if perf_counter() >= until:
                break
        return self._ahead == len(jobs)

    def _ready(self, job: _Job) -> None:
        weight, index = job.weight, self._index
        if not isinstance(weight.value, torch.Tensor):
            sources = self._whole(weight, job.sources)
            job.write = index.rewriting(weight, sources)
            job.made = index.made(weight, sources) if job.write is None else None
        else:
            job.rows = []
            for number, name in enumerate(weight.names):
                source = job.sources.get(name)
                if source is not None:
                    view = index.view(weight, number, source)
                    values = view.dense(weight.value.dtype) if weight.role == "matrix" else index.vector(weight, view)
                    job.rows.append((weight.value[weight.rows(number)], values))
                elif name in weight.zeros:
                    rows = weight.value[weight.rows(number)]
                    job.rows.append((rows, torch.zeros_like(rows)))
        for source in job.sources.values():
            source.done()
        job.ready = True

    def _whole(self, weight: Weight, given: dict[str, Source]) -> dict[str, Source]:
        """All parts of a packed weight: those that it has, where no new ones came."""
        kept = {name: self._index.get(name, lost=True) for name in weight.names if name not in given}
        lacking = [name for name in kept if tuple(kept[name].shape) != self._index.stored_shape(name)]
        if lacking:
            raise ModelLoadError(f"{some(lacking)}: only shares are here; push them with {some(list(given))}")
        return {**given, **{name: TensorSource(name, tuple(v.shape), tensor=v) for name, v in kept.items()}}

    def install(self, *, same: bool = False) -> bool:
        """Put everything in place: for the thread that runs the steps, between two of them. True if a weight moved in
        memory, so that recorded steps are stale.

        `same`: these are the values that were there before; what was derived of them is right again.
        """
        ops, aside, moved = self._index.ctx.ops, self._index.ctx.aside, False
        changed = {id(job.weight) for job in self._jobs.values()}
        for job in self._jobs.values():
            assert job.ready, "prepare() comes first"
            for target, values in job.rows:
                target.copy_(values)
            if job.write is not None:
                job.write()
            if job.made is not None:
                moved |= not self._place(job.weight, job.made, same)
        self._jobs.clear()
        if ops.renew is not None:
            for weight in self._index.weights:
                ops.renew(weight.value)
        if aside is not None:
            aside.refresh(changed)
        return moved

    def stream(self) -> None:
        """Make ready and put in place one weight after another: the values that were there before, whose memory has
        been given back. For the thread that runs the steps."""
        jobs, self._jobs = self._jobs, {}
        for key, job in jobs.items():
            self._jobs = {key: job}
            self._ready(job)
            if self.install(same=True):
                raise ModelLoadError(f"{job.weight.names[0]} takes another form than before")

    def _place(self, weight: Weight, made: Any, same: bool) -> bool:
        """Whether it lies where the old one lay."""
        ops, old = self._index.table(weight), weight.value
        if same and ops.memory is not None:
            targets, values = ops.memory(old), ops.memory(made)
            if [target.numel() for target in targets] == [value.numel() for value in values]:
                for target, value in zip(targets, values, strict=True):
                    target.copy_(value)
                return True
        if ops.refill is not None and ops.refill(old, made):
            return True
        weight.value = made
        return False
