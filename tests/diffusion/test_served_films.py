"""A folder that makes films, served by processes of its own, and by the command."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_pictures import serving

pytest.importorskip("diffusers", reason="films need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

from phloem.testing.films import tiny_films
from phloem.utils.png import png

av = pytest.importorskip("av", reason="films need PyAV: pip install 'phloem[media]'")
pytestmark = pytest.mark.slow
DEFAULTS = '{"size": "32x16", "frames": 5, "steps": 3}'


def frames_in(data: bytes) -> list[tuple[int, int]]:
    """The size of each."""
    with av.open(io.BytesIO(data)) as file:
        return [(frame.width, frame.height) for frame in file.decode(video=0)]


def test_films_are_made_deleted_and_kept_by_processes_of_their_own(tmp_path: Path) -> None:
    folder = tiny_films(tmp_path / "model", "wan_first_frame")
    options = (
        "--image-policy",
        "shortest",
        "--image-defaults",
        DEFAULTS,
        "--video-output-path",
        str(tmp_path / "films"),
    )
    with serving(folder, *options) as url, httpx.Client(base_url=url, timeout=120) as client:

        def ended(key: str) -> dict[str, Any]:
            video: dict[str, Any] = {}
            for _ in range(600):
                video = client.get(f"/v1/videos/{key}").json()
                if video["status"] in ("completed", "failed"):
                    return video
                time.sleep(0.05)
            raise AssertionError(video)

        long = client.post("/v1/videos", json={"prompt": "a tree", "num_inference_steps": 1000}).json()["id"]
        files = {"input_reference": ("a.png", png(bytes(96), 8, 4), "image/png")}
        form = {"prompt": "draw a cat", "size": "32x16", "seconds": "0.2", "seed": "3"}
        first = client.post("/v1/videos", data=form, files=files).json()
        assert ended(first["id"])["status"] == "completed", ended(first["id"])
        assert frames_in(client.get(f"/v1/videos/{first['id']}/content").content) == [(32, 16)] * 5
        assert client.delete(f"/v1/videos/{long}").json()["deleted"]
        wrong = client.post("/v1/videos", json={"prompt": "a", "guidance_scale_2": 2})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "guidance_scale_2")
        wrong = client.post("/v1/images/generations", json={"prompt": "a"})
        assert wrong.status_code == 400 and "/v1/videos" in wrong.text
        assert client.get("/health_generate").status_code == 200
        assert "wan" in str(client.get("/server_info").json()["decisions"])
    assert sorted(path.suffix for path in (tmp_path / "films").glob("video_*")) == [".json", ".mp4"]


def test_the_command_makes_a_film(tmp_path: Path) -> None:
    folder = tiny_films(tmp_path / "model")
    run = [sys.executable, "-m", "phloem", "generate", str(folder), "--image-defaults", DEFAULTS, "--prompt", "a cat"]
    target = tmp_path / "film.mp4"
    done = subprocess.run([*run, "--output", str(target), "--seed", "5"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "seed 5" in done.stdout and "5 frames" in done.stdout and frames_in(target.read_bytes()) == [(32, 16)] * 5
    assert not list(tmp_path.glob(".*"))
    for more, says in (
        (["--output", str(target), "--num-frames", "6"], "num_frames: 6"),
        (["--output", str(tmp_path / "a.png"), "--seconds", "2"], "seconds"),
        (["--output", str(target), "--image", str(tmp_path / "none.png")], "none.png"),
    ):
        done = subprocess.run([*run, *more], capture_output=True, text=True, timeout=200)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
