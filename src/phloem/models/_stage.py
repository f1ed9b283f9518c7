"""A decoder's layers shared out among the stages of a pipeline, by what they weigh.

The first stage has the embedding, the last one the last norm and the head. What a stage does not have is built and
never loaded: names, numbers of layers, and the groups of memory are those of the whole model on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from phloem.distributed.mesh import Axis
    from phloem.layers.context import ForwardBatch
    from phloem.layers.embed import Head
    from phloem.layers.rows import Rows
    from phloem.layers.weight import Layer, Weight
    from phloem.models._layer import MixerAlone


class Layered(Protocol):
    """What is asked of a decoder (`_common.Decoder`)."""

    @property
    def embed(self) -> Layer: ...

    @property
    def positions(self) -> Layer | None: ...

    @property
    def layers(self) -> Sequence[MixerAlone]: ...

    @property
    def norm(self) -> Layer: ...

    @property
    def head(self) -> Head: ...

    @property
    def rows(self) -> Rows | None: ...

    def weights(self) -> Iterator[Weight]: ...

    def adapt(self, step: ForwardBatch, /, *, wanted: bool = False) -> None: ...

    def enter(self, step: ForwardBatch, /) -> Tensor: ...

    def finish(self, out: Tensor, residual_TN: Tensor, keep_L: Tensor | None, /) -> Tensor: ...


@dataclass(frozen=True)
class Stage:
    """One rank's part of a decoder: layers [first, last). `pools`: the memory of each stage's layers, by pool index."""

    axis: Axis
    first: int
    last: int
    pools: tuple[frozenset[int], ...]
    away: frozenset[int]  # ids of weights that other stages have
    elsewhere: frozenset[str]  # their tensors' names

    @property
    def own(self) -> frozenset[int]:
        return self.pools[self.axis.rank]


def spans(costs: Sequence[int], head: int, stages: int) -> list[tuple[int, int]]:
    """[first, last) of the layers of each stage, so that the heaviest is as light as can be; the head is the last's.

    Raises:
        ModelLoadError: there are fewer layers than stages.
    """
    if len(costs) < stages:
        valid = ", ".join(str(size) for size in range(1, min(len(costs), 64) + 1))
        raise ModelLoadError(f"pp_size {stages}: {len(costs)} layers cannot be shared out; valid: {valid}")
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[end]: (the heaviest stage, where the last one begins) of the first `end` layers in so many stages.
    best = [(total[end], 0) for end in range(len(costs) + 1)]
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        more = head if stage == stages - 1 else 0
        after = [(0, 0)] * len(best)
        for end in range(stage + 1, len(best)):
            after[end] = min((max(best[cut][0], total[end] - total[cut] + more), cut) for cut in range(stage, end))
        best = after
        cuts.append([cut for _, cut in best])
    found, end = list[tuple[int, int]](), len(costs)
    for row in reversed(cuts):
        found.append((row[end], end))
        end = row[end]
    return [(0, end), *reversed(found)]


def stage_of(model: Layered, axis: Axis, pools: Sequence[range]) -> Stage:
    """This rank's stage of a decoder whose layers are built. `pools`: of each layer.

    Raises:
        ModelLoadError: there are too few layers, or some of two stages share something.
    """
    kept = [{id(weight): weight for weight in layer.weights()} for layer in model.layers]
    costs = [_cost(weights.values()) for weights in kept]
    each = spans(costs, _cost([model.head.weight]), axis.size)
    of_layer = [stage for stage, (first, last) in enumerate(each) for _ in range(first, last)]
    owners: dict[int, set[int]] = {}
    for number, weights in enumerate(kept):
        for key in weights:
            owners.setdefault(key, set()).add(of_layer[number])
    of_pool = {pool: of_layer[number] for number, own in enumerate(pools) for pool in own}
    reads = [(of_pool[layer.attention.pool], of_layer[at]) for at, layer in enumerate(model.layers) if layer.attention]
    if any(len(found) > 1 for found in owners.values()) or any(kept != reader for kept, reader in reads):
        raise ModelLoadError(f"pp_size {axis.size}: layers of different stages share weights or memory in this model")
    first, last = each[axis.rank]
    own = {key for number in range(first, last) for key in kept[number]}
    if axis.rank == 0:
        own |= _ids([model.embed, *([model.positions] if model.positions is not None else [])])
    if axis.rank == axis.size - 1:
        own |= _ids([model.norm, model.head])
    away = [weight for weight in model.weights() if id(weight) not in own]
    return Stage(
        axis,
        first,
        last,
        tuple(
            frozenset(pool for number in range(*span) for pool in pools[number]) for span in each
        ),
        frozenset(id(weight) for weight in away),
        frozenset(name for weight in away for name in (*weight.names, *weight.elsewhere)),
    )  # fmt: skip


def run_stage(model: Layered, stage: Stage, step: ForwardBatch, given: Sequence[Tensor]) -> list[Tensor]:
    """What the next stage is given, [T, N] each: hidden states, and the residual where it is apart; of the last stage
    the hidden states [L, N] that the head takes, or nothing where none is wanted. `given`: what the stage before has
    given."""
    if given:
        model.adapt(step)
    x_TN = given[0] if given else model.enter(step)
    residual_TN = given[1] if len(given) > 1 else None
    final = stage.last == len(model.layers)
    for layer in model.layers[stage.first : stage.last - final]:
        x_TN, residual_TN = layer.attend(x_TN, residual_TN, step)
        x_TN, residual_TN = layer.feed(x_TN, residual_TN)
    if final:
        out, residual_TN = model.layers[-1].attend(x_TN, residual_TN, step)
        index = step.logit_index
        if index is not None and not len(index) and model.rows is None:  # nor by another group
            return []
        model.adapt(step, wanted=True)
        return [model.finish(out, residual_TN, step.logit_index)]
    return [x_TN] if residual_TN is None else [x_TN, residual_TN]


def _ids(layers: Iterable[Layer]) -> set[int]:
    return {id(weight) for layer in layers for weight in layer.weights()}


def _cost(weights: Iterable[Weight]) -> int:
    return sum(prod(weight.local(part)) for weight in weights for part in range(len(weight.names)))
