"""What converters do to whole families: q, k and v in one tensor, language models of models that see, rows that no
checkpoint has; and files of models that write by diffusion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from model_support import PROMPT, Engine, close, reference

from phloem.checkpoint.describe import describe
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.testing import checkpoints
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

pytestmark = pytest.mark.slow


def joined(patch: pytest.MonkeyPatch, cut: int = 0) -> None:
    """Let the writer join queries, keys and values as `--fuse-qkv` does, and lose so many rows."""
    add, held = gguf.GGUFWriter.add_tensor, dict[str, dict[str, Any]]()

    def one(writer: Any, stored: str, tensor: Any, **rest: Any) -> None:
        match = re.fullmatch(r"(blk\.\d+\.)attn_([qkv])(\.weight|\.bias)", stored)
        if match is None:
            return add(writer, stored, tensor, **rest)
        parts = held.setdefault(match[1] + match[3], {})
        parts[match[2]] = tensor
        if len(parts) < 3:
            return None
        whole = np.concatenate([parts[letter] for letter in "qkv"])
        return add(writer, f"{match[1]}attn_qkv{match[3]}", whole[: len(whole) - cut].copy(), **rest)

    patch.setattr(gguf.GGUFWriter, "add_tensor", one)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "F32"), ("llama", "Q8_0"), ("qwen2", "F32"), ("glm", "F32"), ("gemma2", "F32")]
)
def test_queries_keys_and_values_in_one_tensor(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are turned in each of the three, and biases lie beside each other too."""
    path = tiny_checkpoint(name, tmp_path / "hf")
    apart = Engine(tiny_gguf(path, tmp_path / "apart.gguf", kind)).whole(PROMPT)
    joined(monkeypatch)
    file = tiny_gguf(path, tmp_path / "joined.gguf", kind)
    assert "blk.0.attn_qkv.weight" in describe(str(file)).gguf.tensors  # type: ignore[union-attr]
    torch.testing.assert_close(Engine(file).whole(PROMPT), apart, rtol=0, atol=0)


def test_a_joined_tensor_of_another_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, 2)
    file = tiny_gguf(tiny_checkpoint("llama", tmp_path / "hf"), tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"blk.0.attn_qkv.weight is \[126, 32\], expected 64 \+ 32 \+ 32 rows"):
        Engine(file)


@pytest.mark.parametrize(("name", "arch"), [("qwen2", "qwen2vl"), ("qwen3", "qwen3vl"), ("qwen3_moe", "qwen3vlmoe")])
def test_the_language_model_of_one_that_sees(
    name: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To texts the axes of its rotation are one, whatever their sections; it takes no pictures."""
    path = tiny_checkpoint(name, tmp_path / "hf")
    monkeypatch.setattr(checkpoints, "architecture", lambda config, usual: arch)
    more = {f"{arch}__rope__dimension_sections": [3, 3, 2, 0], f"{arch}__n_deepstack_layers": 3}
    engine = Engine(tiny_gguf(path, tmp_path / "tiny.gguf", **more))
    assert engine.checkpoint.model_type == name
    close(engine.whole(PROMPT), reference(path, PROMPT))


def test_rows_of_padding_are_no_inputs_of_layers(tmp_path: Path) -> None:
    """Tokens beyond the table read its first row, though the converter has filled the table up; and a table that is
    full is one, whatever its last row."""
    file = tiny_gguf(tiny_checkpoint("gemma3n_text", tmp_path / "hf"), tmp_path / "tiny.gguf", "Q8_0")
    config = describe(str(file)).config
    assert (config["vocab_size_per_layer_input"], config["filled_per_layer_input"]) == (384, 300)
    full = tiny_checkpoint("gemma3n_text", tmp_path / "full", vocab_size_per_layer_input=384)
    file = tiny_gguf(full, tmp_path / "full.gguf")
    assert describe(str(file)).config["filled_per_layer_input"] == 384
    close(Engine(file).whole(PROMPT), reference(full, PROMPT))


@pytest.mark.parametrize("name", ["dream", "llada"])
def test_models_of_diffusion_give_the_logits_of_their_folder(name: str, tmp_path: Path) -> None:
    """The folder's are compared with a dense reference (`test_denoisers.py`)."""
    path = tiny_checkpoint(name, tmp_path / "hf")
    file = tiny_gguf(path, tmp_path / "tiny.gguf")
    if name == "dream":  # as published files call it: no sign that it only embeds
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": ["DreamModel"]}))
    ours, theirs = Engine(file), Engine(path)
    assert ours.checkpoint.config["mask_token_id"] == theirs.checkpoint.config["mask_token_id"] == 2
    close(ours.whole(PROMPT), theirs.whole(PROMPT))
    with pytest.raises((ModelLoadError, ConfigError), match=r"attention\.causal"):
        Engine(tiny_gguf(path, tmp_path / "odd.gguf", **{f"{name}__attention__causal": True}))


def test_routers_of_kimi_linear_score_by_a_sigmoid(tmp_path: Path) -> None:
    path = tiny_checkpoint("kimi_linear", tmp_path / "hf")
    file = tiny_gguf(path, tmp_path / "tiny.gguf", **{"kimi-linear__expert_gating_func": 1})
    with pytest.raises(ModelLoadError, match="moe_router_activation_func 1: known is sigmoid"):
        Engine(file)
