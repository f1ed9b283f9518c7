"""A norm inside the linear layer behind it, and a residual inside the one before it: the bits of the separate ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import levels, make_source, needs_native
from model_support import PROMPT, Engine

from phloem.checkpoint.families import family
from phloem.kernels import native
from phloem.kernels import reference as ref
from phloem.kernels.ops import Norm, Ops
from phloem.layers.context import BuildContext
from phloem.layers.linear import Linear
from phloem.layers.norm import RMSNorm
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = needs_native
CPU = torch.device("cpu")
EPS = 1e-5
FAMILIES = ["llama-tied", "llama-bias", "qwen2", "qwen3-bias", "mistral", "qwen3_moe-dense-layer", "gemma3_text-caps"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[(level, threads) for level in levels() for threads in (1, 2)], ids=str)
def ops(request: Any) -> Iterator[Ops]:
    level, threads = request.param
    yield native.table(threads, level)
    native.runtime().library.set_level(None)


def apart(table: Ops) -> Ops:
    """The same kernels, one op after another."""
    linear: Any = table.linear
    return dataclasses.replace(table, linear=linear.__self__.apart)


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_1"), ("Q4_K", "Q6_K"), ("dense", "dense")])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
def test_norm_inside_gives_the_bits_of_one_before(ops: Ops, kinds: tuple[str, str], rows: int, activation: str) -> None:
    blocks = 2 if kinds[0] == "Q4_K" else 5
    weight = ops.prepare_linear([make_source(kind, 32, blocks, i) for i, kind in enumerate(kinds)], torch.bfloat16, CPU)
    n = weight.in_features
    x, norm = random(rows, n + 3)[:, :n], random(n, seed=1)
    bias = random(64, seed=2) if rows != 2 else None
    for residual in (None, random(rows, n, seed=3)):
        got, total = ops.linear(x, weight, bias, norm=Norm(norm, EPS), residual=residual, gate=activation)
        want_total = x if residual is None else x + residual
        normed = ops.rms_norm(want_total, norm, EPS)
        if residual is not None:
            assert torch.equal(ops.add_rms_norm(x, residual, norm, EPS)[0], normed)
        want, _ = ops.linear(normed, weight, bias, gate=activation)
        assert total is not None and torch.equal(got, want) and torch.equal(total, want_total)
        torch.testing.assert_close(normed, ref.rms_norm(want_total, norm, EPS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 15, 33, 70, 111, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widths_that_fill_no_vector(ops: Ops, columns: int, dtype: torch.dtype) -> None:
    source = dataclasses.replace(make_source("dense", 20, 4, 1), shape=(20, columns))
    source.values = random(20, columns, seed=9)
    weight = ops.prepare_linear([source], dtype, CPU)
    x, residual, norm = random(3, columns), random(3, columns, seed=1), random(columns, seed=2)
    got, total = ops.linear(x, weight, norm=Norm(norm, EPS), residual=residual)
    normed, want_total = ops.add_rms_norm(x, residual, norm, EPS)
    assert total is not None and torch.equal(got, ops.linear(normed, weight)[0]) and torch.equal(total, want_total)
    one, its_total = ops.linear(x[1:2], weight, norm=Norm(norm, EPS), residual=residual[1:2])
    assert its_total is not None and torch.equal(one, got[1:2]) and torch.equal(its_total, total[1:2])


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_residual_after(ops: Ops, rows: int) -> None:
    weight = ops.prepare_linear([make_source("Q4_0", 40, 3, 1)], torch.bfloat16, CPU)
    x, residual, bias = random(rows, 96), random(rows, 40, seed=1), random(40, seed=2)
    for added in (None, bias):
        got, rest = ops.linear(x, weight, added, add=residual)
        assert (rest is None) == (rows == 1)
        assert torch.equal(got if rest is None else got + rest, ops.linear(x, weight, added)[0] + residual)


def test_what_does_not_fit_is_refused() -> None:
    ops = native.table(1)
    weight = ops.prepare_linear([make_source("Q4_0", 40, 3, 1)], torch.bfloat16, CPU)
    x = random(1, 96)
    with pytest.raises(ValueError, match=r"cannot add \[2, 96\]"):
        ops.linear(x, weight, norm=Norm(random(96), EPS), residual=random(2, 96))
    with pytest.raises(TypeError, match="norm weight"):
        ops.linear(x, weight, norm=Norm(random(95), EPS))
    with pytest.raises(ValueError, match=r"residual \[1, 96\] to \[1, 40\]"):
        ops.linear(x, weight, add=x)


def test_a_layer_passes_its_options_to_the_table() -> None:
    seen: list[dict[str, Any]] = []

    def linear(x: Any, weight: Any, bias: Any, **options: Any) -> Any:
        seen.append({name: value for name, value in options.items() if value is not None and value != ""})
        return x, options["add"]

    ctx = BuildContext(dataclasses.replace(Ops(), linear=linear), torch.float32, CPU)
    norm, layer = RMSNorm(ctx.child("norm"), 6, EPS), Linear(ctx, 6, {"gate": 6, "up": 6})
    norm.weight.value, layer.weight.value = random(6), random(12, 6, seed=1)
    x, residual = random(2, 6, seed=2), random(2, 6, seed=3)
    layer(x)
    layer(x, norm=norm, residual=residual, gate="silu")
    assert layer(x, add=residual)[1] is residual
    assert seen == [{}, {"norm": Norm(norm.weight.value, EPS), "residual": residual, "gate": "silu"}, {"add": residual}]


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("threads", [1, 2])
def test_models_give_the_same_bits(variant: str, threads: int, tmp_path: Path) -> None:
    """Prompts, single rows and batches of every family."""
    name, _, differs = variant.partition("-")
    path = tiny_checkpoint(name, tmp_path, **(family(name).variants[differs] if differs else {}))
    table = native.table(threads)
    norms: list[bool] = []

    def linear(*args: Any, **options: Any) -> Any:
        if options.get("norm") is not None:
            norms.append(True)
        return table.linear(*args, **options)

    results: list[list[torch.Tensor]] = []
    for ops in (dataclasses.replace(table, linear=linear), apart(table)):
        engine = Engine(path, torch.bfloat16, ops=ops, kv_dtype=torch.bfloat16)
        pages, more = engine.pages(len(PROMPT)), engine.pages(len(PROMPT))
        steps = [engine.step([(PROMPT[:9], pages, 0)], every=True), engine.step([(PROMPT[9:10], pages, 9)])]
        steps.append(engine.step([(PROMPT[10:11], pages, 10), (PROMPT[:4], more, 0)]))
        results.append(steps)
        if not norms:
            raise AssertionError("the fused op was not asked for")
        model: Any = engine.model
        layers = model.layers
        dense = sum(not hasattr(layer.mlp, "router") for layer in layers)
        assert len(norms) == 3 * (len(layers) + dense)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    # One row beside others and alone: the sum is made in other places, to the same bits.
    engine = Engine(path, torch.bfloat16, ops=table, kv_dtype=torch.bfloat16)
    pages, more = engine.pages(len(PROMPT)), engine.pages(len(PROMPT))
    engine.step([(PROMPT[:9], pages, 0)])
    engine.step([(PROMPT[:9], more, 0)])
    alone = engine.step([(PROMPT[9:10], pages, 9)])
    assert torch.equal(engine.step([(PROMPT[9:10], more, 9), (PROMPT[9:10], more, 9)])[:1], alone)
