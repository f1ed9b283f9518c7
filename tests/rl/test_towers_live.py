"""Weights of towers that change while the engine runs: pictures and sounds are those of a fresh start with the new
ones, also where a tower keeps what it has made of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from speech_support import sound, wav
from vision_support import picture, png, seeing_checkpoint

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

SETTINGS: dict[str, Any] = {"ops": "reference", "dtype": "float32", "max_total_tokens": 1024, "threads": 1}
HEARD = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "qwen2_audio")
FAMILIES = (*HEARD, "qwen3_vl", "smolvlm", "gemma3", "internvl")


def made(name: str, path: Path, seed: int) -> Path:
    return tiny_checkpoint(name, path, seed=seed) if name in HEARD else seeing_checkpoint(name, path, seed=seed)


def told(engine: Engine, name: str) -> list[float]:
    """Log probabilities behind a sound, or a picture."""
    media: Any = {"audio_data": wav(sound(1.0))} if name in HEARD else {"image_data": png(picture(3, 24, 16))}
    kind = "audio" if name in HEARD else "image"
    found: Any = engine.generate(
        f"see <{kind}> and tell",
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
        **media,
    )
    return [entry[0] for entry in found["meta_info"]["input_token_logprobs"][1:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_seen_and_heard_is_of_the_new_weights(name: str, tmp_path: Path) -> None:
    old, new = made(name, tmp_path / "old", 0), made(name, tmp_path / "new", 9)
    stored = load_file(new / "model.safetensors")
    towers = {key: value for key, value in stored.items() if not key.startswith(("model.layers", "lm_head"))}
    with Engine(model_path=str(old), **SETTINGS) as engine:
        before = told(engine, name)
        # First kernels of convolutions alone, then everything.
        kernels = {key: value for key, value in towers.items() if value.ndim > 2}
        assert kernels
        assert engine.update_weights_from_tensor(list(kernels.items()))[0]
        changed = told(engine, name)
        assert engine.update_weights_from_tensor(list(stored.items()))[0]
        after = told(engine, name)
    with Engine(model_path=str(new), **SETTINGS) as engine:
        wanted = told(engine, name)
    assert changed != before
    assert torch.allclose(torch.tensor(after), torch.tensor(wanted), atol=1e-5)
