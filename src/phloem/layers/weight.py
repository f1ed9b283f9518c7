"""Slots for checkpoint tensors, declared by the layer that uses them; loading and live updates read the same slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

# matrix: through `ops.prepare_linear`; norm: a float32 vector; bias: a vector in the activations' type.
Role = Literal["matrix", "norm", "bias"]


@dataclass(slots=True)
class Weight:
    """What one op needs, made of one or more checkpoint tensors stacked along their first axis.

    `value` is None until the model is loaded. `shift` is added to every element on the way in: Gemma's norms store
    their distance from 1.
    """

    names: tuple[str, ...]  # in the checkpoint
    shapes: tuple[tuple[int, ...], ...]  # as stored: [out_features, in_features], or [size]
    role: Role
    shift: float = 0.0
    experts: int = 0  # above 0: the matrices of that many experts, prepared by `ops.prepare_experts`
    value: Any = None


class Layer:
    """Something that owns weights, itself or through the layers in its attributes. Calling it is the subclass's."""

    def weights(self) -> Iterator[Weight]:
        """Every slot below this layer, each once, in the order of declaration."""
        seen: set[int] = set()
        for slot in _slots(vars(self).values()):
            if id(slot) not in seen:
                seen.add(id(slot))
                yield slot


def _slots(values: Any) -> Iterator[Weight]:
    for value in values:
        if isinstance(value, Weight):
            yield value
        elif isinstance(value, Layer):
            yield from value.weights()
        elif isinstance(value, list):
            yield from _slots(value)
