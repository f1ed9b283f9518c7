"""Families that see videos, against transformers: anywhere, in chunks, from the prefix tree, beside pictures."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from vision_support import Theirs, clip, picture, png, seeing_checkpoint

from phloem.core.errors import BadRequest
from phloem.llm import Engine
from phloem.multimodal import _video
from phloem.multimodal._video import Video, Wanted

CLIPS = [[picture(10 * seed + at, 32, 16) for at in range(count)] for seed, count in ((1, 6), (2, 4))]
FILES = [clip(frames) for frames in CLIPS]
IMAGE = picture(3, 24, 16)
TEXTS = {
    "one": ([5, 17, 200, "V", 301, 44, 9, 12], [0], False),
    "first": (["V", 301, 44], [1], False),
    "two": ([5, "V", 200, 3, "V", 99], [1, 0], False),
    "picture": ([9, "P", 200, "V", 99, 97], [0], True),
    "behind": ([9, "V", 200, "P", 99, 97], [1], True),
}
FAST = ("qwen2_5_vl", "qwen3_vl")
SLOW = ("qwen2_vl", "qwen3_vl_moe", "llava_onevision")
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
SETTINGS = {"ops": "reference", "dtype": "float32", "max_total_tokens": 4096, "max_running_requests": 8, "threads": 1}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Theirs, Any]]:
    torch.set_num_threads(1)
    name = request.param
    around = {}
    if name == "qwen2_5_vl":
        from phloem.checkpoint.families import family

        tiny: Any = family(name).tiny
        vision = {**tiny["around"]["vision_config"], "tokens_per_second": 3}  # half seconds: 0, 1.5, 3
        around = {"around": {**tiny["around"], "vision_config": vision}}
    path = seeing_checkpoint(name, tmp_path_factory.mktemp("watching"), **around)
    yield Theirs(name, path), path


def engine_of(path: Any, **settings: Any) -> Engine:
    return Engine(model_path=str(path), random_seed=1, debug_invariants=True, **(SETTINGS | settings))


def ask(engine: Engine, name: str, which: list[int] | None = None, **more: Any) -> dict[str, Any]:
    ids, own, pictured = TEXTS[name]
    processors = engine._client.pictures.processors
    marks = {
        letter: engine.tokenizer.encode(processors[kind].mark, False)
        for letter, kind in (("P", "image"), ("V", "video"))
    }
    found: Any = engine.generate(
        input_ids=[token for one in ids for token in (marks[one] if isinstance(one, str) else [one])],
        image_data=png(IMAGE) if pictured else None,
        video_data=[FILES[number] for number in (own if which is None else which)],
        sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        return_prompt_token_ids=True,
        **more,
    )
    return found


def check(theirs: Theirs, found: dict[str, Any], name: str) -> None:
    ids = found["meta_info"]["prompt_token_ids"]
    images, clips = [IMAGE] if TEXTS[name][2] else [], [CLIPS[number] for number in TEXTS[name][1]]
    logits = theirs.logits(ids, images, clips).log_softmax(-1)
    told = found["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in told] == ids
    rows = zip(told[1:], ids[1:], strict=True)
    worst = max(abs(entry[0] - float(logits[at, token])) for at, (entry, token) in enumerate(rows))
    assert worst < 1e-4, f"{name}: {worst}"
    assert found["output_ids"] == theirs.greedy(ids, images, 8, clips)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 5, "max_running_requests": 2, "page_size": 4}])
def test_logits_and_greedy_text_are_those_of_transformers(pair: Any, settings: dict[str, Any]) -> None:
    theirs, path = pair
    with engine_of(path, **settings) as engine:
        for name in TEXTS:
            check(theirs, ask(engine, name, return_logprob=True, logprob_start_len=0), name)


@pytest.mark.slow
def test_videos_are_found_by_content(pair: Any) -> None:
    """The same prompt again is neither encoded nor computed; the same text about another video shares what is before
    it; the same frames at another speed are another video, where the model is told of time."""
    theirs, path = pair
    with engine_of(path, page_size=1) as engine:
        first, again = ask(engine, "one"), ask(engine, "one")
        ids = first["meta_info"]["prompt_token_ids"]
        assert again["meta_info"]["cached_tokens"] == len(ids) - 1
        assert again["output_ids"] == first["output_ids"]
        other = ask(engine, "one", [1])
        shared = other["meta_info"]["cached_tokens"]
        assert 3 <= shared <= ids.index(engine._client.pictures.tokens["video"])
        assert other["output_ids"] == theirs.greedy(other["meta_info"]["prompt_token_ids"], [], 8, [CLIPS[1]])
        state = engine.get_server_info()["internal_states"][0]
        assert (state["pictures_encoded"], state["pictures_found"]) == (2, 0)


def test_a_video_whose_seconds_lead_behind_the_context_is_refused_alone(pair: Any) -> None:
    """A frame each four minutes: few tokens, far places. Others go on, and nothing reads behind the rope table."""
    theirs, path = pair
    if theirs.name != "qwen2_5_vl":
        pytest.skip("its places in time are those of tokens")
    with engine_of(path, context_length=256) as engine:
        slow = {"data": clip([picture(at, 16, 16) for at in range(6)], rate=Fraction(1, 240)), "fps": 0.004}
        with pytest.raises(BadRequest, match="reach up to position"):
            engine.generate("<video>", video_data=slow)
        found: Any = engine.generate("<video>", video_data=FILES[0], sampling_params={"max_new_tokens": 2})
        assert found["meta_info"]["completion_tokens"] >= 1


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("mpegts", "mpeg2video"), ("avi", "mpeg4")])
def test_the_frames_that_are_asked_for(container: str, codec: str) -> None:
    """Whatever the order: sought from key frames, they are those of reading all."""
    frames = [picture(at, 32, 16) for at in range(12)]
    data = clip(frames, 25, container, codec)
    all_frames = Video(data, "here", Wanted()).frames(range(12), 32, 16, {})
    some = Video(data, "here", Wanted()).frames([0, 5, 5, 11], 32, 16, {})
    assert (some == all_frames[[0, 5, 5, 11]]).all()
    assert [Video(data, "here", Wanted()).frames([at], 32, 16, {}).tobytes() for at in (3, 9)] == [
        all_frames[at].tobytes() for at in (3, 9)
    ]


def test_reading_a_video_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_video, "WHOLE_SECONDS", -1.0)
    with pytest.raises(BadRequest, match="takes more than") as error:
        Video(FILES[0], "here", Wanted())
    assert error.value.param == "here"


@pytest.mark.parametrize("data", [b"", b"#EXTM3U\nfile:///etc/passwd", FILES[0][:80], b"\x1aE\xdf\xa3" * 40])
def test_what_is_no_video_is_told(data: bytes) -> None:
    with pytest.raises(BadRequest, match=r"no video|broken|no frames"):
        Video(data, "here", Wanted())


def test_stacked_experts_are_read_either_way_round(tmp_path: Any) -> None:
    """As transformers keeps them, and transposed as published checkpoints have them."""
    from model_support import PROMPT, close, edited
    from model_support import Engine as Steps

    path = seeing_checkpoint("qwen3_vl_moe", tmp_path / "made")

    def turned(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values.mT.contiguous() if ".experts." in name else values for name, values in stored.items()}

    close(Steps(edited(path, tmp_path / "turned", turned)).whole(PROMPT), Steps(path).whole(PROMPT))
