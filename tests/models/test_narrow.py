"""What sources give to kernels for narrow weights: of any rank's share, the numbers that the unpacked share has."""

from __future__ import annotations

from functools import partial
from typing import Any

import packers
import pytest
import torch

from phloem.checkpoint.quant_config import StoredFormat
from phloem.core.errors import ModelLoadError
from phloem.kernels.narrow import Codes, Narrow, group_width
from phloem.models._sources import TensorSource
from phloem.quant import _groups, method_for
from phloem.quant._source import View

NAME = "model.layers.0.mlp.up_proj.weight"
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "blocks": (
        partial(packers.float8, by="block", scale_name="weight_scale_inv"), "fp8", {"weight_block_size": [128, 128]},
    ),
    "rows": (partial(packers.float8, by="row"), "compressed_tensors", {}),
    "matrix": (partial(packers.float8, by="tensor"), "modelopt", {"quant_algo": "FP8"}),
    "awq": (partial(packers.awq, group=64), "awq", {}),
    "gptq": (partial(packers.gptq, symmetric=False), "gptq", {"sym": False}),
    "gptq v2": (partial(packers.gptq, symmetric=True, v2=True), "gptq", {"checkpoint_format": "gptq_v2"}),
    "packed": (partial(packers.packed_ints, group=128), "compressed_tensors", {}),
    "packed rows": (partial(packers.packed_ints, group=0, symmetric=False), "compressed_tensors", {}),
    "packed, 5 bits": (partial(packers.packed_ints, bits=5, symmetric=False), "compressed_tensors", {}),
    "packed, 8 bits": (partial(packers.packed_ints, bits=8, group=128), "compressed_tensors", {}),
    "gptq, 8 bits": (partial(packers.gptq, bits=8, symmetric=False), "gptq", {"bits": 8, "sym": False}),
    "int8": (packers.int8_rows, "compressed_tensors", {}),
    "int8 of bitsandbytes": (packers.int8_table, "bitsandbytes", {}),
}  # fmt: skip


def joined(case: str) -> Any:
    pack, method, config = CASES[case]
    tensors, values = pack(torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) / 9)
    reader = method_for(None, StoredFormat(method, method, config, "here"))
    assert reader is not None and reader.join is not None
    stem = NAME.removesuffix("weight")
    sources = {stem + name: TensorSource(stem + name, tuple(one.shape), tensor=one) for name, one in tensors.items()}
    found = {what: sources[name] for what, name in reader.companions(NAME).items() if name in sources}
    return reader.join(NAME, found, (256, 256)), values, reader.report


def dequantised(form: Narrow, codes: Codes) -> torch.Tensor:
    """Number by number, as `_narrow` describes them."""
    middle = torch.full_like(codes.scale, {"int4": 8.0, "int8": 128.0}.get(form.kind, 0.0))
    zero = middle if codes.zero is None else codes.zero
    spread = [one.repeat_interleave(form.high, 0).repeat_interleave(form.wide, 1) for one in (zero, codes.scale)]
    return (codes.values.float() - spread[0]) * spread[1]


@pytest.mark.parametrize("case", CASES)
def test_shares_are_those_of_the_values(case: str) -> None:
    source, values, report = joined(case)
    for rows, cols in ((slice(0, 256, 1), slice(0, 256, 1)), (slice(128, 256, 1), slice(128, 256, 1))):
        view = View(NAME, (rows.stop - rows.start, cols.stop - cols.start), source, (rows, cols))
        form = view.narrow()
        assert isinstance(form, Narrow)
        torch.testing.assert_close(dequantised(form, view.codes()), values[rows, cols], rtol=1e-6, atol=1e-7)
    kept = {"int4": "4-bit integers", "int8": "8-bit integers"}.get(form.kind, "float8")
    assert f"1 matrices keep their bits as {kept}" in report.decision("bfloat16")[1]


def test_shares_that_scales_do_not_follow_are_refused() -> None:
    blocks, _, _ = joined("blocks")
    rows, _, _ = joined("rows")
    some, odd = slice(0, 128, 1), slice(64, 192, 1)
    assert blocks.narrow(odd, some) == blocks.narrow(some, odd) == "a share of it begins inside a block"
    assert blocks.narrow(slice(0, 256, 2), some) == "a share of it begins inside a block"
    assert rows.narrow(odd, odd) == Narrow("float8", 1, 128)  # scales of rows stand for any columns
    packed, _, _ = joined("packed")
    assert packed.narrow(odd, odd) == Narrow("int4", 1, 64)
    assert "no power of two" in packed.narrow(some, slice(16, 32, 1))
    eight, whole = joined("packed, 8 bits")[0], joined("int8")[0]
    assert eight.narrow(some, slice(64, 160, 1)) == Narrow("int8", 1, 32, half=True)
    assert whole.narrow(odd, odd) == Narrow("int8", 1, 128, half=True)


@pytest.mark.parametrize("width,cols,found", [(128, (0, 256), 128), (512, (0, 512), 128), (96, (0, 96), 32),
                                             (64, (32, 96), 32), (48, (0, 96), 0), (40, (0, 80), 0)])  # fmt: skip
def test_groups_are_cut_into_powers_of_two(width: int, cols: tuple[int, int], found: int) -> None:
    assert group_width(width, slice(*cols, 1)) == found


def test_groups_that_are_one_number_have_a_zero_point_that_float16_holds() -> None:
    """Rounded to 4 bits: zeros, one number 32 times, and numbers that differ by less than their size allows."""
    rows = torch.stack((torch.zeros(32), torch.full((32,), -0.37), 5 + torch.linspace(0, 1e-4, 32), torch.arange(32.0)))
    source: Any = TensorSource("x.weight", (4, 32), tensor=rows)
    made = _groups.quantised(View("x.weight", (4, 32), source), 4)
    assert isinstance(made, _groups.GroupQuantised)
    codes = made.codes()
    assert codes.zero is not None and bool(codes.zero.half().isfinite().all())
    rounded = Codes(codes.values, codes.scale.half().float(), codes.zero.half().float())
    form = made.narrow()
    assert isinstance(form, Narrow)
    torch.testing.assert_close(dequantised(form, rounded), made.dense(torch.float32), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("byte", [255, 254, 241, 240, 0])
@pytest.mark.parametrize("stack", [False, True])
def test_powers_of_two_that_are_no_scales_are_refused(stack: bool, byte: int) -> None:
    """Kernels cut them off, and would compute with other numbers without a word: 255 stands for NaN."""
    weight = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(1))
    method = "mxfp4" if stack else "compressed_tensors"
    name = "model.layers.0.mlp.experts.down_proj" if stack else NAME
    if stack:
        found = packers.mxfp4_stack(name, weight)
        assert found is not None
        tensors, shape = found[0], (3, 64, 32)
        tensors["_scales"][2, 31, 1] = byte
    else:
        tensors, shape = packers.mxfp4_matrix(weight[0])[0], (64, 32)
        tensors["weight_scale"][63, 0] = byte
    reader = method_for(None, StoredFormat(method, method, {}, "here"))
    assert reader is not None and reader.join is not None
    stem = name if stack else name.removesuffix("weight")
    sources = {stem + key: TensorSource(stem + key, tuple(one.shape), tensor=one) for key, one in tensors.items()}
    source = reader.join(
        name, {key: sources[one] for key, one in reader.companions(name).items() if one in sources}, shape
    )
    rows, cols, entry = (slice(0, 32, 1), slice(0, 64, 1), 2) if stack else (slice(0, 64, 1), slice(0, 32, 1), 0)
    if byte <= 240:
        assert float(source.codes(rows, cols, entry).scale.max()) <= 2.0**113
    else:
        with pytest.raises(ModelLoadError, match="4-bit floats are no numbers, or beyond 2\\^113"):
            source.codes(rows, cols, entry)
