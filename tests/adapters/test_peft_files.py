"""What a PEFT folder may hold, and what is refused by name before anything is served with it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import write_adapter
from safetensors.torch import load_file, save_file

from phloem import Engine
from phloem.adapters._peft import content, read
from phloem.core.errors import BadRequest, ConfigError, PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("peft", reason="PEFT writes the adapters")
pytestmark = pytest.mark.slow
Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model.model.layers.0.self_attn."
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def good(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(model, tmp_path_factory.mktemp("good"), strong=3.0)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model_path=str(model), max_total_tokens=1024, enable_lora=True, max_lora_rank=8) as found:
        yield found


def altered(good: Path, out: Path, tensors: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
    """A copy with other settings, or other tensors."""
    out.mkdir()
    settings = {**json.loads((good / "adapter_config.json").read_text()), **config}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    found = load_file(good / "adapter_model.safetensors")
    if tensors is not None:
        tensors(found)
    save_file(found, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [-5]}, "trainable_token_indices must be"),
        ({"trainable_token_indices": {"embed_tokens": 5}}, "trainable_token_indices must be"),
        ({"target_parameters": [3]}, "target_parameters must be"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 5}, "says rank 5"),
        ({"r": 0}, "r must be"),
        ({"rank_pattern": {"q_proj": 3}}, "says rank 3"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"r": True}, "r must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
        ({"lora_alpha": 1e300}, "lora_alpha must be a number"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must map names to numbers"),
        ({"rank_pattern": [1]}, "rank_pattern must map names to whole numbers"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "no regular expression"),
        ({"r": 10**12}, "r must be a whole number above 0, at most"),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(
    good: Path, tmp_path: Path, config: dict[str, Any], names: str
) -> None:
    with pytest.raises(BadRequest, match=names):
        read(altered(good, tmp_path / "altered", **config))


def _add(name: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_add(f"{PREFIX}q_proj.lora_C.weight", 4, 4), "lora_C"),
        (lambda tensors: tensors.pop(f"{PREFIX}q_proj.lora_A.weight"), "has no lora_A"),
        (_add(f"{PREFIX}q_proj.lora_B.weight", 64, 3), "do not fit together"),
        (_add(f"{PREFIX}q_proj.lora_B.default.weight", 64, 4), "say the same"),
        (_add(f"{PREFIX}q_proj.bias"), r"float32 \[\] is not of an adapter"),
        (lambda tensors: tensors[f"{PREFIX}q_proj.lora_A.weight"].fill_(float("nan")), "q_proj.*no finite numbers"),
        (lambda tensors: tensors[f"{PREFIX}q_proj.lora_B.weight"].fill_(1e30), r"q_proj.lora_B.* beyond 1e\+18"),
        (lambda tensors: tensors.update({f"{PREFIX}q_proj.lora_B.weight": torch.ones(64, 4).int()}), "int32"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    good: Path, tmp_path: Path, change: Callable[[Tensors], Any], names: str
) -> None:
    with pytest.raises(BadRequest, match=names):
        read(altered(good, tmp_path / "altered", change))


def test_numbers_that_are_none_as_they_are_kept_are_refused(engine: Engine, good: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{PREFIX}q_proj.lora_B.weight"] *= 1e15

    with pytest.raises(PhloemError, match="q_proj has values that are too large"):
        engine.load_lora_adapter("large", str(altered(good, tmp_path / "large", change, lora_alpha=1e8)))


def test_a_layer_under_two_names_is_refused(engine: Engine, good: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for side in "AB":
            name = f"{PREFIX}q_proj.lora_{side}.weight"
            tensors[name.replace("model.model.model.", "model.")] = 2 * tensors[name]

    with pytest.raises(PhloemError, match=r"layers.0.self_attn.q_proj and .*layers.0.self_attn.q_proj say the same"):
        engine.load_lora_adapter("twice", str(altered(good, tmp_path / "twice", change)))


@pytest.mark.parametrize("shape", [[-4, -32], [4.0, 32]])
def test_shapes_that_are_none_are_refused(good: Path, tmp_path: Path, shape: list[Any]) -> None:
    out = altered(good, tmp_path / "shape")
    header = json.dumps({f"{PREFIX}q_proj.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 512]}})
    padded = header.encode() + b" " * (-len(header) % 8)
    (out / "adapter_model.safetensors").write_bytes(len(padded).to_bytes(8, "little") + padded + bytes(512))
    with pytest.raises(BadRequest, match=r"adapter_model.safetensors: "):
        read(out)


def test_copies_are_known_as_alike_wherever_their_base_lies_and_others_are_not(good: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(good, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/elsewhere"}))
    assert content(copy) == content(good)
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    assert content(copy) != content(good)
    tensors = load_file(good / "adapter_model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    shutil.copy(good / "adapter_config.json", copy)
    save_file(changed, copy / "adapter_model.safetensors")
    assert content(copy) != content(good)


def test_pickled_objects_are_never_read(good: Path, tmp_path: Path) -> None:
    out = altered(good, tmp_path / "altered")
    (out / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return (tmp_path / "touched").touch, ()

    (out / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadRequest, match="never read"):
        read(out)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"{}", b"\xff" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_broken_file_is_refused(good: Path, tmp_path: Path, content: bytes) -> None:
    out = altered(good, tmp_path / "altered")
    (out / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(BadRequest, match=r"adapter_model\.safetensors"):
        read(out)
    (out / "adapter_config.json").write_text("[")
    with pytest.raises(BadRequest, match="is not JSON"):
        read(out)
    (out / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(BadRequest, match="is not JSON"):
        read(out)
    (out / "adapter_config.json").unlink()
    os.mkfifo(out / "adapter_config.json")
    with pytest.raises(BadRequest, match="is no file"):
        read(out)
    for name in ("nowhere", "x" * 5000):
        with pytest.raises(BadRequest, match="no such folder"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "config", "names"),
    [
        (_add("base_model.model.lm_head.weight", 383, 32), {}, r"lm_head\.weight is \[383, 32\]"),
        (_add("base_model.model.vision.layers.0.self_attn.q_proj.bias", 64), {}, "vision.layers.0"),
        (_add("base_model.model.model.embed_tokens.lora_embedding_A", 4, 384), {}, "but one of lora_embedding"),
        (None, {"r": 16}, "says rank 16"),
    ],
)
def test_what_has_no_place_in_the_model_is_refused_and_nothing_is_half_applied(
    engine: Engine,
    good: Path,
    tmp_path: Path,
    change: Callable[[Tensors], Any] | None,
    config: dict[str, Any],
    names: str,
) -> None:
    engine.load_lora_adapter("kept", str(good))
    before: Any = engine.generate("hello", GREEDY, lora_path="kept")
    base: Any = engine.generate("hello", GREEDY)
    for name in ("kept", "other"):
        with pytest.raises(PhloemError, match=names):
            engine.load_lora_adapter(name, str(altered(good, tmp_path / name, change, **config)))
    after: Any = engine.generate("hello", GREEDY, lora_path="kept")
    assert after["output_ids"] == before["output_ids"] != base["output_ids"]
    assert engine.generate("hello", GREEDY)["output_ids"] == base["output_ids"]  # type: ignore[index, call-overload]
    with pytest.raises(BadRequest, match="no adapter 'other'"):
        engine.generate("hello", GREEDY, lora_path="other")


def test_another_base_and_too_high_a_rank_are_told(engine: Engine, good: Path, tmp_path: Path) -> None:
    wide = tiny_checkpoint("llama", tmp_path / "wide", hidden_size=48)
    with pytest.raises(PhloemError, match=r"another base.*48 inputs, the layer here 32"):
        engine.load_lora_adapter("x", str(write_adapter(wide, tmp_path / "of-wide")))
    deep = tiny_checkpoint("llama", tmp_path / "deep", num_hidden_layers=5)
    with pytest.raises(PhloemError, match=r"14 modules are not adapted here: model\.layers\.3"):
        engine.load_lora_adapter("x", str(write_adapter(deep, tmp_path / "of-deep")))
    high = write_adapter(tiny_checkpoint("llama", tmp_path / "same"), tmp_path / "high", r=9)
    with pytest.raises(PhloemError, match="rank is 9, at most 8"):
        engine.load_lora_adapter("x", str(high))


@pytest.mark.parametrize("spelling", ["default", "bare", "language_model"])
def test_names_as_other_tools_write_them_are_found(engine: Engine, good: Path, tmp_path: Path, spelling: str) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            other = {
                "default": name.replace(".weight", ".default.weight"),
                "bare": name.removeprefix("base_model.model."),
                "language_model": name.replace("model.model.layers", "model.model.language_model.layers"),
            }[spelling]
            tensors[other] = tensors.pop(name)

    engine.load_lora_adapter("plain", str(good))
    engine.load_lora_adapter("renamed", str(altered(good, tmp_path / "renamed", rename)))
    answers: Any = engine.generate(["hello"] * 2, GREEDY, lora_path=["plain", "renamed"])
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


def test_a_start_with_a_wrong_adapter_says_which(model: Path, good: Path, tmp_path: Path) -> None:
    for paths, names in (
        ([f"a={tmp_path}/none"], "no such folder|adapter_config.json"),
        ([f"a={good}", f"a={good}"], "several adapters are called 'a'"),
        (["{"], "is not JSON"),
        (["=x"], "NAME=PATH"),
    ):
        with pytest.raises(ConfigError, match=names):
            Engine(model_path=str(model), max_total_tokens=512, lora_paths=paths)


def test_spellings_of_adapters_at_the_start(model: Path, good: Path) -> None:
    spec = json.dumps({"lora_name": "j", "lora_path": str(good), "pinned": True})
    vllm = json.dumps({"name": "v", "path": str(good), "base_model_name": "x"})
    with Engine(model_path=str(model), max_total_tokens=512, lora_modules=[spec, vllm, str(good)]) as engine:
        assert engine.ready["lora_adapters"] == {"j": str(good), "v": str(good), str(good): str(good)}
        decisions = {name: value for name, value, _ in engine.ready["decisions"]}
        assert decisions["max_loaded_loras"] >= 3 and decisions["max_lora_rank"] >= 4
