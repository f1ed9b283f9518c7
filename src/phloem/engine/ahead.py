"""A process that compiles a model's kernels while another one loads its weights.

    python -m phloem.engine.ahead < plan.json

It builds the model without data, runs every class of steps (`shapes`) while launches are noted, and compiles the notes
in parallel processes into a cache on disk, where the engine finds them. It needs no device and takes none.

Standard output: one JSON object (`Done`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from phloem.attention.triton import Backend
from phloem.checkpoint.describe import Checkpoint
from phloem.engine.shapes import Shape, run_shape, step_shapes
from phloem.engine.sizing import Need
from phloem.kernels.triton import ahead, table
from phloem.kvcache.pool import KVPool, fewest_pages
from phloem.layers.context import BuildContext
from phloem.models import build_model

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class Done(msgspec.Struct, frozen=True):
    """What came of it. `shapes`: a few that, run one after another, launch all that was compiled."""

    shapes: list[Shape]
    kernels: int
    cached: int  # of them, that lay in the cache
    seconds: float
    slowest: tuple[str, float]
    errors: list[str]


def shallow(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A model's config with so many layers at most; lists that tell of each layer are cut too."""
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int) or depth <= layers:
        return config
    cut = {key: value[:layers] for key, value in config.items() if isinstance(value, list) and len(value) == depth}
    return {**config, **cut, "num_hidden_layers": layers}


def need_of(plan: Plan, layers: int = LAYERS[-1]) -> Need:
    """The model without data and with so many layers at most, and what steps need of the engine."""
    config = shallow(plan.config, layers)
    nowhere, device = Path("none"), torch.device("meta")
    checkpoint = Checkpoint(
        path=nowhere, format="dummy", model_type=plan.model_type, config=config, generation_config={}, eos_ids=(),
        context_length=plan.context, vocab_size=plan.vocab, tokenizer_path=nowhere, gguf=None, name="none",
        architectures=(),
    )  # fmt: skip
    ops = table.invariant_table() if plan.ops == "invariant" else table.table()
    dtype = getattr(torch, plan.dtype)
    model = build_model(plan.model_type, config, BuildContext(ops, dtype, device), plan.context)
    model.load(checkpoint, None)
    backend = Backend(ops, model.attention_specs, device, dtype)
    page = plan.page or backend.page_size
    kv_dtype = getattr(torch, plan.kv_dtype)
    return Need(model, backend, ops, kv_dtype, page, plan.context, plan.running, plan.chunk, True)


def trace(plan: Plan) -> tuple[ahead.Notes, list[Shape]]:
    """Every launch of every class of steps, and the classes that launched something new."""
    few, many = (need_of_noted(plan, layers) for layers in LAYERS)
    every = step_shapes(plan.running, plan.chunk, plan.context)
    ends = [every[0], every[-1]]
    # Two layers stand for all where they launch what eight do, and take a quarter of the time.
    need = few if set(noted(few, ends)[0].found) == set(noted(many, ends)[0].found) else many
    return noted(need, every)


def need_of_noted(plan: Plan, layers: int) -> Need:
    """`need_of`, whose launches while the weights are prepared belong to no step."""
    with torch.inference_mode(), ahead.Notes().taken():
        return need_of(plan, layers)


def noted(need: Need, every: Sequence[Shape]) -> tuple[ahead.Notes, list[Shape]]:
    """The launches of these shapes, and which of them brought new ones."""
    notes, shapes = ahead.Notes(), []
    memory = need.model.memory
    pool = KVPool(memory, fewest_pages(memory, need.page_size), need.page_size, need.kv_dtype, torch.device("meta"))
    with torch.inference_mode(), notes.taken():
        for shape in every:
            before = len(notes.found)
            run_shape(need, pool, shape)
            if len(notes.found) > before:
                shapes.append(shape)
    return notes, shapes


def run(plan: Plan) -> Done:
    """Trace and compile."""
    begun = perf_counter()
    backend, arch, warp = plan.target
    ahead.aim(backend, arch, warp, plan.processors, Path(plan.cache))
    notes, shapes = trace(plan)
    compiled = ahead.compile_all(list(notes.found.values()), plan.processes)
    slowest = max(((one.kernel, one.seconds) for one in compiled), key=lambda one: one[1], default=("", 0.0))
    errors = [f"{one.kernel}: {one.error}" for one in compiled if one.error is not None]
    return Done(shapes, len(compiled), sum(one.cached for one in compiled), perf_counter() - begun, slowest, errors)


def main() -> int:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    os.nice(5)  # whoever loads the weights comes first
    sys.stdout.buffer.write(msgspec.json.encode(run(plan)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
