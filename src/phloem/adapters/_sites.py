"""Where adapters act: a site for each linear layer of a model, with the stacks of all adapters that are there.

Entry 0 of a stack is nobody's. The memory of an entry is only taken, on a host, as far as an adapter's rank needs it.
Legend: A entries, P parts of a fused layer, r rank of the stacks, N inputs, M outputs.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from phloem.adapters._shares import Share, packed
from phloem.core.errors import ConfigError
from phloem.kernels.calls import Adapters
from phloem.layers.context import Adapted
from phloem.layers.embed import Embedding
from phloem.layers.grouped import Gathered
from phloem.layers.linear import Linear
from phloem.layers.moe import SparseMLP
from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.adapters._fits import Fit
    from phloem.adapters._worn import Own
    from phloem.kernels.ops import Ops
    from phloem.layers.embed import Head
    from phloem.layers.rows import Rows
    from phloem.layers.weight import Part, Weight

L = TypeVar("L", bound=Layer)
HOST = torch.device("cpu")
# What checkpoints of one model put in front of its modules' names, and other tools leave out.
_AROUND = ("base_model", "model", "language_model", "text_model")


class Index(Protocol):
    """As `models._index.WeightIndex`."""

    slots: dict[str, list[tuple[Weight, int]]]

    def stored_shape(self, name: str) -> tuple[int, ...]: ...
    def stand_in(self, weight: Weight, tensors: Mapping[str, Tensor]) -> Any: ...
    def prepared(self, name: str, matrix: Tensor) -> Any: ...


class Adaptable(Protocol):
    """A model whose layers take adapters (`models._common.Decoder`)."""

    adapted: Adapted | None
    embed: Embedding
    head: Head

    @property
    def index(self) -> Index: ...

    def checkpoint_name(self, name: str, /) -> str | None: ...
    def get_weight(self, name: str, rows: int | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a site that a module's outputs go to."""

    site: int
    part: int
    start: int  # its first column
    size: int
    rows: Part | None  # which of the module's outputs they are; None: all, in order


class Site:
    """What adapters add to one layer (`layers.linear.Additions`).

    Args:
        index: of the layer's rows that are computed now the entry of each, 0: none; None: no row has one.
        entries: of the stacks; 0: another rank has the layer.
    """

    def __init__(
        self, layer: Linear, index: Callable[[], Tensor | None], entries: int, rank: int, dtype: torch.dtype
    ) -> None:
        weight = layer.weight
        self.sizes = [shape[0] for shape in weight.shapes]
        self.inputs, self.outputs = weight.shapes[0][1], sum(self.sizes)
        self._index, self._share = index, Share.of(layer)
        device, (_, inputs) = _device(weight.value), weight.local(0)
        sizes = [weight.local(part)[0] for part in range(len(self.sizes))]  # on this rank
        outputs = sum(sizes)
        self.facts = zeros((entries, 2), torch.int32, device)
        self.down = zeros((entries, len(sizes), rank, inputs), dtype, device)
        self.up = zeros((entries, rank, outputs), dtype, device)
        self.factor = zeros((entries, outputs), torch.float32, device)
        self.shift = zeros((entries, outputs), torch.float32, device)
        self.ends = torch.tensor(np.cumsum(sizes), dtype=torch.int64)
        self._high = [0] * entries  # rows of an entry that are not zero

    def now(self) -> Adapters | None:
        index = self._index()
        if index is None:
            return None
        return Adapters(index, self.facts, self.down, self.up, self.factor, self.shift, self.ends)

    def fill(self, entry: int, fit: Fit | None) -> None:
        """An adapter's numbers; None: it has none of this layer. No step under way may compute with the entry."""
        if not self._high:
            return
        rank = 0 if fit is None else fit.rank
        if rank < self._high[entry]:  # tables that read whole stacks must not see what was there before
            self.down[entry, :, rank : self._high[entry]] = 0
            self.up[entry, rank : self._high[entry]] = 0
        self._high[entry] = rank
        if fit is None:
            return
        fit = fit if self._share is None else self._share.cut(fit)
        self.down[entry, :, :rank] = fit.down
        self.up[entry, :rank] = fit.up
        if fit.factor is not None and fit.shift is not None:
            self.factor[entry], self.shift[entry] = fit.factor, fit.shift

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.factor, self.shift))


def check_adaptable(model: Any) -> None:
    """Raises ConfigError: the model's layers take no adapters."""
    if not isinstance(model, Layer) or "adapted" not in dir(model) or next(iter(_linears(model)), None) is None:
        raise ConfigError("enable_lora: the layers of this model take no adapters", param="enable_lora")


class Sites:
    """All of a model's, and which modules go where.

    Args:
        model: its linear layers look here from now on.
        entries: adapters that there may be at a time.
        rank: the largest of an adapter.

    Raises:
        ConfigError: the model's layers take no adapters.
    """

    def __init__(self, model: Any, ops: Ops, dtype: torch.dtype, entries: int, rank: int) -> None:
        check_adaptable(model)
        layers = list(_linears(model))
        self.model: Adaptable = model  # pyright: ignore[reportAttributeAccessIssue] - as was just asked
        self.entries, self.rank = entries, rank
        self.dtype = ops.adapter_dtype or dtype
        adapted = Adapted()
        all_rows = _gathered(model)  # of blocks that are given the rows of all groups of ranks
        here = {id(weight) for weight in model.weights()}  # and not on another stage of a pipeline
        self.sites = [
            Site(
                layer,
                all_rows.get(id(layer), lambda: adapted.index),
                entries + 1 if id(layer.weight) in here else 0,
                rank,
                self.dtype,
            )
            for layer in layers
        ]
        self.places: dict[str, list[Place]] = {}
        for number, (layer, site) in enumerate(zip(layers, self.sites, strict=True)):
            layer.additions = site
            if ops.apart is not None:
                layer.ops = replace(layer.ops, linear=ops.apart)
            start = 0
            for part, (name, size) in enumerate(zip(layer.weight.names, site.sizes, strict=True)):
                module = name.removesuffix(".weight")
                self.places.setdefault(module, []).append(Place(number, part, start, size, layer.weight.part(part)))
                start += size
        self._here = [number for number, site in enumerate(self.sites) if len(site.facts)]
        self._facts = _together([self.sites[number] for number in self._here])
        self._used: set[int] = set()  # entries that were filled once
        self._bare = {bare(name): name for name in self.places}
        self.own: dict[int, Own] = {}  # by entry: what is computed in passes of their own
        self.tell: Callable[[int, bytes], None] | None = None  # the other ranks, of what is put; None: there are none
        self._stored = {bare(name): name for name in self.model.index.slots}
        found = list(_layers(model, SparseMLP))
        self.blocks = {block_key(block.name): block for block in found}
        model.adapted = adapted  # pyright: ignore[reportAttributeAccessIssue]

    def resolve(self, module: str) -> str | None:
        """Our name of a module in a PEFT file; None: no layer of that name takes adapters."""
        if module in self.places:
            return module
        renamed = self.model.checkpoint_name(f"{module}.weight")
        for name in (renamed.removesuffix(".weight") if renamed else module, module):
            if name in self.places:
                return name
            if bare(name) in self._bare:
                return self._bare[bare(name)]
        return None

    def vocabulary(self, module: str) -> str:
        """Whether a module in a PEFT file is our "embedding" or "head"; "": neither."""
        renamed = self.model.checkpoint_name(f"{module}.weight")
        names = {bare(name) for name in (renamed, f"{module}.weight") if name}
        embedding, head = (bare(name) for name in self.names)
        if embedding in names:
            return "embedding"
        return "head" if head in names or "lm_head.weight" in names else ""

    def slot(self, module: str, what: str) -> str | None:
        """Our name of a tensor, "weight" or "bias", of a module in a PEFT file; None: there is none."""
        renamed = self.model.checkpoint_name(f"{module}.{what}")
        names = (name for name in (renamed, f"{module}.{what}") if name)
        return next((self._stored[bare(name)] for name in names if bare(name) in self._stored), None)

    @property
    def names(self) -> tuple[str, str]:
        """Of the matrices of embedding and head, which may be one."""
        return self.model.embed.weight.names[0], self.model.head.weight.names[0]

    @property
    def tied(self) -> bool:
        return self.model.head.weight is self.model.embed.weight

    @property
    def head_bias(self) -> str:
        """The name of the head's bias; "": it has none."""
        bias = self.model.head.bias
        return "" if bias is None else bias.names[0]

    @property
    def table(self) -> tuple[int, int]:
        """(Rows of the vocabulary, hidden size)."""
        rows, hidden = self.model.embed.weight.shapes[0]
        return rows, hidden

    @property
    def sizes(self) -> tuple[int, int]:
        """(Adapters that there may be at a time, their largest rank)."""
        return self.entries, self.rank

    @property
    def device(self) -> torch.device:
        return self.sites[0].facts.device

    @property
    def looks_up_elsewhere(self) -> bool:
        """Whether tokens are looked up in tables beside the embedding's, which no adapter makes longer."""
        model: Any = self.model
        return sum(1 for _ in _layers(model, Embedding)) > 1

    def put(self, entry: int, fits: Mapping[int, Fit], own: Own | None = None) -> None:
        """An adapter into the stacks, between two steps; of all ranks, each of which keeps its share."""
        if self.tell is not None:
            self.tell(entry, packed(fits))
        self.fill(entry, fits)
        self.show(entry, fits, own)

    @property
    def beside(self) -> bool:
        """Whether entries may be filled beside running steps: stacks are the host's, and of this rank alone."""
        return self._facts is not None and self.tell is None

    def used(self, entry: int) -> bool:
        """Whether steps under way may compute with it: an adapter was there before."""
        return entry in self._used

    def fill(self, entry: int, fits: Mapping[int, Fit]) -> None:
        """An adapter's numbers, where no step under way looks (`beside`). `show` comes behind it."""
        with torch.inference_mode():
            for number, site in enumerate(self.sites):
                site.fill(entry, fits.get(number))
        self._used.add(entry)

    def show(self, entry: int, fits: Mapping[int, Fit], own: Own | None = None) -> None:
        """Rows may compute with what was filled: between two steps."""
        found = [fits.get(number) for number in self._here]
        facts = torch.tensor([[0, 0] if one is None else [one.rank, int(one.factor is not None)] for one in found])
        with torch.inference_mode():
            if self._facts is not None:
                self._facts[:, entry] = facts
            else:
                for number, row in zip(self._here, facts, strict=True):
                    self.sites[number].facts[entry] = row
        self.own.pop(entry, None)
        if own is not None:
            self.own[entry] = own

    def clear(self, entry: int) -> None:
        """Forget what an adapter has of its own, between two steps: nobody computes with it any more."""
        self.own.pop(entry, None)

    def tokens(self, entry: int) -> int:
        """How many tokens an adapter's embedding and head know, the larger."""
        rows, own = self.table[0], self.own.get(entry)
        if own is None:
            return rows
        return max([rows, *(one.rows for one in (own.embedding, own.head) if one is not None)])

    def owners(self, entries: NDArray[np.int32] | None) -> list[int]:
        """Those of the entries, each once, whose rows are computed in passes of their own."""
        if entries is None or not self.own:
            return []
        return [entry for entry in sorted(set(entries.tolist())) if entry in self.own]

    @contextmanager
    def wearing(self, entry: int) -> Generator[None]:
        """While the rows of this adapter are computed, and no others: its own weights are in their places. For the
        thread that runs the steps."""
        own, model = self.own[entry], self.model
        before = [slot.value for slot, _ in own.slots]
        try:
            for slot, value in own.slots:
                slot.value = value
            model.embed.worn, model.head.worn = own.embedding, own.head
            for block, worn in own.experts:
                block.worn = worn
            yield
        finally:
            for (slot, _), value in zip(own.slots, before, strict=True):
                slot.value = value
            model.embed.worn = model.head.worn = None
            for block, _ in own.experts:
                block.worn = None

    @property
    def nbytes(self) -> int:
        """Memory of all stacks; of a host's, most is never taken."""
        return sum(site.nbytes for site in self.sites)


def _linears(layer: Layer) -> Iterator[Linear]:
    """Every linear layer below, each once; not those of a tower, which computes other tokens than those that adapters
    are told of."""
    return (one for one in _layers(layer, Linear) if not one.weight.plain)


def _gathered(model: Layer) -> dict[int, Callable[[], Tensor | None]]:
    """Linear layers, by id, that compute the rows of all groups of ranks, and where their adapters are said."""
    found: dict[int, Callable[[], Tensor | None]] = {}
    for block in _layers(model, Gathered):
        rows = block.rows
        found |= {id(layer): partial(_of_rows, rows) for layer in _layers(block, Linear)}
    return found


def _of_rows(rows: Rows) -> Tensor | None:
    return rows.adapters


def _layers(layer: Layer, kind: type[L]) -> Iterator[L]:
    """Every layer of a kind below, each once; nothing below those."""
    seen: set[int] = set()
    waiting: list[Any] = list(vars(layer).values())
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, kind):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        elif isinstance(value, Layer):
            waiting[:0] = vars(value).values()
        elif isinstance(value, list | tuple):
            waiting[:0] = value
        elif isinstance(value, dict):
            waiting[:0] = value.values()


def bare(name: str) -> str:
    parts = name.split(".")
    while parts and parts[0] in _AROUND:
        parts.pop(0)
    return ".".join(parts)


def block_key(block: str) -> str:
    """Of a sparse block, whichever of its ages named it."""
    return bare(block).replace("block_sparse_moe", "mlp")


@runtime_checkable
class _Lies(Protocol):
    """A weight that says on which device it lies: one in another layout may not."""

    device: Any


def _device(value: Any) -> torch.device:
    return value.device if isinstance(value, _Lies) and isinstance(value.device, torch.device) else HOST


def _together(sites: list[Site]) -> Tensor | None:
    """The facts of all sites [S, A, 2] as one tensor of which each has its part; None: they are not all the host's."""
    if not sites or any(site.facts.device != HOST for site in sites):
        return None
    whole = torch.stack([site.facts for site in sites])
    for site, facts in zip(sites, whole, strict=True):
        site.facts = facts
    return whole


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = HOST) -> Tensor:
    """Zeros whose memory a host takes when they are written, page by page."""
    if device != HOST or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
