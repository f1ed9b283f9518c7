"""A process that compiles a model's kernels while another one loads its weights.

    python -m phloem.speculation.ahead < plan.json

It builds the model without data, runs every class of steps (`shapes`) while launches are noted, and compiles the notes
in parallel processes into a cache on disk, where the engine finds them. It needs no device and takes none.

Standard output: one JSON object (`Done`).
"""

from __future__ import annotations

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
from phloem.checkpoint.describe import Checkpoint
from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.checkpoint.quant_config import StoredFormat
from phloem.core.errors import PhloemError
from phloem.engine.shapes import Shape, run_shape, step_shapes
from phloem.engine.sizing import Need
from phloem.kernels.shapes_only import shapes_only
from phloem.kernels.triton import ahead, table
from phloem.kvcache.pool import KVPool, fewest_pages
from phloem.layers.context import BuildContext
from phloem.models import build_model
from phloem.models._common import Decoder
from phloem.models._narrowed import load_forms
from phloem.quant import method_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.engine.drafting import Loaded
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


def need_of(plan: Plan, layers: int | None = LAYERS[-1], drafts: Drafts | None = None) -> Need:
    """The model without data and with so many layers at most (None: all), and what steps need of the engine."""
    config = plan.config if layers is None else shallow(plan.config, layers)
    device = torch.device("meta")
    checkpoint = checkpoint_of(plan, config)
    ops = shapes_only(table.invariant_table() if plan.ops == "invariant" else table.table())
    dtype, kv_dtype = getattr(torch, plan.dtype), getattr(torch, plan.kv_dtype)
    ctx = BuildContext(ops, dtype, device)
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
    return Need(model, backend, ops, kv_dtype, *sizes, True, scales, (), adapts, helper, attends)


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
    """Every launch of every class of steps, and the classes that launched something new."""
    every = step_shapes(plan.running, plan.chunk, plan.context)
    few, many = (_noted_need(plan, layers, drafts) for layers in depths(plan))
    if few is None or many is None:
        whole = _noted_need(plan, None, drafts) if many is None else many
        assert whole is not None
        return noted(whole, every)
    ends = [every[0], every[-1]]
    # Two layers stand for all where they launch what eight do, and take a quarter of the time.
    need = few if set(noted(few, ends)[0].found) == set(noted(many, ends)[0].found) else many
    return noted(need, every)


def _noted_need(plan: Plan, layers: int | None, drafts: Drafts | None) -> Need | None:
    """`need_of`, whose launches while the weights are prepared belong to no step; None: there is no such model with so
    few layers."""
    with torch.inference_mode(), ahead.Notes().taken():
        try:
            return need_of(plan, layers, drafts)
        except (PhloemError, IndexError):
            if layers is None:
                raise
            return None


def noted(need: Need, every: Sequence[Shape]) -> tuple[ahead.Notes, list[Shape]]:
    """The launches of these shapes, and which of them brought new ones."""
    notes, shapes = ahead.Notes(), []
    pool = pool_of(need)
    with torch.inference_mode(), notes.taken():
        for shape in every:
            before = len(notes.found)
            run_shape(need, pool, shape)
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
    compiled = ahead.compile_all(list(notes.found.values()), plan.processes)
    slowest = max(((one.kernel, one.seconds) for one in compiled), key=lambda one: one[1], default=("", 0.0))
    errors = [f"{one.kernel}: {one.error}" for one in compiled if one.error is not None]
    return Done(shapes, len(compiled), sum(one.cached for one in compiled), perf_counter() - begun, slowest, errors)


def main(drafts: Drafts | None = None) -> int:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    os.nice(5)  # whoever loads the weights comes first
    sys.stdout.buffer.write(msgspec.json.encode(run(plan, drafts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
