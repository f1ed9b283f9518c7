"""Families that see videos, against transformers: anywhere, in chunks, from the prefix tree, beside pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from vision_support import FPS, Theirs, clip, picture, png, seeing_checkpoint
from vision_support import SETTINGS as SETTINGS_OF

from phloem.checkpoint.describe import describe
from phloem.core.errors import BadRequest
from phloem.llm import Engine
from phloem.multimodal import Facts, _video, glm4v, idefics3
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD
from phloem.multimodal._video import Video, Wanted
from phloem.testing.checkpoints import tiny_checkpoint

if TYPE_CHECKING:
    from phloem.multimodal._aside import Film

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
SLOW = ("qwen2_vl", "qwen3_vl_moe", "llava_onevision", "llava_next_video", "glm4v", "glm4v_moe")
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


@pytest.mark.some(5)
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 5, "max_running_requests": 2, "page_size": 4}])
def test_logits_and_greedy_text_are_those_of_transformers(pair: Any, settings: dict[str, Any]) -> None:
    theirs, path = pair
    with engine_of(path, **settings) as engine:
        for name in TEXTS:
            check(theirs, ask(engine, name, return_logprob=True, logprob_start_len=0), name)


@pytest.mark.some(3)
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


@pytest.mark.some(3)
@pytest.mark.slow
def test_videos_pictures_and_texts_in_the_same_steps_are_as_alone(pair: Any) -> None:
    _, path = pair
    with engine_of(path, chunked_prefill_size=7, page_size=4) as engine:
        alone = {name: ask(engine, name) for name in TEXTS}
        engine.flush_cache()
        text = [5, 17, 200, 301, 44, 9]
        params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        written: Any = engine.generate(input_ids=text, sampling_params=params)
        processors = engine._client.pictures.processors
        marks = {
            letter: engine.tokenizer.encode(processors[kind].mark, False)
            for letter, kind in (("P", "image"), ("V", "video"))
        }
        prompts = [
            [token for one in ids for token in (marks[one] if isinstance(one, str) else [one])]
            for ids, _, _ in TEXTS.values()
        ]
        found: Any = engine.generate(
            input_ids=[*prompts, text] * 2,
            image_data=[*([png(IMAGE)] if pictured else [] for _, _, pictured in TEXTS.values()), []] * 2,
            video_data=[*([FILES[number] for number in which] for _, which, _ in TEXTS.values()), []] * 2,
            sampling_params=params,
        )
        wanted = [*(answer["output_ids"] for answer in alone.values()), written["output_ids"]]
        assert [answer["output_ids"] for answer in found] == wanted * 2


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


def framed(name: str, theirs: Theirs, frames: list[Any]) -> torch.Tensor:
    """[frames, 3, side, side] of a clip of squares of the tower's side."""
    mean, std = CLIP_MEAN, CLIP_STD
    if name == "smolvlm":
        longest = theirs.processor.size["longest_edge"]
        frames = [frame.resize((longest, longest), 1).resize(frame.size, 1) for frame in frames]
        mean = std = (0.5, 0.5, 0.5)
    raw = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(0, 3, 1, 2)
    return (raw / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), [("internvl", "Frame1: "), ("smolvlm", "of {} frames from a 0:00:01 ")])
def test_frames_of_a_video_may_be_pictures_with_their_numbers(tmp_path: Any, name: str, said: str) -> None:
    """InternVL and SmolVLM: pictures and videos have one placeholder, in whatever order they come."""
    path = seeing_checkpoint(name, tmp_path)
    theirs = Theirs(name, path)
    with engine_of(path, chunked_prefill_size=9) as engine:
        size, token = theirs.model.config.vision_config.image_size, theirs.model.config.image_token_id
        size = size if isinstance(size, int) else size[0]
        clips = [[frame.resize((size, size), 3) for frame in frames] for frames in CLIPS]
        files = {"V": clip(clips[0]), "W": clip(clips[1])}
        shown = {letter: framed(name, theirs, frames) for letter, frames in zip("VW", clips, strict=True)}
        given = [[IMAGE]] if name == "smolvlm" else [IMAGE]
        shown["P"] = theirs.processor(images=given, return_tensors="pt").pixel_values.reshape(-1, 3, size, size)
        for order in ("V", "PV", "VP", "WPV"):
            text = " and ".join({"P": "<image>", "V": "<video>", "W": "<video>"}[one] for one in order)
            found: Any = engine.generate(
                text,
                image_data=[png(IMAGE)] if "P" in order else None,
                video_data=[{"data": files[one], "fps": FPS} for one in order if one != "P"],
                sampling_params={"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
                return_prompt_token_ids=True,
                return_logprob=True,
                logprob_start_len=0,
            )
            ids, told = found["meta_info"]["prompt_token_ids"], found["meta_info"]["input_token_logprobs"]
            prompt = engine.tokenizer.decode(ids)
            assert sum(prompt.count(said.format(word)) for word in ("six", "four")[: 2 if "{" in said else 1]) == len(
                order.replace("P", "")
            )
            pixels = torch.cat([shown[one] for one in order])
            inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels[None] if name == "smolvlm" else pixels}
            with torch.inference_mode():
                logits = theirs.model(**inputs).logits[0].float().log_softmax(-1)
                more = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                wanted = theirs.model.generate(**inputs, **more)[0, len(ids) :].tolist()
            worst = max(abs(told[at + 1][0] - float(logits[at, one])) for at, one in enumerate(ids[1:]))
            assert token in ids and worst < 1e-4, f"{order}: {worst}"
            assert found["output_ids"] == wanted


@dataclass
class Length:
    """Of a video, as much of it as processors choose frames by."""

    total: int
    fps: float
    wanted: Wanted = Wanted()


@pytest.mark.parametrize(("total", "fps"), [(1, 30.0), (5, 2.0), (47, 29.97), (300, 24.0), (9000, 25.0), (240, 0.5)])
@pytest.mark.parametrize("name", ["glm4v", "smolvlm"])
def test_frames_are_chosen_as_transformers_chooses_them(name: str, total: int, fps: float, tmp_path: Any) -> None:
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    config = describe(str(tiny_checkpoint(name, tmp_path))).config
    facts = Facts(config, SETTINGS_OF[name], lambda token: f"<|{token}|>", video={"num_frames": 64, "fps": 2})
    kind = glm4v.GlmVideos(facts) if name == "glm4v" else idefics3.TileVideos(facts)
    chooser: Any = Glm4vVideoProcessor if name == "glm4v" else SmolVLMVideoProcessor
    told = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
    wanted = chooser(num_frames=64, fps=2).sample_frames(told).tolist()
    assert kind._indices(cast("Film", Length(total, fps))) == wanted


def test_numbers_of_frames_are_told_in_words() -> None:
    wanted = {1: "one", 19: "nineteen", 20: "twenty", 64: "sixty-four", 100: "one hundred", 300: "three hundred"}
    assert {number: idefics3._in_words(number) for number in wanted} == wanted
    assert idefics3._in_words(768) == "seven hundred and sixty-eight"


def test_reading_a_video_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_video, "WHOLE_SECONDS", -1.0)
    with pytest.raises(BadRequest, match="takes more than") as error:
        Video(FILES[0], "here", Wanted())
    assert error.value.param == "here"


@pytest.mark.parametrize("data", [b"", b"#EXTM3U\nfile:///etc/passwd", FILES[0][:80], b"\x1aE\xdf\xa3" * 40])
def test_what_is_no_video_is_told(data: bytes) -> None:
    with pytest.raises(BadRequest, match=r"no video|broken|no frames"):
        Video(data, "here", Wanted())


def test_what_is_broken_is_told_without_the_decoder_s_calls() -> None:
    data = clip([picture(at, 32, 16) for at in range(12)], 25, "mp4", "mpeg4")
    with pytest.raises(BadRequest, match=r"the video is broken: [A-Z][\w ]+$"):
        Video(data[: len(data) // 2], "here", Wanted())


def test_stacked_experts_are_read_either_way_round(tmp_path: Any) -> None:
    """As transformers keeps them, and transposed as published checkpoints have them."""
    from model_support import PROMPT, close, edited
    from model_support import Engine as Steps

    path = seeing_checkpoint("qwen3_vl_moe", tmp_path / "made")

    def turned(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values.mT.contiguous() if ".experts." in name else values for name, values in stored.items()}

    close(Steps(edited(path, tmp_path / "turned", turned)).whole(PROMPT), Steps(path).whole(PROMPT))
