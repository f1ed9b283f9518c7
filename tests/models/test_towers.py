"""Checkpoints of language models among towers: text is served, by the file of the language model's family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, check_modes, edited, reference

from phloem.checkpoint.describe import describe
from phloem.checkpoint.families import FAMILIES, family
from phloem.core.errors import ModelLoadError
from phloem.testing.checkpoints import _SIZES as SIZES

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
GEMMA = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
LLAMA = {"intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", QWEN),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN),
    "mistral3": ("ministral3", {**VISION, "model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 8}),
    "llava": ("llama", {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 1}),
    "llama4": ("llama4_text", {**VISION, **LLAMA, "num_hidden_layers": 1}),
    "gemma4": ("gemma4_text", {**GEMMA, "num_hidden_layers": 1}),
}


def made(name: str, path: Path) -> Path:
    """A tiny checkpoint of a model with towers."""
    import transformers

    inner, vision = TOWERS[name]
    text = {**SIZES, **(family(inner).tiny or {}), "model_type": inner}
    text = {key: value for key, value in text.items() if value is not None}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, text_config=text, vision_config=vision)
    model: Any = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and key.endswith("norm.weight") and not inner.startswith("qwen")
            wide = 1.0 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.normal_(float(norm), wide)
    model.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_logits(name: str, tmp_path: Path) -> None:
    path = made(name, tmp_path)
    checkpoint = describe(str(path))
    # A family with a file of its own takes pictures too; here it is asked for text.
    assert checkpoint.model_type == (name if name in FAMILIES.names() else TOWERS[name][0])
    check_modes(path, reference(path, PROMPT))


def test_a_model_whose_language_model_has_no_file_is_refused_by_its_own_name(tmp_path: Path) -> None:
    for inner, kind in (("unheard_of", "NewForConditionalGeneration"), ("bert", "NewForConditionalGeneration")):
        text = {"model_type": inner}
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "new_vl", "text_config": text, "architectures": [kind]})
        )
        with pytest.raises(ModelLoadError, match="unknown model type 'new_vl'"):
            describe(str(tmp_path), load_format="dummy")


def test_towers_are_left_out_knowingly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In either spelling of the names; nothing is said of them."""
    from model_support import Engine

    from phloem.testing.checkpoints import tiny_checkpoint

    path = tiny_checkpoint("qwen3", tmp_path / "text")
    config = json.loads((path / "config.json").read_text())
    want = Engine(path).whole(PROMPT)

    def new(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inner = {key.replace("model.", "model.language_model.", 1): value for key, value in stored.items()}
        return {**inner, "model.visual.patch.weight": torch.zeros(2, 2)}

    def old(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**{f"language_model.{key}": value for key, value in stored.items()}, "vision_tower.a": torch.zeros(2)}

    around = {"model_type": "some_vl", "text_config": config, "architectures": ["SomeForConditionalGeneration"]}
    for place, names in (("new", new), ("old", old)):
        got = Engine(edited(path, tmp_path / place, names, **around)).whole(PROMPT)
        torch.testing.assert_close(got, want, atol=0, rtol=0)
    assert "not used" not in caplog.text
