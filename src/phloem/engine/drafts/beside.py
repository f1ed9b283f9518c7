"""A model that drafts, made ready beside the one that it drafts for: its memory in the same pool, its attention, its
recordings, and the pages that branches of trees lie in."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phloem import attention
from phloem.attention import AttentionNeed
from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.engine.drafts.blocks import BlockWork
from phloem.engine.drafts.drafting import DraftWork
from phloem.engine.drafts.growing import TreeWork
from phloem.engine.drafts.growing_late import LateTrees
from phloem.engine.forward import Eager, Forward
from phloem.engine.recorded import choice
from phloem.engine.recorded.pieces import PieceGraphs
from phloem.models._common import Decoder
from phloem.models._dflash import DFlash
from phloem.models._draft import DraftHead

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.attention import AttentionBackend
    from phloem.core.config import Config
    from phloem.core.memory import Group
    from phloem.engine.drafts.drafting import Loaded
    from phloem.engine.sampling.slots import Slots
    from phloem.engine.transfer import LastTokens
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.models import Tower
    from phloem.platforms import Platform

PARAM, TREES = "speculative_draft_model_path", "speculative_eagle_topk"
RECORDED = ("step_graphs", "piecewise_graphs")
GRAPH_SHARE = 4  # its recordings take up to this part of what all may


def part_of(pool: KVPool, first: int, count: int) -> KVPool:
    """Some layers' memory as a pool of its own, with the groups, and so the tables, of the whole."""
    found = copy.copy(pool)
    span = slice(first, first + count)
    found.memory, found.keys, found.values = pool.memory[span], pool.keys[span], pool.values[span]
    found.states = pool.states[span]
    found.group_of = {layer - first: group for layer, group in pool.group_of.items() if first <= layer < first + count}
    found.scales = {}
    return found


@dataclass(frozen=True)
class Place:
    """Where and how large the steps of the model are, for which drafts are made."""

    config: Config
    platform: Platform
    backend: AttentionBackend
    pool: KVPool
    ops: Ops
    rows: int
    pages: int
    chunk: int
    eager: str
    tower: Tower | None = None  # of a model that takes pictures
    graph_bytes: int | None = None  # that its recordings may take; None: nothing was measured


def taken(loaded: Loaded | None) -> int:
    """Bytes of its weights."""
    return 0 if loaded is None else loaded.model.weight_bytes


def graph_bytes(loaded: Loaded | None, all_bytes: int | None) -> tuple[int | None, int | None]:
    """Of what all recordings may take, how much is the model's and how much its own."""
    own = 0 if loaded is None or all_bytes is None else all_bytes // GRAPH_SHARE
    return (None, None) if all_bytes is None else (all_bytes - own, own)


@dataclass(frozen=True)
class Prepared:
    """What a runner needs of it. `make`: the work of its thread."""

    loaded: Loaded
    make: Callable[[Slots, LastTokens], DraftWork]
    own: tuple[int, ...]  # of each group of the pool, pages that are given out; those behind them are for trees
    recorded: tuple[choice.RecordedWay, ...] = ()  # how its passes are run


def prepare(loaded: Loaded | None, place: Place, decisions: list[Decision]) -> Prepared | None:
    """Its backend and its recordings; None: nothing was loaded.

    Raises:
        ConfigError: the attention of the model's steps does not serve the one that drafts, or it reads no whole texts.
    """
    if loaded is None:
        return None
    decisions.append(loaded.decision)
    given = _without_spare(loaded, place, decisions)
    model, pool = loaded.model, part_of(place.pool, loaded.first, len(loaded.model.memory))
    group = pool.groups[pool.group_of[0]]
    if any(pool.groups[number] != group for number in pool.group_of.values()) or group.kind != "pages" or group.window:
        raise ConfigError("a model that drafts must keep all of a text: no windows, no states", param=PARAM)
    specs, kind, device = model.attention_specs, place.pool.dtype, place.pool.device
    backend = attention.BACKENDS.get(place.backend.name)(place.ops, specs, device, kind)
    why = backend.decline(AttentionNeed(specs, kind, device, pool.page_size, 0))
    if why is not None:
        raise ConfigError(f"attention backend {backend.name} does not serve the model that drafts: {why}", param=PARAM)
    ways = _recorded(loaded, place, backend, pool, decisions)
    forward = Forward(ways, Eager(model, backend, pool))  # pyright: ignore[reportArgumentType] - as much as it calls

    def make(slots: Slots, last: LastTokens) -> DraftWork:
        if isinstance(model, DFlash):
            pieces = next((way for way in ways if isinstance(way, PieceGraphs)), None)
            return BlockWork(loaded, forward, backend, pool, slots, last, model, pieces)
        if loaded.tree is None:
            return DraftWork(loaded, forward, backend.ops, pool, slots, last)
        kind = TreeWork if last.host is not None else LateTrees
        return kind(loaded, forward, backend.ops, pool, slots, last, given)

    return Prepared(loaded, make, given, tuple(ways))


def _recorded(
    loaded: Loaded, place: Place, backend: AttentionBackend, pool: KVPool, decisions: list[Decision]
) -> list[choice.RecordedWay]:
    """How its passes are run, recorded before the engine is ready where the model's steps are. A head's on a device
    alone: on the host it computes by torch's code too, which the recorder there does not see."""
    model, facts, runtime = loaded.model, place.platform.facts, place.config.runtime
    if not isinstance(model, Decoder) and (facts.on_host or not isinstance(model, DraftHead)):
        return []
    graph_bytes = 0 if facts.on_host else place.graph_bytes
    free, told = place.platform.memory()[0], list[Decision]()
    # pyrefly: ignore[bad-argument-type] - a head is callable, and has as much as is called
    own = choice.Place(model, backend, pool, place.ops, facts, free, graph_bytes, eager=place.eager)  # pyright: ignore[reportArgumentType]
    if isinstance(model, DFlash):
        ways = choice.in_pieces(runtime, own, place.chunk, told)
    else:
        wide = 1 if loaded.tree is None else loaded.tree.width  # rows of a pass, of each of the step's
        ways = choice.choose(runtime, own, place.rows * wide, place.pages, place.chunk, told)
    if choice.record_first(runtime, ways, facts, told):
        decisions += [replace(one, name=f"draft_{one.name}") for one in told if one.name in RECORDED]
    return ways


def with_spare(loaded: Loaded | None, groups: Sequence[Group], counts: Sequence[int], page_size: int) -> list[int]:
    """The pages of each group, with those that trees want beside what is given out."""
    if loaded is None or loaded.tree is None:
        return list(counts)
    spare = loaded.tree.spare_pages(page_size)
    return [count + (spare if group.kind == "pages" else 0) for group, count in zip(groups, counts, strict=True)]


def _without_spare(loaded: Loaded, place: Place, decisions: list[Decision]) -> tuple[int, ...]:
    """The pages of each group that are given out. Raises ConfigError where drafts cannot branch."""
    pool, tree = place.pool, loaded.tree
    if tree is None:
        return pool.num_pages
    why = ""
    if any(group.kind != "pages" for group in pool.groups):
        why = "a recurrent state takes in tokens in one order, and a tree has several"
    elif place.tower is not None:
        why = "positions of pictures' tokens do not follow from their order, and a tree's are counted from it"
    elif pool.routes is not None:
        why = "the experts of tokens are kept by position, which several drafts share"
    if why:
        raise ConfigError(f"{TREES}: {why}; leave it out, for chains", param=TREES)
    spare = tree.spare_pages(pool.page_size)
    told = f"up to {tree.nodes} drafts, {tree.depth} deep, {tree.width} wide; {spare} pages beside for their branches"
    decisions.append(Decision(TREES, str(tree.width), told))
    return tuple(count - spare for count in pool.num_pages)
