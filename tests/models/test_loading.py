"""What goes wrong while a model is loaded, and live updates of one that is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import needs_native
from model_support import CPU, PROMPT, Engine, close, edited

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.distributed.mesh import Mesh
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.models._transformers import load_foreign
from phloem.quant import Method
from phloem.quant._source import Source
from phloem.testing.checkpoints import tiny_checkpoint


def test_missing_tensors_are_named(made: Any, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = edited(made("llama")[0], tmp_path / "x", lambda stored: {k: v for k, v in stored.items() if k != name})
    with pytest.raises(ModelLoadError, match=f"1 tensors are missing: {name}"):
        Engine(path)


def test_wrong_shape_is_named(made: Any, tmp_path: Path) -> None:
    path = edited(made("llama")[0], tmp_path / "x", intermediate_size=96)
    with pytest.raises(ModelLoadError, match=r"9 tensors have another shape: .*gate_proj.*\[64, 32\], expected \[96"):
        Engine(path)


@pytest.mark.parametrize("impl", ["phloem", "transformers"])
def test_tensors_that_nothing_reads_are_refused_with_their_names(made: Any, tmp_path: Path, impl: str) -> None:
    more = {f"model.layers.{n}.mlp.extra_proj.weight": torch.ones(2) for n in range(10)}
    path = edited(made("llama")[0], tmp_path / "x", lambda stored: {**stored, **more})
    said = r"10 tensors are read by no layer of llama: model\.layers\.0\.mlp\.extra_proj.* and 2 more \(config.json"
    with pytest.raises(ModelLoadError, match=said):
        if impl == "phloem":
            Engine(path)
        else:
            load_foreign(describe(str(path), model_impl=impl), BuildContext(Ops(), torch.float32, CPU), None)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (
            "llama",
            ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "model.layers.1.self_attn.q_scale"],
        ),
        ("gpt2", ["transformer.h.0.attn.bias", "h.0.attn.masked_bias"]),
        ("qwen3_5_text", ["mtp.fc.weight", "model.visual.patch_embed.proj.weight"]),
        ("deepseek_v3", ["model.layers.3.eh_proj.weight"]),
        ("ernie4_5_moe", ["model.mtp_block.0.mlp.up_proj.weight"]),
        ("gemma3_text", ["vision_tower.vision_model.post_layernorm.weight"]),
    ],
)
def test_what_files_hold_beside_a_model_does_not_stop_it(made: Any, tmp_path: Path, name: str, left: list[str]) -> None:
    path, theirs = made(name)
    extra = {tensor: torch.ones(1) for tensor in left}
    target = edited(path, tmp_path / "x", lambda stored: {**extra, **stored})
    close(Engine(target).whole(PROMPT), theirs)


@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2", "ernie4_5_moe"])
def test_corrections_of_routers_are_not_rounded_to_the_type_of_the_model(made: Any, tmp_path: Path, name: str) -> None:
    """Values near 7 whose spread is below bfloat16's step there decide which experts compute a token."""

    def corrected(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        near = {key: 6.9 + 1e-3 * torch.arange(old.numel()) for key, old in stored.items() if "correction_bias" in key}
        assert near
        return {**stored, **{key: value.view(stored[key].shape) for key, value in near.items()}}

    path = edited(made(name)[0], tmp_path / "x", corrected)
    kept = [weight for weight in Engine(path, torch.bfloat16).model.weights() if "correction_bias" in weight.names[0]]
    assert kept
    for weight in kept:
        value = weight.value.view(-1)
        assert torch.equal(value, (6.9 + 1e-3 * torch.arange(value.numel()))) and value.dtype == torch.float32


def test_a_bias_that_nobody_adds_is_refused_unless_it_is_of_zeros(made: Any, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    rows = made("llama")[0]
    size = Engine(rows).model.get_weight(name.replace("bias", "weight")).shape[0]
    Engine(edited(rows, tmp_path / "zeros", lambda stored: {**stored, name: torch.zeros(size)}))
    with pytest.raises(ModelLoadError, match=rf"{name}: this family has no bias there.*attention_bias"):
        Engine(edited(rows, tmp_path / "ones", lambda stored: {**stored, name: torch.ones(size)}))


@pytest.mark.parametrize("groups", ["x", [1], 7])
def test_a_quantisation_that_is_not_written_as_its_format_says_is_told(made: Any, tmp_path: Path, groups: Any) -> None:
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    with pytest.raises(ModelLoadError, match="quantization_config: not as compressed-tensors writes it"):
        Engine(edited(made("llama")[0], tmp_path / "x", quantization_config=said))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "spiral"}}, "unknown rope_type 'spiral'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope scaling 'llama3' lacks"),
        ({"hidden_act": "mish"}, "unknown activation 'mish'"),
    ],
)
def test_configuration_that_no_layer_knows(made: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        Engine(edited(made("llama")[0], tmp_path / "x", **change))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "gpt_oss"])
def test_dummy_weights_are_the_same_every_time(made: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text((made(name)[0] / "config.json").read_text())
    first = Engine(tmp_path, load_format="dummy").whole(PROMPT)
    second = Engine(tmp_path / "config.json", load_format="dummy").whole(PROMPT)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.std() > 0


def test_progress_reaches_the_end(made: Any) -> None:
    path, _ = made("llama")
    seen: list[tuple[str, float]] = []
    load_model(
        describe(str(path)), BuildContext(Ops(), torch.float32, CPU), lambda what, share: seen.append((what, share))
    )
    assert {what for what, _ in seen} == {"weights"}
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert seen[-1][1] == pytest.approx(1.0)


# Live updates


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_pushed_weights_make_it_the_other_model(made: Any, tmp_path: Path, family: str) -> None:
    from safetensors.torch import load_file

    path, theirs = made(family)
    other = tiny_checkpoint(family, tmp_path, seed=9)
    engine = Engine(other)
    qkv = engine.model.layers[0].mixer.qkv.weight.value
    assert (engine.whole(PROMPT) - theirs).abs().max() > 0.01
    moved = engine.model.update_weights(load_file(path / "model.safetensors").items())
    close(engine.whole(PROMPT), theirs)
    assert not moved
    assert engine.model.layers[0].mixer.qkv.weight.value is qkv  # in place: recorded steps stay right
    for name, tensor in load_file(path / "model.safetensors").items():
        torch.testing.assert_close(engine.model.get_weight(name), tensor)
    assert sorted(engine.model.weight_names()) == sorted(load_file(path / "model.safetensors"))


@pytest.mark.slow
def test_push_into_packed_weights(made: Any, tmp_path: Path) -> None:
    """A table that packs: parts that a call does not bring are kept."""
    from safetensors.torch import load_file

    @dataclasses.dataclass
    class Packed:
        tensor: torch.Tensor

    ops = dataclasses.replace(
        Ops(),
        prepare_linear=lambda parts, dtype, device: Packed(Ops().prepare_linear(parts, dtype, device)),
        linear=lambda x, weight, bias=None, **options: Ops().linear(x, weight.tensor, bias, **options),
        embedding=lambda ids, weight, scale: Ops().embedding(ids, weight.tensor, scale),
    )
    path, theirs = made("qwen2")
    engine = Engine(tiny_checkpoint("qwen2", tmp_path, seed=9), ops=ops)
    for name, tensor in load_file(path / "model.safetensors").items():
        assert engine.model.update_weights([(name, tensor)]) == (tensor.ndim == 2)
    close(engine.whole(PROMPT), theirs)


def test_push_refuses(made: Any) -> None:
    engine = Engine(made("llama")[0])
    with pytest.raises(ModelLoadError, match=r"no weight is called 'model.nothing'"):
        engine.model.update_weights([("model.nothing", torch.ones(1))])
    with pytest.raises(ModelLoadError, match=r"model.norm.weight is \[3\], expected \[32\]"):
        engine.model.update_weights([("model.norm.weight", torch.ones(3))])


@needs_native
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_packed_weights_are_refilled_where_they_lie(made: Any, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    other = tiny_checkpoint(name, tmp_path, seed=9)
    ops = native.table(1)
    engine, expected = (Engine(path, ops=ops, kv_dtype=torch.bfloat16) for path in (made(name)[0], other))
    places = [weight.value.segments.tolist() for weight in packed_weights(engine)]
    assert not engine.model.update_weights(load_file(other / "model.safetensors").items())
    assert [weight.value.segments.tolist() for weight in packed_weights(engine)] == places
    assert torch.equal(engine.whole(PROMPT), expected.whole(PROMPT))


def packed_weights(engine: Engine) -> list[Any]:
    return [weight for weight in engine.model.weights() if not isinstance(weight.value, torch.Tensor)]


def test_a_matrix_in_several_tensors_is_read_by_its_method(made: Any, tmp_path: Path) -> None:
    """A method names the companions of a matrix; what the file holds decides which matrices are stored so."""
    from safetensors.torch import load_file

    path, _ = made("phi3")
    small = ("self_attn.qkv_proj.weight", "mlp.down_proj.weight")

    def quantised(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, tensor in stored.items():
            if not name.endswith(small):
                out[name] = tensor
                continue
            scale = tensor.abs().amax(1, keepdim=True) / 127
            out[name] = (tensor / scale).round().to(torch.int8)
            out[name + "_scale"] = scale
        return out

    packed = edited(path, tmp_path / "packed", quantised)
    dense = edited(path, tmp_path / "dense", lambda stored: dequantised(quantised(stored)))
    method = Method("by-row", companions=lambda name: {"weight": name, "scale": name + "_scale"}, join=ByRow.join)
    for rank in range(2):
        ctx = BuildContext(Ops(), torch.float32, CPU, mesh=Mesh.of(rank, tp=2))
        ours = load_model(describe(str(packed)), dataclasses.replace(ctx, quant=method))
        theirs = load_model(describe(str(dense)), ctx)
        for mine, other in zip(ours.weights(), theirs.weights(), strict=True):
            torch.testing.assert_close(mine.value, other.value, atol=0, rtol=0)
    stored = load_file(dense / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(theirs.get_weight("model.layers.1.mlp.down_proj.weight"), stored[:, 32:])


def dequantised(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scaled = {n: t.float() * stored[n + "_scale"] for n, t in stored.items() if n + "_scale" in stored}
    return {n: scaled.get(n, t) for n, t in stored.items() if not n.endswith("_scale")}


@dataclasses.dataclass
class ByRow(Source):
    """Integers with a scale for each row."""

    weight: Source | None = None
    scale: Source | None = None

    @staticmethod
    def join(name: str, parts: Any, shape: tuple[int, ...]) -> Source:
        return ByRow(name, parts["weight"].shape, weight=parts["weight"], scale=parts["scale"])

    def take(self, index: Any, dtype: torch.dtype) -> torch.Tensor:
        assert self.weight is not None
        assert self.scale is not None
        rows = None if index is None else (index[0], slice(0, 1, 1))
        return (self.weight.take(index, torch.float32) * self.scale.take(rows, torch.float32)).to(dtype)
