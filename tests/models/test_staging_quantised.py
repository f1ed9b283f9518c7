"""Quantised weights are unpacked, and rounded, where the model is: to the same bits as on the host, and none of it is
made elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import packers
import pytest
import torch

from phloem.checkpoint.describe import describe
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.quant import method_for
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 2}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
TENSORS = {"quant_method": "compressed-tensors", "config_groups": {}}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "awq": (packers.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "gptq": (packers.gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}),
    "gptq of 3 bits": (partial(packers.gptq, bits=3), {"quant_method": "gptq", "bits": 3, "group_size": 32}),
    "gptq, act-order": (partial(packers.gptq, act=True), {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "pack-quantized": (packers.packed_ints, {**TENSORS, "format": "pack-quantized"}),
    "pack-quantized, zeros": (partial(packers.packed_ints, symmetric=False), {**TENSORS, "format": "pack-quantized"}),
    "int8 rows": (packers.int8_rows, {**TENSORS, "format": "int-quantized"}),
    "fp8 blocks": (partial(packers.float8, by="block", scale_name="weight_scale_inv"), BLOCKS),
    "fp8 rows": (partial(packers.float8, by="row"), {"quant_method": "fp8"}),
    "mxfp4": (packers.mxfp4_matrix, {**TENSORS, "format": "mxfp4-pack-quantized"}),
    "nvfp4": (partial(packers.nvfp4, modelopt=False), {**TENSORS, "format": "nvfp4-pack-quantized"}),
    "4-bit table": (packers.table4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


class Elsewhere:
    """A stager whose device is another: tensors of it and of the host are in no operation together."""

    def __init__(self, device: torch.device, packed: Path) -> None:
        self.device, self.packed = device, packed
        self.read: set[str] = set()

    def load(
        self, path: Path, offset: int, shape: Any, stored: torch.dtype, index: Any, to: torch.dtype
    ) -> torch.Tensor:
        self.read.add(str(stored))
        size, whole = stored.itemsize, torch.Size(shape).numel()
        raw = torch.frombuffer(bytearray(path.read_bytes()[offset : offset + size * whole]), dtype=torch.uint8)
        values = raw.view(stored).reshape(shape)
        return (values if index is None else values[index]).to(to).contiguous().to(self.device)


def loaded(path: Path, device: torch.device, stager: Any, dtype: torch.dtype, quantization: str | None = None) -> Any:
    found = describe(str(path))
    method = method_for(quantization, found.stored)
    return load_model(found, BuildContext(Ops(), dtype, device, quant=method, stager=stager))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.mark.parametrize("case", CASES)
def test_stored_formats_are_unpacked_where_the_model_is(case: str, llama: Path, tmp_path: Path) -> None:
    pack, config = CASES[case]
    packed, _ = packers.quantised(llama, tmp_path, pack, config)
    here = Elsewhere(CPU, packed)
    ours, theirs = (loaded(packed, CPU, stager, torch.bfloat16) for stager in (here, None))
    assert len(here.read) >= 2  # the packed numbers and what stands beside them
    for name in theirs.weight_names():
        assert torch.equal(ours.get_weight(name), theirs.get_weight(name)), name
    away = Elsewhere(torch.device("meta"), packed)
    model = loaded(packed, away.device, away, torch.bfloat16)
    assert away.read == here.read
    assert all(weight.value.is_meta for weight in model.weights() if weight.role == "matrix")


@pytest.mark.parametrize("case", [None, "awq"])
@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_what_is_rounded_anew_has_the_same_bits_there(
    method: str, case: str | None, llama: Path, tmp_path: Path
) -> None:
    path = llama if case is None else packers.quantised(llama, tmp_path, *CASES[case])[0]
    here, away = Elsewhere(CPU, path), Elsewhere(torch.device("meta"), path)
    ours, theirs = (loaded(path, CPU, stager, torch.bfloat16, method) for stager in (here, None))
    for name in theirs.weight_names():
        assert torch.equal(ours.get_weight(name), theirs.get_weight(name)), name
    assert here.read
    loaded(path, away.device, away, torch.bfloat16, method)


@pytest.mark.parametrize("method", ["int4", "mxfp4"])
def test_what_devices_might_round_otherwise_is_made_on_the_host(method: str, llama: Path) -> None:
    here = Elsewhere(CPU, llama)
    loaded(llama, CPU, here, torch.bfloat16, method)
    assert not here.read
