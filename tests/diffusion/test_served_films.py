"""A folder that makes films, served by processes of its own, and by the command."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
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


def test_films_wear_adapters_that_come_and_go_over_http(tmp_path: Path) -> None:
    """HunyuanVideo: by a film's `lora`, by its `model`, and as what films wear that say nothing."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    folder = tiny_films(tmp_path / "model", "hunyuan_video")
    name = "transformer.transformer_blocks.0.attn.to_q"
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2)))
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": 4 * b}, tmp_path / "ink.safetensors")
    with serving(folder, "--image-defaults", DEFAULTS) as url, httpx.Client(base_url=url, timeout=120) as client:

        def made(**more: Any) -> Any:
            job = client.post("/v1/videos", json={"prompt": "draw a cat", "seed": 3, **more}).json()
            assert "id" in job, job
            for _ in range(600):
                job = client.get(f"/v1/videos/{job['id']}").json()
                if job["status"] in ("completed", "failed"):
                    break
                time.sleep(0.05)
            assert job["status"] == "completed", job
            with av.open(io.BytesIO(client.get(f"/v1/videos/{job['id']}/content").content)) as file:
                return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(int)

        plain = made()
        assert plain.shape == (5, 16, 32, 3) and np.abs(plain - made()).max() == 0
        body = {"lora_name": "ink", "lora_path": f"{tmp_path}/ink.safetensors"}
        assert client.post("/load_lora_adapter", json=body).status_code == 200
        inked = made(lora="ink")
        assert np.abs(inked - plain).max() > 1 and np.abs(inked - made(model="ink")).max() == 0
        assert client.post("/v1/set_lora", json={"lora_nickname": "ink"}).status_code == 200
        assert np.abs(inked - made()).max() == 0 and np.abs(plain - made(lora=[])).max() == 0
        assert client.post("/unload_lora_adapter", json={"lora_name": "ink"}).status_code == 200
        wrong = client.post("/v1/videos", json={"prompt": "a", "lora": "ink"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "lora")


# In 0.3 seconds HunyuanVideo has 7.2 of its 24 pictures a second, Wan 4.8 of 16: the nearest of 1, 5, 9, ...
@pytest.mark.some(2)
@pytest.mark.parametrize(("family", "frames"), [("hunyuan_video", 9), ("wan", 5), ("wan_image_to_video", 5)])
def test_the_openai_client_asks_looks_lists_fetches_and_deletes(family: str, frames: int, tmp_path: Path) -> None:
    """A whole life of jobs of each family, to their expiry, over a real server."""
    openai: Any = pytest.importorskip("openai")
    folder, films, sees = tiny_films(tmp_path / "model", family), tmp_path / "films", family == "wan_image_to_video"
    # Steps of its own for each film: what is computed beside another one is the same but for rounding.
    options = ("--image-defaults", DEFAULTS, "--video-output-path", str(films), "--video-ttl", "20")
    options += ("--enable-deterministic-inference",)
    asked: dict[str, Any] = {"prompt": "draw a red cat", "size": "32x16", "seconds": "0.3"}
    if sees:
        asked["input_reference"] = ("a.png", png(bytes(range(96)), 8, 4), "image/png")
    with serving(folder, *options) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        long = client.videos.create(**asked, extra_body={"num_inference_steps": 1000})
        assert long.status in ("queued", "in_progress") and (long.size, long.seconds) == ("32x16", "0.3")
        with pytest.raises(openai.BadRequestError) as early:
            client.videos.download_content(long.id)
        assert early.value.code in ("video_queued", "video_in_progress")
        begun = client.videos.create(**asked, extra_body={"seed": 3})
        listed = client.videos.list(limit=1, order="asc")
        assert [one.id for one in listed.data] == [long.id] and listed.has_more
        assert [one.id for one in client.videos.list()] == [begun.id, long.id]
        assert client.videos.retrieve(long.id).status in ("queued", "in_progress")
        assert client.videos.delete(long.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(long.id)
        first = client.videos.poll(begun.id, poll_interval_ms=100)
        assert (first.status, first.progress, first.error) == ("completed", 100, None), first
        content = client.videos.download_content(first.id).read()
        assert frames_in(content) == [(32, 16)] * frames
        again = client.videos.create_and_poll(**asked, extra_body={"seed": 3}, poll_interval_ms=100)
        assert client.videos.download_content(again.id).read() == content  # the seed alone says what is drawn
        assert client.videos.delete(again.id).deleted and not (films / f"{again.id}.mp4").exists()
        refuse: list[tuple[str, dict[str, Any]]] = [
            ("guidance_scale_2", {"extra_body": {"guidance_scale_2": 2}}),
            ("num_frames", {"seconds": openai.omit, "extra_body": {"num_frames": 6}}),
            ("size", {"size": "33x16"}),
            ("num_inference_steps", {"extra_body": {"num_inference_steps": -1}}),
            ("lora", {"extra_body": {"lora": "x"}}),
            ("frames", {"extra_body": {"frames": 5}}),
            ("input_reference", {"input_reference": openai.omit if sees else ("a.png", png(bytes(96), 8, 4))}),
        ]
        for name, fields in refuse:
            with pytest.raises(openai.BadRequestError) as refused:
                client.videos.create(**{**asked, **fields})
            assert refused.value.param == name, (name, refused.value)
        for _ in range(900):  # the film goes when its time is over
            if not list(films.glob("video_*")):
                break
            client.videos.list()
            time.sleep(0.1)
        assert not list(films.glob("video_*"))
        with pytest.raises(openai.NotFoundError):
            client.videos.download_content(first.id)
        assert re.search(r"^phloem:videos_total\{.*\} 2\.0$", httpx.get(f"{url}/metrics").text, re.MULTILINE)


def test_a_rank_that_is_killed_fails_its_film_and_the_next_one_is_made(tmp_path: Path) -> None:
    folder = tiny_films(tmp_path / "model", "hunyuan_video")
    options = ("--image-defaults", DEFAULTS, "--tp-size", "2", "--tp-comm", "shm", "--dtype", "float32")
    with serving(folder, *options) as url, httpx.Client(base_url=url, timeout=120) as client:

        def job_of(key: str, *states: str) -> dict[str, Any]:
            job: dict[str, Any] = {}
            for _ in range(1200):
                job = client.get(f"/v1/videos/{key}").json()
                if job["status"] in states:
                    return job
                time.sleep(0.05)
            raise AssertionError(job)

        def made(seed: int) -> bytes:
            key = client.post("/v1/videos", json={"prompt": "draw a cat", "seed": seed}).json()["id"]
            assert job_of(key, "completed", "failed")["status"] == "completed", job_of(key, "failed")
            return client.get(f"/v1/videos/{key}/content").content

        assert "processes that meet by shm" in str(client.get("/server_info").json()["decisions"])
        before, (rank,) = made(5), picture_ranks()
        long = client.post("/v1/videos", json={"prompt": "a tree", "num_inference_steps": 1000}).json()["id"]
        job_of(long, "in_progress")
        os.kill(rank, signal.SIGKILL)
        failed = job_of(long, "failed")
        assert "rank 1 of 2 has gone" in failed["error"]["message"] and "SIGKILL" in failed["error"]["message"]
        assert made(5) == before
        assert picture_ranks() not in ([], [rank])
    assert not picture_ranks()


def picture_ranks() -> list[int]:
    """Processes of ranks below this one."""
    found: list[int] = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "phloem.launch.picture_rank" in child.cmdline():
                found.append(child.pid)
    return found


def test_a_film_of_ltx_begins_with_a_picture_at_a_rate_of_its_own(tmp_path: Path) -> None:
    folder = tiny_films(tmp_path / "model", "ltx_image_to_video")
    defaults = DEFAULTS.replace("32x16", "64x32")
    with serving(folder, "--image-defaults", defaults) as url, httpx.Client(base_url=url, timeout=120) as client:
        files = {"input_reference": ("a.png", png(bytes(96), 8, 4), "image/png")}
        form = {"prompt": "draw a cat", "num_frames": "5", "fps": "10", "seed": "3"}
        job = client.post("/v1/videos", data=form, files=files).json()
        for _ in range(600):
            job = client.get(f"/v1/videos/{job['id']}").json()
            if job["status"] in ("completed", "failed"):
                break
            time.sleep(0.05)
        assert (job["status"], job["fps"]) == ("completed", 10.0), job
        content = client.get(f"/v1/videos/{job['id']}/content").content
        assert frames_in(content) == [(64, 32)] * 5
        with av.open(io.BytesIO(content)) as file:
            assert float(file.streams.video[0].average_rate) == 10
        wrong = client.post("/v1/videos", json={"prompt": "a"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "input_reference")


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
