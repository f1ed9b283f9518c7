"""`/v1/images/edits` over an engine without a model: forms, files, masks, bombs."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import pytest
from door import make_info, on_loop, open_door

pytest.importorskip("PIL")

from phloem.core.caching import NONE
from phloem.testing.fake_studio import EDITS, FakeStudio
from phloem.utils.png import png

PATH = "/v1/images/edits"
INFO = make_info(draws=True, vocab_size=0, context_length=0)
SMALL = png(bytes([9, 8, 7]) * 32, 8, 4)


def editing(**changes: Any) -> Any:
    return open_door(FakeStudio(facts={**EDITS, **changes}), INFO)


def file(data: bytes = SMALL) -> Any:
    return ("a.png", data, "image/png")


def bomb() -> bytes:
    """A file of a kilobyte that says that it is 60,000 pixels wide and high."""
    found = png(bytes(3), 1, 1)
    return found[:16] + (60_000).to_bytes(4, "big") * 2 + found[24:]


@on_loop
async def test_pictures_come_in_forms_and_in_json() -> None:
    async with editing() as door:
        form = {"prompt": "red", "n": "2", "seed": "5", "size": "16x8", "guidance_scale": "2.5"}
        files = [("image[]", file()), ("image[]", file(png(bytes(12), 2, 2)))]
        response = await door.http.post(PATH, data=form, files=[*files, ("mask", file(png(bytes(96), 8, 4)))])
        assert response.status_code == 200, response.text
        assert [one["seed"] for one in response.json()["data"]] == [5, 6]
        draw = door.engine.draws[1]
        assert [(one.width, one.height) for one in draw.pictures] == [(8, 4), (2, 2)]
        assert draw.pictures[0].data[:3] == bytes([9, 8, 7]) and draw.mask.data == bytes(96)
        assert (draw.guidance, draw.width) == (2.5, 16)
        address = "data:image/png;base64," + base64.b64encode(SMALL).decode()
        for given in ({"image": address}, {"image": [address]}, {"images": [{"image_url": address}]}):
            response = await door.post(PATH, {"prompt": "red", **given})
            assert response.status_code == 200 and door.engine.draws[-1].pictures == draw.pictures[:1]
        assert (await door.http.post(PATH, data={"prompt": "a"}, files={"image": file()})).status_code == 200


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"prompt": "a"}, {}, "image"),
        ({}, {"image": file()}, None),
        ({"prompt": "a"}, {"image": file(b"")}, "image"),
        ({"prompt": "a"}, {"image": file(b"no picture")}, "image"),
        ({"prompt": "a"}, {"image": file(SMALL[:50])}, "image"),
        ({"prompt": "a"}, {"image": file(bomb())}, "image"),
        ({"prompt": "a"}, {"image": file(png(bytes(303), 101, 1))}, "image"),  # and so a column of millions of pixels
        ({"prompt": "a"}, {"image": file(png(bytes(303), 1, 101))}, "image"),
        ({"prompt": "a"}, {"image": file(), "mask": file(bomb())}, "mask"),
        ({"prompt": "a"}, {"image": file(), "mask": file(png(bytes(3), 1, 1))}, "mask"),
        ({"prompt": "a"}, [("image", file())] * 3, "image"),
        ({"prompt": "a"}, [("image", file())] * 100, "image"),
        ({"prompt": "a", "n": "x"}, {"image": file()}, "n"),
        ({"prompt": "a", "n": "11"}, {"image": file()}, "n"),
        ({"prompt": "a", "cache[threshold]": "7"}, {"image": file()}, "cache.threshold"),
        ({"prompt": "a", "cache[kinds]": "none"}, {"image": file()}, "cache.kinds"),
        ({"prompt": "a", "cache": "none"}, {"image": file()}, "cache"),
        ({"prompt": "a", "output_format": "gif"}, {"image": file()}, "output_format"),
        ({"prompt": "a", "guidance": "3"}, {"image": file()}, "guidance"),
        ({"prompt": "a"}, {"image": file(), "pictures": file()}, "pictures"),
    ],
)
@on_loop
async def test_bad_forms_are_named(fields: dict[str, str], files: Any, param: str | None) -> None:
    async with editing() as door:
        files = files or {"user": (None, "x")}
        response = await door.http.post(PATH, data=fields, files=files)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param or (param is None and "prompt" in error["message"])
        assert not door.engine.draws


@on_loop
async def test_the_probe_of_a_model_that_fills_masks_has_one() -> None:
    for masks in (True, False):
        async with editing(masks=masks) as door:
            assert (await door.http.get("/health_generate")).status_code == 200
            assert len(door.engine.draws[0].pictures) == 1 and (door.engine.draws[0].mask is not None) == masks


@on_loop
async def test_a_model_that_takes_no_mask_or_one_picture_says_so_before_it_decodes() -> None:
    async with editing(masks=False, pictures=1, needs_pictures=False) as door:
        for files, param in (({"image": file(), "mask": file(b"x")}, "mask"), ([("image", file(b"x"))] * 2, "image")):
            response = await door.http.post(PATH, data={"prompt": "a"}, files=files)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
            assert "this model" in response.json()["error"]["message"]
        for empty in ({"image": []}, {"images": []}):
            response = await door.post(PATH, {"prompt": "a", **empty})
            assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(empty)))
        for path in ("/etc/passwd", "http://127.0.0.1/a.png", "file:///etc/passwd"):
            response = await door.post(PATH, {"prompt": "a", "image": path})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "image")
            assert "root:" not in response.text


@on_loop
async def test_the_openai_client_edits_and_streams() -> None:
    openai: Any = pytest.importorskip("openai")
    async with editing() as door:
        http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(door.app), base_url="http://door")
        client = openai.AsyncOpenAI(base_url="http://door/v1", api_key="none", http_client=http)
        found = await client.images.edit(
            image=[io.BytesIO(SMALL), io.BytesIO(SMALL)], prompt="red", size="16x8", extra_body={"seed": 3}
        )
        assert base64.b64decode(found.data[0].b64_json).startswith(b"\x89PNG") and found.usage.input_tokens == 5
        assert len(door.engine.draws[0].pictures) == 2
        more = {"seed": [4, 9], "cache": {"kind": "none"}}
        found = await client.images.edit(image=io.BytesIO(SMALL), prompt="red", n=2, extra_body=more)
        assert [draw.seed for draw in door.engine.draws[1:]] == [4, 9]
        assert door.engine.draws[1].step_cache == NONE
        events = await client.images.edit(image=io.BytesIO(SMALL), prompt="red", stream=True, partial_images=1)
        assert [event.type async for event in events] == ["image_edit.partial_image", "image_edit.completed"]
