"""Where adapters act: a site for each linear layer of a model, with the stacks of all adapters that are there.

Entry 0 of a stack is nobody's. The memory of an entry is only taken, on a host, as far as an adapter's rank needs it.
Legend: A entries, P parts of a fused layer, r rank of the stacks, N inputs, M outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from phloem.core.errors import ConfigError
from phloem.kernels.calls import Adapters
from phloem.layers.context import Adapted
from phloem.layers.linear import Linear
from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from phloem.kernels.ops import Ops
    from phloem.layers.weight import Part

# What checkpoints of one model put in front of its modules' names, and other tools leave out.
_AROUND = ("base_model", "model", "language_model", "text_model")


class Adaptable(Protocol):
    """A model whose layers take adapters (`models._common.Decoder`)."""

    adapted: Adapted | None

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


Packed = tuple[int, int, list[bytes]]  # a fit as plain data: parts, rank, bytes of its tensors (b"": none)


@dataclass(slots=True)
class Fit:
    """What one site keeps of an adapter, of the whole model's layer."""

    rank: int
    down: Tensor  # [P, r, N]
    up: Tensor  # [r, M]
    factor: Tensor | None = None  # [M] float32, both or neither
    shift: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.factor, self.shift) if t is not None)

    def packed(self) -> Packed:
        """For other ranks."""
        tensors = self.down, self.up, self.factor, self.shift
        data = [b"" if t is None else t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]
        return len(self.down), self.rank, data

    @staticmethod
    def of(packed: Packed, dtype: torch.dtype) -> Fit:
        """What was packed, in the type that the stacks have."""
        parts, rank, (down, up, *rest) = packed
        factor, shift = (_tensor(data, torch.float32) if data else None for data in rest)
        return Fit(rank, _tensor(down, dtype).view(parts, rank, -1), _tensor(up, dtype).view(rank, -1), factor, shift)


class Site:
    """What adapters add to one layer (`layers.linear.Additions`). `sizes`, `inputs` and `outputs` are the whole
    model's; the stacks have this rank's share of them."""

    def __init__(self, layer: Linear, adapted: Adapted, entries: int, rank: int, dtype: torch.dtype) -> None:
        weight = layer.weight
        self.sizes = [shape[0] for shape in weight.shapes]
        self.inputs, self.outputs = weight.shapes[0][1], sum(self.sizes)
        spans, starts = [weight.spans(part) for part in range(len(self.sizes))], np.cumsum([0, *self.sizes]).tolist()
        own = [last - first for (first, last), _ in spans]
        # Of a layer whose inputs ranks share out each has columns of A, and one of them what is added to outputs.
        self._columns = slice(*spans[0][1])
        self._rows = [slice(at + first, at + last) for at, ((first, last), _) in zip(starts, spans, strict=False)]
        self._adds = layer.comm is None or layer.comm.rank == 0
        inputs, outputs = spans[0][1][1] - spans[0][1][0], sum(own)
        self._adapted = adapted
        device = _device(weight.value)
        self.facts = _zeros((entries, 2), torch.int32, device)
        self.down = _zeros((entries, len(self.sizes), rank, inputs), dtype, device)
        self.up = _zeros((entries, rank, outputs), dtype, device)
        self.factor = _zeros((entries, outputs), torch.float32, device)
        self.shift = _zeros((entries, outputs), torch.float32, device)
        self.ends = torch.tensor(np.cumsum(own), dtype=torch.int64)
        self._high = [0] * entries  # rows of an entry that are not zero

    def now(self) -> Adapters | None:
        index = self._adapted.index
        if index is None:
            return None
        return Adapters(index, self.facts, self.down, self.up, self.factor, self.shift, self.ends)

    def put(self, entry: int, fit: Fit | None) -> None:
        """An adapter's part; None: it has none of this layer."""
        rank = 0 if fit is None else fit.rank
        self.facts[entry] = torch.tensor([rank, int(fit is not None and fit.factor is not None)], dtype=torch.int32)
        if rank < self._high[entry]:  # tables that read whole stacks must not see what was there before
            self.down[entry, :, rank : self._high[entry]] = 0
            self.up[entry, rank : self._high[entry]] = 0
        self._high[entry] = rank
        if fit is None:
            return
        self.down[entry, :, :rank] = fit.down[:, :, self._columns]
        self.up[entry, :rank] = self._own(fit.up)
        if fit.factor is not None and fit.shift is not None:
            shift = self._own(fit.shift)
            self.factor[entry], self.shift[entry] = self._own(fit.factor), shift if self._adds else 0 * shift

    def _own(self, outputs: Tensor) -> Tensor:
        """Of the whole layer's outputs, along the last axis, those of this rank."""
        return torch.cat([outputs[..., rows] for rows in self._rows], -1)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.factor, self.shift))


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
        layers = list(_linears(model)) if isinstance(model, Layer) else []
        if not layers or not isinstance(model, Layer) or "adapted" not in dir(model):
            raise ConfigError("enable_lora: the layers of this model take no adapters", param="enable_lora")
        self.model: Adaptable = model  # pyright: ignore[reportAttributeAccessIssue] - as was just asked
        self.entries, self.rank = entries, rank
        # Of rank 0, what tells the others of an adapter, before it is put into its own stacks.
        self.tell: Callable[[int, Mapping[int, Fit]], None] | None = None
        self.dtype = ops.adapter_dtype or dtype
        adapted = Adapted()
        self.sites = [Site(layer, adapted, entries + 1, rank, self.dtype) for layer in layers]
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
        self._bare = {bare(name): name for name in self.places}
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

    def put(self, entry: int, fits: Mapping[int, Fit]) -> None:
        """An adapter into the stacks, of all ranks, between two steps."""
        if self.tell is not None:
            self.tell(entry, fits)
        with torch.inference_mode():
            for number, site in enumerate(self.sites):
                site.put(entry, fits.get(number))

    @property
    def nbytes(self) -> int:
        """Memory of all stacks; of a host's, most is never taken."""
        return sum(site.nbytes for site in self.sites)


def _linears(layer: Layer) -> Iterator[Linear]:
    """Every linear layer below, each once."""
    seen: set[int] = set()
    waiting: list[Any] = list(vars(layer).values())
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Linear) and value.weight.plain:
            continue  # of a tower, which computes other tokens than those that adapters are told of
        if isinstance(value, Linear):
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


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)


def _device(value: Any) -> torch.device:
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory a host takes when they are written, page by page."""
    if device != torch.device("cpu"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
