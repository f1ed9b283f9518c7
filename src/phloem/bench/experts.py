"""How fast a sparse model of random weights decodes on this processor alone, against what its memory could give.

The default is the shape of Qwen3-30B-A3B with fewer layers, and a vocabulary that is smaller in the same proportion.
The floor of a step is the bytes that it reads (of experts, those that its rows choose), at the rate at which this
machine reads memory, measured in turns with the steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from phloem.bench._report import context as machine_context
from phloem.bench._report import write_line
from phloem.bench.kernels import Limits
from phloem.bench.step import WARM, DecodeSteps
from phloem.bench.step import Options as StepOptions
from phloem.checkpoint.describe import describe
from phloem.core.config import Config, opt
from phloem.core.errors import BadRequest
from phloem.engine import worker
from phloem.engine.runner import ModelRunner
from phloem.kernels import native
from phloem.kernels._native_recorder import RecordedStep
from phloem.kvcache.pool import KVPool
from phloem.models._common import Decoder
from phloem.utils import machine

FAMILY = "qwen3_moe"


@dataclass(frozen=True)
class Options:
    layers: int = opt(6, "Layers that are made.")
    of_layers: int = opt(48, "Layers of the whole model: its vocabulary is made smaller in the same proportion.")
    hidden: int = opt(2048, "Hidden size.")
    experts: int = opt(128, "Experts of a layer.")
    chosen: int = opt(8, "Experts of a token.")
    inner: int = opt(768, "Inner size of an expert.")
    vocabulary: int = opt(151936, "Tokens of the whole model.")
    quantization: str = opt("int4", "Form of the weights.")
    batch: int = opt(1, "Rows of a decode step.")
    context: int = opt(128, "Tokens that each row has already.")
    steps: int = opt(64, "Decode steps of a turn.")
    turns: int = opt(7, "Turns.")
    threads: int | None = opt(None, "Compute threads; default: one per core.")
    output: str | None = opt(None, "File to append a JSON line to.")


def main(argv: list[str]) -> int:
    import tyro

    options = tyro.cli(Options, args=argv, prog="phloem bench experts", description=__doc__)
    if min(options.layers, options.of_layers, options.batch, options.context, options.steps, options.turns) < 1:
        raise BadRequest("layers, of_layers, batch, context, steps and turns must be at least 1")
    record = {**machine_context(), "processor": machine.cpu_name(), **measure(options)}
    _show(record)
    print(json.dumps(record))
    if options.output:
        write_line(Path(options.output), record)
    return 0


def shape(options: Options) -> dict[str, Any]:
    """The config.json of the model that is made."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": FAMILY,
        "vocab_size": max(512, options.vocabulary * options.layers // options.of_layers),
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "moe_intermediate_size": options.inner,
        "num_hidden_layers": options.layers,
        "num_experts": options.experts,
        "num_experts_per_tok": options.chosen,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }


def measure(options: Options) -> dict[str, Any]:
    """Raises BadRequest where the native kernels are missing."""
    try:
        native.runtime()
    except native.Unavailable as error:
        raise BadRequest(f"bench experts needs the native kernels: {error}") from error
    length = options.context + WARM + options.steps + 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(shape(options)))
        settings = {
            "model_path": str(path), "load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu",
            "quantization": options.quantization, "threads": options.threads, "kt_num_gpu_experts": 0,
            "max_running_requests": options.batch, "max_total_tokens": (options.batch + 1) * (length + 64),
        }  # fmt: skip
        config = Config.from_flat(settings)
        begun = perf_counter()
        built = worker.build(config, describe(str(path), "dummy"), lambda phase, seconds: None)
    loaded = perf_counter() - begun
    runner = built.runner
    assert isinstance(runner, ModelRunner)
    try:
        record = {"load_seconds": loaded, "weight_bytes": runner.model.weight_bytes, **_turns(runner, options)}
        return {**{name: getattr(options, name) for name in vars(options) if name != "output"}, **record}
    finally:
        runner.close()


def step_bytes(runner: ModelRunner, options: Options) -> dict[str, int]:
    """What a decode step reads: of experts, those that so many rows choose when all are as likely."""
    found = {"experts": 0, "others": 0, "head": 0}
    model = runner.model
    assert isinstance(model, Decoder)
    share = 1 - (1 - options.chosen / options.experts) ** options.batch
    for weight in model.index.weights:
        if weight.role != "matrix" or weight is model.embed.weight:
            continue
        if weight is model.head.weight:
            found["head"] = weight.value.native.screens.bytes_read(weight.value)
        elif weight.experts:
            found["experts"] += int(weight.value.nbytes * share)
        else:
            found["others"] += int(weight.value.nbytes)
    each = sum(KVPool.bytes_per_token(runner.pool.memory, runner.pool.dtype))
    found["kv"] = each * options.batch * (options.context + WARM + options.steps // 2)
    return found


def _turns(runner: ModelRunner, options: Options) -> dict[str, Any]:
    steps = DecodeSteps(runner, StepOptions(batch=options.batch, context=options.context, steps=options.steps))
    size, limits = step_bytes(runner, options), Limits()
    total = sum(size.values())
    # A buffer as large as what a step of the whole model reads: a few layers' weights would partly stay in a cache.
    buffer = total * options.of_layers // options.layers
    turns: list[tuple[float, float]] = []
    for _ in range(options.turns):
        before = limits.read(buffer)
        seconds = steps.seconds()
        turns.append((seconds, statistics.mean([before, limits.read(buffer)]) * 1e9))
    seconds, read = (statistics.median(values) for values in zip(*turns, strict=True))
    whole = seconds * options.of_layers / options.layers
    return {
        "step_ms": seconds * 1e3,
        "tok_per_s": options.batch / seconds,
        "whole_tok_per_s": options.batch / whole,
        "step_bytes": size,
        "read_gb_per_s": read / 1e9,
        "floor_ms": total / read * 1e3,
        "of_floor": statistics.median(total / rate / took for took, rate in turns),
        "ops": _ops(runner, steps, options),
    }


def _ops(runner: ModelRunner, steps: DecodeSteps, options: Options) -> dict[str, float]:
    """Of the recorded decode step: milliseconds of each op, on all of its threads."""
    steps.run(0, WARM)
    found: dict[str, float] = {}
    for way in runner.recorded:
        step = way.graphs.get(options.batch)
        if found or step is None or not isinstance(step.graph, RecordedStep):
            continue
        for name, _, nanoseconds in step.graph.replay_timed():
            found[name] = round(found.get(name, 0.0) + nanoseconds / 1e6, 3)
    return dict(sorted(found.items(), key=lambda item: -item[1])[:8])


def _show(record: dict[str, Any]) -> None:
    size = {name: f"{value / 1e6:.0f}" for name, value in record["step_bytes"].items()}
    print(f"{record['processor']}, {record['layers']} of {record['of_layers']} layers, {record['quantization']}")
    print(
        f"decode of {record['batch']} rows: {record['step_ms']:.2f} ms a step; it reads "
        f"{', '.join(f'{value} MB of {name}' for name, value in size.items())}; "
        f"floor {record['floor_ms']:.2f} ms at {record['read_gb_per_s']:.1f} GB/s: {record['of_floor']:.2f} of it"
    )
    print(f"all {record['of_layers']} layers: {record['whole_tok_per_s']:.1f} tok/s; ops in ms: {record['ops']}")
