"""Online quantisation: error of the weights, bytes as GGUF reads them, and which weights are left alone."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from linear_cases import Source, make_source, needs_native

from phloem.core.errors import ConfigError
from phloem.kernels import native
from phloem.quant import METHODS


def weight(rows: int, columns: int, name: str = "model.layers.0.mlp.up_proj.weight") -> Source:
    source = Source.dense_of(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02)
    source.name = name
    return source


@pytest.mark.parametrize("method,kind,limit", [("int8", "Q8_0", 0.006), ("int4", "Q4_1", 0.08)])
@pytest.mark.parametrize("columns", [64, 100])
def test_error_and_bytes(method: str, kind: str, limit: float, columns: int) -> None:
    source = weight(48, columns)
    got = METHODS.module(method).wrap(source)
    assert got.kind == kind and got.shape == (48, columns)
    dense = got.dense(torch.float32)
    assert (dense - source.values).norm() < limit * source.values.norm()
    read = gguf.quants.dequantize(got.raw(), gguf.GGMLQuantizationType[kind])[:, :columns]
    np.testing.assert_allclose(read, dense.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_flat_and_empty_groups(method: str) -> None:
    values = torch.cat((torch.zeros(2, 32), torch.full((2, 32), 0.5), torch.tensor([[-1.0] * 31 + [1.0]] * 2)), 1)
    got = METHODS.module(method).wrap(Source.dense_of(values)).dense(torch.float32)
    torch.testing.assert_close(got, values, rtol=1e-3, atol=1e-3)


def test_least_squares_beats_the_plain_range() -> None:
    source = weight(64, 256)
    groups = source.values.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low).flatten(1)
    got = METHODS.module("int4").wrap(source).dense(torch.float32)
    assert (got - source.values).norm() < 0.97 * (plain - source.values).norm()


def test_what_stays_as_it_is() -> None:
    wrap = METHODS.module("int4").wrap
    packed, vector = make_source("Q6_K", 4, 1, 1), Source.dense_of(torch.ones(8))
    assert wrap(packed) is packed and wrap(vector) is vector
    assert wrap(weight(32, 32, "model.embed_tokens.weight")).kind == "Q8_0"
    with pytest.raises(ConfigError, match="int4"):
        METHODS.module("int5")


@needs_native
def test_native_layer_of_odd_width() -> None:
    table = native.table(2)
    source = METHODS.module("int8").wrap(weight(40, 100))
    packed = table.prepare_linear([source], torch.bfloat16, torch.device("cpu"))
    x = torch.randn(3, 100)
    want = x @ source.dense(torch.float32).T
    assert (table.linear(x, packed)[0] - want).norm() < 1e-2 * want.norm()
    assert torch.equal(packed.dense(), source.dense(torch.float32))


def test_float8_has_a_scale_for_each_output() -> None:
    source = weight(48, 100)
    source.values[7] *= 1000
    got = METHODS.get("fp8").wrap(source)
    error = (got.dense(torch.float32) - source.values).norm(dim=1) / source.values.norm(dim=1)
    assert got.kind == "dense" and (error < 0.04).all() and (error > 0.005).all()


@pytest.mark.parametrize("columns", [64, 100])
def test_mxfp4_is_kept_in_five_bits_exactly(columns: int) -> None:
    got = METHODS.get("mxfp4").wrap(weight(48, columns))
    dense = got.dense(torch.float32)
    if columns % 32:
        assert got.kind == "dense"
    else:
        read = gguf.quants.dequantize(got.raw(), gguf.GGMLQuantizationType["Q5_0"])
        assert got.kind == "Q5_0" and np.array_equal(read, dense.numpy())


def test_mxfp4_leaves_small_numbers_and_zeros_alone() -> None:
    values = torch.zeros(2, 64)
    values[0, :4] = torch.tensor([6.0, -3.0, 0.5, 0.24])
    got = METHODS.get("mxfp4").wrap(Source.dense_of(values)).dense(torch.float32)
    assert got[0, :4].tolist() == [6.0, -3.0, 0.5, 0.0] and not got[1].any()
