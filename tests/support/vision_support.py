"""Tiny models that see: checkpoints with processors, pictures, and what transformers makes of both."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phloem.checkpoint.families import family
from phloem.testing.checkpoints import tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "min_pixels": 64,
        "max_pixels": 1600,
    },
}
SETTINGS["qwen2_5_vl"] = SETTINGS["qwen2_vl"]
SETTINGS["qwen3_vl"] = {**SETTINGS["qwen2_vl"], "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SETTINGS["smolvlm"] = {
    "image_processor_type": "SmolVLMImageProcessor",
    "size": {"longest_edge": 32},
    "max_image_size": {"longest_edge": 16},
}
SETTINGS["idefics3"] = {**SETTINGS["smolvlm"], "image_processor_type": "Idefics3ImageProcessor"}
SETTINGS["llava"] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
}
SETTINGS["llava-siglip"] = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}}
SETTINGS["llava-pixtral"] = {
    "image_processor_type": "PixtralImageProcessor",
    "size": {"longest_edge": 24},
    "patch_size": {"height": 4, "width": 4},
}
SETTINGS["mistral3"] = {
    "image_processor_type": "PixtralImageProcessor",
    "size": {"longest_edge": 32},
    "patch_size": {"height": 8, "width": 8},
}
SETTINGS["gemma3"] = {
    "image_processor_type": "Gemma3ImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SETTINGS["internvl"] = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "size": {"height": 16, "width": 16},
    "crop_to_patches": True,
    "max_patches": 4,
}


def picture(seed: int, width: int, height: int) -> Any:
    """A Pillow image with smooth colours and some noise."""
    from PIL import Image

    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def seeing_checkpoint(name: str, path: Path, **overrides: Any) -> Path:
    """A tiny checkpoint with the settings of its picture processor."""
    family_name, _, variant = name.partition("-")
    overrides = {**(family(family_name).variants[variant] if variant else {}), **overrides}
    tiny_checkpoint(family_name, path, **overrides)
    (path / "preprocessor_config.json").write_text(json.dumps(SETTINGS[name]))
    return path


class Theirs:
    """transformers' model and image processor."""

    def __init__(self, name: str, path: Path) -> None:
        import transformers

        self.name = name
        self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        kind = getattr(transformers, SETTINGS[name]["image_processor_type"] + "Pil")
        self.processor: Any = kind(**{k: v for k, v in SETTINGS[name].items() if k != "image_processor_type"})

    def inputs(self, ids: list[int], images: list[Any]) -> dict[str, Any]:
        """`ids` have as many placeholders as the pictures take."""
        found: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if images:
            nested = self.name in ("smolvlm", "idefics3")
            found |= dict(self.processor(images=[images] if nested else images, return_tensors="pt"))
            found.pop("num_patches", None)
        if self.name.startswith("qwen"):
            found["mm_token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).int()
        if self.name == "gemma3":
            found.pop("num_crops", None)
            found["token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).int()
        return found

    def logits(self, ids: list[int], images: list[Any]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(**self.inputs(ids, images)).logits[0].float()

    def greedy(self, ids: list[int], images: list[Any], count: int) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(
                **self.inputs(ids, images), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return out[0, len(ids) :].tolist()


def seeing() -> list[str]:
    return list(SETTINGS)
