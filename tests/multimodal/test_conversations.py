"""Conversations about one picture or video: later turns neither encode nor compute it again, and the metrics say so."""

from __future__ import annotations

import ast
import asyncio
import re
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_doors import OTHER, PNG, SHORT, door, image, uri, user
from vision_support import FPS, clip, pdf, picture, seeing_checkpoint

import phloem
from phloem.llm import Engine
from phloem.multimodal import _pages, _pixels, _video

SETTINGS: dict[str, Any] = {"ops": "reference", "dtype": "float32", "max_total_tokens": 4096, "threads": 1}
FILMS = [clip([picture(10 * seed + at, 32, 16) for at in range(count)]) for seed, count in ((1, 6), (2, 4))]
QUESTIONS = ["What is it?", "Where is it?", "Who made it?", "How old is it?", "What is it worth?"]


def counted(metrics: str, name: str) -> float:
    """A counter of the Prometheus text, all its labels together."""
    found = re.findall(rf"^phloem:{name}_total(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE)
    assert found, name
    return sum(map(float, found))


async def asked(http: Any, messages: list[dict[str, Any]]) -> tuple[str, int, int]:
    """The answer, tokens of the prompt, and those of them that were cached."""
    found = await http.post("/v1/chat/completions", json={"messages": messages, **SHORT})
    assert found.status_code == 200, found.text
    body = found.json()
    cached = (body["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"], cached


async def shown(http: Any, **wanted: int) -> None:
    """Until the metrics say so: what the engine counts reaches the server a little later."""
    names = {"encoded": "pictures_encoded", "hits": "encoder_cache_hits", "cached": "cached_tokens"}
    found: dict[str, float] = {}
    for _ in range(200):
        metrics = (await http.get("/metrics")).text
        found = {short: counted(metrics, name) for short, name in names.items()}
        if found == wanted:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{found}, not {wanted}")


@pytest.mark.slow
def test_five_turns_about_one_picture_encode_it_once(tmp_path: Path) -> None:
    """Each turn finds all of the prompt before it; another conversation about it finds what the tower made."""
    path = seeing_checkpoint("qwen2_vl", tmp_path)

    async def run() -> None:
        async with door(path) as http:
            messages = user(image(PNG), QUESTIONS[0])
            turns: list[tuple[str, int, int]] = []
            for question in [*QUESTIONS[1:], ""]:
                turns.append(await asked(http, messages))
                messages += [{"role": "assistant", "content": turns[-1][0]}, *user(question)]
            for (_, before, _), (_, prompt, cached) in pairwise(turns):
                assert before <= cached < prompt
            cached = sum(found for _, _, found in turns)
            await shown(http, encoded=1, hits=0, cached=cached)  # a picture out of the tree is not looked at
            other = await asked(http, user("Now, in other words: ", image(PNG), "?"))
            assert other[2] < turns[0][1]
            await shown(http, encoded=1, hits=1, cached=cached + other[2])
            third = await asked(http, user(image(OTHER), QUESTIONS[0]))
            await shown(http, encoded=2, hits=1, cached=cached + other[2] + third[2])

    asyncio.run(run())


def told(engine: Engine, text: str, which: int) -> dict[str, Any]:
    found: Any = engine.generate(
        text,
        video_data={"data": FILMS[which], "fps": FPS},
        sampling_params={"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        return_prompt_token_ids=True,
    )
    return found


def seen(engine: Engine) -> tuple[int, int]:
    """Pictures and videos of the tower and of the encoder cache, since the start."""
    state = engine.get_server_info()["internal_states"][0]
    return state["pictures_encoded"], state["pictures_found"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_frames_that_are_pictures_are_found_in_the_next_turn(tmp_path: Path, name: str) -> None:
    """Videos that stand in prompts as numbered pictures are known as a whole, by their frames."""
    path = seeing_checkpoint(name, tmp_path)
    with Engine(model_path=str(path), random_seed=1, page_size=1, **SETTINGS) as engine:
        token = engine._client.pictures.tokens["video"]
        first = told(engine, "Look: <video> What is it?", 0)
        ids = first["meta_info"]["prompt_token_ids"]
        behind = len(ids) - ids[::-1].index(token)
        turn = "Look: <video> What is it? A dog. And then?"
        second = told(engine, turn, 0)
        assert second["meta_info"]["prompt_token_ids"][:behind] == ids[:behind]
        assert behind <= second["meta_info"]["cached_tokens"] < second["meta_info"]["prompt_tokens"]
        assert seen(engine) == (1, 0)
        other = told(engine, turn, 1)  # its number of frames, where it is said, is all that may be shared
        assert other["meta_info"]["cached_tokens"] <= other["meta_info"]["prompt_token_ids"].index(token)
        assert seen(engine) == (2, 0)
        moved = told(engine, "Once more: <video> What is it?", 0)
        assert moved["meta_info"]["cached_tokens"] < behind
        assert seen(engine) == (2, 1)
        engine.flush_cache()
        for answer, text, which in ((second, turn, 0), (other, turn, 1), (moved, "Once more: <video> What is it?", 0)):
            assert told(engine, text, which)["output_ids"] == answer["output_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_frames_that_are_pictures_lie_in_steps_with_texts_as_alone(tmp_path: Path, name: str) -> None:
    path = seeing_checkpoint(name, tmp_path)
    texts = ["Look: <video> What is it?", "A <video> Where?", "no video at all"]
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    with Engine(model_path=str(path), random_seed=1, page_size=4, chunked_prefill_size=7, **SETTINGS) as engine:
        films = [[{"data": FILMS[0], "fps": FPS}], [{"data": FILMS[1], "fps": FPS}], []]
        alone: list[Any] = [
            engine.generate(text, params, video_data=film or None) for text, film in zip(texts, films, strict=True)
        ]
        engine.flush_cache()
        beside: Any = engine.generate(texts * 2, params, video_data=films * 2)
        assert [one["output_ids"] for one in beside] == [one["output_ids"] for one in alone] * 2


@pytest.mark.slow
def test_no_decoder_runs_where_steps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are decoded in threads of the reader, videos and documents in processes of their own; neither the engine
    nor the scheduler can, as they import nothing of it."""
    threads: list[str] = []
    decode = _pixels.decode

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return decode(*given)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a video or document was opened in this process")

    monkeypatch.setattr(_pixels, "decode", noted)
    monkeypatch.setattr(_video.Video, "__init__", never)
    monkeypatch.setattr(_pages.Document, "__init__", never)
    path = seeing_checkpoint("qwen2_vl", tmp_path)

    async def run() -> None:
        async with door(path) as http:
            film = {"type": "video_url", "video_url": {"url": uri(FILMS[0]), "fps": 4}}
            paper = {"type": "file", "file": {"file_data": uri(pdf([(72, 36)])), "filename": "a.pdf"}}
            await asked(http, user(image(PNG), film, paper, "What?"))

    asyncio.run(run())
    assert threads and all(name.startswith("phloem-image") for name in threads)
    source = Path(phloem.__file__).parent
    rooms = ("engine", "scheduler", "models", "kernels", "attention", "kvcache", "speculation", "layers")
    # `blank.py` makes pictures of nothing, in the process that compiles kernels beside the loading.
    files = [file for room in rooms for file in (source / room).rglob("*.py") if file.name != "blank.py"]
    wrong = [
        file.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phloem.multimodal")
    ]
    assert len(files) > 100 and not wrong
