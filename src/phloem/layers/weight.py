"""Slots for checkpoint tensors, declared by the layer that uses them; loading and live updates read the same slots.

A slot says which tensors, which part of each (`Part`: a fused or stacked tensor holds several matrices), and which
share of it this rank keeps (`Cut`). Legend: M outputs, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from phloem.core.errors import ModelLoadError
from phloem.distributed.mesh import some_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phloem.distributed.mesh import Axis
    from phloem.layers.context import BuildContext

# matrix: through `ops.prepare_linear`; norm: a float32 vector; bias: a vector in the activations' type.
Role = Literal["matrix", "norm", "bias"]


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of a stored tensor a matrix is: `tensor[expert]`, perhaps transposed, then rows `start::step`."""

    start: int = 0
    step: int = 1
    transposed: bool = False  # stored as [in_features, out_features]
    expert: int | None = None  # entry along the stored tensor's first axis
    experts: int = 0  # how many entries that axis has
    total: int = 0  # rows of the stored tensor, where this rank claims but some of them


@dataclass(frozen=True, slots=True)
class Cut:
    """The share of an axis (0 rows, 1 columns) that this rank keeps: piece `index` of `count`.

    Several ranks may keep the same piece: kv heads that are fewer than the ranks.
    """

    axis: int
    index: int
    count: int

    def span(self, size: int) -> tuple[int, int]:
        share = -(-size // self.count)
        return min(size, share * self.index), min(size, share * (self.index + 1))


@dataclass(frozen=True, slots=True)
class Projection:
    """One of the matrices that a layer stacks: `size` rows of the whole model's matrix.

    `name` is the tensor's below the layer, without `.weight`; "": the projection's own name.
    """

    size: int
    name: str = ""
    part: Part | None = None
    cut: Cut | None = None


@dataclass(slots=True)
class Weight:
    """What one op needs, made of one or more checkpoint tensors stacked along their first axis.

    `value` is None until the model is loaded. `shift` is added to every element on the way in: Gemma's norms store
    their distance from 1. `parts` and `cuts` are empty, or as long as `names`.
    """

    names: tuple[str, ...]  # in the checkpoint
    shapes: tuple[tuple[int, ...], ...]  # of the whole model: [out_features, in_features], or [size]
    role: Role
    shift: float = 0.0
    experts: int = 0  # above 0: the matrices of that many experts, prepared as `fused` says
    value: Any = None
    parts: tuple[Part | None, ...] = ()
    cuts: tuple[tuple[Cut, ...], ...] = ()
    fused: bool = True  # experts: for `ops.moe` (prepare_experts); otherwise for `ops.experts` (stack_experts)
    plain: bool = False  # kept in the type it is asked for, whatever others are rounded to while they are loaded
    aside: bool = False  # prepared by the host's table, beside the device
    in_own_type: bool = False  # a bias that stays in the type of the model, whatever that of the activations
    elsewhere: tuple[str, ...] = ()  # tensors of the same kind that other ranks keep
    zeros: tuple[str, ...] = ()  # those that no checkpoint has: biases beside others that are stored

    def part(self, number: int) -> Part | None:
        return self.parts[number] if self.parts else None

    def spans(self, number: int) -> tuple[tuple[int, int], ...]:
        """[first, last) along each axis of a part's matrix that this rank keeps."""
        spans = [(0, size) for size in self.shapes[number]]
        for cut in self.cuts[number] if self.cuts else ():
            if cut.axis < len(spans):
                spans[cut.axis] = cut.span(self.shapes[number][cut.axis])
        return tuple(spans)

    def local(self, number: int) -> tuple[int, ...]:
        """Shape of a part on this rank."""
        return tuple(last - first for first, last in self.spans(number))

    def rows(self, number: int) -> slice:
        """Where a part lies among the rows of `value`."""
        start = sum(self.local(other)[0] for other in range(number))
        return slice(start, start + self.local(number)[0])


def cut_of(axis: Axis, dimension: int) -> Cut | None:
    """The even share of one mesh axis; None where there is nothing to cut."""
    return Cut(dimension, axis.rank, axis.size) if axis.size > 1 else None


def check_divides(what: str, size: int, axis: Axis, name: str = "tp_size") -> None:
    """Raises ModelLoadError, with the sizes that would do, unless every rank gets the same share."""
    if size % axis.size:
        raise ModelLoadError(f"{name} {axis.size}: {what} {size} cannot be shared out; valid: {some_sizes(size, size)}")


def projections(
    ctx: BuildContext,
    in_features: int,
    parts: Mapping[str, int | Projection],
    *,
    bias: bool = False,
    cut: Cut | None = None,
) -> tuple[Weight, Weight | None]:
    """The slots of a linear layer: its stacked matrix, and its bias.

    Args:
        parts: projection name -> its rows, or all that there is to say of it.
        cut: what this rank keeps of the inputs.
    """
    wanted = {name: item if isinstance(item, Projection) else Projection(item) for name, item in parts.items()}
    stems = [ctx.child(item.name or name).name for name, item in wanted.items()]
    cuts = tuple(tuple(c for c in (item.cut, cut) if c is not None) for item in wanted.values())
    own = tuple(item.part for item in wanted.values())
    sizes = [item.size for item in wanted.values()]

    def slot(suffix: str, shapes: Iterable[tuple[int, ...]], role: Role) -> Weight:
        found = Weight(tuple(f"{stem}.{suffix}" for stem in stems), tuple(shapes), role)
        found.parts = own if any(own) else ()
        found.cuts = cuts if any(cuts) else ()
        return found

    weight = slot("weight", ((size, in_features) for size in sizes), "matrix")
    return weight, slot("bias", ((size,) for size in sizes), "bias") if bias else None


class Layer:
    """Something that owns weights, itself or through the layers in its attributes. Calling it is the subclass's."""

    row_ops: ClassVar[tuple[str, ...]] = ()  # of the op table, those that it calls which go through a step's rows

    def every_layer(self) -> Iterator[Layer]:
        """It, and every layer below it."""
        yield self
        for part in _layers(vars(self).values()):
            yield from part.every_layer()

    def weights(self) -> Iterator[Weight]:
        """Every slot below this layer, each once, in the order of declaration."""
        seen: set[int] = set()
        for slot in _slots(vars(self).values()):
            if id(slot) not in seen:
                seen.add(id(slot))
                yield slot


def _layers(values: Any) -> Iterator[Layer]:
    for value in values:
        if isinstance(value, Layer):
            yield value
        elif isinstance(value, list | tuple):
            yield from _layers(value)
        elif isinstance(value, dict):
            yield from _layers(value.values())


def _slots(values: Any) -> Iterator[Weight]:
    for value in values:
        if isinstance(value, Weight):
            yield value
        elif isinstance(value, Layer):
            yield from value.weights()
        elif isinstance(value, list | tuple):
            yield from _slots(value)
        elif isinstance(value, dict):
            yield from _slots(value.values())
