"""transformers' matrices in the op table's keeping: packed or quantised, and computed as those of our own layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from phloem.layers.weight import Weight
from phloem.models._index import WeightIndex
from phloem.models._sources import Read, TensorSource

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext


class PackedLinear(nn.Module):
    """In the place of a `nn.Linear`: [..., N] -> [..., M]."""

    def __init__(self, weight: Weight, bias: nn.Parameter | None, packed: Packed) -> None:
        super().__init__()
        self.slot, self.packed, self.looked_at = weight, packed, False
        self.out_features, self.in_features = weight.shapes[0]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_zeros((*x.shape[:-1], self.out_features))
        rows = x.reshape(-1, self.in_features).to(self.packed.dtype).contiguous()
        out, _ = self.packed.ops.linear(rows, self.slot.value, self.bias)
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """For code that looks at the matrix itself; such a layer is put back."""
        self.looked_at = True
        return self.dense()

    def dense(self) -> Tensor:
        return self.packed.index.get(self.slot.names[0]).to(self.packed.dtype)


class PackedEmbedding(nn.Module):
    """In the place of a `nn.Embedding`: ids -> rows."""

    def __init__(self, weight: Weight, packed: Packed) -> None:
        super().__init__()
        self.slot, self.packed, self.looked_at = weight, packed, False

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed.ops.embedding(ids.reshape(-1), self.slot.value, 1.0).view(*ids.shape, -1)

    @property
    def weight(self) -> Tensor:
        self.looked_at = True
        return self.dense()

    def dense(self) -> Tensor:
        return self.packed.index.get(self.slot.names[0]).to(self.packed.dtype)


class Packed:
    """A model's plain matrices, one after another taken from its modules; the rest goes to the activations' type."""

    def __init__(self, theirs: nn.Module, ctx: BuildContext) -> None:
        self.ops, self._theirs = ctx.ops, theirs
        self.index = WeightIndex([], ctx, "")
        self.dtype = _activations(ctx)
        slots: dict[int, Weight] = {}  # by the tensor: tied ones are kept once
        names = {id(parameter): name for name, parameter in theirs.named_parameters()}
        found: Any = theirs
        first = found.get_input_embeddings()
        for path, module in list(theirs.named_modules()):
            if type(module) is nn.Linear:
                slot = self._slot(slots, names, module.weight)
                theirs.set_submodule(path, PackedLinear(slot, module.bias, self))
            elif module is first and type(module) is nn.Embedding:
                theirs.set_submodule(path, PackedEmbedding(self._slot(slots, names, module.weight), self))
        if self.dtype != ctx.dtype:
            theirs.to(self.dtype)

    def _slot(self, slots: dict[int, Weight], names: dict[int, str], tensor: Tensor) -> Weight:
        """A tensor's slot; tied ones have one."""
        if id(tensor) not in slots:
            name = names[id(tensor)]
            slot = slots[id(tensor)] = Weight((name,), (tuple(tensor.shape),), "matrix")
            source = TensorSource(name, tuple(tensor.shape), tensor=tensor.detach())
            WeightIndex([slot], self.index.ctx, name).pull({name: source}, name, None)  # one at a time: memory
            self.index.weights.append(slot)
            self.index.slots[name] = [(slot, 0)]
        return slots[id(tensor)]

    def put_back(self) -> int:
        """Give code that looks at a matrix itself a plain one; of how many."""
        count = 0
        for path, module in list(self._theirs.named_modules()):
            if isinstance(module, PackedLinear | PackedEmbedding) and module.looked_at:
                self._theirs.set_submodule(path, _plain(module))
                count += 1
        used = {id(m.slot) for m in self._theirs.modules() if isinstance(m, PackedLinear | PackedEmbedding)}
        self.index.weights = [slot for slot in self.index.weights if id(slot) in used]
        self.index.slots = {name: places for name, places in self.index.slots.items() if id(places[0][0]) in used}
        return count


def _plain(module: PackedLinear | PackedEmbedding) -> nn.Module:
    dense = nn.Parameter(module.dense(), requires_grad=False)
    if isinstance(module, PackedEmbedding):
        return nn.Embedding.from_pretrained(dense)
    new = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    new.weight = dense
    if module.bias is not None:
        new.bias = module.bias
    return new


def _activations(ctx: BuildContext) -> torch.dtype:
    """The type that the table's layers compute in."""
    source = Read("probe", (32, 32), torch.zeros(32, 32, dtype=ctx.dtype))
    made: Any = ctx.ops.prepare_linear
    value = made([source], ctx.dtype, ctx.device)
    return ctx.ops.embedding(torch.zeros(1, dtype=torch.int64, device=ctx.device), value, 1.0).dtype
