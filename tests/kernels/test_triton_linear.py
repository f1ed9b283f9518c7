"""`Ops.linear` of the Triton tables, under the interpreter, and the weights that they take beside dense ones."""

from __future__ import annotations

import pytest
import torch
from test_linear_op import M, N, adapters, random
from test_linear_op import ops as ops
from test_linear_op import test_every_option_of_every_table as test_every_option_of_every_table
from torch.nn import functional as F
from triton_support import need_interpreter

from phloem.kernels import reference as ref
from phloem.kernels import reference_formats as formats
from phloem.kernels.ops import Norm

need_interpreter()
from test_triton_gguf import Integers, made  # noqa: E402

from phloem.kernels.triton import gemm_int, table  # noqa: E402
from phloem.kernels.triton.weights import Float8Blocks, Float8Rows, Int4Weight, Weight  # noqa: E402

FP8 = torch.float8_e4m3fn


def forms() -> dict[str, tuple[Weight, torch.Tensor, float]]:
    """Of a weight each form, what it stands for, and how far activations of 8 bits may lead away.

    The interpreter cuts off where a GPU rounds to float8, which doubles the error.
    """
    wide = random(M, 256, seed=1) / 16
    integers = Integers(M, 256, 256, zeros=False)
    rows, row_scale = formats.quantise_fp8(wide, FP8)
    blocks, block_scale = formats.quantise_blocks(wide, FP8)
    nibbles = torch.randint(0, 16, (M, 256), generator=torch.Generator().manual_seed(2))
    step = random(M, 4, seed=3).abs() / 50 + 0.001
    return {
        "dense": (wide, wide, 0.0),
        "int8": (made(integers), integers.values, 0.0),
        "int4": (
            Int4Weight(gemm_int.pack_int4(nibbles, 64), step),
            (nibbles - 8) * step.repeat_interleave(64, 1),
            0.0,
        ),
        "float8 rows": (Float8Rows(rows, row_scale), rows.float() * row_scale[:, None], 0.12),
        "float8 blocks": (Float8Blocks(blocks, block_scale), formats.spread_blocks(blocks, block_scale), 0.12),
    }


@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "float8 rows", "float8 blocks"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_every_kind_of_weight_under_every_option(kind: str, tokens: int) -> None:
    weight, wide, error = forms()[kind]
    x, bias, norm = random(tokens, 256, seed=4), random(M, seed=5), Norm(random(256, seed=6).abs() + 0.5, 1e-5)
    linear = table.table().linear
    for offset in (None, bias):
        out, total = linear(x, weight, offset)
        want = F.linear(x, wide, offset)
        assert total is None and (out - want).norm() <= (error + 1e-4) * want.norm()
    out, total = linear(x, weight, bias, norm=norm, gate="silu")
    want = ref.silu_and_mul(F.linear(ref.rms_norm(x, norm.weight, norm.eps), wide, bias))
    assert total is x and (out - want).norm() <= (2 * error + 1e-4) * want.norm()
    before = random(tokens, 256, seed=7)
    out, total = linear(x, weight, norm=norm, residual=before)
    want = F.linear(ref.rms_norm(x + before, norm.weight, norm.eps), wide)
    assert total is not None and torch.equal(total, x + before)
    assert (out - want).norm() <= (error + 1e-4) * want.norm()


def test_adapters_are_added_to_narrow_weights() -> None:
    values, scale = formats.quantise_fp8(random(M, N, seed=1) / 7, FP8)
    x, low = random(5, N), adapters(5)
    out, _ = table.table().linear(x, Float8Rows(values, scale), adapter=low)
    want = ref.add_adapters(F.linear(x, values.float() * scale[:, None]), x, low)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
