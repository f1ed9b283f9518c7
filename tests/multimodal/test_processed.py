"""Pictures that come as the tensors of transformers' processors: the same prompt, content and answer as the files."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from test_doors import SETTINGS, door, image, user
from vision_support import Theirs, picture, png, seeing_checkpoint

from phloem.core.errors import BadRequest
from phloem.llm import Engine

IMAGES = [picture(1, 24, 16), picture(2, 40, 40)]
PARAMS = {"temperature": 0, "max_new_tokens": 4}


def tensors(name: str, path: Path) -> dict[str, Any]:
    return {"format": "processor_output", **Theirs(name, path).processor(images=IMAGES, return_tensors="pt")}


def packed(values: Any) -> dict[str, Any]:
    data = base64.b64encode(values.numpy().tobytes()).decode()
    return {"data": data, "dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v", "llava", "gemma3", "mistral3"])
def test_what_a_processor_made_of_pictures_is_these_pictures(name: str, tmp_path: Path) -> None:
    """As lists, base64 and halves; in a prompt with one mark each, and in one with all placeholders."""
    given = tensors(name, seeing_checkpoint(name, tmp_path / name))
    lists = {key: value if isinstance(value, str) else np.asarray(value).tolist() for key, value in given.items()}
    forms = [[lists], {**lists, "pixel_values": packed(given["pixel_values"])}]
    forms.append([{**lists, "pixel_values": packed(given["pixel_values"].half())}])

    async def run() -> None:
        async with door(tmp_path / name) as http:

            async def ask(**fields: Any) -> dict[str, Any]:
                answer = await http.post("/generate", json={"sampling_params": PARAMS, **fields})
                assert answer.status_code == 200, answer.text
                return answer.json()

            shown = [image(png(each)) for each in IMAGES]
            spread = (await http.post("/tokenize", json={"messages": user("a", shown[0], "b", shown[1])})).json()
            files = [part["image_url"]["url"] for part in shown]
            text = "a <image> b <image> c"
            first = await ask(text=text, image_data=files)
            for form in forms:
                again = await ask(text=text, image_data=form)
                assert again["output_ids"] == first["output_ids"]
                assert again["meta_info"]["cached_tokens"] == first["meta_info"]["prompt_tokens"] - 1
            whole = await ask(input_ids=spread["tokens"], image_data=forms[0])
            assert whole["meta_info"]["prompt_tokens"] == spread["count"]
            chat = {"messages": user("a", shown[0], "b", shown[1]), "temperature": 0, "max_tokens": 4}
            usage = (await http.post("/v1/chat/completions", json=chat)).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == spread["count"] - 1 == usage["prompt_tokens"] - 1

    asyncio.run(run())


def test_tensors_that_are_no_pictures_are_refused_by_name(tmp_path: Path) -> None:
    given = tensors("qwen2_vl", seeing_checkpoint("qwen2_vl", tmp_path))
    fields = {key: packed(value.float()) for key, value in given.items() if key != "format"}
    values, grid = np.asarray(given["pixel_values"]), given["image_grid_thw"].tolist()
    good = {"format": "processor_output", **fields}

    def with_values(changed: Any) -> dict[str, Any]:
        return {**good, "pixel_values": packed(torch.from_numpy(changed))}

    bad = [
        ({"format": "precomputed_embedding"}, "image_data[0].format", "only 'processor_output'"),
        ({"format": ["x"]}, "image_data[0].format", "only"),
        ({"format": "processor_output"}, "image_data[0].pixel_values", "missing"),
        ({**good, "image_grid_thw": []}, "image_data[0]", "0 pictures"),
        ({**good, "image_grid_thw": {"shape": [10**9, 3]}}, "image_data[0]", "1000000000 pictures"),
        ({**good, "image_grid_thw": [[1, 2]] * 2}, "image_data[0].image_grid_thw", "whole numbers"),
        ({**good, "image_grid_thw": [[1, -2, 2]] * 2}, "image_data[0].image_grid_thw", "whole numbers"),
        ({**good, "image_grid_thw": [[1, 2, 2]] * 2}, "image_data[0]", "patches"),
        ({**good, "image_grid_thw": [[2, *sides[1:]] for sides in grid]}, "image_data[0]", ""),
        ({**good, "pixel_values": "zz"}, "image_data[0].pixel_values", "numbers"),
        ({**good, "pixel_values": [[1], [2, 3]]}, "image_data[0].pixel_values", "numbers"),
        ({**good, "pixel_values": {**fields["pixel_values"], "data": "@"}}, "image_data[0].pixel_values", "numbers"),
        ({**good, "pixel_values": {**fields["pixel_values"], "dtype": "O"}}, "image_data[0].pixel_values", "numbers"),
        ({**good, "image_grid_thw": None}, "image_data[0]", ""),
        (with_values(values + np.float32(0.007)), "image_data[0]", "mean and deviation"),
        (with_values(values * np.float32(np.nan)), "image_data[0]", "mean and deviation"),
        (with_values(values * np.float32(100)), "image_data[0]", "mean and deviation"),
    ]

    async def run() -> None:
        async with door(tmp_path) as http:

            async def ask(given: Any) -> httpx.Response:
                body = {"text": "<image> <image>", "image_data": [given], "sampling_params": PARAMS}
                return await http.post("/generate", json=body)

            assert (await ask(good)).status_code == 200
            for given, where, why in bad:
                answer = await ask(given)
                assert answer.status_code == 400, (where, why, answer.text)
                error = answer.json()["error"]
                assert error["param"] == where, error
                assert why in error["message"], error
            one = {"text": "<image>", "image_data": [good]}
            assert "2 pictures" in (await http.post("/generate", json=one)).json()["error"]["message"]
            assert (await http.get("/health")).status_code == 200

    asyncio.run(run())


def test_tiles_are_refused_and_tensors_of_torch_are_taken(tmp_path: Path) -> None:
    path = seeing_checkpoint("llava", tmp_path)
    given = tensors("llava", path)
    with Engine(model_path=str(path), **SETTINGS) as engine:
        files = engine.generate("<image> a <image>", PARAMS, image_data=[png(each) for each in IMAGES])
        assert engine.generate("<image> a <image>", PARAMS, image_data=[given])["output_ids"] == files["output_ids"]
        tiles = {**given, "pixel_values": given["pixel_values"][None]}
        with pytest.raises(BadRequest, match=r"expected \[pictures, 3, height, width\]"):
            engine.generate("<image>", PARAMS, image_data=[tiles])
