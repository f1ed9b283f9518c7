"""Tiny models that see: checkpoints with processors, pictures, and what transformers makes of both."""

from __future__ import annotations

import io
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phloem.checkpoint.families import family
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD
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
SETTINGS["qwen3_vl_moe"] = SETTINGS["qwen3_vl"]
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
TILES: list[list[int]] = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
SETTINGS["llava_next"] = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 12},
    "crop_size": {"height": 12, "width": 12},
    "image_grid_pinpoints": TILES,
}
SETTINGS["llava_next_video"] = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
}
SETTINGS["llava_onevision"] = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "size": {"height": 22, "width": 22},
    "image_grid_pinpoints": [[22, 22], [22, 44], [44, 22], [44, 44]],
}
SETTINGS["glm4v"] = {
    "image_processor_type": "Glm4vImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 128, "longest_edge": 3200},
}
SETTINGS["glm4v_moe"] = SETTINGS["glm4v"]
FPS = 4  # of the clips in tests, all frames of which are shown
WATCHED = {"patch_size": 4, "merge_size": 2, "fps": FPS, "min_frames": 2}


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
    if name.startswith(("qwen", "glm")):
        means = {key: value for key, value in SETTINGS[name].items() if key in ("image_mean", "image_std")}
        size = {"shortest_edge": 64, "longest_edge": 1 << 14}
        (path / "video_preprocessor_config.json").write_text(json.dumps({**means, **WATCHED, "size": size}))
    if name in ("llava_onevision", "llava_next_video"):
        size = SETTINGS[name]["size"]
        (path / "video_preprocessor_config.json").write_text(json.dumps({"size": size, "num_frames": 4}))
    return path


def patches_of(frames: list[Any], mean: Any = CLIP_MEAN, std: Any = CLIP_STD) -> tuple[torch.Tensor, Any]:
    """Patches of 4 x 4 pixels and 2 frames, in blocks of 2 x 2: what a video processor makes without resizing."""
    values = (np.stack([np.asarray(frame) for frame in frames]) / 255 - mean) / std
    if len(values) % 2:
        values = np.concatenate([values, values[-1:]])
    steps, rows, columns = len(values) // 2, values.shape[1] // 4, values.shape[2] // 4
    cut = values.reshape(steps, 2, rows // 2, 2, 4, columns // 2, 2, 4, 3)
    flat = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(steps * rows * columns, -1)
    return torch.from_numpy(flat).float(), (steps, rows, columns)


class Theirs:
    """transformers' model and image processor."""

    def __init__(self, name: str, path: Path) -> None:
        import transformers

        self.name = name
        self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        kind = getattr(transformers, SETTINGS[name]["image_processor_type"] + "Pil")
        self.processor: Any = kind(**{k: v for k, v in SETTINGS[name].items() if k != "image_processor_type"})

    def inputs(self, ids: list[int], images: list[Any], clips: list[list[Any]] | None = None) -> dict[str, Any]:
        """`ids` have as many placeholders as the pictures and clips take; frames of clips have whole blocks."""
        found: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if images:
            nested = self.name in ("smolvlm", "idefics3")
            found |= dict(self.processor(images=[images] if nested else images, return_tensors="pt"))
            found.pop("num_patches", None)
        if self.name.startswith(("qwen", "glm")):
            found["mm_token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).int()
            found["mm_token_type_ids"] += 2 * (found["input_ids"] == self.model.config.video_token_id).int()
        if clips and self.name.startswith("llava"):
            found["pixel_values_videos"] = torch.stack([self._frames(frames) for frames in clips])
        elif clips and self.name.startswith("glm"):
            self._with_films(found, clips)
        elif clips:
            made = [self._clip(frames) for frames in clips]
            found["pixel_values_videos"] = torch.cat([values for values, _ in made])
            found["video_grid_thw"] = torch.tensor([grid for _, grid in made])
        if clips and self.name == "qwen2_5_vl":
            found["second_per_grid_ts"] = torch.tensor([2 / FPS for _ in clips])
        if self.name == "gemma3":
            found.pop("num_crops", None)
            found["token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).int()
        return found

    def _with_films(self, found: dict[str, Any], clips: list[list[Any]]) -> None:
        """GLM's frames have the placeholder of pictures. Of both in one prompt transformers' class takes none: there
        frames stand as pictures do, which they are alike, in the order that the numbers of tokens tell."""
        made = [self._clip(frames) for frames in clips]
        values = torch.cat([values for values, _ in made])
        grids = torch.tensor([grid for _, grid in made])
        token = found["input_ids"][0] == self.model.config.image_token_id
        if "pixel_values" not in found:
            found |= {"pixel_values_videos": values, "video_grid_thw": grids}
            found["mm_token_type_ids"] = 2 * token.int()[None]
            return
        (steps, rows, columns), spans = made[0][1], [list(each) for key, each in groupby(token.tolist()) if key]
        parts = [(found["pixel_values"], found["image_grid_thw"]), (values, torch.tensor([[1, rows, columns]] * steps))]
        if len(spans[0]) == rows * columns // 4:
            parts.reverse()
        found["pixel_values"], found["image_grid_thw"] = (torch.cat(each) for each in zip(*parts, strict=True))

    def _frames(self, frames: list[Any]) -> torch.Tensor:
        """Four frames, evenly spread, made square, or the square in their middle."""
        from PIL import Image

        chosen = [frames[int(at * len(frames) / 4)] for at in range(4)]
        if self.name == "llava_onevision":
            chosen = [frame.resize((22, 22), Image.Resampling.BICUBIC) for frame in chosen]
        else:
            chosen = [frame.crop((8, 0, 24, 16)) for frame in chosen]
        values = (np.stack([np.asarray(frame) for frame in chosen]) / 255 - CLIP_MEAN) / CLIP_STD
        return torch.from_numpy(values).float().permute(0, 3, 1, 2)

    def _clip(self, frames: list[Any]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        settings = SETTINGS[self.name]
        return patches_of(frames, settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD))

    def logits(self, ids: list[int], images: list[Any], clips: list[list[Any]] | None = None) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(**self.inputs(ids, images, clips)).logits[0].float()

    def greedy(self, ids: list[int], images: list[Any], count: int, clips: list[list[Any]] | None = None) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(
                **self.inputs(ids, images, clips),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, len(ids) :].tolist()


def seeing() -> list[str]:
    return list(SETTINGS)


def clip(
    frames: list[Any], fps: int = FPS, container: str = "matroska", codec: str = "ffv1", rate: Any = None
) -> bytes:
    """A video file of Pillow images; by this codec without loss."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=rate or fps)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = {"ffv1": "bgr0", "gif": "rgb8"}.get(codec, "yuv420p")
        stream.options = {} if codec == "gif" else {"g": "4"}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    return buffer.getvalue()


def pdf(sizes: list[tuple[int, int]], lock: bool = False) -> bytes:
    """A document with a coloured page of each of these sizes, in points; `lock`: it says that it is encrypted."""
    kids = " ".join(f"{4 + 2 * at} 0 R" for at in range(len(sizes)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(sizes)}>>"]
    objects.append("<</Filter/Standard/V 1/R 2/O(" + "o" * 32 + ")/U(" + "u" * 32 + ")/P -4>>")
    for at, (width, height) in enumerate(sizes):
        drawn = f"0.{at + 1} 0.5 0.9 rg 0 0 {width // 2} {height} re f"
        box = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {width} {height}]/Contents {5 + 2 * at} 0 R>>"
        objects += [box, f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream"]
    data, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj{text}endobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    lines = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(objects) + 1}/Root 1 0 R"
    locked = "/Encrypt 3 0 R/ID[(a)(a)]" if lock else ""
    return data + f"{lines}{locked}>>\nstartxref\n{len(data)}\n%%EOF".encode()
