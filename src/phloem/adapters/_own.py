"""What of an adapter no row of another one can be computed beside: whole matrices and vectors in place of the base's,
rows of the vocabulary, additions to head, embedding and experts. `_fit` takes the rest.

Everything is checked before anything is made; what the base is read for, or what tables prepare, is done between steps.
Legend: V the base's vocabulary, W the adapter's (at least V), N hidden size, r rank, E experts.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from phloem.adapters._peft import check_finite, refuse, some, token_ids
from phloem.adapters._sites import bare, block_key
from phloem.adapters._worn import Own
from phloem.layers.worn import LowRank, TokenRows, WornEmbedding, WornExperts, WornHead

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.adapters._peft import AdapterFile, Module
    from phloem.adapters._sites import Sites
    from phloem.layers.moe import SparseMLP
    from phloem.layers.weight import Weight

    Base = Callable[[str], Tensor]  # as in `_fit`
    Between = Callable[[Callable[[], Any]], Any]  # runs work between two steps, and gives what it gives

_EXPERT = re.compile(r"^(?P<block>.+)\.experts\.(?P<number>\d+)\.(?P<part>[a-z0-9_]+)$")
_STACKED = re.compile(r"^(?P<block>.+)\.experts(?:\.base_layer)*$")
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


def split(file: AdapterFile, sites: Sites, base: Base, between: Between) -> tuple[AdapterFile, Own | None]:
    """(The adapter without it, what it has of its own; None: nothing).

    Raises:
        BadRequest: naming what has no place here, or is of another shape.
    """
    found = _Split(file, sites, base, between)
    for name, module in file.modules.items():
        found.take(name, module)
    if sites.tell is not None and found.names:
        why = (
            f"{some(found.names)}: what is no addition to a linear layer of a decoder block is served by one rank alone"
        )
        raise refuse(file.path, why)
    with torch.inference_mode():
        own = found.made()
    return replace(file, modules=found.rest), None if own.empty else own


class _Split:
    def __init__(self, file: AdapterFile, sites: Sites, base: Base, between: Between) -> None:
        self.file, self.sites, self.base, self.between = file, sites, base, between
        self.rest: dict[str, Module] = {}
        self.embedding: tuple[str, Module] | None = None
        self.head: tuple[str, Module] | None = None
        self._taken: dict[str, str] = {}  # what of the model -> how the file spells it
        self._stands: dict[int, tuple[Weight, dict[str, Tensor]]] = {}
        self._experts: dict[int, tuple[SparseMLP, WornExperts]] = {}

    def take(self, name: str, module: Module) -> None:
        kind = self.sites.vocabulary(name)
        before = self._taken.setdefault(kind or self.sites.resolve(name) or bare(name), name)
        if before != name:
            raise refuse(self.file.path, f"{before} and {name} say the same")
        if kind == "embedding":
            self.embedding = name, module
        elif kind == "head":
            self.head = name, module
        elif not self._of_experts(name, module):
            self._of_layers(name, module)

    @property
    def names(self) -> list[str]:
        """Of what was taken."""
        edges = [part[0] for part in (self.embedding, self.head) if part is not None]
        stands = [name for _, tensors in self._stands.values() for name in tensors]
        return edges + stands + [block.name for block, _ in self._experts.values()]

    # whole modules

    def _of_layers(self, name: str, module: Module) -> None:
        """Linear layers go on to `_fit` but for whole matrices."""
        if module.tokens is not None or module.embedding:
            raise refuse(self.file.path, f"{name} is no embedding of this model, and no head")
        own = self.sites.resolve(name)
        left = module
        if module.whole is not None and self._stands_for(name, "weight", module.whole, own):
            if module.magnitude is not None:
                raise refuse(self.file.path, f"{name} has a matrix of its own and a lora_magnitude_vector")
            left = replace(left, whole=None)
        if own is None and module.bias is not None and self._stands_for(name, "bias", module.bias, own):
            left = replace(left, bias=None)
        if not left.empty:
            self.rest[name] = left

    def _stands_for(self, name: str, what: str, tensor: Tensor, own: str | None) -> bool:
        """Whether there is such a weight."""
        stored = f"{own}.{what}" if own is not None else self.sites.slot(name, what)
        index = self.sites.model.index
        if stored is None or stored not in index.slots:
            return False
        for weight, _ in index.slots[stored]:
            if weight.experts or (weight.role == "matrix" and own is None):
                return False
        shape = index.stored_shape(stored)
        if tuple(tensor.shape) != shape:
            raise self._other(f"{name}.{what} is {list(tensor.shape)}, that of the model {list(shape)}")
        for weight, _ in index.slots[stored]:
            kept = tensor.to(self.sites.dtype) if weight.role == "matrix" else tensor.float()
            check_finite(self.file.path, name, kept)
            self._stands.setdefault(id(weight), (weight, {}))[1][stored] = kept
        return True

    # experts

    def _of_experts(self, name: str, module: Module) -> bool:
        one, all_of_them = _EXPERT.match(name), _STACKED.match(name)
        found = one or all_of_them
        block = None if found is None else self.sites.blocks.get(block_key(found["block"]))
        if found is None or block is None or module.down is None or module.up is None:
            return False
        if block.adaptable:
            raise refuse(self.file.path, f"{name}: {block.adaptable}")
        if module.magnitude is not None or module.up_bias is not None or module.bias is not None:
            raise refuse(self.file.path, f"{name}: experts take low-rank additions alone, no DoRA and no biases")
        worn = self._experts.setdefault(id(block), (block, WornExperts()))[1]
        if one is None:
            self._stacked(name, module.down, module.up.float() * module.scale, block, worn)
            return True
        which, expert = _PARTS.get(one["part"]), int(one["number"])
        if which is None or expert >= block.config.count or (which == 0 and not block.spec.gated):
            return False
        which -= not block.spec.gated
        self._check_rank(name, len(module.down))
        sizes, expected = (module.down.shape[1], module.up.shape[0]), self._sizes(block, which)
        if sizes != expected:
            raise self._other(f"{name} is of {sizes[0]} inputs and {sizes[1]} outputs, an expert's here {expected}")
        worn.add(expert, which, self._low(name, module.down, module.up.float() * module.scale))
        return True

    def _stacked(self, name: str, down: Tensor, up: Tensor, block: SparseMLP, worn: WornExperts) -> None:
        """`target_parameters`: the additions to a tensor that stacks all experts, as PEFT lays them out: down [E r, N]
        expert by expert, up [M, r E] with experts alternating."""
        count, gated = block.config.count, block.spec.gated
        before = (self._sizes(block, 0)[0], (1 + gated) * self._sizes(block, 0)[1])
        last = 1 + gated
        sizes = down.shape[1], up.shape[0]
        if down.shape[0] % count or sizes not in (before, self._sizes(block, last)):
            raise self._other(f"{name}: lora_A {list(down.shape)}, lora_B {list(up.shape)} for {count} experts")
        self._check_rank(name, down.shape[0] // count)
        downs, ups = down.unflatten(0, (count, -1)), up.unflatten(1, (-1, count)).permute(2, 0, 1)
        for expert in range(count):
            if sizes != before:
                worn.add(expert, last, self._low(name, downs[expert], ups[expert]))
                continue
            for which in range(last):
                names = block.config.names
                rows = slice(which, None, last) if names.alternating else slice(which * (len(up) // last), None)
                part = ups[expert][rows][: len(up) // last]
                worn.add(expert, which, self._low(name, downs[expert], part))

    def _sizes(self, block: SparseMLP, which: int) -> tuple[int, int]:
        """(inputs, outputs) of an expert's matrix."""
        rows, cols = (block.gate_up if which < 1 + block.spec.gated else block.down).shapes[0]
        return cols, rows

    def _low(self, name: str, down: Tensor, up: Tensor) -> LowRank:
        dtype, device = self.sites.dtype, self.sites.device
        found = LowRank(down.to(device, dtype).contiguous(), up.to(device, dtype).contiguous())
        check_finite(self.file.path, name, found.down, found.up)
        return found

    def _check_rank(self, name: str, rank: int) -> None:
        if rank > self.sites.rank:
            why = f"{name}: its rank is {rank}, at most {self.sites.rank} is served (max_lora_rank)"
            raise refuse(self.file.path, why)

    # the vocabulary

    def _check_vocabulary(self, name: str, module: Module, *, head: bool) -> int:
        """W."""
        base, hidden = self.sites.table
        if module.embedding and head:
            raise refuse(self.file.path, f"{name} has lora_embedding_A, and is a head")
        if not head and (module.down is not None or module.bias is not None or module.up_bias is not None):
            raise refuse(self.file.path, f"{name} has lora_A or a bias, and is an embedding")
        if not head and module.magnitude is not None:
            raise refuse(self.file.path, f"{name}: DoRA of an embedding is not served")
        rows = base
        if module.whole is not None:
            if module.whole.ndim != 2 or module.whole.shape[1] != hidden or module.whole.shape[0] < base:
                raise self._other(f"{name}.weight is {list(module.whole.shape)}, that of the model {[base, hidden]}")
            rows = module.whole.shape[0]
        if rows > base and not head and self.sites.looks_up_elsewhere:
            raise refuse(self.file.path, f"{name} has added tokens: this model looks tokens up in other tables too")
        low = (module.embedding["A"], module.embedding["B"]) if module.embedding else (module.down, module.up)
        if low[0] is not None and low[1] is not None:
            self._check_rank(name, len(low[0]))
            sizes = (low[0].shape[1], low[1].shape[0])
            if sizes != ((hidden, rows) if head else (rows, hidden)):
                raise self._other(f"{name} is of {sizes[0]} inputs and {sizes[1]} outputs, of {[rows, hidden]} here")
        for what in (module.up_bias, module.magnitude, module.bias):
            if what is not None and what.shape != (rows,):
                raise self._other(f"{name} gives {what.shape[0]} outputs, the layer here {rows}")
        return rows

    def _tokens(self, name: str, delta: Tensor, rows: int) -> TokenRows:
        """Rows that PEFT trained by themselves: they stand in place of the base's."""
        ids = token_ids(self.file, name, delta, rows)
        if delta.shape[1] != self.sites.table[1]:
            raise self._other(f"{name}: rows of {delta.shape[1]} values, here {self.sites.table[1]}")
        device = self.sites.device
        index = torch.tensor(ids, dtype=torch.int64, device=device)
        places = torch.full((rows,), -1, dtype=torch.int64, device=device)
        places[index] = torch.arange(len(ids), device=device)
        own = delta.to(device, self.sites.dtype).contiguous()
        check_finite(self.file.path, name, own)
        return TokenRows(index, own, places)

    def made(self) -> Own:
        """Prepares what was checked."""
        own = Own(experts=list(self._experts.values()))
        checked = [
            None if part is None else self._check_vocabulary(*part, head=head)
            for part, head in ((self.embedding, False), (self.head, True))
        ]
        longest = [rows or self.sites.table[0] for rows in checked]
        if longest[1] > longest[0]:
            why = f"its head gives {longest[1]} tokens, its embedding knows {longest[0]}: some would be unknown"
            raise refuse(self.file.path, why)
        if self.embedding is not None and checked[0] is not None:
            own.embedding = self._embedding(*self.embedding, checked[0])
        if self.head is not None and checked[1] is not None:
            own.head = self._head(*self.head, checked[1])
        elif own.embedding is not None and self.embedding is not None and self.sites.tied:
            own.head = self._tied(*self.embedding, own.embedding)
        model = self.sites.model
        for weight, tensors in self._stands.values():
            whole = {name: tensors[name] if name in tensors else self.base(name) for name in weight.names}
            own.slots.append((weight, self.between(partial(model.index.stand_in, weight, whole))))
        own.nbytes = self._size(own)
        return own

    def _embedding(self, name: str, module: Module, rows: int) -> WornEmbedding:
        found = WornEmbedding(rows)
        if module.whole is not None and not self._as_the_base(module, self.sites.names[0]):
            found.value = self._prepared(name, module.whole)
        if module.tokens is not None:
            found.tokens = self._tokens(name, module.tokens, rows)
        if module.embedding:
            found.added = self._low(name, module.embedding["A"], module.embedding["B"].float() * module.scale)
        return found

    def _head(self, name: str, module: Module, rows: int) -> WornHead:
        found, stored = WornHead(rows), self.sites.names[1]
        if module.whole is not None and not self._as_the_base(module, stored):
            found.value = self._prepared(name, module.whole)
        if module.tokens is not None:
            found.tokens = self._tokens(name, module.tokens, rows)
        if module.down is not None and module.up is not None:
            found.added = self._low(name, module.down, module.up.float() * module.scale)
        device, bias = self.sites.device, torch.zeros(rows)
        if self.sites.head_bias and (module.bias is not None or module.magnitude is not None):
            own = self.base(self.sites.head_bias).float().cpu()
            bias[: len(own)] = own
        factor = torch.ones(rows)
        if module.magnitude is not None and module.down is not None and module.up is not None:
            weight = (module.whole if module.whole is not None else self.base(stored).cpu()).float()
            weight = weight + module.scale * (module.up.float() @ module.down.float())
            factor = module.magnitude.float() / weight.norm(dim=1)
            found.factor = factor.to(device)
        shift = (bias if module.bias is None else module.bias.float()) - factor * bias
        if module.up_bias is not None:
            shift = shift + factor * module.scale * module.up_bias.float()
        check_finite(self.file.path, name, factor, shift)
        if bool(shift.any()):
            found.shift = shift.to(device)
        return found

    def _tied(self, name: str, module: Module, embedding: WornEmbedding) -> WornHead | None:
        """The head that reads the same matrix as the embedding, where the adapter says nothing of it. PEFT copies what
        `modules_to_save` names, and the head keeps the base's; what is saved because the vocabulary was resized, and
        tokens that are trained by themselves, are the head's too."""
        config = self.file.config
        always = bool(config.get("ensure_weight_tying"))
        saved = any(name == one or name.endswith(f".{one}") for one in config.get("modules_to_save") or ())
        found = WornHead(embedding.rows)
        if embedding.value is not None and (always or not saved):
            found.value = embedding.value
        if embedding.tokens is not None:
            found.tokens = embedding.tokens
        if embedding.added is not None and always:
            found.added = LowRank(embedding.added.up.T.contiguous(), embedding.added.down.T.contiguous())
        if found.value is None and found.tokens is None and found.added is None:
            return None
        return found if found.value is not None else replace(found, rows=self.sites.table[0])

    def _as_the_base(self, module: Module, stored: str) -> bool:
        """Beside additions PEFT saves the base's own matrix: it is not kept twice."""
        whole = module.whole
        if whole is None or (not module.embedding and module.down is None):
            return False
        if whole.shape[0] != self.sites.table[0]:
            return False
        base = self.base(stored).cpu()
        return torch.equal(base, whole.to(base.dtype))

    def _prepared(self, name: str, whole: Tensor) -> Any:
        kept = whole.to(self.sites.dtype)
        check_finite(self.file.path, name, kept)
        return self.between(lambda: self.sites.model.index.prepared(f"{name}.weight", kept))

    def _other(self, why: str) -> Exception:
        other = f" (it names {self.file.base!r} as its base)" if self.file.base else ""
        return refuse(self.file.path, f"it is of another base{other}: {why}")

    def _size(self, own: Own) -> int:
        values = [value for _, value in own.slots]
        edges = [one for one in (own.embedding, own.head) if one is not None]
        seen: dict[int, Any] = {id(one.value): one.value for one in edges if one.value is not None}
        seen |= {id(part): part for one in edges for part in (one.tokens, one.added) if part is not None}
        return sum(int(one.nbytes) for one in [*values, *seen.values(), *(worn for _, worn in own.experts)])
