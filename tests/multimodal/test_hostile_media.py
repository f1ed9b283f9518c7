"""Files that are made to cost: small ones that ask for hours or gigabytes; and videos by the language and the shell."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_doors import door, user
from vision_support import clip, pdf, picture, png, seeing_checkpoint

from phloem import cli, lang
from phloem.core.errors import BadRequest
from phloem.llm import Engine
from phloem.multimodal import _aside, _pixels
from phloem.multimodal._aside import Aside
from phloem.multimodal._video import Wanted

SETTINGS: dict[str, Any] = {"ops": "reference", "dtype": "float32", "max_total_tokens": 2048, "threads": 1}


@pytest.fixture(scope="module")
def watches(tmp_path_factory: Any) -> Path:
    torch.set_num_threads(1)
    return seeing_checkpoint("qwen2_vl", tmp_path_factory.mktemp("watches"))


@pytest.fixture
def aside(request: Any) -> Iterator[Aside]:
    made = Aside(request.param, 1)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("aside", ["document"], indirect=True)
def test_a_page_without_end_ends_in_time_and_the_next_document_is_drawn(
    aside: Aside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 kB of compressed lines, drawn one by one."""
    lines = zlib.compress(b"0 0 72 72 re f\n" * 400_000)
    plain = b"0.1 0.5 0.9 rg 0 0 36 72 re f"
    long = pdf([(72, 72)]).replace(
        b"<</Length 29>>stream\n" + plain, b"<</Length %d/Filter/FlateDecode>>stream\n%s" % (len(lines), lines)
    )
    assert len(long) > 10_000  # it was replaced
    monkeypatch.setattr(_aside, "WHOLE_SECONDS", 0.2)
    with pytest.raises(BadRequest, match="takes more than") as told, aside.opened(long, "here", most=1) as paper:
        list(paper.pages())
    assert (told.value.param, told.value.code) == ("here", "too_large")
    monkeypatch.undo()
    with aside.opened(pdf([(72, 36)]), "here", most=1) as paper:
        assert [page.size for page in paper.pages()] == [(144, 72)]


@pytest.mark.parametrize("aside", ["video"], indirect=True)
def test_an_index_of_more_frames_than_bytes_takes_no_memory_here(aside: Aside) -> None:
    """Two kilobytes that say of themselves that they have 170 million frames: four gigabytes of index."""
    good = clip([picture(at, 32, 16) for at in range(12)], 25, "mp4", "mpeg4")
    bad, count = bytearray(good), struct.pack(">I", 170_000_000)
    sizes, chunks, times = (bad.find(name) for name in (b"stsz", b"stsc", b"stts"))
    bad[sizes + 8 : sizes + 16] = struct.pack(">I", 1) + count
    bad[chunks + 16 : chunks + 20] = bad[times + 12 : times + 16] = count
    with pytest.raises(BadRequest, match=r"broken|takes more"), aside.opened(bytes(bad), "here", wanted=Wanted()):
        pass
    with aside.opened(good, "here", wanted=Wanted()) as video:
        film = video.film()
        assert (film.total, film.size) == (12, (32, 16))
        assert film.frames([0, 5], 8, 8, {}).shape == (2, 8, 8, 3)


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    """Each of a few bytes goes over all of the picture: 25 MiB of them took hours."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (640, 640), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert _pixels.decode(data, "here").size == (640, 640)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadRequest, match="scans") as told:
        _pixels.decode(data[:-2] + scan * 300 + data[-2:], "here")
    assert told.value.code == "too_large"


def test_answers_are_the_same_where_the_encoder_cache_has_no_room(watches: Path) -> None:
    """Several pictures, prompts in chunks that end inside them, many requests at a time."""
    answers: list[Any] = []
    for budget in ("256MiB", "1"):
        settings = {**SETTINGS, "chunked_prefill_size": 8, "page_size": 4, "mm_encoder_cache": budget}
        with Engine(model_path=str(watches), **settings) as engine:
            found: Any = engine.generate(
                [f"<image> {number} <image>?" for number in range(6)],
                {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
                image_data=[[png(picture(number, 40, 24)), png(picture(number + 9, 16, 48))] for number in range(6)],
            )
            answers.append([one["output_ids"] for one in found])
    assert answers[0] == answers[1]


def test_a_client_that_leaves_while_its_video_is_read_keeps_nobody_waiting(
    watches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More such clients than there are threads for videos; then one that stays."""
    film = {"url": f"data:video/x;base64,{base64.b64encode(clip([picture(at, 24, 16) for at in range(4)])).decode()}"}
    asked = {"messages": user({"type": "video_url", "video_url": film}, "?"), "max_tokens": 2}
    answers, opened = threading.Event(), Aside.opened

    def slow(self: Aside, *args: Any, **more: Any) -> Any:
        answers.wait(20)
        return opened(self, *args, **more)

    async def run() -> None:
        async with door(watches) as http:
            monkeypatch.setattr(Aside, "opened", slow)
            leaving = [asyncio.create_task(http.post("/v1/chat/completions", json=asked)) for _ in range(5)]
            await asyncio.sleep(0.1)
            for one in leaving:
                one.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            monkeypatch.undo()
            answers.set()
            found = await http.post("/v1/chat/completions", json=asked)
            assert found.status_code == 200, found.text
            loads = (await http.get("/server_info")).json()["internal_states"][0]
            assert loads["running"] == 0

    asyncio.run(run())


@pytest.mark.slow
def test_a_program_shows_a_video(watches: Path, tmp_path: Path) -> None:
    """As a file and as bytes, all frames or so many: what the engine is told is what a request says."""
    data = clip([picture(at, 24, 16) for at in range(8)])
    path = tmp_path / "a.mkv"
    path.write_bytes(data)

    @lang.function
    def told(s: Any, source: Any, frames: int | None) -> None:
        s += lang.user(lang.video(source, frames) + "What moves?")
        s += lang.assistant(lang.gen("it", max_tokens=4, temperature=0))

    backend: Any = lang.Engine(model_path=str(watches), **SETTINGS)
    try:
        by_file, by_bytes = (told.run(source=one, frames=4, backend=backend) for one in (path, data))
        whole = told.run(source=str(path), frames=None, backend=backend)
        assert by_file.error() is None and by_file["it"] == by_bytes["it"]
        tokens = [one.get_meta_info("it")["prompt_tokens"] for one in (by_file, by_bytes, whole)]
        assert tokens[0] == tokens[1] < tokens[2]
        asked = "<|im_start|>user\n<video>What moves?<|im_end|>\n<|im_start|>assistant\n"
        given = {"temperature": 0, "max_new_tokens": 4}
        found = backend.engine.generate(asked, given, video_data={"url": data, "num_frames": 4})
        assert found["meta_info"]["prompt_tokens"] == tokens[0] and found["text"] == by_file["it"]
        with pytest.warns(UserWarning, match="neither a file nor base64"):
            assert told.run(source=str(tmp_path / "no.mkv"), frames=None, backend=backend).error() is not None
    finally:
        backend.shutdown()


def test_the_shell_shows_a_video(watches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "a.mkv", tmp_path / "out.jsonl"
    path.write_bytes(clip([picture(at, 24, 16) for at in range(4)]))
    command = ["run", str(watches), "--prompt", "What moves?", "--max-new-tokens", "4", "--output", str(out)]
    command += ["--ops", "reference", "--dtype", "float32", "--max-total-tokens", "1024", "--threads", "1"]
    assert cli.main([*command, "--video", str(path)]) == 0
    (answer,) = (json.loads(line) for line in out.read_text().splitlines())
    assert "error" not in answer, answer
    assert cli.main([*command, "--video", str(tmp_path / "no.mkv")]) != 0
    assert "cannot read" in capsys.readouterr().err
