"""What a served model of pictures answers to those who mean it ill: the field, and the next picture all the same."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_pictures import serving

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
BODIES: list[tuple[dict[str, Any], str]] = [
    ({"size": "33x32"}, "size"),
    ({"size": "99999x99999"}, "size"),
    ({"size": "-32x32"}, "size"),
    ({"size": "32x32x32"}, "size"),
    ({"width": 0, "height": 32}, "width"),
    ({"n": 11}, "n"),
    ({"n": -1}, "n"),
    ({"n": 1.5}, "n"),
    ({"num_inference_steps": -4}, "num_inference_steps"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 10**6}, "num_inference_steps"),
    ({"num_inference_steps": 10**30}, "num_inference_steps"),
    ({"guidance_scale": 1e30}, "guidance_scale"),
    ({"guidance_scale": "3; drop"}, "guidance_scale"),
    ({"seed": 2**70}, "seed"),
    ({"seed": [1, 2, 3]}, "seed"),
    ({"guidence_scale": 3}, "guidence_scale"),
    ({"true_cfg_scale": 2}, "true_cfg_scale"),
    ({"prompt": "a" * 32_001}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"cache": {"kind": "magic"}}, "cache.kind"),
    ({"cache": {"kind": "teacache", "threshold": -1}}, "cache.threshold"),
    ({"cache": {"kind": "teacache", "coefficients": [1, 2]}}, "cache.coefficients"),
    ({"cache": {"kind": "teacache", "fn_compute_blocks": 2}}, "cache.fn_compute_blocks"),
    ({"cache": {"kind": "dbcache", "fn_compute_blocks": 0}}, "cache.fn_compute_blocks"),
    ({"cache": {"kind": "dbcache", "fn_compute_blocks": 64}}, "cache.fn_compute_blocks"),
    ({"lora": "../../etc/passwd"}, "lora"),
    ({"image": "data:image/png;base64,AAAA"}, "image"),
    ({"mask": "x"}, "mask"),
]


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes whose header promises side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_each_is_refused_by_field_and_the_server_draws_on(tmp_path: Path) -> None:
    folder, wrong = tiny_pictures(tmp_path, "stable_diffusion_3"), list[Any]()
    options = (
        "--image-defaults",
        '{"size": "32x32", "steps": 2}',
        "--image-step-cache",
        "teacache",
        "--enable-cfg-parallel",
    )
    with serving(folder, *options) as url, httpx.Client(base_url=url, timeout=60) as http:

        def refused(path: str, param: str | None, **sent: Any) -> None:
            answer = http.post(path, **sent)
            error = answer.json().get("error") or {}
            if answer.status_code != 400 or (param is not None and error.get("param") != param):
                wrong.append((sent, param, answer.status_code, answer.text[:200]))
            if "Traceback" in answer.text or str(Path.home()) in answer.text:
                wrong.append((sent, "leaks", answer.text[:200]))

        for body, param in BODIES:
            refused("/v1/images/generations", param, json={"prompt": "a cat", **body})
        refused("/v1/images/edits", None, data={"prompt": "a cat"})
        refused("/v1/videos", None, json={"prompt": "a cat"})
        refused("/v1/chat/completions", None, json={"messages": [{"role": "user", "content": "hi"}]})
        refused("/v1/images/generations", None, content=b"{" * 10_000)
        for body in ({}, {"guidance_scale": 4, "negative_prompt": "a dog", "cache": {"kind": "dbcache"}}):
            drawn = http.post("/v1/images/generations", json={"prompt": "a cat", **body})
            assert drawn.status_code == 200, drawn.text[:300]
        assert http.get("/health").status_code == 200
    assert not wrong, "\n".join(map(str, wrong))


def test_pictures_that_promise_too_much_or_are_none_are_refused_by_a_model_that_takes_them(tmp_path: Path) -> None:
    """By what is wrong with the picture, before anything of it is decoded; guided ones are drawn on two sides then."""
    data = "data:image/png;base64,"
    files = [(bomb(60_000), "too_large"), (bomb(4097), "too_large"), (bomb(2**31 - 1), "too_large")]
    files += [(bomb(4000), "bad_image"), (bomb(0), "bad_image"), (b"<svg onload=x>", "bad_image")]
    bodies: list[Any] = [data + base64.b64encode(bomb(60_000)).decode(), data + "!", "file:///etc/passwd", 5, [], {}]
    folder = tiny_pictures(tmp_path, "flux_kontext")
    options = ("--image-defaults", '{"size": "32x32", "steps": 2}', "--enable-cfg-parallel")
    with serving(folder, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        for file, code in files:
            answer = http.post("/v1/images/edits", data={"prompt": "a"}, files={"image": ("a.png", file)})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text[:300]
        for image in bodies:
            answer = http.post("/v1/images/edits", json={"prompt": "a", "image": image})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image"), answer.text[:300]
        guided = {"prompt": "a cat", "true_cfg_scale": 3, "negative_prompt": "a dog"}
        drawn = http.post("/v1/images/generations", json=guided)
        assert drawn.status_code == 200, drawn.text[:300]
