"""`Ops.linear` of every table with every option, against the same arithmetic in plain torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from linear_cases import Source, levels
from torch.nn import functional as F

from phloem.kernels import native
from phloem.kernels.ops import Adapters, Norm, Ops

CPU = torch.device("cpu")
N, M, EPS = 48, 64, 1e-5
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
TABLES = ["reference", *(f"native {level}" for level in levels()), *(["native invariant"] if levels() else [])]
TABLES += ["triton", "triton invariant"] if INTERPRETED else []
OPTIONS = [
    {"bias": bias, "norm": norm, "residual": residual, "gate": gate, "add": add, "adapter": adapter}
    for bias, norm, residual, gate, add, adapter in itertools.product(
        (False, True), (False, True), (False, True), ("", "silu", "gelu_tanh"), (False, True), (False, True)
    )
    if (norm or not residual) and not (norm and add)
]


@pytest.fixture(params=TABLES)
def ops(request: Any) -> Iterator[Ops]:
    kind, _, which = request.param.partition(" ")
    if kind == "triton":
        from phloem.kernels.triton import table

        yield table.invariant_table() if which else table.table()
    elif kind == "native":
        invariant = which == "invariant"
        yield native.table(2, None if invariant else which, invariant=invariant)
        native.runtime().library.set_level(None)
    else:
        yield Ops()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def adapters(rows: int) -> Adapters:
    """Adapters of a layer of two parts: the first row has the second, of rank 6, with a factor and a shift; the next
    none; and the others the first, of rank 4."""
    index = torch.tensor([2, 0, *[1] * rows][:rows]).int()
    facts = torch.tensor([[0, 0], [4, 0], [6, 1]]).int()
    down, up = random(3, 2, 8, N, seed=7) / 7, random(3, 8, M, seed=8)
    down[1, :, 4:], up[1, 4:], down[2, :, 6:], up[2, 6:] = 0, 0, 0, 0
    factor, shift = random(3, M, seed=9).abs() + 0.5, random(3, M, seed=10)
    return Adapters(index, facts, down, up, factor, shift, torch.tensor([M // 2, M]))


def plainly(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **given: Any) -> torch.Tensor:
    """What the op's docstring says, row by row for adapters."""
    if given["norm"] is not None:
        x = x if given["residual"] is None else x + given["residual"]
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * given["norm"].weight
    out = F.linear(x, weight, bias)
    if given["adapter"] is not None:
        low = given["adapter"]
        for row, which in enumerate(low.index.tolist()):
            if which:
                first, second = (low.down[which, part] @ x[row] for part in (0, 1))
                out[row, : M // 2] += first @ low.up[which, :, : M // 2]
                out[row, M // 2 :] += second @ low.up[which, :, M // 2 :]
            if which == 2:
                out[row] = low.factor[which] * out[row] + low.shift[which]
    if given["gate"]:
        gate, up = out.chunk(2, -1)
        out = (F.silu(gate) if given["gate"] == "silu" else F.gelu(gate, approximate="tanh")) * up
    return out if given["add"] is None else out + given["add"]


@pytest.mark.some(171)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(k for k, v in o.items() if v) or "plain")
def test_every_option_of_every_table(ops: Ops, options: dict[str, Any], rows: int) -> None:
    parts = [random(M // 2, N, seed=seed) for seed in (1, 2)]
    weight = ops.prepare_linear([Source.dense_of(part) for part in parts], torch.float32, CPU)
    x, width = random(rows, N), M // 2 if options["gate"] else M
    given: dict[str, Any] = {
        "norm": Norm(random(N, seed=3).abs() + 0.5, EPS) if options["norm"] else None,
        "residual": random(rows, N, seed=4) if options["residual"] else None,
        "gate": options["gate"],
        "add": random(rows, width, seed=5) if options["add"] else None,
        "adapter": adapters(rows) if options["adapter"] else None,
    }
    bias = random(M, seed=6) if options["bias"] else None
    before = x.clone()
    out, total = ops.linear(x, weight, bias, **given)
    want = plainly(x, torch.cat(parts), bias, **given)
    if given["norm"] is not None:
        assert total is not None
        torch.testing.assert_close(total, x if given["residual"] is None else x + given["residual"])
    elif given["add"] is not None:
        # Added already, or handed back for the norm that follows.
        assert total is None or total is given["add"]
        out = out if total is None else out + total
    else:
        assert total is None
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


def test_options_that_exclude_each_other_are_refused(ops: Ops) -> None:
    weight = ops.prepare_linear([Source.dense_of(random(M, N))], torch.float32, CPU)
    x = random(2, N)
    with pytest.raises(ValueError, match="only with a norm"):
        ops.linear(x, weight, residual=x)
    with pytest.raises(ValueError, match="not both"):
        ops.linear(x, weight, norm=Norm(torch.ones(N), EPS), add=random(2, M))


def test_no_optional_field_is_left_that_linear_could_fuse() -> None:
    fields = {field.name for field in dataclasses.fields(Ops)}
    assert {name for name in fields if "linear" in name} == {"prepare_linear", "linear", "linear_argmax", "linear_topk"}
