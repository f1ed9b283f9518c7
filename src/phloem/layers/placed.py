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

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.distributed.experts import Move, Table
    from phloem.kernels.ops import Ops
    from phloem.kernels.specs import ExpertSpec
    from phloem.layers.weight import Weight

HOST = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Matrix:
    """A `WeightSource` over a tensor."""

    name: str
    tensor: Tensor
    kind: str = "dense"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def raw(self) -> Any:
        raise TypeError(f"{self.name} is dense: it has no quantised bytes")


class Aside:
    """The host's half: its op table, its thread, and the layers whose experts it has.

    Args:
        ops: the host's table.
        same: it is the device's table too, so that there is nothing to overlap and nothing to copy.
        deferred: d of every sparse layer but the last.
        streams_from: a step of so many tokens has all experts copied to the device, layer by layer; None: none has.
    """

    def __init__(self, ops: Ops, *, same: bool = False, deferred: int = 0, streams_from: int | None = None) -> None:
        self.ops, self.same, self.deferred, self.streams_from = ops, same, deferred, streams_from
        self.layers: list[PlacedExperts] = []
        self.pending: Late | None = None  # what the sparse layer before this one deferred
        self.counts: NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)  # [layers, E] tokens that chose the expert
        self.busy = self.waited = 0.0  # seconds that the host computed, and that the device's thread waited for it
        self.moved = self.steps = 0
        self._thread = None if same else ThreadPoolExecutor(1, "phloem-experts")

    def enter(self, layer: PlacedExperts) -> int:
        """The number of a layer, in the order of the model."""
        if self.layers and layer.spec.experts != self.layers[0].spec.experts:
            raise ModelLoadError("experts on the host: layers with different numbers of experts are not placed")
        self.layers.append(layer)
        self.counts = np.zeros((len(self.layers), layer.spec.experts), dtype=np.int64)
        return len(self.layers) - 1

    def defers(self, number: int, k: int) -> int:
        """How many of k experts this layer defers; one at least is its own."""
        return 0 if number == len(self.layers) - 1 else min(self.deferred, k - 1)

    def keep(self, rows_L: Tensor | None) -> None:
        """Behind here the step goes on with these of its tokens alone (None: all)."""
        if self.pending is not None:
            self.pending.rows = rows_L

    def submit(self, work: Callable[[], Tensor]) -> Future[Tensor]:
        """Compute on the host, one after the other."""

        def timed() -> Tensor:
            begun = perf_counter()
            found = _inferring(work)
            self.busy += perf_counter() - begun
            return found

        if self._thread is not None:
            return self._thread.submit(timed)
        done: Future[Tensor] = Future()
        done.set_result(timed())
        return done

    def send(self, work: Callable[[], T]) -> Future[T]:
        """Make ready for the device, in the same thread."""
        if self._thread is not None:
            return self._thread.submit(_inferring, work)
        done: Future[T] = Future()
        done.set_result(work())
        return done

    def wait(self, found: Future[Tensor]) -> Tensor:
        begun = perf_counter()
        value = found.result()
        self.waited += perf_counter() - begun
        return value

    def put(self, table: Table) -> None:
        """Copy experts to the device as the table says: when weights are there, and after they have changed."""
        for layer, row in zip(self.layers, table, strict=True):
            layer.put(np.flatnonzero(row).tolist())

    def refresh(self, changed: set[int]) -> None:
        """Copy anew what is on the device of these weights (their `id`s), which have changed on the host."""
        for layer in self.layers:
            if any(id(weight) in changed for weight in (layer.gate_up, layer.down, *(layer.biases or ()))):
                layer.put(layer.residents)

    def move(self, moves: list[Move]) -> None:
        """Between two steps."""
        for one in moves:
            self.layers[one.layer].exchange(one.comes, one.goes)
        self.moved += len(moves)

    @property
    def table(self) -> Table:
        """Which experts are on the device, [layers, E]."""
        found = np.zeros(self.counts.shape, dtype=np.bool_)
        for row, layer in zip(found, self.layers, strict=True):
            row[layer.residents] = True
        return found

    @property
    def hidden_share(self) -> float:
        """Of the host's time, the part that nobody waited for."""
        return max(0.0, 1.0 - self.waited / self.busy) if self.busy else 0.0

    @property
    def host_bytes(self) -> int:
        """Of the experts on the host."""
        return sum(int(weight.value.nbytes) for layer in self.layers for weight in (layer.gate_up, layer.down))

    @property
    def device_bytes(self) -> int:
        """Of the copies on the device."""
        return sum(layer.device_bytes for layer in self.layers)


@dataclass(slots=True)
class Late:
    """Outputs of experts that a layer deferred: the host's are perhaps still being computed."""

    near: Tensor | None  # [T, N] on the device
    far: Future[Tensor] | None
    rows: Tensor | None = None  # which of the tokens go on; None: all


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
        self.number = aside.enter(self)

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
        stacks: list[Any] = []
        for weight in (self.gate_up, self.down):
            rows = self._rows(weight, experts)
            parts = [Matrix(weight.names[0], part) for part in rows.chunk(len(experts))]
            stacks.append(self.ops.stack_experts(parts, self.dtype, self.device, len(experts)))
        biases = None
        if self.biases is not None:
            up, down = (weight.value.view(self.spec.experts, -1)[experts].reshape(-1) for weight in self.biases)
            biases = up.to(self.device), down.to(self.device)
        return _Copies(*stacks, biases, sum(int(stack.nbytes) for stack in stacks))

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

    # ---- a step ----

    def begin(self, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Begun:
        """Start the experts that a token has, [T, k], on both machines."""
        aside = self.aside
        if self.number == 0:
            aside.pending = None
            aside.steps += 1
        before = aside.pending
        ids, weights = ids_Tk.to(HOST), weights_Tk.to(HOST, torch.float32)
        if not aside.same:
            aside.counts[self.number] += np.bincount(ids.reshape(-1).numpy(), minlength=self.spec.experts)
        count = aside.defers(self.number, self.k)
        late = _least(weights, count) if count else None
        streamed = None
        if aside.streams_from is not None and not aside.same and len(ids) >= aside.streams_from:
            streamed = self._streamed()
        own = ids if late is None else ids.masked_fill(late, -1)
        host_x = x_TN.to(HOST, torch.float32)
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
        far = far.to(self.device, dtype)
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
        there = slots_Tk.to(self.device), weights_Tk.to(self.device)
        return self.ops.experts(x_TN, *there, copies.gate_up, copies.down, spec, copies.biases)

    def _far(self, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        ops, weights = self.aside.ops, (self.gate_up.value, self.down.value)
        if self.plain:
            return ops.chosen_experts(x_TN, ids_Tk, weights_Tk, *weights)
        biases = None if self.biases is None else (self.biases[0].value, self.biases[1].value)
        return ops.experts(x_TN, ids_Tk, weights_Tk, *weights, self.spec, biases)

    # ---- long steps ----

    def _streamed(self) -> _Copies:
        """All experts on the device, for this step alone; the next layer's are on their way meanwhile."""
        found = self.sent().result()
        self._ahead = None
        # The last layer has but the rows whose next token is wanted.
        if self.number + 1 < len(self.aside.layers) - 1:
            self.aside.layers[self.number + 1].sent()
        return found

    def sent(self) -> Future[_Copies]:
        """Send all experts to the device."""
        if self._ahead is None:
            self._ahead = self.aside.send(lambda: self._copied(list(range(self.spec.experts))))
        return self._ahead


def _inferring(work: Callable[[], T]) -> T:
    with torch.inference_mode():
        return work()


def fits_plain(spec: ExpertSpec, *, biased: bool) -> bool:
    """Whether `Ops.chosen_experts` computes such experts."""
    return spec.plain and not biased


def _least(weights_Tk: Tensor, count: int) -> Tensor:
    """Of each token's experts the `count` of least weight, the last of equals first: bool [T, k]."""
    order = weights_Tk.argsort(dim=-1, descending=True, stable=True)
    late = torch.zeros(weights_Tk.shape, dtype=torch.bool)
    return late.scatter_(1, order[:, -count:], True)
