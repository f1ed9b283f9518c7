"""Packing: every GGUF type, dense types and fused parts, against gguf's own dequantisation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from linear_cases import GGUF_TYPES, Source, make_source, needs_native

from phloem.core.errors import ModelLoadError
from phloem.kernels import native
from phloem.kernels.native_linear import NativeLinear, PackedLinear

pytestmark = needs_native
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def linear() -> NativeLinear:
    native.table(2)
    return NativeLinear(native.runtime())


def pack(linear: NativeLinear, *sources: Source, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    return linear.prepare_linear(list(sources), dtype, CPU)


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("rows,blocks", [(1, 1), (16, 3), (37, 2)])
def test_dequantises_exactly(linear: NativeLinear, kind: str, rows: int, blocks: int) -> None:
    source = make_source(kind, rows, blocks, seed=rows + blocks)
    weight = pack(linear, source)
    want = gguf.quants.dequantize(source.data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(weight.dense().numpy(), want)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_bits_per_weight_are_kept(linear: NativeLinear, kind: str) -> None:
    source = make_source(kind, 64, 8 if kind[-1] != "K" else 2, seed=1)
    weight = pack(linear, source)
    assert weight.nbytes <= 1.2 * source.data.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows,columns", [(1, 1), (20, 33), (48, 200)])
def test_dense_types_stay_as_they_are(linear: NativeLinear, dtype: torch.dtype, rows: int, columns: int) -> None:
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight = pack(linear, Source.dense_of(tensor), dtype=dtype)
    assert torch.equal(weight.dense(dtype), tensor)
    assert weight.shape == (rows, columns)


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_1"), ("Q4_K", "Q6_K"), ("Q8_0", "dense"), ("Q4_0", "Q4_0", "Q5_0")])
@pytest.mark.parametrize("sizes", [(32, 32, 16), (24, 40, 5)])
def test_fused_parts_keep_their_order(linear: NativeLinear, kinds: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    wide = any(kind.endswith("_K") for kind in kinds)
    sources = [
        make_source(kind, rows, 1 if kind.endswith("_K") else (8 if wide else 3), seed=i)
        for i, (kind, rows) in enumerate(zip(kinds, sizes, strict=False))
    ]
    if kinds[-1] == "dense":
        sources[-1] = Source.dense_of(torch.randn(sizes[1], 96).bfloat16())
    weight = pack(linear, *sources)
    want = torch.cat([source.dense(torch.float32) for source in sources])
    assert torch.equal(weight.dense(), want)
    assert weight.paired == (kinds == ("Q4_1", "Q4_1") and sizes[0] == sizes[1])


def test_unknown_type_is_made_dense(linear: NativeLinear) -> None:
    source = make_source("Q4_0", 16, 2, seed=5)
    strange = Source("w", source.shape, "TQ1_0", source.data, source.dense(torch.float32))
    weight = pack(linear, strange)
    assert weight.kinds == ("BF16",)
    assert torch.equal(weight.dense(torch.bfloat16), source.dense(torch.bfloat16))


def test_wrong_data_are_refused(linear: NativeLinear) -> None:
    source = make_source("Q4_1", 16, 2, seed=5)
    with pytest.raises(ModelLoadError, match="do not fit"):
        pack(linear, Source("w", (16, 96), "Q4_1", source.data))
    with pytest.raises(ModelLoadError, match="inputs"):
        pack(linear, source, make_source("Q4_1", 16, 3, seed=5))


def test_embedding(linear: NativeLinear) -> None:
    source = make_source("Q8_0", 50, 3, seed=7)
    weight = pack(linear, source)
    ids = torch.tensor([0, 49, 17, 17])
    want = source.dense(torch.float32)[ids]
    assert torch.equal(linear.embedding(ids, weight, 1.0), want)
    # The scale is rounded to the type of the model: 25.298 is 25.25 in bfloat16.
    assert torch.equal(linear.embedding(ids.int(), weight, 25.298), want * 25.25)
    assert linear.embedding(torch.tensor([50]), weight, 1.0).isnan().all()
