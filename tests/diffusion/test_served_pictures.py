"""A folder that draws, served by processes of its own; and the digits that the example's model draws."""

from __future__ import annotations

import base64
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from served_pictures import read_png, serving

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

from phloem.testing.pictures import tiny_pictures
from phloem.utils.png import png

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


def test_digits_are_served_and_recognised() -> None:
    """Ten requests at once through HTTP; and the seven again alone, with the same seed: the same picture."""
    with serving(DIGITS, "--image-defaults", '{"steps": 12, "guidance_scale": 3}') as url:

        def draw(digit: int) -> list[Any]:
            body = {"prompt": f"draw a {WORDS[digit]}", "n": 4, "seed": 100}
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=300).json()
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures(tmp_path_factory.mktemp("tiny"), "stable_diffusion_3")


def test_a_folder_is_served_by_processes_of_its_own(tiny: Path) -> None:
    """Three requests at once, one of them again alone with the same seed: the same picture."""
    options = ("--image-defaults", '{"size": "32x32", "steps": 3}')
    with serving(tiny, *options) as url, ThreadPoolExecutor(3) as pool:

        def draw(seed: int) -> Any:
            body = {"prompt": "draw a red cat", "seed": seed}
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            return read_png(base64.b64decode(answer.json()["data"][0]["b64_json"]))

        together = list(pool.map(draw, range(3)))
        assert together[1].shape == (32, 32, 3)
        assert np.abs(together[1].astype(int) - draw(1).astype(int)).max() <= 1
        off = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "size": "33x32"}, timeout=60)
        assert (off.status_code, off.json()["error"]["param"]) == (400, "size")
        chat = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert chat.status_code == 400 and "/v1/images/generations" in chat.text
        assert "stable_diffusion_3" in str(httpx.get(f"{url}/server_info").json()["decisions"])
        assert httpx.get(f"{url}/health").status_code == 200


def test_the_command_draws_into_files(tiny: Path, tmp_path: Path) -> None:
    settings = [
        "--image-defaults",
        '{"size": "16x16", "steps": 2}',
        "--prompt",
        "draw a cat",
        "--n",
        "2",
        "--seed",
        "5",
    ]
    run = [sys.executable, "-m", "phloem", "generate", str(tiny), *settings]
    done = subprocess.run([*run, "--output", str(tmp_path / "d.png")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "seed 5" in done.stdout and "seed 6" in done.stdout
    assert [read_png((tmp_path / f"d-{at}.png").read_bytes()).shape for at in (1, 2)] == [(16, 16, 3)] * 2
    assert not list(tmp_path.glob(".*"))  # nothing half written
    (tmp_path / "folder.png").mkdir()
    for more, says in (
        (["--output", "x.bmp"], "expected a file named"),
        (["--output", str(tmp_path / "d.png"), "--size", "15x16"], "multiples of"),
        (["--output", str(tmp_path / "folder.png"), "--n", "1"], "it is a folder"),
    ):
        done = subprocess.run([*run, *more], capture_output=True, text=True, timeout=200)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr


def test_a_picture_is_changed_over_http_and_by_the_command(tmp_path: Path) -> None:
    folder = tiny_pictures(tmp_path / "model", "stable_diffusion_img2img")
    given = tmp_path / "given.png"
    given.write_bytes(png(bytes(range(192)), 8, 8))
    defaults = ["--image-defaults", '{"size": "16x16", "steps": 5}']
    fields = {"prompt": "draw a cat", "seed": "5", "guidance_scale": "3"}
    with serving(folder, *defaults) as url:
        files = {"image": ("a.png", given.read_bytes(), "image/png")}
        answer = httpx.post(f"{url}/v1/images/edits", data=fields, files=files, timeout=120)
        assert answer.status_code == 200, answer.text
        served = read_png(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        alone = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a"}, timeout=60)
        assert (alone.status_code, alone.json()["error"]["param"]) == (400, "image") and "/edits" in alone.text
        assert httpx.get(f"{url}/health_generate", timeout=60).status_code == 200
    options = ["--prompt", "draw a cat", "--seed", "5", "--guidance-scale", "3", "--image", str(given)]
    run = [sys.executable, "-m", "phloem", "generate", str(folder), *defaults, *options]
    done = subprocess.run([*run, "--output", str(tmp_path / "d.png")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    made = read_png((tmp_path / "d.png").read_bytes())
    assert served.shape == (16, 16, 3) and np.abs(made.astype(int) - served.astype(int)).max() <= 1


def test_adapters_come_and_go_over_http(tiny: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.attn.to_q"
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    for at in range(2):
        save_file({f"{name}.lora_A.weight": a * (at + 1), f"{name}.lora_B.weight": b}, tmp_path / f"{at}.safetensors")
    defaults = ["--image-defaults", '{"size": "16x16", "steps": 2}', "--lora-paths", f"one={tmp_path}/0.safetensors"]
    with serving(tiny, *defaults) as url:

        def drawn(**more: Any) -> Any:
            body = {"prompt": "draw a cat", "seed": 3, **more}
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return read_png(base64.b64decode(answer.json()["data"][0]["b64_json"])).astype(int)

        def told(path: str, **body: Any) -> tuple[int, Any]:
            answer = httpx.post(f"{url}{path}", json=body, timeout=60)
            return answer.status_code, answer.json()

        plain, one = drawn(), drawn(lora="one")
        assert np.abs(plain - one).max() > 1
        assert np.abs(drawn(lora={"name": "one", "scale": 2.0}) - one).max() > 1
        status, answer = told("/load_lora_adapter", lora_name="two", lora_path=f"{tmp_path}/1.safetensors")
        assert (status, list(answer["loaded_adapters"])) == (200, ["one", "two"])
        assert np.abs(drawn(model="two") - drawn(lora={"name": "one", "scale": 2.0})).max() <= 1
        status, answer = told("/load_lora_adapter", lora_name="bad", lora_path=f"{tmp_path}/none")
        assert status == 400 and "lora_path" in answer["message"]
        assert told("/v1/set_lora", lora_nickname="one")[0] == 200
        assert np.abs(drawn() - one).max() <= 1 and np.abs(drawn(lora=[]) - plain).max() <= 1
        assert told("/unload_lora_adapter", lora_name="one")[0] == 200
        assert np.abs(drawn() - plain).max() <= 1
        status, answer = told("/v1/images/generations", prompt="a", lora="one")
        assert (status, answer["error"]["param"]) == (400, "lora")


def test_a_picture_of_two_ranks_is_that_of_one(tiny: Path) -> None:
    found: list[Any] = []
    for options in ([], ["--sp-degree", "2"]):
        with serving(tiny, "--image-defaults", '{"size": "32x32", "steps": 3}', *options) as url:
            body = {"prompt": "draw a cat", "seed": 3, "guidance_scale": 3}
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            found.append(read_png(base64.b64decode(answer.json()["data"][0]["b64_json"])).astype(int))
    assert found[0].std() > 5 and np.abs(found[0] - found[1]).max() <= 1
