"""When the vendor's float8 product is used, over a stand-in for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from phloem.kernels.triton import vendor, weights

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def exact(x: Any, x_scale: Any, weight: Any, weight_scale: Any, bias: Any) -> torch.Tensor:
    wide = weight.float() * weight_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    out = (x.float() * x_scale.repeat_interleave(128, 1)) @ wide.t()
    return (out if bias is None else out + bias).to(torch.bfloat16)


def test_it_is_used_where_a_trial_comes_out_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "block_product", exact)
    found = vendor._try(CPU, FP8)
    assert found.serves and "trial" in found.reason


def test_it_is_not_used_where_a_trial_is_wrong_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "block_product", lambda *given: exact(*given) * 1.1)
    found = vendor._try(CPU, FP8)
    assert not found.serves and "off by" in found.reason

    def refuse(*_: Any) -> torch.Tensor:
        raise RuntimeError("scales of 1x128 need compute capability 9.0\nand more")

    monkeypatch.setattr(vendor, "block_product", refuse)
    found = vendor._try(CPU, FP8)
    assert not found.serves and found.reason == "it refuses: scales of 1x128 need compute capability 9.0"


def test_sizes_that_it_takes() -> None:
    weight = torch.empty(256, 512, dtype=FP8)
    assert vendor.fits(64, weight) and not vendor.fits(63, weight)
    assert not vendor.fits(64, torch.empty(256, 640, dtype=FP8)) and not vendor.fits(
        64, torch.empty(200, 512, dtype=FP8)
    )
    assert not vendor.serves_blocks(CPU, FP8)


def test_blocks_go_to_it_from_enough_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def product(x: Any, *rest: Any) -> torch.Tensor:
        asked.append(len(x))
        return exact(x, *rest)

    monkeypatch.setattr(vendor, "block_product", product)
    monkeypatch.setattr(vendor, "serves_blocks", lambda *_: True)
    monkeypatch.setattr(weights, "block_scaled_gemm", lambda x, *rest: torch.zeros(len(x), 256, dtype=torch.bfloat16))
    weight = weights.Float8Blocks(torch.randn(256, 512).to(FP8), torch.rand(2, 4) + 0.5)
    for tokens in (20, 64, 100):
        values, scale = torch.randn(tokens, 512).to(FP8), torch.rand(tokens, 4) + 0.5
        out = weights.scaled(values, scale, weight, None, torch.bfloat16)
        assert out.shape == (tokens, 256) and bool(out.any()) == (tokens >= 64)
    assert asked == [64, 100]
    weights.scaled(values, scale, weight, None, torch.float16)
    assert asked == [64, 100]
