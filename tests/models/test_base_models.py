"""Checkpoints that a base model wrote: no `model.` before the names, and no head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, Engine, close, edited, reference

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.engine.choices.dtypes import stored_scales
from phloem.testing.checkpoints import families, tiny_checkpoint


def base_of(path: Path, target: Path) -> Path:
    """What transformers writes of the model without its head."""
    from transformers import AutoModel

    AutoModel.from_pretrained(path, dtype=torch.float32).save_pretrained(target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text", "gemma3"])
def test_a_base_model_with_a_tied_head(made: Any, tmp_path: Path, name: str) -> None:
    path, theirs = made(name)
    base = base_of(path, tmp_path / "base")
    close(reference(base, PROMPT), theirs)
    close(Engine(base).whole(PROMPT), theirs)


def test_names_without_the_prefix_beside_a_head(made: Any, tmp_path: Path) -> None:
    path, theirs = made("llama")
    more = {"model.layers.1.self_attn.k_scale": torch.tensor(0.5)}

    def bare(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("model."): values for name, values in {**stored, **more}.items()}

    changed = edited(path, tmp_path / "x", bare)
    engine = Engine(changed)
    close(engine.whole(PROMPT), theirs)
    assert stored_scales(engine.model, describe(str(changed))) == {1: ((0.5,), (1.0,))}


# Gemma 3's is another; of the others a base model writes the same names as the whole one.
WITHOUT = (
    "gemma3",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "qwen2_audio",
    "mistral3",
    "internvl",
)


@pytest.mark.some(21)
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in families() if name not in WITHOUT])
def test_every_family_does_without_its_prefix(made: Any, tmp_path: Path, name: str) -> None:
    path, theirs = made(name)
    prefixes = ("model.", "transformer.", "gpt_neox.", "backbone.")

    def bare(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for key, values in stored.items():
            prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
            found[key.removeprefix(prefix)] = values
        assert found.keys() != stored.keys()
        return found

    ours = Engine(edited(path, tmp_path / "x", bare)).whole(PROMPT)
    assert (ours - theirs).abs().max() <= 1e-4


def test_several_files(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "whole", tie_word_embeddings=True)
    from transformers import AutoModel

    base = tmp_path / "base"
    AutoModel.from_pretrained(path, dtype=torch.float32).save_pretrained(base, max_shard_size="60KB")
    assert len(describe(str(base)).files) > 1
    close(Engine(base).whole(PROMPT), reference(path, PROMPT))


def test_a_head_that_is_nowhere_is_missed(made: Any, tmp_path: Path) -> None:
    base = base_of(made("llama")[0], tmp_path / "base")
    with pytest.raises(ModelLoadError, match=r"1 tensors are missing: lm_head.weight \(a base model has"):
        Engine(base, task="generate")
