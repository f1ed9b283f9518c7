"""The Pallas kernel over pages, interpreted, against the reference; and compiled for TPUs where their compiler is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from phloem.attention import AttentionNeed, choose
from phloem.kernels import reference_attention
from phloem.kernels.calls import AttentionCall, PagedBatch
from phloem.kernels.ops import Ops
from phloem.layers.context import AttentionSpec

pytestmark = pytest.mark.slow
jax = pytest.importorskip("jax")
PAGES, CPU = 64, torch.device("cpu")

# (tokens of each row, new ones of each row, kv heads, query heads of each, head size, value size, page size, table)
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "rows of one token": (([5, 1, 33, 64], [1, 1, 1, 1], 2, 3, 16, 16, 4, 16), {}),
    "a prompt's chunk in a window": (([70], [37], 2, 3, 16, 24, 4, 20), {"window": 9}),
    "several blocks of queries": (([150], [150], 1, 2, 8, 8, 4, 40), {"softcap": 5.0, "sinks": True}),
    "sinks and windows": (([20, 3], [1, 1], 1, 1, 8, 8, 4, 5), {"window": 6, "sinks": True}),
    "chunks": (([50], [30], 2, 2, 8, 8, 4, 13), {"chunk": 16}),
    "blocks": (([50], [30], 2, 2, 8, 8, 4, 13), {"block": 8}),
    "both ways": (([50], [30], 2, 2, 8, 8, 4, 13), {"causal": False, "window": 7}),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_what_the_reference_gives_and_never_reads_what_nobody_sees(name: str) -> None:
    from phloem.kernels.jax.pallas import paged_attention
    from phloem.kernels.jax.tensor import Array, to_jax, to_torch

    (lens, news, kv_heads, group, size, values, page, width), options = CASES[name]
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(draw.normal(size=shape).astype(np.float32))

    q = normal(sum(news), kv_heads * group, size)
    cache = normal(PAGES, kv_heads, page, size), normal(PAGES, kv_heads, page, values)
    free = draw.permutation(np.arange(1, PAGES)).tolist()
    table = torch.zeros(len(lens), width, dtype=torch.int32)
    for row, length in enumerate(lens):
        used = -(-length // page)
        table[row, :used] = torch.tensor([free.pop() for _ in range(used)])
    sinks = normal(kv_heads * group) if options.get("sinks") else None
    options = {key: value for key, value in options.items() if key != "sinks"}
    starts = torch.tensor([0, *np.cumsum(news)], dtype=torch.int32)
    step: list[Any] = [starts, torch.tensor(lens, dtype=torch.int32), table, starts[:0]]
    call = AttentionCall(size**-0.5, sinks=sinks, **options)
    wanted = reference_attention.paged_attention(
        q, cache, PagedBatch(*step, max_query_len=max(news), max_seq_len=max(lens)), call
    )
    for part in cache:
        part[free] = float("nan")

    def lifted(x: torch.Tensor | None) -> Any:
        return None if x is None else Array(to_jax(x))

    batch = PagedBatch(*map(lifted, step), max_query_len=max(news), max_seq_len=max(lens))
    call = AttentionCall(size**-0.5, sinks=lifted(sinks), **options)
    made = paged_attention(interpret=True)(lifted(q), (lifted(cache[0]), lifted(cache[1])), batch, call)
    assert (to_torch(made.a) - wanted).abs().max() < 1e-5


def test_the_kernel_comes_first_on_a_tpu_and_declines_with_a_reason() -> None:
    from phloem.kernels.jax.table import table

    def chosen(ops: Ops, size: int) -> Any:
        spec = AttentionSpec(0, 4, 2, size, 1.0)
        return choose(["pallas", "reference"], AttentionNeed([spec], torch.float32, CPU), ops)

    assert chosen(table("tpu"), 128).backend.name == "pallas"
    assert chosen(table("cpu"), 16).backend.name == "pallas"  # interpreted: any size
    small, plain = chosen(table("tpu"), 64), chosen(Ops(), 128)
    assert small.backend.name == plain.backend.name == "reference"
    assert "heads of 64" in small.declined["pallas"] and "no Pallas kernel" in plain.declined["pallas"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPUs' compiler (libtpu) is not installed")
@pytest.mark.parametrize("target", ["v5e:2x2", "v6e:2x2"])
def test_the_kernel_compiles_for_a_tpu(target: str) -> None:
    script = "scripts/tpu_compile.py"
    done = subprocess.run([sys.executable, script, target], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "paged_attention" in done.stdout and "step over 4 devices" in done.stdout
