"""Whole steps as functions that jax compiles: caches go in and come out in the same memory, weights are arguments."""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING, Any

import jax

from phloem.core.errors import EngineDead
from phloem.kernels.jax.mesh import Described, Devices
from phloem.kernels.jax.tensor import DTYPES, Array, Copies, Leaves, Unknown, lift, to_jax, to_torch, tracing
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_log = log.get("kernels.jax")


class Function:
    """A function of arrays that is compiled for each of their shapes, at its first call with them."""

    def __init__(
        self, name: str, function: Callable[[list[Array]], Array], leaves: Leaves, caches: list[Array], devices: Devices
    ) -> None:
        self._name, self._function, self._leaves, self._caches = name, function, leaves, caches
        self._devices = devices
        self.compiled: dict[tuple[Any, ...], float] = {}  # shapes -> seconds
        self._jitted = jax.jit(self._pure, donate_argnums=1)
        self._known = False

    def _pure(self, values: Any, kept: Any, arrays: Any) -> Any:
        return self._traced(values, kept, arrays)

    def _traced(self, values: Any, kept: Any, arrays: Any) -> Any:
        before = [cache.a for cache in self._caches]
        try:
            for cache, value in zip(self._caches, kept, strict=True):
                cache.a = value
            with tracing(self._leaves, values):
                made = lift(self._function([Array(a) for a in arrays]))
            # Results whole on every device; caches stay cut as they came.
            return self._devices.whole(made), [self._devices.kept(cache.a) for cache in self._caches]
        finally:
            for cache, value in zip(self._caches, before, strict=True):
                cache.a = value

    def look(self, arrays: Sequence[Any]) -> None:
        """Find what the function reads beside its arguments, without computing it."""
        jax.eval_shape(lambda kept, given: self._traced(None, kept, given), [c.a for c in self._caches], arrays)
        self._known = True

    def lowered(self, arrays: Sequence[Tensor], platform: str) -> str:
        """The function for another platform, as StableHLO: nothing of that platform need be here."""
        given = [to_jax(x) for x in arrays]
        self.look(given)
        kept = [cache.a for cache in self._caches]
        return jax.export.export(self._jitted, platforms=[platform])(self._leaves.values(), kept, given).mlir_module()

    def ahead(self, arrays: Sequence[Tensor]) -> Any:
        """Compiled for devices that are described alone: `memory_analysis` and `cost_analysis` tell of it."""
        given = [to_jax(x) for x in arrays]
        self.look(given)

        def like(x: Any) -> Any:
            place = x.sharding if isinstance(x, Described) else self._devices.everywhere
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        read = [leaf.a if isinstance(leaf, Array) else to_jax(leaf) for leaf in self._leaves.found.values()]
        kept = [like(cache.a) for cache in self._caches]
        return self._jitted.lower([like(x) for x in read], kept, [like(x) for x in given]).compile()

    def __call__(self, arrays: Sequence[Tensor]) -> Tensor:
        """Raises EngineDead when it fails behind its start: its caches, given to it, are then lost."""
        given = [to_jax(x) for x in arrays]
        if not self._known:
            self.look(given)
        try:
            return self._run(given)
        except Unknown:  # these shapes read something that others do not
            self.look(given)
            return self._run(given)

    def _run(self, given: list[Any]) -> Tensor:
        shapes, begun = tuple(x.shape for x in given), perf_counter()
        donated = [cache.a for cache in self._caches]
        try:
            made, kept = self._jitted(self._leaves.values(), donated, given)
            for cache, value in zip(self._caches, kept, strict=True):
                cache.a = value
            made.block_until_ready()
        except Exception as error:
            if not any(cache.is_deleted() for cache in donated):
                raise  # it was not begun
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineDead(f"the {self._name} failed and took the KV caches with it: {why:.300}") from error
        if shapes not in self.compiled:
            self.compiled[shapes] = seconds = perf_counter() - begun
            sizes = " ".join("x".join(map(str, shape)) or "1" for shape in shapes)
            _log.info("%s compiled for inputs of %s in %.1f s", self._name, sizes, seconds)
        return to_torch(made)


class Compiler:
    """Makes functions over one table's ops (`kernels.graph.StepCompiler`). Used by one thread at a time."""

    def __init__(self, copies: Copies, devices: Devices | None = None) -> None:
        self._copies, self._devices = copies, devices or Devices()

    def cache(self, like: Tensor) -> Any:
        return Array(self._devices.zeros(tuple(like.shape) if math.prod(like.shape) else (0,), DTYPES[like.dtype]))

    def function(self, name: str, function: Callable[[list[Any]], Any], caches: Sequence[Any] = ()) -> Function:
        leaves = Leaves(self._copies, self._devices.everywhere)
        return Function(name, function, leaves, list(caches), self._devices)
