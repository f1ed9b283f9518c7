"""Files with adapters of models that draw, as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def tensors(pipe: Any, names: list[str], seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """Of these layers, large enough to change a picture."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for at, name in enumerate(names):
        linear = pipe.transformer.get_submodule(name)
        for side, shape in (("A", (rank + at % 2, linear.in_features)), ("B", (linear.out_features, rank + at % 2))):
            made[f"transformer.{name}.lora_{side}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return made


def written(path: Path, found: dict[str, torch.Tensor], alpha: float | None = None) -> Path:
    """As diffusers saves adapters: PEFT's settings stand in the file's header."""
    names = {
        key.removeprefix("transformer.").split(".lora_")[0]: value for key, value in found.items() if "lora_A" in key
    }
    settings = {
        "transformer.r": 2,
        "transformer.lora_alpha": alpha,
        "transformer.target_modules": list(names),
        "transformer.rank_pattern": {name: value.shape[0] for name, value in names.items() if value.shape[0] != 2},
        "transformer.alpha_pattern": dict.fromkeys(list(names)[:1], 2 * alpha if alpha else 0),
    }
    extra = {} if alpha is None else {"lora_adapter_metadata": json.dumps(settings)}
    save_file(found, path, {"format": "pt", **extra})
    return path
