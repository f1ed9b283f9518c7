"""Kernels of towers, and of steps with what they give, are compiled beside the loading: pictures, videos and sounds of
random sizes launch none that the process was not told of."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("PIL")

from steps_without_data import told
from vision_support import SETTINGS, picture, seeing_checkpoint

from phloem.attention._packed import PackedMemory
from phloem.checkpoint.describe import describe
from phloem.engine.choices.dtypes import tower_of
from phloem.engine.warmup import ahead, blank
from phloem.kernels.triton import ahead as kernels


def launched(plan: ahead.Plan, path: Path, count: int = 6) -> tuple[kernels.Notes, set[str]]:
    """What towers launch for media of random sizes, some of them together; and which kinds there were."""
    with torch.inference_mode(), kernels.Notes().taken():
        need = ahead.need_of(plan)
    model: Any = need.model
    tower, notes, random = tower_of(model), kernels.Notes(), np.random.default_rng(0)
    assert tower is not None
    processors = blank.processors_of(describe(str(path), "dummy"))
    pack = partial(PackedMemory, need.ops)

    def source(kind: str) -> Any:
        if kind == "audio":
            return np.zeros(int(random.integers(800, 16000 * 20)), np.float32)
        width, height = (int(random.integers(8, 100)) for _ in range(2))
        return picture(0, width, height) if kind == "image" else blank.Film(int(random.integers(1, 8)), (width, height))

    with torch.inference_mode(), notes.taken():
        for kind, (processor, token) in processors.items():
            for number in range(count):
                some = [blank.media_of(processor, token, source(kind)) for _ in range(1 + number % 3)]
                tower.encode(some, pack)
    return notes, set(processors)


@pytest.mark.slow
@pytest.mark.some(3)
@pytest.mark.parametrize("name", SETTINGS)
def test_no_picture_or_video_needs_a_kernel_that_was_not_foretold(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    path = seeing_checkpoint(name, tmp_path)
    plan, refusal = told(path, monkeypatch, load_format="dummy")
    assert refusal is None
    found = ahead.trace(plan)[0].found
    notes, kinds = launched(plan, path)
    assert "image" in kinds and ("video" in kinds or not name.startswith(("qwen", "glm4v", "llava_next_video")))
    assert notes.found and not [note.name for key, note in notes.found.items() if key not in found]
    if name == "llava":
        monkeypatch.setattr(ahead, "encode_all", lambda *given: None)
        assert set(ahead.trace(plan)[0].found) < set(found), "towers launch something of their own"
