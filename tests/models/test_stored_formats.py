"""Every quantised format: values bit for bit, logits in all modes, what is kept packed, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import torch
from model_support import CPU, PROMPT, Engine, check_modes, close, reference
from share_support import engine_of, together

from phloem.checkpoint.describe import describe
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.distributed.mesh import Mesh
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.quant import method_for

SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 2}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


def group(bits: int, **more: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, **more}}}


def ct(bits: int = 4, name: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": group(bits), **more}


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    # name: (packer, quantization_config, the kind that a table may keep it as)
    "awq": (packers.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "Q4_1"),
    "awq-64": (partial(packers.awq, group=64), {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "Q4_1"),
    "gptq": (packers.gptq, GPTQ, "Q4_0"),
    "gptq-asymmetric": (partial(packers.gptq, symmetric=False), {**GPTQ, "sym": False}, "Q4_1"),
    "gptq-whole-rows": (partial(packers.gptq, group=0), {**GPTQ, "group_size": -1}, "Q4_0"),
    "gptq-v2": (partial(packers.gptq, symmetric=False, v2=True), {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
                "Q4_1"),
    "gptq-act-order": (partial(packers.gptq, act=True, symmetric=False), {**GPTQ, "desc_act": True, "sym": False},
                       "dense"),
    "gptq-2": (partial(packers.gptq, bits=2), {**GPTQ, "bits": 2}, "Q4_0"),
    "gptq-3": (partial(packers.gptq, bits=3, symmetric=False), {**GPTQ, "bits": 3, "sym": False}, "Q4_1"),
    "gptq-8": (partial(packers.gptq, bits=8), {**GPTQ, "bits": 8}, "Q8_0"),
    "auto-round": (packers.gptq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "Q4_0"),
    "pack-quantized": (packers.packed_ints, ct(), "Q4_0"),
    "pack-quantized-asymmetric": (partial(packers.packed_ints, symmetric=False), ct(), "Q4_1"),
    "pack-quantized-whole-rows": (partial(packers.packed_ints, group=0), ct(), "Q4_0"),
    "pack-quantized-3": (partial(packers.packed_ints, bits=3), ct(3), "Q4_0"),
    "pack-quantized-5": (partial(packers.packed_ints, bits=5, symmetric=False), ct(5), "dense"),
    "pack-quantized-8": (partial(packers.packed_ints, bits=8), ct(8), "Q8_0"),
    "int-quantized": (packers.int8_rows, ct(8, "int-quantized"), "Q8_0"),
    "float-quantized": (partial(packers.float8, by="row"), ct(8, "float-quantized"), "dense"),
    "float-quantized-blocks": (partial(packers.float8, by="block"), ct(8, "float-quantized"), "dense"),
    "mxfp4-pack-quantized": (packers.mxfp4_matrix, ct(4, "mxfp4-pack-quantized"), "Q5_0"),
    "mxfp8-quantized": (packers.mxfp8_matrix, ct(8, "mxfp8-quantized"), "dense"),
    "nvfp4-pack-quantized": (partial(packers.nvfp4, modelopt=False), ct(4, "nvfp4-pack-quantized"), "dense"),
    "modelopt-nvfp4": (partial(packers.nvfp4, modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"},
                       "dense"),
    "modelopt-fp8": (partial(packers.float8, by="tensor"), {"quant_method": "modelopt", "quant_algo": "FP8"}, "dense"),
    "fp8-blocks": (partial(packers.float8, by="block", scale_name="weight_scale_inv"),
                   {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dense"),
    "fp8-tensor": (partial(packers.float8, by="tensor"), {"quant_method": "fp8", "activation_scheme": "dynamic"},
                   "dense"),
    "fbgemm-fp8": (partial(packers.float8, by="row"), {"quant_method": "fbgemm_fp8"}, "dense"),
    "nf4": (packers.table4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "dense"),
    "nf4-nested": (partial(packers.table4, nested=True), {"quant_method": "bitsandbytes"}, "dense"),
    "fp4": (partial(packers.table4, kind="fp4"), {"quant_method": "bitsandbytes"}, "dense"),
    "bitsandbytes-int8": (packers.int8_table, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "Q8_0"),
}  # fmt: skip
MODES = ("awq", "gptq-act-order", "pack-quantized-asymmetric", "fp8-blocks", "nvfp4-pack-quantized", "nf4-nested")


@pytest.fixture(scope="module")
def pairs(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By case: a packed checkpoint, and the plain one of the same values."""
    kept: dict[str, tuple[Path, Path]] = {}

    def get(case: str, family: str = "llama", **sizes: Any) -> tuple[Path, Path]:
        key = f"{case} {family} {sizes}"
        if key not in kept:
            pack, config, _ = CASES[case]
            path, _ = made(family, **{**SIZES, **sizes})
            kept[key] = packers.quantised(path, tmp_path_factory.mktemp("packed"), pack, config)
        return kept[key]

    return get


def loaded(path: Path, ops: Ops | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any]:
    """(The model, the method that read it)."""
    checkpoint = describe(str(path))
    method = method_for(more.pop("quantization", None), checkpoint.stored)
    return load_model(checkpoint, BuildContext(ops or Ops(), dtype, CPU, quant=method, **more)), method


def test_words_by_hand() -> None:
    """The golden words of the formats' descriptions, so that the packers are right."""
    row = torch.arange(-8.0, 8.0)
    assert packers.stream(list(range(16)), 4) == [0x76543210, 0xFEDCBA98 - (1 << 32)]
    eight = np.arange(8)[list(packers.AWQ_ORDER)]
    assert packers.stream([int(x) for x in eight], 4) == [0x75316420]
    assert packers.halves(np.array([[1, 15]])).tolist() == [[0xF1]]
    nf4, _ = packers.table4(torch.tensor([[1.0, -1.0]]))
    assert nf4["weight"].tolist() == [[0xF0]]
    assert packers.packed_ints(row[None], group=0)[0]["weight_packed"].shape == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_description_bit_for_bit(pairs: Any, case: str) -> None:
    packed, plain = pairs(case)
    (ours, _), (theirs, _) = loaded(packed), loaded(plain)
    for one, other in zip(ours.weights(), theirs.weights(), strict=True):
        assert torch.equal(one.value, other.value), one.names


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_share_reads_the_same_values(pairs: Any, case: str) -> None:
    packed, plain = pairs(case)
    for rank in range(2):
        mesh = Mesh.of(rank, tp=2)
        (ours, _), (theirs, _) = loaded(packed, mesh=mesh), loaded(plain, mesh=mesh)
        for one, other in zip(ours.weights(), theirs.weights(), strict=True):
            assert torch.equal(one.value, other.value), one.names


@pytest.mark.slow
@pytest.mark.parametrize("case", MODES)
def test_logits_are_those_of_the_dequantised_model(pairs: Any, case: str) -> None:
    packed, plain = pairs(case)
    check_modes(packed, reference(plain, PROMPT))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi3", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("case", ["awq", "gptq", "fp8-blocks", "pack-quantized", "nf4"])
def test_fused_tensors_experts_and_latents_are_read(pairs: Any, family: str, case: str) -> None:
    sizes: dict[str, Any] = {"head_dim": None} if family != "mixtral" else {}
    if family == "deepseek_v3":
        sizes |= {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
        sizes |= {"v_head_dim": 32, "moe_intermediate_size": 64}
    packed, plain = pairs(case, family, **sizes)
    close(Engine(packed).whole(PROMPT), Engine(plain).whole(PROMPT))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_native_table_keeps_what_it_can(pairs: Any, case: str) -> None:
    try:
        ops = native.table(1)
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    packed, plain = pairs(case)
    (ours, method), (theirs, _) = loaded(packed, ops, torch.bfloat16), loaded(plain)
    kind = CASES[case][2]
    value, reason = method.report.decision("bfloat16")
    assert value
    assert f"14 matrices keep their bits as {kind}" in reason if kind != "dense" else "14 are unpacked" in reason
    for one, other in zip(ours.weights(), theirs.weights(), strict=True):
        if one.role == "matrix" and "proj" in one.names[0]:
            wanted, got = other.value, one.value.dense()
            assert set(one.value.kinds) == {"BF16" if kind == "dense" else kind}
            # Q4_0 and Q5_0 are exact; of a minimum, or a float32 scale, float16 keeps 11 bits.
            limit = {"Q4_0": 0.0, "Q5_0": 0.0, "Q4_1": 8e-3, "Q8_0": 1e-3, "dense": 4e-3}[kind]
            assert (got - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["awq", "gptq", "pack-quantized"])
def test_the_native_table_keeps_experts_packed(pairs: Any, case: str) -> None:
    try:
        ops = native.table(1)
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    packed, plain = pairs(case, "mixtral")
    ours, method = loaded(packed, ops, torch.bfloat16)
    experts = [weight for weight in ours.weights() if weight.experts]
    assert experts and all(set(weight.value.kinds) == {CASES[case][2]} for weight in experts)
    assert "unpacked" not in method.report.decision("bfloat16")[1]
    logits = Engine(packed, ops=ops, kv_dtype=torch.bfloat16).whole(PROMPT)
    wanted = Engine(plain).whole(PROMPT)
    # A router may choose otherwise where two experts are close: most tokens are near.
    assert (logits - wanted).abs().amax(-1).median() < 0.05 * wanted.abs().max()


@pytest.mark.slow
def test_mixed_formats_and_plain_matrices_lie_in_one_file(made: Any, tmp_path: Path) -> None:
    """What the file holds decides, also between the parts of one fused layer."""
    kinds: dict[str, Any] = {
        "q_proj": packers.packed_ints, "k_proj": partial(packers.float8, by="row"), "up_proj": packers.int8_rows,
        "gate_proj": partial(packers.packed_ints, bits=8, group=0), "down_proj": partial(packers.nvfp4, modelopt=False),
    }  # fmt: skip

    def pack(name: str, tensor: torch.Tensor) -> packers.Packed | None:
        kind = kinds.get(name.split(".")[-2])
        return None if kind is None else kind(tensor)

    config = ct(4, "mixed-precision", ignore=["lm_head", "re:.*v_proj", "re:.*o_proj"])
    packed, plain = packers.quantised(made("llama", **SIZES)[0], tmp_path, pack, config, named=True)
    close(Engine(packed).whole(PROMPT), reference(plain, PROMPT))


@pytest.mark.slow
def test_experts_of_gpt_oss_are_read_from_their_blocks(made: Any, tmp_path: Path) -> None:
    packed, plain = gpt_oss(made, tmp_path)
    check_modes(packed, reference(plain, PROMPT))
    _, method = loaded(packed)
    assert "24 matrices" not in method.report.decision("float32")[1]
    assert "8 are unpacked to float32: experts in one stack" in method.report.decision("float32")[1]
    for rank in range(2):
        mesh = Mesh.of(rank, tp=2)
        (ours, _), (theirs, _) = loaded(packed, mesh=mesh), loaded(plain, mesh=mesh)
        for one, other in zip(ours.weights(), theirs.weights(), strict=True):
            assert torch.equal(one.value, other.value), one.names


@pytest.mark.slow
@pytest.mark.parametrize("case", ["awq", "gptq", "fp8-blocks", "nf4-nested"])
def test_ranks_give_the_logits_of_one(pairs: Any, case: str) -> None:
    """No group of quantised values is cut, so that nothing is rounded anew."""
    packed, _ = pairs(case)
    whole = Engine(packed).whole(PROMPT)
    found = together(2, lambda comm: engine_of(packed, comm).whole(PROMPT))[0]
    assert whole.abs().max() > 0.1 and (found - whole).abs().max() <= 1e-4


def gpt_oss(made: Any, target: Path) -> tuple[Path, Path]:
    path, _ = made("gpt_oss", hidden_size=64, intermediate_size=32)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return packers.quantised(path, target, packers.mxfp4_stack, config, named=True)


@pytest.mark.slow
@pytest.mark.parametrize("v2", [False, True])
def test_symmetric_gptq_files_that_lie_are_read_by_their_zeros(made: Any, tmp_path: Path, v2: bool) -> None:
    config = {**GPTQ, "checkpoint_format": "gptq" if v2 else "gptq_v2"}
    packed, plain = packers.quantised(made("llama", **SIZES)[0], tmp_path, partial(packers.gptq, v2=v2), config)
    close(Engine(packed).whole(PROMPT), Engine(plain).whole(PROMPT))


@pytest.mark.slow
def test_act_order_that_orders_nothing_is_kept_packed(made: Any, tmp_path: Path) -> None:
    packed, _ = packers.quantised(made("llama", **SIZES)[0], tmp_path, packers.gptq, {**GPTQ, "desc_act": True})
    _, method = loaded(packed)
    assert "the op table reads values" in method.report.decision("float32")[1]


def test_scales_beyond_float16_are_unpacked_and_told(made: Any, tmp_path: Path) -> None:
    def pack(weight: torch.Tensor) -> packers.Packed:
        tensors, values = packers.int8_rows(weight)
        tensors["weight_scale"] = tensors["weight_scale"] * 1e-6
        return tensors, values * 1e-6

    packed, _ = packers.quantised(made("llama", **SIZES)[0], tmp_path, pack, ct(8, "int-quantized"))
    _, method = loaded(packed)
    assert "do not fit into float16" in method.report.decision("float32")[1]


def changed(pairs: Any, tmp_path: Path, case: str, change: Any) -> Path:
    from safetensors.torch import load_file, save_file

    packed, _ = pairs(case)
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    return tmp_path


UP = "model.layers.1.mlp.up_proj"
MISSING = [
    ("awq", "scales", "its scales missing beside"), ("awq", "qweight", "its qweight missing beside"),
    ("gptq", "qzeros", "its qzeros missing beside"), ("pack-quantized", "weight_scale", "its scale missing beside"),
    ("nvfp4-pack-quantized", "weight_global_scale", "its global missing beside"),
    ("modelopt-nvfp4", "weight_scale_2", "its scale_2 missing beside"),
    ("fp8-blocks", "weight_scale_inv", "in a type that stands for no weights by itself"),
    ("fp8-blocks", "weight", "its weight missing beside"), ("bitsandbytes-int8", "SCB", "missing beside"),
    ("nf4", "weight.quant_map", "its quant_map missing beside"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("case", "part", "message"), MISSING, ids=lambda x: str(x)[:30])
def test_a_missing_part_is_named(pairs: Any, tmp_path: Path, case: str, part: str, message: str) -> None:
    path = changed(pairs, tmp_path, case, lambda tensors: tensors.pop(f"{UP}.{part}"))
    with pytest.raises(ModelLoadError, match=rf"{UP}.*{message}|{message}.*{UP}"):
        Engine(path)


WRONG = [
    ("awq", "qweight"), ("awq", "qzeros"), ("awq", "scales"), ("gptq", "qweight"), ("gptq", "qzeros"),
    ("gptq", "scales"), ("gptq", "g_idx"), ("pack-quantized", "weight_packed"), ("pack-quantized", "weight_scale"),
    ("pack-quantized-asymmetric", "weight_zero_point"), ("int-quantized", "weight"), ("int-quantized", "weight_scale"),
    ("float-quantized", "weight_scale"), ("fp8-blocks", "weight_scale_inv"), ("fp8-blocks", "weight"),
    ("nvfp4-pack-quantized", "weight_packed"), ("nvfp4-pack-quantized", "weight_scale"),
    ("modelopt-nvfp4", "weight_scale"), ("mxfp4-pack-quantized", "weight_scale"), ("nf4", "weight"),
    ("nf4", "weight.absmax"), ("nf4", "weight.quant_map"), ("bitsandbytes-int8", "SCB"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("case", "part"), WRONG)
def test_a_part_of_another_shape_is_named(pairs: Any, tmp_path: Path, case: str, part: str) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"][:-1].contiguous()

    # Where scales give the number of groups, it is the other part, or the matrix, that does not fit to them.
    named = rf"{UP}\.(qzeros|weight)" if part == "scales" else rf"{UP}\.{part}"
    with pytest.raises(ModelLoadError, match=named):
        Engine(changed(pairs, tmp_path, case, cut))


def test_a_state_that_is_none_is_named(pairs: Any, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight.quant_state.bitsandbytes__nf4"][0] = 0

    with pytest.raises(ModelLoadError, match="no state of a 4-bit matrix"):
        Engine(changed(pairs, tmp_path, "nf4", spoil))


def test_a_group_beyond_the_last_is_refused(pairs: Any, tmp_path: Path) -> None:
    def beyond(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.g_idx"][3] = 99

    with pytest.raises(ModelLoadError, match=f"{UP}.g_idx names groups beyond the 4"):
        Engine(changed(pairs, tmp_path, "gptq-act-order", beyond))


def test_biases_of_layers_that_have_none_must_be_zeros(pairs: Any, tmp_path: Path) -> None:
    def bias(value: float) -> Any:
        return lambda tensors: tensors.update({f"{UP}.bias": torch.full((192,), value)})

    for folder in ("zeros", "ones"):
        (tmp_path / folder).mkdir()
    path = changed(pairs, tmp_path / "zeros", "gptq", bias(0.0))
    close(Engine(path).whole(PROMPT), Engine(pairs("gptq")[1]).whole(PROMPT))
    with pytest.raises(ModelLoadError, match=f"{UP}.bias: this family has no bias there, and it is not of zeros"):
        Engine(changed(pairs, tmp_path / "ones", "gptq", bias(1.0)))


def test_plain_values_beside_scales_are_a_contradiction(pairs: Any, tmp_path: Path) -> None:
    def plain(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].float()

    with pytest.raises(ModelLoadError, match=f"{UP}.weight is plain .*weight_scale_inv: which of the two holds"):
        Engine(changed(pairs, tmp_path, "fp8-blocks", plain))


def test_matrices_that_are_stored_transposed_are_refused(made: Any, tmp_path: Path) -> None:
    def pack(name: str, tensor: torch.Tensor) -> packers.Packed | None:
        return packers.int8_table(tensor) if name.endswith("c_fc.weight") else None

    packed, _ = packers.quantised(
        made("gpt2")[0], tmp_path, pack, {"quant_method": "bitsandbytes", "load_in_8bit": True}, named=True
    )
    with pytest.raises(ModelLoadError, match=r"fc.*weight.*stored transposed are not read"):
        Engine(packed)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "AWQ version 'gemv' is not read: convert it"),
        ({"quant_method": "awq", "bits": 3}, "AWQ with 3 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ checkpoint_format 'marlin' is not read"),
        ({**GPTQ, "bits": 9}, "GPTQ with 9 bits"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "ModelOpt 'W4A8_AWQ' is not read; known: FP8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:x"}, "packing_format 'auto_round:x' is not read"),
        (ct(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        (ct(transform_config={"config_groups": {}}), "rotations of activations are not served"),
        ({"quant_method": "w4afp8"}, "'w4afp8' is not supported; take the compressed-tensors form"),
        ({"quant_method": "own"}, "'own' is not supported; read are auto-round, awq"),
        ("fp8", "expected an object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_read_is_refused_with_its_name_and_a_remedy(
    made: Any, tmp_path: Path, config: Any, message: str
) -> None:
    from model_support import edited

    path = edited(made("llama")[0], tmp_path / "x", quantization_config=config)
    with pytest.raises(ModelLoadError, match=f"config.json: quantization_config.*{message}"):
        Engine(path)


def test_old_files_beside_config_json_say_the_format(pairs: Any, tmp_path: Path) -> None:
    import json

    for case, file in (("gptq", "quantize_config.json"), ("awq-64", "quant_config.json")):
        packed, plain = pairs(case)
        folder = tmp_path / case
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((packed / "model.safetensors").read_bytes())
        config = json.loads((packed / "config.json").read_text())
        said = config.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(config))
        (folder / file).write_text(json.dumps({key: value for key, value in said.items() if key != "quant_method"}))
        close(Engine(folder).whole(PROMPT), Engine(plain).whole(PROMPT))


def test_the_page_of_models_lists_every_format() -> None:
    import model_table

    from phloem.checkpoint.quant_config import _REMEDIES, readers
    from phloem.quant import METHODS

    page = model_table.PAGE.read_text()
    assert page == model_table.page(), "docs/models.md is out of date: python scripts/model_table.py"
    made = {name for name in METHODS.names() if METHODS.get(name).wrap is not None}
    assert not {name for name in {*readers(), *_REMEDIES, *made} if f"`{name}`" not in page}


def test_a_format_that_is_only_read_cannot_be_asked_for(made: Any) -> None:
    checkpoint = describe(str(made("llama")[0]))
    with pytest.raises(
        ConfigError, match=r"awq is read from checkpoints, and this one is plain; made .* are fp8, int4"
    ):
        method_for("awq", checkpoint.stored)


def test_the_format_that_the_checkpoint_is_in_may_be_named(pairs: Any) -> None:
    ours, _ = loaded(pairs("awq")[0], quantization="awq")
    assert ours.weight_bytes > 0


def test_a_quantised_checkpoint_may_be_quantised_anew(pairs: Any) -> None:
    packed, plain = pairs("fp8-blocks")
    model, method = loaded(packed, quantization="int8")
    other, _ = loaded(plain, quantization="int8")
    for one, two in zip(model.weights(), other.weights(), strict=True):
        assert torch.equal(one.value, two.value)
    assert "14 are quantised anew (int8)" in method.report.decision("bfloat16")[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers_that_the_format_s_own_library_packs_are_read(bits: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    from phloem.quant._bits import unpack

    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, 72), generator=torch.Generator().manual_seed(bits))
    words = helpers.pack_to_int32(codes.to(torch.int8), bits)
    assert torch.equal(unpack(words, bits, 72).int() - (1 << bits - 1), codes.int())


def test_floats_that_the_format_s_own_library_packs_are_read() -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.nvfp4.helpers", reason="compressed-tensors is not installed"
    )
    from phloem.quant._bits import twice_e2m1

    values = torch.tensor(packers.E2M1).repeat(3, 2)
    assert torch.equal(twice_e2m1(helpers.pack_fp4_to_uint8(values)).float() / 2, values)


LIBRARY: dict[str, tuple[str, dict[str, Any], bool]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, True),
    "int4-zeros": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, False),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, True),
    "int8-zeros": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, False),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, True),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, True),
}


@pytest.mark.parametrize("case", LIBRARY)
def test_values_are_those_of_the_format_s_own_library(case: str) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from phloem.models._sources import TensorSource
    from phloem.quant import METHODS, Report

    layout, args, symmetric = LIBRARY[case]
    draw = torch.Generator().manual_seed(1)
    weight, groups = torch.randn(64, 128, generator=draw) * 0.05, 128 // args.get("group_size", 128)
    state = {"weight": weight, "weight_scale": torch.rand(64, groups, generator=draw) * 0.01 + 0.01}
    if case == "mxfp4":
        args = {**args, "scale_dtype": torch.uint8}
        state["weight_scale"] = torch.exp2(torch.randint(-8, -3, (64, groups), generator=draw).float())
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, (64, groups), dtype=torch.int8, generator=draw)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=symmetric, **args))
    library = base.BaseCompressor.get_value_from_registry(layout)
    stored = library.compress(state, scheme)
    wanted = library.decompress(dict(stored), scheme)["weight"]
    method = METHODS.module("compressed_tensors").configure({}, Report("compressed-tensors"))
    companions = {what: name.removeprefix("x.") for what, name in method.companions("x.weight").items()}
    found = {
        what: TensorSource(name, tuple(stored[name].shape), tensor=stored[name])
        for what, name in companions.items()
        if name in stored
    }
    assert len(found) == len(stored)
    assert torch.equal(method.join("x.weight", found, (64, 128)).take(None, torch.float32), wanted.float())


def test_nvfp4_is_the_library_s_but_for_the_bfloat16_that_it_computes_in() -> None:
    helpers = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.base import BaseCompressor

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) * 0.05
    tensors, values = packers.nvfp4(weight, modelopt=False)
    args = helpers.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    scheme = helpers.QuantizationScheme(targets=["Linear"], weights=args)
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    theirs = library.decompress(dict(tensors), scheme)["weight"].float()
    assert ((theirs - values).abs() <= 2**-7 * values.abs()).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_tables_of_4_bits_are_read_as_their_own_library_reads_them(kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    from phloem.models._sources import TensorSource
    from phloem.quant import METHODS, Report

    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(1)) * 0.05  # blocks of 64 cross its rows
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    stored = {"weight": packed, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}
    method = METHODS.module("bitsandbytes").configure({}, Report("bitsandbytes"))
    found = {
        what: TensorSource(name, tuple(stored[name[2:]].shape), tensor=stored[name[2:]])
        for what, name in method.companions("x.weight").items()
        if name[2:] in stored
    }
    ours = method.join("x.weight", found, (96, 80)).take(None, torch.float32)
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))


def test_blocks_of_float8_are_read_as_transformers_reads_them() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    from phloem.models._sources import TensorSource
    from phloem.quant import METHODS, Report

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(3)) * 0.05
    stored, _ = packers.float8(weight, by="block", scale_name="weight_scale_inv")
    method = METHODS.module("fp8").configure({"weight_block_size": [128, 128]}, Report("fp8"))
    found = {
        what: TensorSource(name, tuple(stored[name[2:]].shape), tensor=stored[name[2:]])
        for what, name in method.companions("x.weight").items()
        if name[2:] in stored
    }
    ours = method.join("x.weight", found, (256, 384)).take(None, torch.float32)
    theirs = Fp8Dequantize(None).convert({"weight": stored["weight"], "weight_scale_inv": stored["weight_scale_inv"]})
    assert torch.equal(ours, theirs["weight"]) and ours.std() > 0.01


@pytest.mark.slow
def test_experts_of_gpt_oss_are_those_that_transformers_unpacks(made: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, _ = gpt_oss(made, tmp_path)
    stored, model = load_file(packed / "model.safetensors"), Engine(packed).model
    names = [name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")]
    assert len(names) == 8
    for name in names:
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32)
        assert torch.equal(model.get_weight(name), theirs), name
