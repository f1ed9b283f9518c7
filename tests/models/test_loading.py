"""What goes wrong while a model is loaded, and live updates of one that is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import CPU, PROMPT, Engine, close

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.testing.checkpoints import tiny_checkpoint


def edited(path: Path, target: Path, tensors: Any = None, **config: Any) -> Path:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    stored = load_file(path / "model.safetensors")
    save_file(tensors(stored) if tensors else stored, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **config}))
    return target


def test_missing_tensors_are_named(made: Any, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = edited(made("llama")[0], tmp_path / "x", lambda stored: {k: v for k, v in stored.items() if k != name})
    with pytest.raises(ModelLoadError, match=f"1 tensors are missing: {name}"):
        Engine(path)


def test_wrong_shape_is_named(made: Any, tmp_path: Path) -> None:
    path = edited(made("llama")[0], tmp_path / "x", intermediate_size=96)
    with pytest.raises(ModelLoadError, match=r"9 tensors have another shape: .*gate_proj.*\[64, 32\], expected \[96"):
        Engine(path)


def test_unexpected_tensors_are_named(made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = edited(made("llama")[0], tmp_path / "x", lambda stored: {**stored, "extra.weight": torch.ones(2)})
    Engine(path)
    assert "1 tensors are not used: extra.weight" in caplog.text


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


def test_dummy_weights_are_the_same_every_time(made: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((made("gemma3_text")[0] / "config.json").read_text())
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
