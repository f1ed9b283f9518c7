"""GGUF's types, and integers of 8 bits, on the Triton table: the values of the format, and products with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton_support import need_interpreter

need_interpreter()
from phloem.kernels.narrow import Codes, Narrow  # noqa: E402
from phloem.kernels.triton import gemm_gguf, narrow  # noqa: E402
from phloem.kernels.triton.weights import GroupedWeight, product, widened  # noqa: E402

CPU = torch.device("cpu")
# What has each type's scales in its block, so that random bytes are no infinite ones: places of float16 numbers.
FLOATS = {
    **{"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "IQ4_XS": [0]},
    **{"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]},
}


class Stored:
    """A source of blocks of random bytes."""

    def __init__(self, kind: str, rows: int, columns: int, seed: int = 1) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        random = np.random.default_rng(seed)
        raw = random.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        for place in FLOATS[kind]:
            scale = random.uniform(-0.02, 0.02, raw.shape[:2]).astype(np.float16)
            raw[..., place : place + 2] = scale.view(np.uint8).reshape(*raw.shape[:2], 2)
        self.bytes = raw.reshape(rows, -1)
        self.values = torch.from_numpy(dequantize(self.bytes, GGMLQuantizationType[kind])).float()
        self.name, self.shape, self.kind = f"{kind}.weight", (rows, columns), kind

    def narrow(self) -> Narrow:
        return Narrow("gguf", 1, 32, stored=self.kind)

    def codes(self) -> Codes:
        return Codes(torch.from_numpy(self.bytes), torch.empty(0))

    def refused(self, why: str) -> None:
        raise AssertionError(why)


class Integers(Stored):
    """A source of integers of 8 bits, with a scale for each `wide` columns."""

    def __init__(self, rows: int, columns: int, wide: int, *, zeros: bool, half: bool = False) -> None:
        generator = torch.Generator().manual_seed(wide)
        groups = rows, columns // wide
        codes = torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8)
        scale = torch.rand(groups, generator=generator) / 100
        scale = scale.half().float() if half else scale
        zero = torch.randint(0, 257, groups, generator=generator).float() if zeros else None
        self.given, self.form = Codes(codes, scale, zero), Narrow("int8", 1, wide, zeros, half)
        less = torch.full(groups, 128.0) if zero is None else zero
        self.values = (codes - less.repeat_interleave(wide, 1)) * scale.repeat_interleave(wide, 1)
        self.name, self.shape, self.kind = f"int8 {wide}", (rows, columns), "dense"

    def narrow(self) -> Narrow:
        return self.form

    def codes(self) -> Codes:
        return self.given


def made(*parts: Any, dtype: torch.dtype = torch.float32) -> GroupedWeight:
    found = narrow.prepare_linear(parts, dtype, CPU)
    assert isinstance(found, GroupedWeight) and found.shape == (sum(p.shape[0] for p in parts), parts[0].shape[1])
    return found


PARTS: dict[str, Any] = {
    **{kind: lambda kind=kind: [Stored(kind, 11, 512)] for kind in FLOATS},
    "int8, groups of 32": lambda: [Integers(11, 160, 32, zeros=False, half=True)],
    "int8, groups of 16": lambda: [Integers(11, 96, 16, zeros=True)],
    "int8, groups of 128": lambda: [Integers(11, 512, 128, zeros=True)],
    "int8, rows": lambda: [Integers(11, 96, 96, zeros=False)],
    "several": lambda: [
        Stored("Q4_K", 16, 512),
        Stored("Q4_K", 5, 512, 2),
        Stored("Q6_K", 9, 512),
        Stored("Q8_0", 7, 512),
    ],
}


@pytest.mark.parametrize("case", PARTS)
def test_rows_are_those_of_the_format(case: str) -> None:
    parts = PARTS[case]()
    found, want = made(*parts), torch.cat([part.values for part in parts])
    torch.testing.assert_close(widened(found), want, rtol=1e-6, atol=1e-7)
    ids = torch.tensor([3, len(want) - 1, 0, 3, 10])
    torch.testing.assert_close(found.rows(ids.int()), want[ids], rtol=1e-6, atol=1e-7)
    assert found.rows(ids[:0]).shape == (0, want.shape[1])
    bits = {
        "Q4_K": 4.63,
        "Q6_K": 6.57,
        "Q8_0": 8.5,
        "Q4_0": 4.5,
        "Q5_0": 5.5,
        "Q5_K": 5.63,
        "int8, rows": 8.4,
        "int8, groups of 16": 11,
    }
    assert found.nbytes * 8 <= bits.get(case, 9.5) * want.numel()
    assert sum(piece.numel() for piece in narrow.memory(found)) == found.nbytes


# One of each way through the kernels.
MULTIPLIED = ["Q4_0", "Q5_1", "Q2_K", "Q4_K", "Q6_K", "int8, groups of 16", "int8, rows", "several"]


@pytest.mark.parametrize("case", MULTIPLIED)
def test_products_of_few_tokens_and_of_more(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = PARTS[case]()
    found, want = made(*parts), torch.cat([part.values for part in parts])
    monkeypatch.setattr(gemm_gguf, "MANY", 24)
    monkeypatch.setattr(gemm_gguf, "_COPIED", 17 * want.shape[1])  # more than one copy
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(24, 2 * want.shape[1], generator=generator)[:, : want.shape[1]]
    bias = torch.randn(len(want), generator=generator)
    for tokens, shift in ((0, None), (1, None), (2, bias), (3, None), (19, bias), (24, bias)):
        got = product(x[:tokens], found, shift)
        assert got.shape == (tokens, len(want)) and got.dtype == x.dtype
        close(got, x[:tokens], want, shift)
    for dtype, off in ((torch.float16, 1e-3), (torch.float32, 2e-6)):
        narrowed = x[:3].to(dtype)
        close(gemm_gguf.grouped_gemm(narrowed[:2], found.runs), narrowed[:2], want, None, off)
        close(gemm_gguf.grouped_gemm(narrowed, found.runs), narrowed, want, None, off)


def close(got: torch.Tensor, x: torch.Tensor, want: torch.Tensor, bias: torch.Tensor | None, off: float = 2e-6) -> None:
    expected = torch.nn.functional.linear(x.double(), want.double(), None if bias is None else bias.double())
    assert (got.double() - expected).norm() <= off * expected.norm()


@pytest.mark.parametrize("tokens", [1, 3])
def test_splits_of_features_are_added(tokens: int) -> None:
    (part,) = parts = [Stored("Q4_K", 11, 4096 + 512)]
    x = torch.randn(tokens, part.shape[1], generator=torch.Generator().manual_seed(1))
    close(gemm_gguf.grouped_gemm(x, made(*parts).runs, None, 2), x, part.values, None)
