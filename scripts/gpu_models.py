"""Models with dummy weights for scripts/gpu_check.py: shapes, building, correctness of whole tiny models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu_kernels import Outcome, distance
from torch import Tensor

from phloem.attention.reference import Backend as TableBackend
from phloem.attention.triton import Backend as TritonBackend
from phloem.core.batch import Batch
from phloem.core.memory import groups_of
from phloem.engine.forward import run_forward
from phloem.engine.inputs import Step, StepInputs
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.recorded.pieces import PieceGraphs
from phloem.engine.transfer import LastTokens
from phloem.engine.wanted import Wanted
from phloem.kernels import reference_formats as formats
from phloem.kernels.graph_cuda import Recorder
from phloem.kernels.ops import Ops, WeightSource
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.models import FAMILIES
from phloem.platforms._facts import StepFacts

_COMMON = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "hidden_act": "silu"}
LLAMA_8B = {
    **_COMMON,
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN3_30B_A3B = {
    **_COMMON,
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
_TINY = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
TINY_LLAMA = {**LLAMA_8B, **_TINY}
TINY_MOE = {**QWEN3_30B_A3B, **_TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_SIGMOID = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0, "rms_norm_eps": 1e-6},
    **{"hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False},
}
# Routers with a sigmoid and a correction; experts in groups, and latent attention.
TINY_GLM = {**_TINY, **_SIGMOID, "model_type": "glm4_moe", "use_qk_norm": True, "n_group": 1, "topk_group": 1}
TINY_GLM["partial_rotary_factor"] = 0.5
TINY_DEEPSEEK = {
    **{**_TINY, **_SIGMOID, "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "num_key_value_heads": 4},
    **{"q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
}


@dataclass
class Fp8Experts:
    """Stacked experts in float8 with a scale per 128 x 128 block, [E, M, N] and [E, M / 128, N / 128]."""

    values: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


def random_weights(device: torch.device, float8: torch.dtype | None, ops: Ops) -> Ops:
    """`ops` with weights drawn on the device in place of loaded ones; with `float8`, matrices in that type.

    The embedding, the head and the router stay as they are, as in published FP8 checkpoints.
    """

    def draw(parts: Sequence[WeightSource], dtype: torch.dtype) -> Tensor:
        rows, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
        return torch.empty((rows, width), dtype=dtype, device=device).normal_(0, width**-0.5)

    from phloem.kernels.triton import table
    from phloem.kernels.triton.weights import Float8Rows

    def linear_weight(parts: Sequence[WeightSource], dtype: torch.dtype, _: torch.device) -> Any:
        dense = draw(parts, dtype)
        kept = any(name in parts[0].name for name in ("embed_tokens", "lm_head", ".gate.weight"))
        if float8 is None or kept:
            return dense
        return Float8Rows(*formats.quantise_fp8(dense, float8))

    def expert_weights(parts: Sequence[WeightSource], dtype: torch.dtype, _: torch.device, experts: int) -> Any:
        dense = draw(parts, dtype)
        if float8 is None:
            return dense
        stacked = dense.unflatten(0, (experts, -1))
        blocks = [formats.quantise_blocks(one, float8) for one in stacked]
        return Fp8Experts(torch.stack([values for values, _ in blocks]), torch.stack([scale for _, scale in blocks]))

    drawn = replace(ops, prepare_linear=linear_weight, prepare_experts=expert_weights)
    return drawn if float8 is None else replace(drawn, linear=table.table().linear, moe=_fp8_moe(ops))


def _fp8_moe(ops: Ops) -> Any:
    from phloem.kernels.triton import moe

    def run(x: Tensor, logits: Tensor, gate_up: Any, down: Any, top_k: int, renormalise: bool) -> Tensor:
        weights, ids = moe.route(logits, top_k, renormalise)
        return moe.experts(x, weights, ids, gate_up.values, down.values, scales=(gate_up.scale, down.scale))

    return run


class Again:
    """Stands in for a recorder in a dry run: a replay runs the step again and copies its result over the first one."""

    def record(self, fn: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        result = fn()
        return SimpleNamespace(bytes=0, replay=lambda: result.copy_(fn())), result

    def record_pieces(self, fn: Callable[[Any], tuple[Tensor, ...]]) -> tuple[Any, tuple[Tensor, ...]]:
        def cut(run: bool) -> Any:
            def call(between: Callable[[], None], more: bool = True) -> None:
                if run:
                    between()

            call.hold = lambda x: x  # type: ignore[attr-defined]
            return call

        def replay() -> None:
            for old, new in zip(result, fn(cut(True)), strict=True):
                old.copy_(new)

        result = fn(cut(False))
        return SimpleNamespace(bytes=0, replay=replay), result


class Dummy:
    """A model with random weights, its backend and its pool."""

    def __init__(
        self,
        config: dict[str, Any],
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        pages: int,
        float8: torch.dtype | None = None,
        triton: bool = True,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.device, self.dtype = config, device, dtype
        self.ops = random_weights(device, float8, ops)
        family = FAMILIES.module(config["model_type"])
        self.model = family.build(config, BuildContext(self.ops, dtype, device), config["max_position_embeddings"])
        self.model.load(_checkpoint(config), None)
        specs = self.model.attention_specs
        self.backend = (TritonBackend if triton else TableBackend)(self.ops, specs, device, dtype)
        self.page_size = self.backend.page_size
        memory = self.model.memory
        self.pool = KVPool(memory, [pages + 1] * len(groups_of(memory)), self.page_size, dtype, device)

    def fill_cache(self) -> None:
        """Random KV: zeros would be too easy, for the numbers and for the clocks."""
        for spec in self.model.attention_specs:
            self.pool.keys[spec.pool].normal_()
            self.pool.values[spec.pool].normal_()

    def recorder(self) -> Any:
        return Recorder(self.device) if self.device.type == "cuda" else Again()

    def graphs(self, limit: int, context: int) -> DecodeGraphs:
        pages = -(-context // self.page_size)
        return DecodeGraphs(self.recorder(), self.model, self.backend, self.pool, StepFacts(), limit, pages)

    def pieces(self, limit: int) -> PieceGraphs:
        return PieceGraphs(self.recorder(), self.model, self.backend, self.pool, limit)

    def forward(self, inputs: StepInputs) -> Tensor:
        return run_forward(self.model, self.backend, self.pool, inputs, inputs.logit_index)

    def batch(self, queries: list[int], lengths: list[int]) -> Batch:
        """A step of rows on scattered pages, with random tokens; each row's pages follow from its number alone."""
        width = -(-max(lengths) // self.page_size)
        order = np.random.default_rng(0).permutation(self.pool.num_pages[0] - 1) + 1
        table = order[: len(lengths) * width].reshape(len(lengths), width).astype(np.int32)
        ids = np.random.default_rng(1).integers(0, self.config["vocab_size"], sum(queries)).astype(np.int32)
        new, rows = np.array(queries, np.int32), len(lengths)
        slots = np.arange(rows, dtype=np.int32)
        tables = (table,) * len(self.pool.groups)
        return Batch(0, slots, new, np.array(lengths, np.int32) - new, ids, tables, np.ones(rows, np.int32))

    def inputs(self, queries: list[int], lengths: list[int]) -> StepInputs:
        return self.step(queries, lengths).inputs

    def step(self, queries: list[int], lengths: list[int]) -> Step:
        batch = self.batch(queries, lengths)
        return Step(batch, Wanted.of(batch), self.pool, LastTokens(len(lengths), self.device, False, None))


def _checkpoint(config: dict[str, Any]) -> Any:
    from phloem.checkpoint.describe import Checkpoint

    nowhere = Path("dummy")
    return Checkpoint(
        path=nowhere,
        format="dummy",
        model_type=config["model_type"],
        config=config,
        generation_config={},
        eos_ids=(),
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        tokenizer_path=nowhere,
        gguf=None,
        name=config["model_type"],
        architectures=(),
    )


@dataclass(frozen=True)
class Work:
    """What one decode step must move and compute at the least."""

    weight_bytes: float
    kv_bytes: float
    flops: float

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        return max((self.weight_bytes + self.kv_bytes) / bytes_per_second, self.flops / flops_per_second)


def decode_work(config: dict[str, Any], rows: int, context: int, weight_size: float, kv_size: float) -> Work:
    """Floors of a decode step: each weight that the rows need is read once, each row's KV once.

    The head is counted in 16 bits. Of E experts, rows that choose k each at random touch E (1 - (1 - k / E)^rows).
    """
    hidden, layers, head = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    top = config["vocab_size"] * hidden
    if "num_experts" in config:
        count, k = config["num_experts"], config["num_experts_per_tok"]
        one = 3 * hidden * config["moe_intermediate_size"]
        touched, active = count * (1 - (1 - k / count) ** rows) * one, k * one
    else:
        touched = active = 3 * hidden * config["intermediate_size"]
    kv = 2 * layers * kv_heads * head * context
    flops = 2 * rows * (layers * (attention + active) + top) + 2 * rows * 2 * layers * heads * head * context
    weights = layers * (attention + touched) * weight_size + top * 2
    return Work(weights, rows * kv * kv_size, flops)


def prefill_flops(config: dict[str, Any], tokens: int) -> float:
    """Products of a whole prompt of `tokens`, causal attention counted by half, the head for one token."""
    one = decode_work(config, 1, 0, 2, 2).flops - 2 * config["vocab_size"] * config["hidden_size"]
    heads, head, layers = config["num_attention_heads"], config["head_dim"], config["num_hidden_layers"]
    return tokens * one + 2 * layers * heads * head * tokens * tokens + 2 * config["vocab_size"] * config["hidden_size"]


TINY = {str(config["model_type"]): config for config in (TINY_LLAMA, TINY_MOE, TINY_GLM, TINY_DEEPSEEK)}


def check_models(device: torch.device, dtype: torch.dtype, triton_ops: Ops, only: str = "") -> list[Outcome]:
    """Tiny models: Triton table and backend against the reference table in float32, and graphs against eager steps.
    `only`: of these, by type, with commas."""
    outcomes: list[Outcome] = []
    limit = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for config in (TINY[name] for name in TINY if not only or name in only.split(",")):
        begin = time.perf_counter()
        name = f"tiny {config['model_type']}, {str(dtype).removeprefix('torch.')}"
        with torch.inference_mode():
            ours = Dummy(config, triton_ops, device, dtype, 64)
            want = Dummy(config, Ops(), device, torch.float32, 64, triton=False)
            _same_weights(ours, want)
            prefill, decode = ours.inputs([37, 5], [37, 5]), ours.inputs([1, 1], [38, 6])
            errors: list[float] = []
            for inputs in (prefill, decode):
                got, expected = (one.model.head(one.forward(inputs)) for one in (ours, want))
                errors.append(distance(got, expected))
            worst = max(errors)
            outcomes.append(Outcome(f"{name}: logits", worst <= limit, worst, limit, time.perf_counter() - begin))
            outcomes.append(_check_graphs(name, ours))
            deep = Dummy({**config, "num_hidden_layers": 3}, triton_ops, device, dtype, 64)
            outcomes.append(_check_pieces(name, deep, limit))
    return outcomes


def _check_graphs(name: str, ours: Dummy) -> Outcome:
    """Two rows of a bucket of their own, then three rows of one padded to a larger bucket."""
    begin, errors = time.perf_counter(), [0.0]
    graphs = ours.graphs(5, 64)
    graphs.graphs.sizes.remove(3)
    for lengths in ([38, 6], [38, 6, 20]):
        eager = ours.forward(ours.inputs([1] * len(lengths), lengths))
        replayed = None
        for _ in range(8 if ours.device.type == "cuda" else 3):  # a bucket is recorded when it is wanted again
            replayed = graphs.run(ours.step([1] * len(lengths), lengths), lambda: None)
        if replayed is None:
            reason = graphs.graphs.refusal(len(lengths)) or "not recorded"
            return Outcome(f"{name}: graph", False, math.inf, 0.0, time.perf_counter() - begin, reason)
        errors.append(distance(replayed, eager))
    return Outcome(f"{name}: graph equals eager", max(errors) <= 1e-3, max(errors), 1e-3, time.perf_counter() - begin)


def _check_pieces(name: str, ours: Dummy, limit: float) -> Outcome:
    """Prefill, chunks and mixed steps at the edges of a bucket (32 tokens), in pieces and eagerly.

    A padded product may add in another order, so the bound is that of the type; and in 16 bits a router may choose
    another expert for it, so there only full buckets count. All buckets share one memory pool and are recorded before
    any runs, so that a buffer wrongly shared between them would show.
    """
    begin, errors = time.perf_counter(), [0.0]
    pieces = ours.pieces(48)
    if ours.device.type == "cpu":  # the interpreter takes seconds for each
        pieces.graphs.sizes[:] = [8, 32, 48]
    pieces.graphs.record_all()
    full_only = "num_experts" in ours.config and ours.dtype != torch.float32
    steps = (
        ([27, 5], [27, 5]),
        ([1, 1, 31], [38, 6, 40]),
        ([1, 7], [20, 30]),
        ([31], [31]),
        ([48], [60]),
        ([32], [32]),
    )
    for queries, lengths in steps if ours.device.type == "cuda" else steps[:3]:
        if full_only and sum(queries) not in pieces.graphs.sizes:
            continue
        step = ours.step(queries, lengths)
        got = pieces.run(step, lambda: None)
        if got is None:
            reason, took = pieces.graphs.refusal(sum(queries)) or "not recorded", time.perf_counter() - begin
            if "does not run between pieces" in reason:  # such models run these steps eagerly
                return Outcome(f"{name}: pieces", True, 0.0, 0.0, took, reason)
            return Outcome(f"{name}: pieces", False, math.inf, 0.0, took, reason)
        errors.append(distance(got, ours.forward(step.inputs)))
    if pieces.run(ours.step([49], [49]), lambda: None) is not None:
        errors.append(math.inf)  # there is no such bucket
    worst = max(errors)
    return Outcome(f"{name}: pieces equal eager", worst <= limit, worst, limit, time.perf_counter() - begin)


def _same_weights(source: Dummy, target: Dummy) -> None:
    target.model.update_weights((name, source.model.get_weight(name).float()) for name in source.model.weight_names())
