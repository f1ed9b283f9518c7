"""A folder that draws, served by processes of its own; and the digits that the example's model draws."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "model"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digit_of(picture: Any) -> int:
    """What the example's classifier sees in [16, 16, 3] pixels."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(DIGITS / "judge.safetensors")
    grey = torch.tensor(picture.astype(np.float32)).mean(-1).reshape(8, 2, 8, 2).mean((1, 3)) / 127.5 - 1
    first = torch.relu(grey.flatten() @ weights["first.weight"].T + weights["first.bias"])
    return int((first @ weights["last.weight"].T + weights["last.bias"]).argmax())


def test_digits_are_served_and_recognised(tmp_path: Path) -> None:
    """Ten requests at once through HTTP; and the seven again alone, with the same seed: the same picture."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx
    from served_pictures import read_png, serving

    with serving(DIGITS, "--image-defaults", '{"steps": 12, "guidance_scale": 2}') as url:

        def draw(digit: int) -> list[Any]:
            body = {"prompt": f"draw a {WORDS[digit]}", "n": 4, "seed": 100}
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120).json()
            return [read_png(base64.b64decode(item["b64_json"])) for item in answer["data"]]

        with ThreadPoolExecutor(10) as pool:
            found = list(pool.map(draw, range(10)))
        alone = draw(7)
        chat = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert chat.status_code == 400
        info = httpx.get(f"{url}/server_info").json()
        assert "z_image" in str(info["decisions"])
    seen = [[digit_of(picture) for picture in pictures] for pictures in found]
    assert seen[7] == [7, 7, 7, 7], seen
    right = sum(one == digit for digit, row in enumerate(seen) for one in row)
    assert right >= 36, seen
    for one, other in zip(found[7], alone, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_the_command_draws_into_files(tmp_path: Path) -> None:
    from served_pictures import read_png

    run = [
        sys.executable,
        "-m",
        "phloem",
        "generate",
        str(DIGITS),
        "--prompt",
        "draw a seven",
        "--n",
        "2",
        "--seed",
        "5",
    ]
    done = subprocess.run([*run, "--output", str(tmp_path / "d.png")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "seed 5" in done.stdout and "seed 6" in done.stdout
    assert [read_png((tmp_path / f"d-{at}.png").read_bytes()).shape for at in (1, 2)] == [(16, 16, 3)] * 2
    for more, says in (
        (["--output", "x.bmp"], "expected a file named"),
        (["--output", str(tmp_path / "d.png"), "--size", "15x16"], "multiples of 4"),
    ):
        done = subprocess.run([*run, *more], capture_output=True, text=True, timeout=200)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
