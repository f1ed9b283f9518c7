"""A process that compiles a model's kernels while another one loads its weights.

    python -m phloem.speculation.ahead < plan.json

It builds the model without data, runs every class of steps (`shapes`) while launches are noted, and compiles the notes
in parallel processes into a cache on disk, where the engine finds them. It needs no device and takes none.

Standard output: one JSON object (`Done`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from phloem.adapters._sites import Sites
from phloem.attention._elsewhere import backend_without_data
from phloem.checkpoint.describe import Checkpoint, described
from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.checkpoint.quant_config import StoredFormat
from phloem.core.config import ModelConfig
from phloem.core.errors import PhloemError
from phloem.engine.choices.dtypes import tower_of
from phloem.engine.choices.sizing import Need, run_step
from phloem.engine.pooled import run_texts
from phloem.engine.ranks.rehearsal import Rehearsed
from phloem.engine.towers.media import Pictures
from phloem.engine.warmup.alone import Alone, Arrangement, placed
from phloem.engine.warmup.blank import encode_all
from phloem.engine.warmup.shapes import Shape, lengths_of, run_shape, step_shapes, text_shapes
from phloem.kernels.shapes_only import shapes_only
from phloem.kernels.triton import ahead, table
from phloem.kvcache.pool import KVPool, fewest_pages
from phloem.layers.context import BuildContext, Chosen
from phloem.layers.spread import Spread
from phloem.models import build_model
from phloem.models._common import Decoder
from phloem.models._narrowed import load_forms
from phloem.models._pooled import load_pooled
from phloem.quant import method_for

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from phloem.engine.drafts.drafting import Loaded
    from phloem.models import Model

LAYERS = (2, 8)  # of a deeper model: what repeats from layer to layer launches the same kernels


class Plan(msgspec.Struct, frozen=True):
    """What the engine will serve, and on what."""

    model_type: str
    config: dict[str, Any]
    context: int
    vocab: int
    ops: str  # the table's name
    dtype: str
    kv_dtype: str
    page: int | None  # None: the backend's
    running: int
    chunk: int
    target: tuple[str, int | str, int]  # as Triton names it: backend, architecture, warp size
    processors: int
    cache: str  # directory
    processes: int
    backend: str = "triton"
    scales: dict[int, tuple[int, int]] = {}  # by pool index, how many scales keys and values of a float8 cache have
    adapters: tuple[int, int] | None = None  # how many there may be, and their largest rank; None: none are served
    drafting: dict[str, Any] | None = None  # as `core.speculation.Wanted`, of a model that drafts; None: none does
    path: str = "none"  # of the checkpoint, and its files: what drafts may lie in it
    files: list[str] = []
    quantization: str | None = None  # of `--quantization`
    stored: dict[str, Any] | None = None  # as `checkpoint.quant_config.StoredFormat`; None: plain matrices
    consolidated: bool = False  # the files are in Mistral's own format
    ranks: Arrangement | None = None  # of a model that is shared out; None: it is on one rank
    spread: tuple[int, bool] | None = None  # slots beyond the experts, and whether choices are counted, as `Spread`
    told: bool = False  # answers tell which experts computed their tokens
    pooled: dict[str, Any] | None = None  # settings (`core.config.ModelConfig`) of a model that reads whole texts
    gguf: str = ""  # the file, or the first of its parts; "": another format


class Done(msgspec.Struct, frozen=True):
    """What came of it. `shapes`: a few that, run one after another, launch all that was compiled."""

    shapes: list[Shape]
    kernels: int
    cached: int  # of them, that lay in the cache
    seconds: float
    slowest: tuple[str, float]
    errors: list[str]


# Puts the model that drafts beside the one that it drafts for, both without data.
Drafts = Callable[[Plan, Checkpoint, "Model", BuildContext], "Loaded | None"]


def shallow(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A model's config with so many layers at most; lists that tell of each layer are cut too."""
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int) or depth <= layers:
        return config
    cut = {key: value[:layers] for key, value in config.items() if isinstance(value, list) and len(value) == depth}
    return {**config, **cut, "num_hidden_layers": layers}


def depths(plan: Plan) -> tuple[int, int]:
    """Layers of the two models that are compared: enough to have one of each combination of GGUF types."""
    kinds: dict[int, dict[str, str]] = {}
    for name, tensor in GGUFFile.open(plan.gguf).tensors.items() if plan.gguf else ():
        block, _, rest = name.removeprefix("blk.").partition(".")
        if name.startswith("blk.") and block.isdigit():
            kinds.setdefault(int(block), {})[rest] = tensor.kind
    firsts: dict[tuple[tuple[str, str], ...], int] = {}
    for block in sorted(kinds):
        firsts.setdefault(tuple(sorted(kinds[block].items())), block + 1)
    least = max(firsts.values(), default=0)
    return max(LAYERS[0], least), max(LAYERS[1], least)


def checkpoint_of(plan: Plan, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint of no values."""
    return Checkpoint(
        path=Path(plan.path), format="dummy", model_type=plan.model_type, config=config, generation_config={},
        eos_ids=(), context_length=plan.context, vocab_size=plan.vocab, tokenizer_path=Path("none"), gguf=None,
        name="none", architectures=(), files=tuple(map(Path, plan.files)),
    )  # fmt: skip


def need_of(plan: Plan, layers: int | None = LAYERS[-1], drafts: Drafts | None = None, rank: int = 0) -> Need:
    """The model, or a rank's share of it, without data and with so many layers at most (None: all; of stages, on each),
    and what steps need of the engine."""
    stages = 1 if plan.ranks is None else plan.ranks.pp
    config = plan.config if layers is None else shallow(plan.config, layers * stages)
    device = torch.device("meta")
    checkpoint = checkpoint_of(plan, config)
    ops = shapes_only(table.invariant_table() if plan.ops == "invariant" else table.table())
    dtype, kv_dtype = getattr(torch, plan.dtype), getattr(torch, plan.kv_dtype)
    spread = None if plan.spread is None else Spread(plan.spread[0], counting=plan.spread[1])
    ctx = BuildContext(ops, dtype, device, spread=spread, chosen=Chosen() if plan.told else None)
    ctx, groups = (ctx, None) if plan.ranks is None else placed(ctx, plan.ranks, rank)
    model = _loaded(plan, checkpoint, ctx)
    if plan.adapters is not None:
        Sites(model, ops, dtype, *plan.adapters)
    helper = None if drafts is None or plan.drafting is None else drafts(plan, checkpoint, model, ctx)
    attends = partial(_attends, plan.backend, ops, device, kv_dtype)
    backend = attends(model.attention_specs)
    page = plan.page or backend.page_size
    ones = {pool: ((1.0,) * keys, (1.0,) * values) for pool, (keys, values) in plan.scales.items()}
    scales = {pool: both for pool, both in ones.items() if pool < len(model.memory)}
    sizes = page, plan.context, plan.running, plan.chunk
    adapts = plan.adapters is not None
    shared = model if groups is None else Rehearsed(Alone(model, groups, dtype), together=False)
    return Need(shared, backend, ops, kv_dtype, *sizes, True, scales, (), adapts, helper, attends)


def _loaded(plan: Plan, checkpoint: Checkpoint, ctx: BuildContext) -> Model:
    """The model, whose weights have the forms in which the table keeps them."""
    stored = None if plan.stored is None else StoredFormat(**plan.stored)
    file = GGUFFile.open(plan.gguf) if plan.gguf else None
    ctx = replace(ctx, quant=method_for(plan.quantization, stored))
    model = build_model(plan.model_type, checkpoint.config, ctx, plan.context)
    if not isinstance(model, Decoder) or (stored is None and file is None):
        model.load(checkpoint, None)
    elif file is not None:
        load_forms(model, replace(checkpoint, format="gguf", gguf=file))
    else:
        load_forms(model, replace(checkpoint, format="safetensors", stored=stored, consolidated=plan.consolidated))
    return model


def _attends(name: str, ops: Any, device: torch.device, kv_dtype: torch.dtype, specs: Any) -> Any:
    return backend_without_data(name, ops, specs, device, kv_dtype)


def trace(plan: Plan, drafts: Drafts | None = None) -> tuple[ahead.Notes, list[Shape]]:
    """Every launch of every class of steps, on every rank, and the classes that launched something new."""
    if plan.pooled is not None:
        return _texts(plan, plan.pooled)
    every = step_shapes(plan.running, plan.chunk, plan.context)
    found, shapes = ahead.Notes(), list[Shape]()
    for rank in range(1 if plan.ranks is None else plan.ranks.size):
        need, ends = _as_deep_as_needed(plan, every, drafts, rank)
        if rank and set(ends.found) <= set(found.found):
            continue  # as one of the ranks before
        own, new = noted(need, every)
        found.found |= own.found | _seen(plan, need, every).found
        shapes += [shape for shape in new if shape not in shapes]
    return found, sorted(shapes, key=every.index)


def _texts(plan: Plan, settings: dict[str, Any]) -> tuple[ahead.Notes, list[Shape]]:
    """The same of a model that reads whole texts."""
    ops = shapes_only(table.invariant_table() if plan.ops == "invariant" else table.table())
    found = described(ModelConfig(**settings))
    config = shallow(found.config, LAYERS[-1])
    checkpoint = replace(found, config=config, format="dummy", gguf=None, context_length=plan.context)
    method = method_for(plan.quantization, checkpoint.stored)
    ctx = BuildContext(ops, getattr(torch, plan.dtype), torch.device("meta"), quant=method)
    with torch.inference_mode(), ahead.Notes().taken():
        model = load_pooled(checkpoint, ctx)
    run = partial(run_texts, model, ops)
    # A step has so many tokens at most, or one text.
    return _new(text_shapes(max(plan.chunk, plan.context), plan.context), lambda shape: run(lengths_of(shape)))


def _as_deep_as_needed(
    plan: Plan, every: Sequence[Shape], drafts: Drafts | None, rank: int
) -> tuple[Need, ahead.Notes]:
    """Of few layers where these launch what more do, and the launches of the first and the last shape."""
    ends = [every[0], every[-1]]
    few, many = (_noted_need(plan, layers, drafts, rank) for layers in depths(plan))
    if few is None or many is None:
        whole = _noted_need(plan, None, drafts, rank) if many is None else many
        assert whole is not None
        return whole, noted(whole, ends)[0]
    # Two layers stand for all where they launch what eight do, and take a quarter of the time.
    short, long = noted(few, ends)[0], noted(many, ends)[0]
    return (few, short) if set(short.found) == set(long.found) else (many, long)


def _noted_need(plan: Plan, layers: int | None, drafts: Drafts | None, rank: int) -> Need | None:
    """`need_of`, whose launches while the weights are prepared belong to no step; None: there is no such model with so
    few layers."""
    with torch.inference_mode(), ahead.Notes().taken():
        try:
            return need_of(plan, layers, drafts, rank)
        except (PhloemError, IndexError):
            if layers is None:
                raise
            return None


def _seen(plan: Plan, need: Need, every: Sequence[Shape]) -> ahead.Notes:
    """The launches of the model's tower, and of steps with what it gives; none where it has no tower."""
    tower, notes, device = tower_of(need.model), ahead.Notes(), torch.device("meta")  # pyright: ignore[reportArgumentType]
    if tower is None or need.model.hidden_size != tower.hidden_size:
        return notes
    pool = pool_of(need)
    with torch.inference_mode(), notes.taken():
        encode_all(checkpoint_of(plan, plan.config), tower, need.ops)
        for shape in every:
            lengths = lengths_of(shape)
            if len(lengths) == shape[0] > 1:
                continue  # rows that decode are in no picture
            values = torch.empty(
                lengths[0], tower.parts * tower.hidden_size, dtype=getattr(torch, plan.dtype), device=device
            )
            index = torch.zeros(lengths[0], dtype=torch.int64, device=device)
            spans = [(0, lengths[0], lengths[0])] if tower.whole else []
            pictures = Pictures(index, values, tower.hidden_size, spans)
            run_step(need, pool, lengths, pictures=pictures)
    return notes


def noted(need: Need, every: Sequence[Shape]) -> tuple[ahead.Notes, list[Shape]]:
    """The launches of these shapes, and which of them brought new ones."""
    pool = pool_of(need)
    return _new(every, lambda shape: run_shape(need, pool, shape))


def _new(every: Sequence[Shape], work: Callable[[Shape], object]) -> tuple[ahead.Notes, list[Shape]]:
    notes, shapes = ahead.Notes(), []
    with torch.inference_mode(), notes.taken():
        for shape in every:
            before = len(notes.found)
            work(shape)
            if len(notes.found) > before:
                shapes.append(shape)
    return notes, shapes


def pool_of(need: Need) -> KVPool:
    """The least memory that steps run with, without data."""
    memory, device = need.model.memory, torch.device("meta")
    pages = fewest_pages(memory, need.page_size)
    return KVPool(memory, pages, need.page_size, need.kv_dtype, device, need.kv_scales)


def run(plan: Plan, drafts: Drafts | None = None) -> Done:
    """Trace and compile."""
    begun = perf_counter()
    backend, arch, warp = plan.target
    ahead.aim(backend, arch, warp, plan.processors, Path(plan.cache))
    notes, shapes = trace(plan, drafts)
    with _turn(Path(plan.cache)):
        compiled = ahead.compile_all(list(notes.found.values()), plan.processes)
    slowest = max(((one.kernel, one.seconds) for one in compiled), key=lambda one: one[1], default=("", 0.0))
    errors = [f"{one.kernel}: {one.error}" for one in compiled if one.error is not None]
    return Done(shapes, len(compiled), sum(one.cached for one in compiled), perf_counter() - begun, slowest, errors)


@contextlib.contextmanager
def _turn(cache: Path) -> Generator[None]:
    """One process at a time fills a cache: what replicas, or servers that start together, have in common is compiled by
    the first of them."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks: then each compiles for itself
            cache.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((cache / "turn").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(drafts: Drafts | None = None) -> int:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    os.nice(5)  # whoever loads the weights comes first
    sys.stdout.buffer.write(msgspec.json.encode(run(plan, drafts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
