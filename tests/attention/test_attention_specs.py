"""Layers that ask more than plain attention: against a brute force, and who declines them with which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from linear_cases import needs_native
from test_attention import PAGE, ROWS, Case, backend_named, paged_batch

from phloem.attention import BACKENDS, AttentionNeed
from phloem.attention import choose as choose_backend
from phloem.attention._store import unserved
from phloem.attention.reference import TableStep
from phloem.core.errors import ConfigError
from phloem.kernels import native
from phloem.kernels.ops import AttentionCall, Ops, Rotation
from phloem.layers.context import AttentionSpec, Heads

CPU = torch.device("cpu")
PLAIN = AttentionSpec(0, 4, 2, 8, 0.3)
ODD = {
    "value size": {"value_size": 12},
    "both ways": {"causal": False},
    "both ways in a window": {"causal": False, "window": 5},
    "chunks": {"chunk": 6},
    "chunks and a window": {"chunk": 8, "window": 3},
    "blocks": {"block": 5},
    "blocks and a window": {"block": 4, "window": 6},
    "everything": {"value_size": 4, "block": 4, "chunk": 8, "softcap": 2.0},
}


class Pool:
    """Caches of any two sizes, as a pool keeps them."""

    def __init__(self, spec: AttentionSpec, pages: int, dtype: torch.dtype = torch.float32) -> None:
        self.keys = [torch.randn(pages, spec.kv_heads, PAGE, spec.head_size).to(dtype)]
        self.values = [torch.randn(pages, spec.kv_heads, PAGE, spec.values).to(dtype)]
        self.scales: dict[int, Any] = {}
        self.dtype, self.page_size = dtype, PAGE


def make(rows: list[tuple[int, int]], spec: AttentionSpec, dtype: torch.dtype = torch.float32) -> Case:
    pages = sum(-(-length // PAGE) for _, length in rows) + 3
    tokens = sum(queries for queries, _ in rows)
    heads = [torch.randn(tokens, spec.heads, spec.head_size), torch.randn(tokens, spec.kv_heads, spec.head_size)]
    pool: Any = Pool(spec, pages, dtype)
    return Case(paged_batch(rows, PAGE, pages), pool, *heads, torch.randn(tokens, spec.kv_heads, spec.values))


def brute(case: Case, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Token by token, head by head and key by key, over what the caches hold once the step has written."""
    batch, out = case.batch, torch.zeros(len(case.q), spec.heads, spec.values)
    for row in range(len(batch.seq_lens)):
        length, begin = int(batch.seq_lens[row]), int(batch.query_start[row])
        end = int(batch.query_start[row + 1])
        for token in range(begin, end):
            here = length - end + token
            for head in range(spec.heads):
                weights, values = [], []
                for there in range(length):
                    last = here if not spec.block else here - here % spec.block + spec.block - 1
                    seen = there <= last or not spec.causal
                    seen &= (
                        not spec.window or -spec.window < here - there < spec.window or (spec.causal and there > here)
                    )
                    seen &= not spec.chunk or here // spec.chunk == there // spec.chunk
                    if seen:
                        page, kv = int(batch.page_table[row, there // PAGE]), head // (spec.heads // spec.kv_heads)
                        logit = (
                            float(case.q[token, head] @ case.pool.keys[0][page, kv, there % PAGE].float()) * spec.scale
                        )
                        weights.append(
                            math.exp(spec.softcap * math.tanh(logit / spec.softcap) if spec.softcap else logit)
                        )
                        values.append(case.pool.values[0][page, kv, there % PAGE].float())
                total = sum(weights) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
                out[token, head] = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ROWS["chunk"], ROWS["mixed"], ROWS["one"]], ids=["chunk", "mixed", "one"])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("sunk", [False, True])
def test_the_reference_attends_as_a_brute_force_does(odd: dict[str, Any], rows: Any, sunk: bool) -> None:
    torch.manual_seed(1)
    spec = dataclasses.replace(PLAIN, **odd)
    case = make(rows, spec)
    backend = backend_named("reference", spec)
    sinks = torch.randn(4) if sunk else None
    out = backend.begin(case.batch, case.pool)(spec, Heads(case.q, case.k, case.v, sinks))
    torch.testing.assert_close(out, brute(case, spec, sinks), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [ROWS["chunk"], ROWS["mixed"]], ids=["chunk", "mixed"])
@pytest.mark.parametrize("odd", [{"block": 5}, {"block": 32}, {"block": 4, "softcap": 2.0}])
def test_gathered_pages_are_attended_to_causally_by_blocks(odd: dict[str, Any], rows: Any) -> None:
    torch.manual_seed(4)
    spec = dataclasses.replace(PLAIN, **odd)
    case = make(rows, spec)
    backend = backend_named("cpu", spec)
    assert not backend.native
    out = backend.begin(case.batch, case.pool)(spec, Heads(case.q, case.k, case.v))
    torch.testing.assert_close(out, brute(case, spec), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in BACKENDS.names() if name in ("cpu", "reference")])
@pytest.mark.parametrize("normed", [False, True])
def test_a_layer_that_reads_anothers_pool_writes_nothing_and_turns_only_its_queries(name: str, normed: bool) -> None:
    torch.manual_seed(2)
    spec = dataclasses.replace(PLAIN, writes=False)
    case = make(ROWS["mixed"], spec)
    norms = (torch.rand(8) + 0.5, torch.rand(8) + 0.5, 1e-6) if normed else (None, None, 0.0)
    turn = Rotation(torch.randint(0, 30, (len(case.q),)), torch.randn(30, 2, 4), False, *norms)
    keys, values = case.pool.keys[0].clone(), case.pool.values[0].clone()
    q, nothing = case.q.clone(), torch.full((len(case.q), 0, 8), float("nan"))
    got = backend_named(name, spec).begin(case.batch, case.pool)(spec, Heads(q, nothing, nothing, None, turn))
    assert torch.equal(case.pool.keys[0], keys) and torch.equal(case.pool.values[0], values)
    ops, turned = Ops(), case.q.clone()
    if turn.q_norm is not None:
        turned = ops.rms_norm(turned, turn.q_norm, turn.eps)
    ops.rope_(turned, turned[:, :0], turn.positions, turn.cos_sin, False)
    torch.testing.assert_close(got, brute(dataclasses.replace(case, q=turned), spec), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["cpu", "triton", "flash", "flashinfer"])
@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"causal": False}, "later tokens"),
        ({"chunk": 4}, "chunks of positions"),
        ({"block": 4, "window": 6}, "blocks of positions"),
        ({"value_size": 12}, "value heads of 12 beside key heads of 8"),
    ],
)
def test_backends_of_plain_attention_decline_with_a_reason(name: str, odd: dict[str, Any], words: str) -> None:
    specs = [PLAIN, dataclasses.replace(PLAIN, **odd)]
    assert words in (unserved(specs) or "") and unserved(specs[:1]) is None
    assert unserved([dataclasses.replace(PLAIN, writes=False)]) is None
    assert (unserved(specs, values=True) is None) == ("value_size" in odd)
    with pytest.raises(ConfigError, match=words if name == "cpu" else name):
        choose_backend(["reference"], AttentionNeed(specs, torch.float32, CPU), Ops(), named=name)
    assert (
        choose_backend(["cpu", "reference"], AttentionNeed(specs, torch.float32, CPU), Ops()).backend.name
        == "reference"
    )
    with pytest.raises(ConfigError, match="int8"):
        choose_backend(["cpu", "reference"], AttentionNeed(specs, torch.int8, CPU), Ops())


@pytest.mark.slow
@needs_native
def test_over_the_native_table_odd_layers_have_the_reference_and_the_others_the_kernel() -> None:
    torch.manual_seed(3)
    ops, calls = native.table(2), []

    def attend(q: Any, cache: Any, batch: Any, call: AttentionCall, /) -> torch.Tensor:
        calls.append(call)
        return ops.paged_attention(q, cache, batch, call)

    for odd in ({}, {"block": 5}, {"block": 4, "window": 6}, {"causal": False}, {"chunk": 6}, {"value_size": 4}):
        spec = dataclasses.replace(PLAIN, **odd)
        case = make(ROWS["mixed"], spec, torch.bfloat16)
        step = TableStep(dataclasses.replace(ops, paged_attention=attend), case.batch, case.pool)
        out = step(spec, Heads(case.q, case.k, case.v))
        torch.testing.assert_close(out, brute(case, spec), atol=2e-2, rtol=2e-2)
    assert [call.block for call in calls] == [0, 5] and calls[0].plain
    with pytest.raises(ValueError, match="causal, or causal by blocks"):
        ops.paged_attention(case.q, (case.pool.keys[0],) * 2, case.batch, AttentionCall(0.3, causal=False))
