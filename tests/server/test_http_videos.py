"""`/v1/videos` over an engine without a model: jobs from their beginning to their expiry, files, refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from door import make_info, on_loop, open_door, until

from phloem.core.config import Config
from phloem.core.errors import ConfigError, StorageFailed
from phloem.server.start import run
from phloem.server.videos.film import FilmWriter
from phloem.server.videos.folder import FilmFolder
from phloem.server.videos.store import VideoStore
from phloem.testing.fake_studio import FILMS, FakeStudio
from phloem.utils.png import png

av = pytest.importorskip("av", reason="films need PyAV: pip install 'phloem[media]'")
PATH = "/v1/videos"
INFO = make_info(draws=True, vocab_size=0, context_length=0)


def filming(config: dict[str, Any] | None = None, **changes: Any) -> Any:
    return open_door(FakeStudio(facts={**FILMS, **changes.pop("facts", {})}, **changes), INFO, **(config or {}))


async def finished(door: Any, key: str) -> dict[str, Any]:
    video: dict[str, Any] = {}
    for _ in range(500):
        video = (await door.http.get(f"{PATH}/{key}")).json()
        if video["status"] in ("completed", "failed"):
            return video
        await asyncio.sleep(0.01)
    raise AssertionError(video)


def frames_of(data: bytes) -> tuple[Any, float]:
    """([frames, height, width, 3], frames a second) of an mp4 file."""
    with av.open(io.BytesIO(data)) as file:
        rate = float(file.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]), rate


@on_loop
async def test_a_film_is_made_as_a_job_and_its_file_holds_the_frames() -> None:
    async with filming() as door:
        body = {"prompt": "a leaf", "size": "32x16", "num_frames": 5, "fps": 12, "seed": 200, "num_inference_steps": 2}
        job = (await door.post(PATH, body)).json()
        assert (job["object"], job["size"], job["num_frames"], job["seed"]) == ("video", "32x16", 5, 200)
        assert job["status"] in ("queued", "in_progress", "completed") and job["seconds"] == f"{5 / 12:g}"
        video = await finished(door, job["id"])
        assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
        assert video["expires_at"] >= video["completed_at"] + 86399
        response = await door.http.get(f"{PATH}/{job['id']}/content")
        assert response.headers["content-type"] == "video/mp4"
        frames, rate = frames_of(response.content)
        assert frames.shape == (5, 16, 32, 3) and rate == 12
        assert np.abs(frames[:, :, :, 0].astype(int) - 200).max() < 12
        assert frames[-1, :, :, 2].mean() > frames[0, :, :, 2].mean() + 40
        part = await door.http.get(f"{PATH}/{job['id']}/content", headers={"range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, b"ftyp")
        for asked, status in (("bytes=x-y", 400), ("feet=1-2", 400), ("", 400), ("bytes=9999999-", 416)):
            refused = await door.http.get(f"{PATH}/{job['id']}/content", headers={"range": asked})
            assert refused.status_code == status, asked
            assert (
                refused.headers["content-type"] == "application/json" and "Range" in refused.json()["error"]["message"]
            )
        assert refused.headers["content-range"] == f"bytes */{len(response.content)}"
        draw = door.engine.draws[0]
        assert (draw.film, draw.frames, draw.width, draw.steps) == (True, 5, 32, 2)
        text = (await door.http.get("/metrics")).text
        assert 'phloem:videos_total{model_name="tiny"} 1.0' in text
        assert 'phloem:image_pixels_total{model_name="tiny"} 2560.0' in text
        assert (await door.http.get("/health_generate")).status_code == 200


@on_loop
async def test_seconds_become_the_nearest_number_of_frames_that_the_model_makes() -> None:
    async with filming() as door:
        for seconds, frames in (("4", 33), (1, 9), ("0.1", 1), ("2.6", 21)):
            job = (await door.post(PATH, {"prompt": "a", "seconds": seconds})).json()
            assert (job["num_frames"], job["seconds"], job["fps"]) == (frames, str(seconds), 8.0), job
        assert (await door.post(PATH, {"prompt": "a"})).json()["seconds"] == f"{9 / 8:g}"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "size": "33x16"}, "size"),
        ({"prompt": "a", "size": "4096x4096"}, "size"),
        ({"prompt": "a", "seconds": "12"}, "seconds"),
        ({"prompt": "a", "seconds": "nan"}, "seconds"),
        ({"prompt": "a", "seconds": "0"}, "seconds"),
        ({"prompt": "a", "seconds": "-4"}, "seconds"),
        ({"prompt": "a", "seconds": "long"}, "seconds"),
        ({"prompt": "a", "seconds": "1e400"}, "seconds"),
        ({"prompt": "a", "seconds": [4]}, "seconds"),
        ({"prompt": "a", "seconds": "1", "num_frames": 9}, "seconds"),
        ({"prompt": "a", "num_frames": 8}, "num_frames"),
        ({"prompt": "a", "num_frames": 37}, "num_frames"),
        ({"prompt": "a", "num_frames": -3}, "num_frames"),
        ({"prompt": "a", "fps": 0}, "fps"),
        ({"prompt": "a", "fps": 1e9}, "fps"),
        ({"prompt": "a", "fps": 1e-300}, "fps"),
        ({"prompt": "a", "num_inference_steps": -1}, "num_inference_steps"),
        ({"prompt": "a", "guidance_scale_2": -1}, "guidance_scale_2"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "flow_shift": 5.0}, "flow_shift"),
        ({"prompt": "a", "lora": {"name": "x", "scale": 1000}}, "lora.scale"),
        ({"prompt": "a", "input_reference": 7}, "input_reference"),
        ({"prompt": "a", "input_reference": "%%%"}, "input_reference"),
        ({"prompt": "a", "input_reference": "http://127.0.0.1/a.png"}, "input_reference"),
        ({"prompt": "a", "input_reference": "/etc/passwd"}, "input_reference"),
        ({"prompt": "a", "input_reference": {"file_id": "f"}}, "input_reference"),
        ({"prompt": "a", "num_frame": 5}, "num_frame"),
    ],
    ids=str,
)
@on_loop
async def test_bad_fields_are_named(body: dict[str, Any], param: str) -> None:
    async with filming() as door:
        response = await door.post(PATH, body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param or (param == "prompt" and "prompt" in error["message"])
        if param == "num_frame":
            assert "num_frames" in error["message"]
        assert not door.engine.draws
        assert (await door.http.get(PATH)).json()["data"] == []


@on_loop
async def test_a_film_begins_with_the_picture_that_is_sent_in_a_form_or_as_an_address() -> None:
    async with filming(facts={"needs_pictures": True}) as door:
        missing = await door.post(PATH, {"prompt": "a"})
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "input_reference")
        picture = png(bytes([9, 8, 7]) * 32, 8, 4)
        fields = {"prompt": "a", "seconds": "1", "seed": "3", "guidance_scale": "2.5"}
        response = await door.http.post(PATH, data=fields, files={"input_reference": ("a.png", picture, "image/png")})
        assert response.status_code == 200, response.text
        address = "data:image/png;base64," + base64.b64encode(picture).decode()
        assert (await door.post(PATH, {"prompt": "a", "input_reference": {"image_url": address}})).status_code == 200
        first, second = door.engine.draws
        assert (first.pictures[0].width, first.pictures[0].data[:3]) == (8, bytes([9, 8, 7]))
        assert (first.frames, first.seed, first.guidance) == (9, 3, 2.5) and second.pictures == first.pictures
        bomb = png(bytes(3), 1, 1)
        bomb = bomb[:16] + (60_000).to_bytes(4, "big") * 2 + bomb[24:]
        for data in (b"", b"no picture", picture[:40], bomb):
            files = {"input_reference": ("a.png", data, "image/png")}
            refused = await door.http.post(PATH, data={"prompt": "a"}, files=files)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_reference"), data[:20]


@on_loop
async def test_what_the_engine_refuses_is_the_answer_and_makes_no_job() -> None:
    async with filming(refuse_draw=(400, "guidance_scale_2: none", "guidance_scale_2")) as door:
        response = await door.post(PATH, {"prompt": "a"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "guidance_scale_2")
        assert (await door.http.get(PATH)).json()["data"] == []
    async with open_door(FakeStudio(), INFO) as door:
        response = await door.post(PATH, {"prompt": "a"})
        assert response.status_code == 400 and "/v1/images/generations" in response.text
    async with open_door() as door:
        response = await door.post(PATH, {"prompt": "a"})
        assert response.json()["error"]["code"] == "wrong_task"


@on_loop
async def test_a_deleted_job_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    async with filming({"video_output_path": str(tmp_path)}, hold=True) as door:
        key = (await door.post(PATH, {"prompt": "a"})).json()["id"]
        await until(lambda: door.app.state.door.videos.get(key).video.progress == 25)
        content = await door.http.get(f"{PATH}/{key}/content")
        assert (content.status_code, content.json()["error"]["code"]) == (400, "video_in_progress")
        gone = await door.http.delete(f"{PATH}/{key}")
        assert gone.json() == {"id": key, "object": "video.deleted", "deleted": True}
        assert door.engine.dropped == [key] and door.client.in_flight == 0
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert (await door.http.request(method, f"{PATH}/{key}{path}")).status_code == 404
        await until(lambda: not door.app.state.door.videos.tasks)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        for path in ("..%2f..%2fetc%2fpasswd", "video_", "%00"):
            assert (await door.http.get(f"{PATH}/{path}")).status_code == 404


@on_loop
async def test_a_film_that_breaks_after_it_was_deleted_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with filming({"video_output_path": str(tmp_path)}) as door:
        loop = asyncio.get_running_loop()

        def add(writer: FilmWriter, pixels: bytes) -> None:
            gone = door.http.delete(f"{PATH}/{door.engine.draws[0].id}")
            assert asyncio.run_coroutine_threadsafe(gone, loop).result(10).status_code == 200
            raise RuntimeError("an encoder that breaks")

        monkeypatch.setattr(FilmWriter, "add", add)
        await door.post(PATH, {"prompt": "a"})
        await until(lambda: door.engine.draws and not door.app.state.door.videos.tasks)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@on_loop
async def test_jobs_are_listed_in_pages() -> None:
    async with filming() as door:
        keys = [(await door.post(PATH, {"prompt": str(at), "num_frames": 1})).json()["id"] for at in range(5)]
        page = (await door.http.get(PATH, params={"limit": 2})).json()
        assert [one["id"] for one in page["data"]] == keys[:2:-1]
        assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", keys[4], keys[3], True)
        page = (await door.http.get(PATH, params={"limit": 9, "after": keys[3]})).json()
        assert [one["id"] for one in page["data"]] == keys[2::-1] and not page["has_more"]
        page = (await door.http.get(PATH, params={"order": "asc", "after": keys[1], "limit": 1})).json()
        assert [one["id"] for one in page["data"]] == [keys[2]]
        assert (await door.http.get(PATH, params={"after": "video_x"})).status_code == 404
        for bad in ({"limit": -1}, {"limit": 1000}, {"order": "up"}):
            assert (await door.http.get(PATH, params=bad)).status_code == 400


@on_loop
async def test_films_outlive_their_server_and_what_ran_has_failed(tmp_path: Path) -> None:
    config = {"video_output_path": str(tmp_path)}
    async with filming(config) as door:
        done = (await door.post(PATH, {"prompt": "a"})).json()["id"]
        film = (await finished(door, done), (await door.http.get(f"{PATH}/{done}/content")).content)
        with pytest.raises(ConfigError, match="another server"):
            FilmFolder(str(tmp_path))
        door.engine.hold = True
        running = (await door.post(PATH, {"prompt": "b"})).json()["id"]
        (tmp_path / f".{running}.mp4.part").write_bytes(b"half")
        (tmp_path / "video_0.json").write_text("{")
        await finished(door, done)
        crashed = (tmp_path / f"{running}.json").read_text().replace(running, "video_1")
        (tmp_path / "video_1.json").write_text(crashed)
    door.app.state.door.videos.close()
    async with filming(config) as door:
        assert (await finished(door, done), (await door.http.get(f"{PATH}/{done}/content")).content) == film
        for key, code in ((running, "engine_unavailable"), ("video_1", "server_stopped")):
            failed = (await door.http.get(f"{PATH}/{key}")).json()
            assert (failed["status"], failed["error"]["code"]) == ("failed", code)
        assert not list(tmp_path.glob(".*.part"))
        assert (await door.http.get(f"{PATH}/video_0")).status_code == 404


@on_loop
async def test_films_expire_and_make_room_for_newer_ones(tmp_path: Path) -> None:
    async with filming({"video_output_path": str(tmp_path), "video_ttl": 1000.0}) as door:
        store = door.app.state.door.videos
        keys = []
        for at in range(3):
            keys.append((await door.post(PATH, {"prompt": str(at), "seed": at})).json()["id"])
            await finished(door, keys[-1])
        sizes = [store.film(key).stat().st_size for key in keys]
        store.max_bytes = sum(sizes) + sizes[0] - 1  # room for all but one
        keys.append((await door.post(PATH, {"prompt": "b", "seed": 0})).json()["id"])
        await finished(door, keys[3])
        assert (await door.http.get(f"{PATH}/{keys[0]}")).status_code == 404
        assert len(list(tmp_path.glob("*.mp4"))) == 3
        store.get(keys[1]).video.expires_at = int(time.time()) - 1
        assert (await door.http.get(f"{PATH}/{keys[1]}/content")).status_code == 404
        assert not store.film(keys[1]).exists()
        store.max_bytes = 100
        large = (await door.post(PATH, {"prompt": "c"})).json()["id"]
        failed = await finished(door, large)
        assert failed["status"] == "failed" and "--video-max-bytes" in failed["error"]["message"]
        assert failed["expires_at"] and not list(tmp_path.glob(".*.part"))


@on_loop
async def test_the_engine_that_dies_fails_the_job_with_the_reason() -> None:
    async with filming(hold=True) as door:
        key = (await door.post(PATH, {"prompt": "a"})).json()["id"]
        door.client.connection.die("gone")
        video = await finished(door, key)
        assert video["status"] == "failed" and video["error"]["code"] == "engine_unavailable"
        assert (await door.post(PATH, {"prompt": "a"})).status_code == 503


@on_loop
async def test_a_film_whose_job_cannot_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with filming({"video_output_path": str(tmp_path)}) as door:
        store, write = door.app.state.door.videos, VideoStore._write

        def full(self: VideoStore, video: Any) -> None:
            if video.status == "completed":
                raise StorageFailed("no space")
            write(self, video)

        monkeypatch.setattr(VideoStore, "_write", full)
        failed = await finished(door, (await door.post(PATH, {"prompt": "a"})).json()["id"])
        assert (failed["status"], failed["error"]["code"], failed["progress"]) == ("failed", "storage_failed", 99)
        await until(lambda: not store.tasks)
        assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob(".*.part"))


@on_loop
async def test_a_folder_that_is_gone_is_told_and_comes_back(tmp_path: Path) -> None:
    folder, away = tmp_path / "films", tmp_path / "away"
    async with filming({"video_output_path": str(folder)}) as door:
        key = (await door.post(PATH, {"prompt": "a"})).json()["id"]
        await finished(door, key)
        folder.rename(away)
        refused = await door.post(PATH, {"prompt": "b"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (507, "storage_failed"), refused.text
        assert door.client.in_flight == 0
        for method in ("GET", "HEAD"):
            assert (await door.http.request(method, f"{PATH}/{key}/content")).status_code == 404
        away.rename(folder)
        assert (await door.http.get(f"{PATH}/{key}/content")).status_code == 200
        store = door.app.state.door.videos
        store.film(key).unlink()
        assert (await door.http.get(f"{PATH}/{key}/content")).json()["error"]["code"] == "video_lost"


@on_loop
async def test_a_film_asked_for_while_the_engine_starts_again_is_503() -> None:
    async with filming() as door:
        door.client.connection.ready = None
        for body in ({"prompt": "a"}, {"prompt": "a", "seconds": "1"}):
            response = await door.post(PATH, body)
            assert (response.status_code, response.json()["error"]["type"]) == (503, "engine_unavailable")
        assert (await door.http.get("/model_info")).status_code in (200, 503)


def test_a_file_is_not_closed_under_the_thread_that_writes_it(tmp_path: Path) -> None:
    writer = FilmWriter(tmp_path / "a.mp4", 32, 16, 16.0, 1 << 20)
    inside, go, said = threading.Event(), threading.Event(), list[str]()

    class Slow:
        def encode(self, frame: Any) -> list[Any]:
            inside.set()
            go.wait(20)
            said.append("encoded")
            return []

    class File:
        def mux(self, packets: Any) -> None:
            pass

        def close(self) -> None:
            said.append("closed")

    file = writer._file
    writer._stream, writer._file = Slow(), File()
    adding = threading.Thread(target=writer.add, args=(bytes(32 * 16 * 3),))
    adding.start()
    assert inside.wait(20)
    dropping = threading.Thread(target=writer.drop)
    dropping.start()
    dropping.join(0.05)
    go.set()
    adding.join(20)
    dropping.join(20)
    writer.add(bytes(32 * 16 * 3))  # of a thread that comes too late
    assert said == ["encoded", "closed"] and not (tmp_path / "a.mp4").exists()
    file.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@on_loop
async def test_the_openai_client_makes_films() -> None:
    openai: Any = pytest.importorskip("openai")
    async with filming() as door:
        http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(door.app), base_url="http://door")
        client = openai.AsyncOpenAI(base_url="http://door/v1", api_key="none", http_client=http)
        picture = ("a.png", png(bytes(96), 8, 4), "image/png")
        made = await client.videos.create(
            prompt="a", seconds="4", size="32x16", input_reference=picture, extra_body={"seed": 5}
        )
        assert (made.status in ("queued", "in_progress"), made.seconds, made.size) == (True, "4", "32x16")
        plain = await client.videos.create_and_poll(prompt="b", poll_interval_ms=10)
        assert plain.status == "completed"
        for key in (made.id, plain.id):
            await finished(door, key)
        assert (await client.videos.retrieve(made.id)).progress == 100
        assert [one.id async for one in client.videos.list(limit=1)] == [plain.id, made.id]
        content = await client.videos.download_content(made.id)
        assert frames_of(content.content)[0].shape == (33, 16, 32, 3)
        with pytest.raises(openai.BadRequestError, match="variant"):
            await client.videos.download_content(made.id, variant="thumbnail")
        assert (await client.videos.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.videos.retrieve(made.id)


def test_a_folder_of_films_that_is_taken_is_told_before_any_model_is_loaded(tmp_path: Path) -> None:
    taken, started = FilmFolder(str(tmp_path)), list[bool]()
    config = Config.from_flat({"model_path": "none", "video_output_path": str(tmp_path), "port": 0})
    with pytest.raises(ConfigError, match="another server"):
        run(config, lambda: started.append(True))  # type: ignore[arg-type, return-value]
    assert not started
    taken.close()
    FilmFolder(str(tmp_path)).close()
