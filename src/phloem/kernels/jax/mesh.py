"""Several devices as one axis, among which compiled steps share out weights and caches.

jax's compiler makes a step's parts for each device from where its arguments lie, and adds what crosses between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phloem.core.errors import ConfigError

AXIS = "tp"


class Described(np.ndarray[Any, Any]):
    """An array on the host that stands for one on devices that are not here."""

    sharding: NamedSharding | None = None

    @staticmethod
    def of(values: Any, sharding: NamedSharding | None) -> Described:
        made = np.asarray(values).view(Described)
        made.sharding = sharding
        return made


@dataclass(frozen=True)
class Devices:
    """`mesh` None: jax's one device. Legend: K kv heads, S page size, D head size, E experts."""

    mesh: Mesh | None = None
    here: bool = True  # False: a compiler's description of devices, to compile for them

    @staticmethod
    def first(count: int) -> Devices:
        """Raises ConfigError where jax sees fewer."""
        found = jax.devices()
        if len(found) < count:
            why = f"tp_size {count}: jax sees {len(found)} device{'s' * (len(found) > 1)}"
            if found[0].platform == "cpu":
                why += f"; of processors, XLA_FLAGS=--xla_force_host_platform_device_count={count} makes more"
            raise ConfigError(why, param="tp_size")
        return Devices(Mesh(np.array(found[:count]), (AXIS,)))

    @staticmethod
    def described(devices: list[Any]) -> Devices:
        """Those of a topology (`jax.experimental.topologies`)."""
        return Devices(Mesh(np.array(devices), (AXIS,)), here=False)

    @property
    def size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def everywhere(self) -> NamedSharding | None:
        """Whole on every device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def cut(self, shape: tuple[int, ...], axis: int | None) -> NamedSharding | None:
        """Even shares along one axis; whole on every device where that is None or does not divide."""
        if self.mesh is None or axis is None or shape[axis] % self.size:
            return self.everywhere
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def place(self, weight: Any, axis: int | None, experts: int) -> Any:
        """A prepared matrix cut along its outputs (0) or inputs (1); of experts each one, as [E, outputs, inputs]."""
        if experts:
            weight, axis = weight.reshape(experts, -1, weight.shape[-1]), None if axis is None else axis + 1
        where = self.cut(weight.shape, axis)
        return jax.device_put(weight, where) if self.here else Described.of(weight, where)

    def of_cache(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Pages [pages, K, S, D] by kv heads, where these divide; anything else whole."""
        return self.cut(shape, 1 if len(shape) == 4 else None)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        where = self.of_cache(shape)
        return jnp.zeros(shape, dtype, device=where) if self.here else Described.of(np.zeros(shape, dtype), where)

    def whole(self, made: Any) -> Any:
        return made if self.mesh is None else jax.lax.with_sharding_constraint(made, self.everywhere)

    def kept(self, cache: Any) -> Any:
        return cache if self.mesh is None else jax.lax.with_sharding_constraint(cache, self.of_cache(cache.shape))
