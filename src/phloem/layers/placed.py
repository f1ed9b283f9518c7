"""Routed experts that two machines share: those on the device by its op table, the others by the host's, at once.

The host has all experts of all sparse layers, in the form that its table reads; the device has copies of those that
`distributed/experts.py` places there, and computes everything else of the model. A step's hidden states go to the host
behind the router; a thread computes there while the device computes its own experts and the shared ones.

Deferral (Chen et al., "KTransformers", SOSP 2025): of each token's k experts the d with the least weight are not added
to their own layer's output but to that of the next sparse layer, so that the host may compute them while the device
attends. The last sparse layer defers nothing. It is a property of the model, not of a step: which experts are deferred
depends on a token's weights alone, so that answers depend neither on places nor on batches, chunks or prefix hits.

Legend: T tokens, N features, F inner size, E experts, k choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.layers.aside import Late

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch import Tensor

    from phloem.kernels.ops import Ops
    from phloem.kernels.specs import ExpertSpec
    from phloem.layers.aside import Aside
    from phloem.layers.weight import Weight


class _Matrix:
    """A `WeightSource` over a tensor."""

    kind = "dense"

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self._tensor = name, tensor
        self.shape: tuple[int, ...] = tuple(tensor.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._tensor.to(dtype)

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        raise TypeError(f"{self.name} is dense: it has no quantised bytes")


@dataclass(slots=True)
class Begun:
    """A sparse layer whose experts are being computed."""

    near: Tensor | None  # [T, N] of the device's experts; None: it has none
    far: Future[Tensor] | None  # of the host's; None: the device has them all
    late: Late | None = None  # what it defers
    before: Late | None = None  # what the layer before it deferred
    dtype: torch.dtype = torch.float32  # of hidden states


@dataclass(slots=True)
class _Copies:
    """Experts on the device: in slot s the expert `residents[s]`."""

    gate_up: Any
    down: Any
    biases: tuple[Tensor, Tensor] | None
    nbytes: int


class PlacedExperts:
    """The routed experts of one sparse layer, on two machines.

    Args:
        gate_up, down: the host's slots (`Weight.aside`), of all experts.
        biases: of both, or None.
        inner: F.
    """

    def __init__(
        self,
        aside: Aside,
        device: tuple[Ops, torch.dtype, torch.device],
        spec: ExpertSpec,
        weights: tuple[Weight, Weight],
        biases: tuple[Weight, Weight] | None,
        k: int,
    ) -> None:
        self.aside, self.spec, self.k = aside, spec, k
        self.ops, self.dtype, self.device = device
        self.gate_up, self.down, self.biases = *weights, biases
        self.plain = fits_plain(spec, biased=biases is not None)
        self.residents: list[int] = []
        self._copies: _Copies | None = None
        self._slots = torch.full((spec.experts,), -1, dtype=torch.int32)  # on the host; of each expert its slot, or -1
        self._ahead: Future[_Copies] | None = None  # all experts, on their way to the device
        self.number = aside.enter(self, spec.experts)

    # ---- places ----

    def put(self, experts: list[int]) -> None:
        """Copy these to the device in place of those that were there."""
        self._ahead = None
        self.residents = list(experts)
        self._copies = self._copied(experts) if experts and not self.aside.same else None
        self._number()

    def exchange(self, comes: int, goes: int) -> None:
        """One expert for another, in its slot."""
        slot = self.residents.index(goes)
        self.residents[slot] = comes
        old, new = self._copies, self._copied([comes])
        tensors = old is not None and isinstance(old.gate_up, torch.Tensor) and isinstance(old.down, torch.Tensor)
        if old is None or not tensors:
            self.put(self.residents)
            return
        pairs = [(old.gate_up, new.gate_up), (old.down, new.down)]
        pairs += list(zip(old.biases, new.biases, strict=True)) if old.biases and new.biases else []
        for target, values in pairs:
            rows = len(target) // len(self.residents)
            target[slot * rows : (slot + 1) * rows].copy_(values)
        self._number()

    def _number(self) -> None:
        self._slots = torch.full((self.spec.experts,), -1, dtype=torch.int32)
        if not self.aside.same:
            self._slots[self.residents] = torch.arange(len(self.residents), dtype=torch.int32)

    def _copied(self, experts: list[int]) -> _Copies:
        """These experts as the device's table wants them."""
        up, down = self._stacked(self.gate_up, experts), self._stacked(self.down, experts)
        biases = None
        if self.biases is not None:
            own = [weight.value.view(self.spec.experts, -1)[experts].reshape(-1) for weight in self.biases]
            biases = own[0].to(self.device), own[1].to(self.device)
        return _Copies(up, down, biases, int(up.nbytes) + int(down.nbytes))

    def _stacked(self, weight: Weight, experts: list[int]) -> Any:
        parts = [_Matrix(weight.names[0], part) for part in self._rows(weight, experts).chunk(len(experts))]
        return self.ops.stack_experts(parts, self.dtype, self.device, len(experts))

    def _rows(self, weight: Weight, experts: list[int]) -> Tensor:
        """The matrices of these experts, one below the other, in the device's type."""
        total = sum(weight.local(number)[0] for number in range(len(weight.names)))
        each = total // self.spec.experts
        ids = (torch.tensor(experts)[:, None] * each + torch.arange(each)).view(-1)
        if isinstance(weight.value, torch.Tensor):
            return weight.value[ids].to(self.dtype)
        # Whatever a packed weight is, its table's `embedding` reads its rows.
        return self.aside.ops.embedding(ids, weight.value, 1.0).to(self.dtype)

    @property
    def device_bytes(self) -> int:
        return 0 if self._copies is None else self._copies.nbytes

    @property
    def host_bytes(self) -> int:
        return sum(int(weight.value.nbytes) for weight in (self.gate_up, self.down))

    def refresh(self, changed: set[int]) -> None:
        """Copy anew if one of these weights (their `id`s), which have changed, is its own."""
        if any(id(weight) in changed for weight in (self.gate_up, self.down, *(self.biases or ()))):
            self.put(self.residents)

    # ---- a step ----

    def begin(self, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Begun:
        """Start the experts that a token has, [T, k], on both machines."""
        aside = self.aside
        if self.number == 0:
            aside.pending = None
            aside.steps += 1
        before = aside.pending
        ids, weights, host_x = aside.to_host(ids_Tk, weights_Tk, x_TN)
        # Widened here: what crosses is as narrow as the model's type.
        weights, host_x = weights.float(), host_x.float()
        if not aside.same:
            aside.counts[self.number] += np.bincount(ids.reshape(-1).numpy(), minlength=self.spec.experts)
        count = aside.defers(self.number, self.k)
        late = _least(weights, count) if count else None
        streamed = None
        if aside.streams_from is not None and not aside.same and len(ids) >= aside.streams_from:
            streamed = self._streamed()
        own = ids if late is None else ids.masked_fill(late, -1)
        begun = self._on_both(x_TN, host_x, own, weights, streamed)
        begun.before, begun.dtype = before, x_TN.dtype
        if late is not None:
            deferred = self._on_both(x_TN, host_x, ids.masked_fill(~late, -1), weights, streamed)
            begun.late = Late(deferred.near, deferred.far)
        return begun

    def end(self, begun: Begun) -> Tensor:
        """The sum of a token's own experts, and of what the sparse layer before this one deferred, [T, N]."""
        found = begun.near
        if begun.far is not None:
            found = self._added(found, self.aside.wait(begun.far), begun.dtype)
        assert found is not None
        late = begun.before
        if late is not None:
            far = None if late.far is None else self.aside.wait(late.far)
            for part in (late.near, far):
                if part is not None:
                    rows = part if late.rows is None else part[late.rows.to(part.device)]
                    found = self._added(found, rows, begun.dtype)
        # The last layer may run twice, for other rows: what it adds stands until the next step begins.
        if self.number < len(self.aside.layers) - 1:
            self.aside.pending = begun.late
        return found

    def _added(self, near: Tensor | None, far: Tensor, dtype: torch.dtype) -> Tensor:
        far = self.aside.to_device(far, self.device).to(dtype)
        return far if near is None else self.ops.add(near, far)

    def _on_both(
        self, x_TN: Tensor, host_x: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, streamed: _Copies | None
    ) -> Begun:
        """The experts `ids_Tk` (on the host; -1: none), those on the device and those on the host."""
        if streamed is not None:
            return Begun(self._near(x_TN, ids_Tk, weights_Tk, streamed, self.spec.experts), None)
        slots = self._slots
        theirs = ids_Tk.masked_fill((slots[ids_Tk] >= 0) & (ids_Tk >= 0), -1) if self._copies is not None else ids_Tk
        far = self.aside.submit(lambda: self._far(host_x, theirs, weights_Tk))
        near = None
        if self._copies is not None:
            found = slots[ids_Tk].masked_fill(ids_Tk < 0, -1)
            near = self._near(x_TN, found, weights_Tk, self._copies, len(self.residents))
        return Begun(near, far)

    def _near(self, x_TN: Tensor, slots_Tk: Tensor, weights_Tk: Tensor, copies: _Copies, count: int) -> Tensor:
        spec = replace(self.spec, experts=count, first=0)
        slots, weights = self.aside.to_device(slots_Tk, self.device), self.aside.to_device(weights_Tk, self.device)
        return self.ops.experts(x_TN, slots, weights, copies.gate_up, copies.down, spec, copies.biases)

    def _far(self, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        ops, weights = self.aside.ops, (self.gate_up.value, self.down.value)
        if self.plain:
            return ops.chosen_experts(x_TN, ids_Tk, weights_Tk, *weights)
        biases = None if self.biases is None else (self.biases[0].value, self.biases[1].value)
        return ops.experts(x_TN, ids_Tk, weights_Tk, *weights, self.spec, biases)

    # ---- long steps ----

    def _streamed(self) -> _Copies:
        """All experts on the device, for this step alone; the next layer's are on their way meanwhile."""
        found = self._sent().result()
        self._ahead = None
        # The last layer has but the rows whose next token is wanted.
        if self.number + 1 < len(self.aside.layers) - 1:
            self.aside.layers[self.number + 1].prefetch()
        return found

    def prefetch(self) -> None:
        """Send all experts to the device, for the step that is under way."""
        self._sent()

    def _sent(self) -> Future[_Copies]:
        if self._ahead is None:
            self._ahead = self.aside.send(lambda: self._copied(list(range(self.spec.experts))))
        return self._ahead


def fits_plain(spec: ExpertSpec, *, biased: bool) -> bool:
    """Whether `Ops.chosen_experts` computes such experts."""
    return spec.plain and not biased


def _least(weights_Tk: Tensor, count: int) -> Tensor:
    """Of each token's experts the `count` of least weight, the last of equals first: bool [T, k]."""
    order = weights_Tk.argsort(dim=-1, descending=True, stable=True)
    late = torch.zeros(weights_Tk.shape, dtype=torch.bool)
    return late.scatter_(1, order[:, -count:], True)
