"""How decode steps of models of random weights scale: against what memory gives, and as their contexts grow.

Sparse models and latent attention are compared with the bytes that a step must read, at the rate at which this machine
reads memory, measured in turns with the steps. Recurrent layers and hybrids decode at several contexts: their
recurrent layers keep a state of fixed size, so a step may grow by its attention alone. `llama` is there to compare.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from phloem.bench._report import context as machine_context
from phloem.bench._report import write_line
from phloem.bench.kernels import Limits
from phloem.bench.step import DecodeSteps
from phloem.bench.step import Options as StepOptions
from phloem.checkpoint.describe import describe
from phloem.core.config import Config, opt
from phloem.core.errors import BadRequest
from phloem.core.memory import State
from phloem.engine import worker
from phloem.engine.runner import ModelRunner
from phloem.kernels import native
from phloem.kernels._native_recorder import RecordedStep
from phloem.kvcache.layouts import layout_of
from phloem.layers.weight import Layer
from phloem.models._common import Decoder
from phloem.utils import machine

# Of recorded steps, what belongs to recurrent mixers but for linear layers and norms.
RECURRENT = frozenset((
    "read_states", "write_states", "causal_conv", "mamba2_scan", "selective_scan", "gated_delta", "step_sizes",
    "decays", "delta_gates", "repeat_heads",
))  # fmt: skip
BUFFER = 1 << 30  # bytes of memory that are read at most to measure its rate: more than any cache has
_USUAL: dict[str, Any] = {
    "vocab_size": 32000, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "eos_token_id": 1, "bos_token_id": 1, "hidden_act": "silu",
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "use_bias": False, "use_conv_bias": True, "conv_kernel": 4, "chunk_size": 128, "layer_norm_epsilon": 1e-5,
    "time_step_limit": [0.0, 1e30], "residual_in_fp32": True,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
# Sparse ones of about 1B weights, of which a token uses a fifth; the others of 120M to 200M.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "intermediate_size": 3072, "moe_intermediate_size": 512, "num_experts": 32,
        "num_experts_per_tok": 4, "norm_topk_prob": True,
    },
    "deepseek_v3": {
        **_LATENT, "hidden_size": 1024, "num_hidden_layers": 17, "num_attention_heads": 16, "intermediate_size": 3072,
        "moe_intermediate_size": 512, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    },
    "llama": {
        "hidden_size": 768, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 4,
        "head_dim": 64, "intermediate_size": 2048,
    },
    "qwen3_next": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128, "intermediate_size": 2048, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "linear_num_key_heads": 8,
        "linear_num_value_heads": 16, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "mamba2": {
        **_MAMBA, "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "n_groups": 1,
        "state_size": 128, "expand": 2,
    },
    "falcon_h1": {
        "hidden_size": 768, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 4,
        "head_dim": 64, "intermediate_size": 2048, "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64,
        "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 128,
    },
    "kimi_linear": {
        **_LATENT, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 16, "intermediate_size": 2048,
        "moe_intermediate_size": 512, "num_experts": 8, "num_experts_per_tok": 2, "linear_num_heads": 12,
        "linear_head_dim": 64, "model_max_length": 16384,
    },
}  # fmt: skip
CLASSES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
}


@dataclass(frozen=True)
class Options:
    shapes: tuple[str, ...] = opt(tuple(SHAPES), f"Which of {', '.join(SHAPES)}.")
    contexts: tuple[int, ...] = opt((256, 2048, 8192), "Tokens that each row has already.")
    quantization: str = opt("int4", "Form of the weights; 'none': bfloat16.")
    batch: int = opt(1, "Rows of a decode step.")
    steps: int = opt(32, "Decode steps of a turn.")
    turns: int = opt(5, "Turns, each with every context.")
    threads: int | None = opt(None, "Compute threads; default: one per core.")
    output: str | None = opt(None, "File to append JSON lines to, one for each shape.")


def main(argv: list[str]) -> int:
    import tyro

    options = tyro.cli(Options, args=argv, prog="phloem bench shapes", description=__doc__)
    if min(options.batch, options.steps, options.turns, *options.contexts, len(options.contexts)) < 1:
        raise BadRequest("batch, steps, turns and contexts must be at least 1")
    unknown = sorted(set(options.shapes) - set(SHAPES))
    if unknown:
        raise BadRequest(f"shapes: unknown: {', '.join(unknown)}; known: {', '.join(SHAPES)}")
    head = {**machine_context(), "processor": machine.cpu_name()}
    print(_titles(options.contexts))
    for name in options.shapes:
        record = {**head, **measure(name, SHAPES[name], options)}
        print(_row(record), flush=True)
        if options.output:
            write_line(Path(options.output), record)
    return 0


def measure(name: str, shape: dict[str, Any], options: Options) -> dict[str, Any]:
    """Raises BadRequest where the native kernels are missing."""
    try:
        native.runtime()
    except native.Unavailable as error:
        raise BadRequest(f"bench shapes needs the native kernels: {error}") from error
    length = max(options.contexts) + 16 + options.steps + 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**_USUAL, **shape, "model_type": name, "architectures": [CLASSES[name]]}))
        settings = {
            "model_path": str(path), "load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu",
            "quantization": None if options.quantization == "none" else options.quantization,
            "threads": options.threads, "max_running_requests": options.batch,
            "max_total_tokens": (options.batch + 1) * (length + 64),
        }  # fmt: skip
        built = worker.build(Config.from_flat(settings), describe(str(path), "dummy"), lambda phase, seconds: None)
    runner = built.runner
    assert isinstance(runner, ModelRunner)
    try:
        chosen = (
            int(shape.get("num_experts_per_tok", 0)),
            int(shape.get("num_experts", shape.get("n_routed_experts", 0))),
        )
        facts = {"shape": name, "quantization": options.quantization, "batch": options.batch, "steps": options.steps}
        return {**facts, **_turns(runner, chosen, options)}
    finally:
        runner.close()


def step_bytes(runner: ModelRunner, chosen: tuple[int, int], batch: int, context: int) -> dict[str, int]:
    """What a decode step reads: of experts, those that so many rows choose when all are as likely; states are written
    too.

    Args:
        chosen: experts of a token, and of a layer.
    """
    found = {"experts": 0, "others": 0, "head": 0, "kv": 0, "states": 0}
    model = runner.model
    assert isinstance(model, Decoder)
    for weight in model.index.weights:
        if weight.in_own_type:  # a matrix that no product of a whole step takes: kv_b_proj of latent attention
            found["others"] += int(weight.value.nbytes)
        if weight.role != "matrix" or (weight is model.embed.weight and weight is not model.head.weight):
            continue
        if weight is model.head.weight:
            found["head"] = weight.value.native.screens.bytes_read(weight.value)
        elif weight.experts:
            found["experts"] += int(weight.value.nbytes * (1 - (1 - chosen[0] / chosen[1]) ** batch))
        else:
            found["others"] += int(weight.value.nbytes)
    for spec in runner.pool.memory:
        size = layout_of(spec, runner.pool.dtype).bytes * batch
        if isinstance(spec, State):
            found["states"] += 2 * size
        else:
            found["kv"] += size * context
    return found


def _recorded_seconds(runner: ModelRunner, batch: int) -> float | None:
    """Seconds in the ops that read, move and write states, of the last step replayed once more; None: steps run
    eagerly."""
    for way in runner.recorded:
        step = way.graphs.get(batch)
        if step is not None and isinstance(step.graph, RecordedStep):
            return sum(took for name, _, took in step.graph.replay_timed() if name in RECURRENT) / 1e9
    return None


class _Mixers:
    """Seconds in the recurrent mixers of a model, where its steps run eagerly."""

    def __init__(self, model: Any) -> None:
        self.seconds, self.count = 0.0, 0
        for layer in _recurrent(model.layers):
            self._time(layer)
            self.count += 1

    def _time(self, layer: Any) -> None:
        attend = layer.attend

        def timed(*arguments: Any) -> Any:
            begun = perf_counter()
            try:
                return attend(*arguments)
            finally:
                self.seconds += perf_counter() - begun

        layer.attend = timed


def _recurrent(values: Any) -> list[Any]:
    """Mixers that keep a state and nothing else, once each."""
    found: dict[int, Any] = {}
    for value in values:
        if isinstance(value, Layer):
            # Only mixers have an `attend` and say what they keep; one of two mixers keeps what both keep.
            known = vars(type(value))
            own = [value] if "attend" in known and "memory" in known and isinstance(value.memory, State) else []  # pyright: ignore[reportAttributeAccessIssue]
            found |= {id(one): one for one in own or _recurrent(vars(value).values())}
        elif isinstance(value, list | tuple):
            found |= {id(one): one for one in _recurrent(value)}
    return list(found.values())


def _turns(runner: ModelRunner, chosen: tuple[int, int], options: Options) -> dict[str, Any]:
    model = runner.model
    assert isinstance(model, Decoder)
    mixers, limits = _Mixers(model), Limits()
    buffer = min(BUFFER, model.weight_bytes)
    steps = {
        context: DecodeSteps(runner, StepOptions(batch=options.batch, context=context, steps=options.steps))
        for context in options.contexts
    }
    times: dict[int, list[tuple[float, float, float]]] = {context: [] for context in steps}
    for _ in range(options.turns):
        for context, decode in steps.items():
            rate = limits.read(buffer) * 1e9
            decode.run(0, 16)
            mixers.seconds = 0.0
            begun = perf_counter()
            decode.run(16, options.steps)
            took = (perf_counter() - begun) / options.steps
            mixing = _recorded_seconds(runner, options.batch) if mixers.count else None
            mixing = mixers.seconds / options.steps if mixing is None else mixing
            times[context].append((took, mixing, (rate + limits.read(buffer) * 1e9) / 2))
    found: list[dict[str, Any]] = []
    for context, seen in times.items():
        took, mixing, rate = (statistics.median(values) for values in zip(*seen, strict=True))
        size = step_bytes(runner, chosen, options.batch, context + 16 + options.steps // 2)
        total = sum(size.values())
        found.append({
            "context": context, "step_ms": took * 1e3, "recurrent_ms": mixing * 1e3 if mixers.count else None,
            "step_bytes": size, "read_gb_per_s": rate / 1e9, "floor_ms": total / rate * 1e3,
            "of_floor": statistics.median(total / rate / took for took, _, rate in seen),
        })  # fmt: skip
    weights = sum(math.prod(shape) for weight in model.index.weights for shape in weight.shapes)
    return {
        "weights": weights, "weight_bytes": model.weight_bytes, "contexts": found,
        "growth": found[-1]["step_ms"] / found[0]["step_ms"],
        "recurrent_growth": found[-1]["recurrent_ms"] / found[0]["recurrent_ms"] if mixers.count else None,
    }  # fmt: skip


def _titles(contexts: tuple[int, ...]) -> str:
    steps = " ".join(f"{f'at {context}':>9}" for context in contexts)
    return f"{'shape':<12} {'weights':>8} {'of floor':>8} {steps} {'growth':>7} {'recurrent part':>20} {'growth':>7}"


def _row(record: dict[str, Any]) -> str:
    found = record["contexts"]
    steps = " ".join(f"{one['step_ms']:6.2f} ms" for one in found)
    part, growth = "-", "-"
    if record["recurrent_growth"] is not None:
        part = f"{found[0]['recurrent_ms']:.2f} to {found[-1]['recurrent_ms']:.2f} ms"
        growth = f"{record['recurrent_growth']:.2f}"
    head = f"{record['shape']:<12} {record['weights'] / 1e6:7.0f}M {found[0]['of_floor']:8.2f}"
    return f"{head} {steps} {record['growth']:7.2f} {part:>20} {growth:>7}"
