"""`/v1/images/generations` over an engine without a model: fields, files, streams, refusals."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from door import make_info, on_loop, open_door, until

from phloem.core.messages import ControlReply
from phloem.testing.fake_studio import FakeStudio
from phloem.utils.png import png

PATH = "/v1/images/generations"


def drawing(**changes: Any) -> Any:
    return open_door(FakeStudio(**changes), make_info(draws=True, vocab_size=0, context_length=0))


def pixels_of(data: bytes) -> Any:
    """[height, width, 3] of a PNG file that Phloem wrote: read by the specification, not by the writer."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, body, width, height = 8, b"", 0, 0
    while at < len(data):
        size, name = struct.unpack(">I", data[at : at + 4])[0], data[at + 4 : at + 8]
        part = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + part)
        if name == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", part[:10])
            assert (depth, colour) == (8, 2)
        body += part if name == b"IDAT" else b""
        at += 12 + size
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, 1 + width * 3)
    assert (rows[:, 0] == 2).all()
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(height, width, 3)


def test_a_png_file_holds_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (pixels_of(png(pixels.tobytes(), 7, 5)) == pixels).all()


@on_loop
async def test_pictures_are_their_users_or_their_keys_where_clients_share_the_machine_out() -> None:
    for settings, expected in (
        ({}, ["ann", ""]),
        ({"image_policy": "fair"}, ["ann", "key"]),
        ({"image_policy": "fair", "fair_queueing": "key"}, ["key", "key"]),
    ):
        info = make_info(draws=True, vocab_size=0, context_length=0)
        async with open_door(FakeStudio(), info, **settings) as door:
            for body in ({"prompt": "a", "user": "ann"}, {"prompt": "a"}):
                headers = {"Authorization": "Bearer secret"}
                assert (await door.http.post(PATH, json=body, headers=headers)).status_code == 200
            found = [draw.client for draw in door.engine.draws]
        digest = hashlib.sha256(b"Bearer secret").hexdigest()[:16]
        assert found == [digest if name == "key" else name for name in expected]


@on_loop
async def test_pictures_are_drawn_with_seeds_in_their_order() -> None:
    async with drawing() as door:
        body = {"prompt": "a leaf", "n": 3, "size": "24x16", "seed": 9, "num_inference_steps": 2, "guidance_scale": 2}
        answer = (await door.post(PATH, body)).json()
        assert [item["seed"] for item in answer["data"]] == [9, 10, 11]
        for item in answer["data"]:
            found = pixels_of(base64.b64decode(item["b64_json"]))
            assert found.shape == (16, 24, 3) and (found == [item["seed"], 0, 7]).all()
        assert (answer["size"], answer["output_format"]) == ("24x16", "png")
        assert answer["usage"]["input_tokens"] == 5 and answer["usage"]["output_tokens"] == 18
        first = door.engine.draws[0]  # type: ignore[attr-defined]
        assert (first.prompt, first.width, first.height, first.steps, first.guidance) == ("a leaf", 24, 16, 2, 2.0)


@on_loop
async def test_a_seed_is_drawn_where_none_is_given_and_a_list_has_one_for_each() -> None:
    async with drawing() as door:
        answers = [(await door.post(PATH, {"prompt": "a"})).json()["data"][0]["seed"] for _ in range(3)]
        assert len(set(answers)) == 3
        answer = (await door.post(PATH, {"prompt": "a", "n": 2, "seed": [4, 4]})).json()
        assert [item["seed"] for item in answer["data"]] == [4, 4]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 11}, "n"),
        ({"prompt": "a", "size": "big"}, "size"),
        ({"prompt": "a", "size": "0x16"}, "size"),
        ({"prompt": "a", "size": "16x16", "width": 8, "height": 8}, "size"),
        ({"prompt": "a", "width": 8}, "height"),
        ({"prompt": "a", "width": -8, "height": 8}, "width"),
        ({"prompt": "a", "seed": [1]}, None),
        ({"prompt": "a", "n": 2, "seed": [1]}, "seed"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale"),
        ({"prompt": "a", "partial_images": 2}, "partial_images"),
        ({"prompt": "a", "stream": True, "partial_images": 4}, "partial_images"),
        ({"prompt": "a", "response_format": "url"}, "response_format"),
        ({"prompt": "a", "background": "transparent"}, "background"),
        ({"prompt": "a", "output_compression": 50}, "output_compression"),
        ({"prompt": "a", "output_format": "gif"}, "output_format"),
        ({"prompt": "a", "lora": {"name": "x", "scale": 1000}}, "lora.scale"),
        ({"prompt": "a", "lora": {"scale": 2}}, "lora"),
        ({"prompt": "a", "lora": ["x", "x"]}, "lora"),
        ({"prompt": "a", "lora": 7}, "lora"),
        ({"prompt": "a", "num_frames": 9}, "num_frames"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"prompt": 7}, "prompt"),
    ],
    ids=str,
)
@on_loop
async def test_bad_fields_are_named(body: dict[str, Any], param: str | None) -> None:
    async with drawing() as door:
        response = await door.post(PATH, body)
        if param is None:
            assert response.status_code == 200
            return
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param or (param == "prompt" and not body and "prompt" in error["message"])
        assert not door.engine.draws  # type: ignore[attr-defined]


@on_loop
async def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    async with drawing() as door:
        error = (await door.post(PATH, {"prompt": "a", "num_inference_step": 4})).json()["error"]
        assert error["code"] == "unknown_field" and "num_inference_steps" in error["message"]
        assert (await door.post(PATH, {"prompt": "a", "model": "other"})).status_code == 404


@on_loop
async def test_what_the_engine_refuses_is_the_answer() -> None:
    for stream in (False, True):
        async with drawing(refuse_draw=(400, "size: 17x17: multiples of 8", "size")) as door:
            response = await door.post(PATH, {"prompt": "a", "stream": stream})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "size")
        async with drawing(refuse_draw=(507, "no memory", "")) as door:
            response = await door.post(PATH, {"prompt": "a", "stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (507, "told_so")


@on_loop
async def test_a_stream_brings_real_pictures_on_the_way() -> None:
    async with drawing() as door:
        body = {"prompt": "a", "stream": True, "partial_images": 2, "seed": 5, "size": "16x8"}
        response = await door.post(PATH, body)
        blocks = [block for block in response.text.split("\n\n") if block]
        assert blocks.pop() == "data: [DONE]"
        names = [block.split("\n")[0] for block in blocks]
        assert names == ["event: image_generation.partial_image"] * 2 + ["event: image_generation.completed"]
        events = [json.loads(block.split("data: ")[1]) for block in blocks]
        assert [event.get("partial_image_index") for event in events] == [0, 1, None]
        shown = [pixels_of(base64.b64decode(event["b64_json"])) for event in events]
        assert not shown[0].any() and (shown[2] == [5, 0, 7]).all()
        assert events[2]["usage"]["output_tokens"] == 2 and events[2]["seed"] == 5


@on_loop
async def test_jpeg_and_webp_are_written_where_pillow_is() -> None:
    pytest.importorskip("PIL")
    async with drawing() as door:
        for kind, magic in (("jpeg", b"\xff\xd8"), ("webp", b"RIFF")):
            body = {"prompt": "a", "output_format": kind, "output_compression": 60}
            answer = (await door.post(PATH, body)).json()
            assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(magic)


@on_loop
async def test_a_client_that_leaves_ends_its_pictures_and_no_others() -> None:
    async with drawing(hold=True) as door:
        engine: Any = door.engine
        leaving = asyncio.create_task(door.client.draw(_draws("a", 2)).pictures())
        staying = door.client.draw(_draws("b", 1))
        await until(lambda: len(engine.draws) == 3)
        assert door.client.in_flight == 3
        leaving.cancel()
        call = next(iter(door.client.easel.active.values()))
        call.cancel()
        assert sorted(engine.dropped) == ["a-0", "a-1"]
        assert door.client.in_flight == 1 and door.client.abort("b") == 1
        with pytest.raises(Exception, match="aborted"):
            await staying.pictures()


def _draws(key: str, count: int) -> Any:
    from phloem.core.messages import Draw

    return [Draw(id=f"{key}-{at}", prompt="a", seed=at) for at in range(count)]


@on_loop
async def test_the_engine_that_dies_ends_every_picture_with_503() -> None:
    async with drawing(hold=True) as door:
        waiting = asyncio.create_task(door.post(PATH, {"prompt": "a"}))
        await until(lambda: door.client.in_flight == 1)
        door.client.connection.die("gone")
        assert (await waiting).status_code == 503


@on_loop
async def test_a_model_of_pictures_asked_for_text_says_what_it_is_for() -> None:
    async with drawing() as door:
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/completions", {"prompt": "hi"}),
            ("/generate", {"text": "hi"}),
            ("/v1/messages", {**chat, "max_tokens": 3}),
            ("/v1/responses", {"input": "hi"}),
            ("/v1/embeddings", {"input": "hi"}),
        ):
            response = await door.post(path, body)
            assert response.status_code == 400, (path, response.text)
            assert "/v1/images/generations" in response.text, path


@on_loop
async def test_a_model_of_text_asked_for_pictures_says_what_it_is_for() -> None:
    async with open_door() as door:
        for path in (PATH, "/v1/images/edits"):
            response = await door.post(path, {"prompt": "a"})
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "wrong_task" and "/v1/chat/completions" in response.text


@on_loop
async def test_edits_are_refused_by_their_field() -> None:
    async with drawing() as door:
        files = {"image": ("a.png", png(bytes(3), 1, 1), "image/png")}
        response = await door.http.post("/v1/images/edits", data={"prompt": "a"}, files=files)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "image")


@on_loop
async def test_figures_of_pictures_are_counted() -> None:
    async with drawing() as door:
        await door.post(PATH, {"prompt": "a", "n": 2, "size": "16x8"})
        text = (await door.http.get("/metrics")).text
        assert 'phloem:images_total{model_name="tiny"} 2.0' in text
        assert 'phloem:image_pixels_total{model_name="tiny"} 256.0' in text
        assert "phloem:image_queue_time_seconds_sum" in text and "phloem:image_step_time_seconds" in text
        assert (await door.http.get("/model_info")).json()["pictures"]["grid"] == 8
        assert (await door.http.get("/v1/models")).json()["data"][0]["task"] == "image"
        assert (await door.http.get("/health_generate")).status_code == 200


@on_loop
async def test_the_openai_client_draws_and_streams() -> None:
    openai: Any = pytest.importorskip("openai")
    async with drawing() as door:
        http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(door.app), base_url="http://door")
        client = openai.AsyncOpenAI(base_url="http://door/v1", api_key="none", http_client=http)
        found = await client.images.generate(prompt="a leaf", n=2, size="16x8", extra_body={"seed": 3})
        assert pixels_of(base64.b64decode(found.data[1].b64_json))[0, 0, 0] == 4
        stream: AsyncIterator[Any] = await client.images.generate(prompt="a", stream=True, partial_images=1)
        assert [event.type async for event in stream] == [
            "image_generation.partial_image",
            "image_generation.completed",
        ]
        with pytest.raises(openai.BadRequestError, match="draws from a prompt alone"):
            await client.images.edit(image=("a.png", png(bytes(3), 1, 1)), prompt="a")


@on_loop
async def test_adapters_are_asked_for_by_name_and_scale_or_as_the_model() -> None:
    async with drawing() as door:
        for asked, worn in (
            (None, None),
            ([], []),
            ({}, []),
            ("style", [("style", 1.0)]),
            ([{"name": "style", "scale": 0.5}, "other"], [("style", 0.5), ("other", 1.0)]),
        ):
            assert (await door.post(PATH, {"prompt": "a", "lora": asked})).status_code == 200
            found = door.engine.draws[-1].lora  # type: ignore[attr-defined]
            assert (None if found is None else [(one.name, one.scale) for one in found]) == worn
        door.client.connection.ready["lora_adapters"] = {"style": "/style"}  # type: ignore[index]
        assert (await door.post(PATH, {"prompt": "a", "model": "style"})).status_code == 200
        assert door.engine.draws[-1].lora[0].name == "style"  # type: ignore[attr-defined]
        twice = await door.post(PATH, {"prompt": "a", "model": "style", "lora": "other"})
        assert (twice.status_code, twice.json()["error"]["param"]) == (400, "lora")


@on_loop
async def test_adapters_of_all_pictures_are_set_in_sglangs_spelling() -> None:
    async with drawing() as door:
        said = {"loaded": {"a": "/a", "b": "/b"}, "active": [["a", 0.5, True]]}
        door.engine.control_reply = ControlReply(id="", data=said)
        body = {"lora_nickname": ["a", "b"], "lora_path": ["/a", None], "strength": 0.5}
        assert (await door.post("/v1/set_lora", body)).json()["status"] == "ok"
        assert door.engine.controls[-1].args["adapters"] == [["a", "/a", 0.5], ["b", None, 0.5]]
        listed = (await door.http.get("/v1/list_loras")).json()
        assert [one["nickname"] for one in listed["loaded_adapters"]] == ["a", "b"]
        assert listed["active"]["transformer"][0] == {"nickname": "a", "path": "/a", "merged": False, "strength": 0.5}
        for path in ("/v1/merge_lora_weights", "/v1/unmerge_lora_weights"):
            assert (await door.post(path, {})).status_code == 200
        for bad, param in (
            ({"lora_nickname": "a", "target": "vae"}, "target"),
            ({"lora_nickname": "a", "strength": [1, 2]}, "strength"),
            ({"lora_nickname": ["a", "a"]}, "lora_nickname"),
            ({"lora_nickname": "tiny"}, "lora_nickname"),
        ):
            refused = await door.post("/v1/set_lora", bad)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        door.engine.control_reply = ControlReply(id="", ok=False, message="lora_path: there is no /x")
        refused = await door.post("/v1/set_lora", {"lora_nickname": "a", "lora_path": "/x"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_path")
    async with open_door() as door:
        assert (await door.post("/v1/set_lora", {"lora_nickname": "a"})).status_code in (400, 404)
