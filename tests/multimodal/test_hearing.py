"""Families that hear, against transformers: sounds anywhere, in chunks, from the prefix tree, beside text rows."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speech_support import sound, wav
from test_doors import door, user
from vision_support import FPS, WATCHED, clip, patches_of, picture, png
from vision_support import SETTINGS as SEEING

from phloem.core.errors import BadRequest
from phloem.llm import Engine
from phloem.multimodal._audio import decode
from phloem.multimodal._video import Video, Wanted
from phloem.testing.checkpoints import tiny_checkpoint

# Of whole states and not, of a whole window, and of the fewest samples that make a token.
SOUNDS = [wav(sound(seconds, pitch=pitch)) for seconds, pitch in ((0.5, 440), (0.337, 880), (1.0, 300), (0.03, 700))]
# Of Qwen3-Omni a second or more: what a shorter one becomes there depends on a longer one beside it.
LONGER = [wav(sound(seconds, pitch=pitch)) for seconds, pitch in ((2.5, 440), (1.337, 880), (3.0, 300), (1.03, 700))]
TEXTS = {
    "none": ([5, 17, 200, 301, 44, 9], []),
    "one": ([5, 17, 200, "S", 301, 44, 9, 12], [0]),
    "first": (["S", 301, 44, 9, 12], [1]),
    "two": ([5, "S", 200, 3, 70, "S", 99, 98, 97], [0, 3]),
    "three": ([5, "S", 3, "S", 200, 70, "S", 99], [2, 0, 2]),
}
SETTINGS: dict[str, Any] = {"ops": "reference", "dtype": "float32", "max_total_tokens": 4096, "threads": 1}
MARK = 8


def sounds_of(name: str) -> list[bytes]:
    return LONGER if name.startswith("qwen3") else SOUNDS


class Theirs:
    """transformers' model and feature extractor."""

    def __init__(self, path: Path) -> None:
        import transformers

        self.model: Any = transformers.AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32).eval()
        # Qwen2-Audio hears a second here; behind the longest sound for Omni there is silence.
        self.name = self.model.config.model_type
        seconds = 1 if self.name == "qwen2_audio" else 4
        self.sounds = sounds_of(self.name)
        self.extract: Any = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)

    def inputs(self, ids: list[int], which: list[int]) -> dict[str, Any]:
        found: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        if which and self.name.startswith("qwen3"):
            # Each as long as it is.
            asked: dict[str, Any] = {"padding": False, "return_attention_mask": True, "return_tensors": "pt"}
            each = [self.extract(decode(self.sounds[number], 10), sampling_rate=16_000, **asked) for number in which]
            pad = torch.nn.utils.rnn.pad_sequence
            features = pad([one.input_features[0].T for one in each], batch_first=True).transpose(1, 2)
            mask = pad([torch.ones(one.input_features.shape[2]).long() for one in each], batch_first=True)
            found |= {"input_features": features, "feature_attention_mask": mask}
        elif which:
            samples = [decode(self.sounds[number], 10) for number in which]
            made = self.extract(
                samples, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt"
            )
            found |= {"input_features": made.input_features, "feature_attention_mask": made.attention_mask}
        return found

    def logits(self, ids: list[int], which: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(**self.inputs(ids, which)).logits[0].float()

    def greedy(self, ids: list[int], which: list[int], count: int = 8) -> list[int]:
        plain = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            return self.model.generate(**self.inputs(ids, which), **plain)[0, len(ids) :].tolist()


@pytest.fixture(scope="module", params=["qwen2_audio", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def pair(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Theirs, Path]]:
    torch.set_num_threads(1)
    path = tiny_checkpoint(request.param, tmp_path_factory.mktemp("hearing"))
    yield Theirs(path), path


def ask(engine: Engine, name: str, which: list[int] | None = None, **more: Any) -> dict[str, Any]:
    ids, own = TEXTS[name]
    found: Any = engine.generate(
        input_ids=[MARK if token == "S" else token for token in ids],
        audio_data=[sounds_of(engine._client.info.model_type)[at] for at in (own if which is None else which)],
        sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        return_prompt_token_ids=True,
        **more,
    )
    return found


@pytest.mark.some(3)
@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 3, "max_running_requests": 2, "page_size": 4}])
def test_logits_and_greedy_text_are_those_of_transformers(pair: Any, settings: dict[str, Any]) -> None:
    theirs, path = pair
    with Engine(model_path=str(path), debug_invariants=True, **SETTINGS, **settings) as engine:
        for name, (_, which) in TEXTS.items():
            found = ask(engine, name, return_logprob=True, logprob_start_len=0)
            ids, told = found["meta_info"]["prompt_token_ids"], found["meta_info"]["input_token_logprobs"]
            logits = theirs.logits(ids, which).log_softmax(-1)
            rows = zip(told[1:], ids[1:], strict=True)
            worst = max(abs(entry[0] - float(logits[at, token])) for at, (entry, token) in enumerate(rows))
            assert worst < 1e-4, f"{name}: {worst}"
            assert found["output_ids"] == theirs.greedy(ids, which)


@pytest.mark.slow
def test_sounds_are_found_by_content_and_many_at_once_are_as_alone(pair: Any) -> None:
    theirs, path = pair
    with Engine(model_path=str(path), page_size=1, debug_invariants=True, **SETTINGS) as engine:
        first, again = ask(engine, "one"), ask(engine, "one")
        ids = first["meta_info"]["prompt_token_ids"]
        assert again["meta_info"]["cached_tokens"] == len(ids) - 1
        other = ask(engine, "one", [1])
        assert other["meta_info"]["cached_tokens"] == 3
        assert other["output_ids"] == theirs.greedy(other["meta_info"]["prompt_token_ids"], [1])
        state = engine.get_server_info()["internal_states"][0]
        assert (state["pictures_encoded"], state["pictures_found"]) == (2, 0)
        alone = {name: ask(engine, name)["output_ids"] for name in TEXTS}
        engine.flush_cache()
        names = [*TEXTS] * 2
        found: Any = engine.generate(
            input_ids=[[MARK if token == "S" else token for token in TEXTS[name][0]] for name in names],
            audio_data=[[theirs.sounds[number] for number in TEXTS[name][1]] for name in names],
            sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        )
        assert [one["output_ids"] for one in found] == [alone[name] for name in names]


BAD = {
    "nothing": (b"", "the file is empty"),
    "text": (b"hello, this is no sound", "no known format"),
    "too long": (wav(sound(1.2)), "hears 1 s at a time"),
    "too short": (wav(sound(0.001)), "too short"),
    "no samples": (wav(np.zeros(0, np.float32)), "too short"),
    "cut": (SOUNDS[0][:30], "cannot be decoded"),
}


def test_sounds_through_the_doors_and_what_is_refused(pair: Any) -> None:
    theirs, path = pair
    data = base64.b64encode(SOUNDS[0]).decode()
    short = {"temperature": 0, "max_tokens": 4}

    def heard(given: str, kind: str = "wav") -> dict[str, Any]:
        return {"type": "input_audio", "input_audio": {"data": given, "format": kind}}

    async def run() -> None:
        async with door(path) as http:
            parts = (heard(data), {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}})
            answers = [
                (await http.post("/v1/chat/completions", json={"messages": user(part, "What?"), **short})).json()
                for part in parts
            ]
            text = "<|im_start|>user\n<sound>What?<|im_end|>\n<|im_start|>assistant\n"
            native: dict[str, Any] = {"text": text, "audio_data": data}
            native["sampling_params"] = {"temperature": 0, "max_new_tokens": 4}
            answer = (await http.post("/generate", json=native)).json()
            assert {one["choices"][0]["message"]["content"] for one in answers} == {answer["text"]}
            tokens = answers[0]["usage"]["prompt_tokens"]
            assert answer["meta_info"]["cached_tokens"] == tokens - 1
            mine = [heard(data), {"type": "input_file", "file_data": f"data:audio/wav;base64,{data}"}]
            for part in mine:
                given = {"input": [{"role": "user", "content": [part, {"type": "input_text", "text": "What?"}]}]}
                given |= {"temperature": 0, "max_output_tokens": 4}
                response = (await http.post("/v1/responses", json=given)).json()
                assert response["output"][0]["content"][0]["text"] == answer["text"]
                assert response["usage"]["input_tokens"] == tokens
            spelled = await http.post("/tokenize", json={"messages": user(heard(data), "What?")})
            assert spelled.json()["count"] == tokens
            assert (await http.get("/model_info")).json()["has_audio_understanding"] is True
            for name, (bad, said) in BAD.items():
                if name == "too long" and theirs.name != "qwen2_audio":
                    continue  # it hears any length
                part = heard(base64.b64encode(bad).decode() or " ")
                found = await http.post("/v1/chat/completions", json={"messages": user("a", part), **short})
                assert found.status_code == 400, (name, found.text)
                error = found.json()["error"]
                assert said in error["message"], error
                assert error["param"] == "messages[0].content[1].input_audio.data", error
            image = {"type": "image_url", "image_url": {"url": "%"}}
            found = await http.post("/v1/chat/completions", json={"messages": user("a", image), **short})
            said = "takes no pictures" if theirs.name == "qwen2_audio" else "no valid base64"
            assert said in found.json()["error"]["message"]
            for given in ("http://127.0.0.1/a.wav", "file:///etc/passwd", "%%%"):
                part = {"type": "audio_url", "audio_url": {"url": given}}
                found = await http.post("/v1/chat/completions", json={"messages": user("a", part), **short})
                assert found.status_code == 400, given

    asyncio.run(run())


def test_a_sound_in_python_is_named_by_its_field(pair: Any) -> None:
    _, path = pair
    with Engine(model_path=str(path), **SETTINGS) as engine, pytest.raises(BadRequest) as told:
        engine.generate("<sound>", audio_data=b"nothing")
    assert told.value.param == "audio_data"


@pytest.fixture(scope="module", params=["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def omni(request: Any, tmp_path_factory: Any) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("omni"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 5, "page_size": 4}])
def test_pictures_videos_and_sounds_in_one_prompt(omni: Path, settings: dict[str, Any]) -> None:
    """Places in time, height and width go on behind each of them; a sound's are those of a text."""
    from transformers import Qwen2VLImageProcessorPil

    frames = [picture(at, 32, 16) for at in range(6)]
    image = picture(3, 24, 16)
    for file, config in (("preprocessor_config.json", SEEING["qwen2_vl"]), ("video_preprocessor_config.json", WATCHED)):
        (omni / file).write_text(json.dumps({**config, "size": {"shortest_edge": 64, "longest_edge": 1 << 14}}))
    orders = [[5, 13, "S", 14, 3, 4, "P", 200], [4, "V", 5, 13, "S", 14, 7 * 11], [4, "P", 5, 4, "V", 5, 13, "S", 14]]
    marks = {"P": 6, "V": 7, "S": MARK}
    theirs = Theirs(omni)
    with Engine(model_path=str(omni), debug_invariants=True, **SETTINGS, **settings) as engine:
        for order in orders:
            found: Any = engine.generate(
                input_ids=[marks[one] if isinstance(one, str) else one for one in order],
                image_data=[png(image)] if "P" in order else None,
                video_data=[clip(frames)] if "V" in order else None,
                audio_data=[theirs.sounds[0]],
                sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
                return_logprob=True,
                logprob_start_len=0,
                return_prompt_token_ids=True,
            )
            ids = found["meta_info"]["prompt_token_ids"]
            inputs = theirs.inputs(ids, [0])
            if "P" in order:
                kept = {k: v for k, v in SEEING["qwen2_vl"].items() if k != "image_processor_type"}
                inputs |= dict(Qwen2VLImageProcessorPil(**kept)(images=[image], return_tensors="pt"))
            if "V" in order:
                values, grid = patches_of(frames)
                inputs |= {"pixel_values_videos": values, "video_grid_thw": torch.tensor([grid])}
                inputs["video_second_per_grid"] = torch.tensor([2 / FPS])
            with torch.inference_mode():
                logits = theirs.model(**inputs).logits[0].float().log_softmax(-1)
                plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                wanted = theirs.model.generate(**inputs, **plain)[0, len(ids) :].tolist()
            told = found["meta_info"]["input_token_logprobs"]
            worst = max(abs(told[at + 1][0] - float(logits[at, token])) for at, token in enumerate(ids[1:]))
            assert worst < 1e-4, f"{order}: {worst}"
            assert found["output_ids"] == wanted


def talking(frames: list[Any], samples: np.ndarray[Any, Any]) -> bytes:
    """A video with a sound track, without loss."""
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        seen: Any = file.add_stream("ffv1", rate=FPS)
        seen.width, seen.height = frames[0].size
        seen.pix_fmt = "bgr0"
        heard: Any = file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for frame in frames:
            file.mux(seen.encode(av.VideoFrame.from_image(frame)))
        file.mux(seen.encode())
        made = av.AudioFrame.from_ndarray((samples * 32767).astype("<i2")[None], format="s16", layout="mono")
        made.sample_rate = 16_000
        file.mux(heard.encode(made))
        file.mux(heard.encode())
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("longer", [False, True])
def test_the_sound_of_a_video_lies_among_its_frames(omni: Path, longer: bool) -> None:
    """Shorter than the video, and longer; by time (Qwen3), or by chunks of two seconds (Qwen2.5)."""
    theirs = Theirs(omni)
    third = theirs.name.startswith("qwen3")
    frames, samples = [picture(at, 32, 16) for at in range(30)], sound(3.2 if longer else 1.2 if third else 0.5)
    data = talking(frames, samples)
    size = {"shortest_edge": 64, "longest_edge": 1 << 14}
    for file, config in (("preprocessor_config.json", SEEING["qwen2_vl"]), ("video_preprocessor_config.json", WATCHED)):
        (omni / file).write_text(json.dumps({**config, "size": size}))
    plain: dict[str, Any] = {"sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
    plain |= {"return_logprob": True, "logprob_start_len": 0, "return_prompt_token_ids": True}
    with Engine(model_path=str(omni), debug_invariants=True, chunked_prefill_size=7, **SETTINGS) as engine:
        order = [9, 4, 7, 5, 200, 11]
        ways: list[dict[str, Any]] = [{"use_audio_in_video": True}]
        for fields in (*ways, {"mm_processor_kwargs": ways[0]}):
            found: Any = engine.generate(input_ids=order, video_data=[data], **plain, **fields)
            ids, told = found["meta_info"]["prompt_token_ids"], found["meta_info"]["input_token_logprobs"]
        silent: Any = engine.generate(input_ids=order, video_data=[data], **plain)
        both: Any = engine.generate(
            input_ids=[13, MARK, 14, *order], video_data=[data], audio_data=[theirs.sounds[0]], use_audio_in_video=True,
            **plain,
        )  # fmt: skip
    assert silent["meta_info"]["prompt_token_ids"] == [9, 4, *[7] * 120, 5, 200, 11]
    theirs.sounds = [*theirs.sounds, wav(samples)]
    # With Qwen2.5 all sounds are of videos there, or none is.
    for answer, which in ((found, [4]), (both, [0, 4])) if third else ((found, [4]),):
        ids, told = answer["meta_info"]["prompt_token_ids"], answer["meta_info"]["input_token_logprobs"]
        inputs = theirs.inputs(ids, which)
        values, grid = patches_of(frames)
        inputs |= {"pixel_values_videos": values, "video_grid_thw": torch.tensor([grid])}
        inputs |= {"video_second_per_grid": torch.tensor([2 / FPS]), "use_audio_in_video": True}
        with torch.inference_mode():
            logits = theirs.model(**inputs).logits[0].float().log_softmax(-1)
            more = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            wanted = theirs.model.generate(**inputs, **more)[0, len(ids) :].tolist()
        worst = max(abs(told[at + 1][0] - float(logits[at, token])) for at, token in enumerate(ids[1:]))
        assert worst < 1e-4, worst
        assert answer["output_ids"] == wanted


def test_a_sound_as_long_as_is_allowed_is_heard() -> None:
    """The resampler's end brings nothing more, which counts as nothing."""
    video = Video(talking([picture(1, 32, 16)] * 4, sound(0.5)), "video", Wanted())
    assert len(video.sound(0.5)) == 8000
    with pytest.raises(BadRequest, match=r"longer than 0\.4 s"):
        video.sound(0.4)


def test_what_a_video_with_its_sound_must_have(omni: Path) -> None:
    mute, heard = clip([picture(at, 32, 16) for at in range(4)]), dict[str, Any](use_audio_in_video=True)
    with Engine(model_path=str(omni), **SETTINGS) as engine:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"video_data": [mute], **heard}, "video_data[0]"),
            ({"video_data": [mute], "mm_processor_kwargs": {"use_audio_in_video": "yes"}}, "mm_processor_kwargs."),
            ({"video_data": [talking([picture(1, 32, 16)] * 4, sound(0.001))], **heard}, "video_data[0]"),
        ]
        for fields, param in cases:
            with pytest.raises(BadRequest) as told:
                engine.generate("<video>", **fields)
            assert told.value.param is not None and told.value.param.startswith(param)
        answer: Any = engine.generate("hello", sampling_params={"max_new_tokens": 1}, **heard)
        assert answer["meta_info"]["completion_tokens"] == 1


def test_a_whole_omni_is_served_by_its_thinker(omni: Path, tmp_path: Path) -> None:
    """As published: the thinker's settings and tensors inside those of a model that speaks."""
    from safetensors.torch import load_file, save_file

    for file in omni.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    inner = json.loads((omni / "config.json").read_text())
    kind = inner["model_type"].removesuffix("_thinker")
    whole = {"architectures": ["OmniModel"], "model_type": kind, "talker_config": {"vocab_size": 3}}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "thinker_config": inner}))
    stored = {f"thinker.{name}": values for name, values in load_file(omni / "model.safetensors").items()}
    save_file({**stored, "talker.model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    answers: list[Any] = []
    for path in (omni, tmp_path):
        with Engine(model_path=str(path), **SETTINGS) as engine:
            answers.append(ask(engine, "two")["output_ids"])
    assert answers[0] == answers[1]
