"""Speech to text over HTTP and in the process: a tiny random model, the openai client, what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engine_door import http_door
from speech_support import sound, tiny_whisper, wav

import phloem
from phloem.cli import transcribe
from phloem.core.errors import BadRequest
from phloem.server.multipart import form_of
from phloem.testing.checkpoints import tiny_checkpoint

LONG = wav(sound(3.5))
SHORT = wav(sound(0.4))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phloem.Engine]:
    path = tiny_whisper(tmp_path_factory.mktemp("whisper"))
    with phloem.Engine(
        model_path=str(path), served_model_name="tiny", debug_invariants=True, max_audio_seconds=20.0
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: phloem.Engine) -> Iterator[str]:
    with http_door(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, file: bytes | None = SHORT, route: str = "transcriptions", **fields: Any) -> httpx.Response:
    files = {} if file is None else {"file": ("a.wav", file)}
    return httpx.post(f"{url}/v1/audio/{route}", data=fields, files=files or {"none": b""}, timeout=60)


@pytest.mark.slow
def test_the_openai_client_gets_a_transcript(client: openai.OpenAI, engine: phloem.Engine) -> None:
    found = client.audio.transcriptions.create(
        model="tiny", file=("a.wav", LONG), language="de", temperature=0.3, extra_body={"seed": 3}
    )
    told = engine.transcribe(LONG, language="german", temperature=0.3, seed=3)
    assert found.text == told["text"]
    assert found.usage is not None and found.usage.type == "duration" and found.usage.seconds == 3.5
    assert told["language"] == "german" and told["duration"] == 3.5
    assert told["segments"] and [one["id"] for one in told["segments"]] == list(range(len(told["segments"])))
    assert all(0 <= one["start"] <= one["end"] for one in told["segments"])
    assert told["segments"][-1]["seek"] > 0  # more than one window was heard


@pytest.mark.slow
def test_every_format(client: openai.OpenAI, url: str) -> None:
    verbose = client.audio.transcriptions.create(
        model="tiny", file=("a.wav", LONG), response_format="verbose_json", timestamp_granularities=["segment"],
        language="en", temperature=0.3, extra_body={"seed": 5},
    )  # fmt: skip
    assert verbose.duration == 3.5 and verbose.language == "english" and verbose.segments
    kinds = {
        kind: post(url, LONG, response_format=kind, language="en", temperature=0.3, seed=5)
        for kind in ("text", "srt", "vtt")
    }
    assert kinds["text"].text == verbose.text + "\n"
    assert kinds["srt"].text.count(" --> ") == len(verbose.segments)
    assert kinds["vtt"].text.startswith("WEBVTT") and kinds["vtt"].headers["content-type"].startswith("text/vtt")


@pytest.mark.slow
def test_words_have_their_times(client: openai.OpenAI, url: str, engine: phloem.Engine) -> None:
    asked: dict[str, Any] = {"language": "en", "temperature": 0.3}
    create: Any = client.audio.transcriptions.create
    found: Any = None
    for grains in (["word"], ["word", "segment"]):
        found = create(
            model="tiny", file=("a.wav", LONG), response_format="verbose_json", timestamp_granularities=grains,
            **asked, extra_body={"seed": 5},
        )  # fmt: skip
        assert found.words and (found.segments is not None) == ("segment" in grains)
        assert "".join(word.word for word in found.words) == "".join(found.text.split())
        starts = [word.start for word in found.words]
        assert starts == sorted(starts) and starts[-1] > 1.0  # of several windows
        assert all(0 <= word.start <= word.end <= 3.5 for word in found.words)
    plain = engine.transcribe(LONG, seed=5, **asked)
    assert "words" not in plain and plain["text"] == found.text
    assert [one["text"] for one in plain["segments"]] == [one.text for one in found.segments or []]
    together = engine.transcribe(LONG, timestamp_granularities=["word"], chunking_strategy="auto", seed=5, **asked)
    assert together["words"]


def test_what_counts_as_silence_is_said_by_the_request(url: str) -> None:
    silent: dict[str, Any] = {
        "no_speech_threshold": 0,
        "logprob_threshold": 0,
        "temperature": 0.3,
        "seed": 1,
        "language": "en",
    }
    assert post(url, **silent).json()["text"] == ""
    silent["no_speech_threshold"] = 1
    assert post(url, **silent).json()["text"] != ""


@pytest.mark.slow
def test_sounds_of_a_few_samples_and_of_silence_have_no_words_or_some(engine: phloem.Engine) -> None:
    for samples in (sound(1 / 16_000) + 0.1, sound(0.01), sound(2.0) * 0):
        told = engine.transcribe(wav(samples), language="en", timestamp_granularities=["word"], seed=1)
        assert "".join(word["word"] for word in told["words"]) == "".join(told["text"].split())
        assert all(0 <= word["start"] <= word["end"] <= told["duration"] for word in told["words"])


@pytest.mark.slow
def test_a_stream_is_the_whole_text_in_pieces(client: openai.OpenAI, url: str) -> None:
    events = list(
        client.audio.transcriptions.create(
            model="tiny", file=("a.wav", LONG), stream=True, temperature=0.3, extra_body={"seed": 1}
        )
    )
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    last: Any = events[-1]
    assert last.type == "transcript.text.done" and last.usage.seconds == 3.5
    assert "".join(event.delta for event in events[:-1]) == last.text  # pyright: ignore[reportAttributeAccessIssue]
    assert last.text == post(url, LONG, temperature=0.3, seed=1).json()["text"]


@pytest.mark.slow
def test_translation_and_detection_of_the_language(url: str, engine: phloem.Engine) -> None:
    assert post(url, SHORT, "translations").json().keys() == {"text", "usage"}
    told = engine.transcribe(SHORT, task="translate", seed=2)
    assert (told["task"], told["language"]) == ("translate", "english")
    assert engine.transcribe(SHORT, seed=2)["language"] in ("english", "german")


@pytest.mark.slow
def test_the_same_audio_and_seed_give_the_same_text_whatever_runs_beside(engine: phloem.Engine) -> None:
    one = engine.transcribe(LONG, language="en", temperature=0.3, seed=7)
    together = engine.transcribe(LONG, language="en", temperature=0.3, seed=7, chunking_strategy="auto")
    assert engine.transcribe(LONG, language="en", temperature=0.3, seed=7) == one
    assert engine.transcribe(LONG, language="en", temperature=0.3, seed=7, chunking_strategy="auto") == together
    # Another sound under the same prompt: a prefix of the first would give its text.
    other = engine.transcribe(wav(sound(3.5, pitch=900.0)), language="en", temperature=0.3, seed=7)
    assert [one["segments"][0]["avg_logprob"]] != [other["segments"][0]["avg_logprob"]]


def test_a_prompt_changes_what_comes_and_a_very_long_one_is_cut(engine: phloem.Engine) -> None:
    plain = engine.transcribe(SHORT, language="en", temperature=0.3, seed=7)
    led = engine.transcribe(SHORT, language="en", temperature=0.3, seed=7, prompt="the lazy dog " * 200)
    assert [one["avg_logprob"] for one in led["segments"]] != [one["avg_logprob"] for one in plain["segments"]]


def test_progress_comes_to_the_end(engine: phloem.Engine) -> None:
    seen: list[tuple[float, float]] = []
    engine.transcribe(LONG, language="en", temperature=0.3, progress=lambda done, whole: seen.append((done, whole)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (3.5, 3.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"file": None}, "file"),
        ({"file": b""}, "file"),
        ({"file": b"no sound"}, "file"),
        ({"file": b"RIFF" + bytes(99)}, "file"),
        ({"file": wav(sound(0.1), 48_000, channels=20)}, "file"),
        ({"file": wav(sound(21.0, 4_000), 4_000)}, "file"),
        ({"language": "klingon"}, "language"),
        ({"temperature": "2"}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"response_format": "doc"}, "response_format"),
        ({"response_format": "srt", "stream": "true"}, "stream"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"response_format": "verbose_json", "timestamp_granularities[]": "letter"}, "timestamp_granularities[0]"),
        ({"timestamp_granularities[]": "segment"}, "timestamp_granularities"),
        ({"no_speech_threshold": "1.5"}, "no_speech_threshold"),
        ({"logprob_threshold": "0.1"}, "logprob_threshold"),
        ({"compression_ratio_threshold": "nan"}, "compression_ratio_threshold"),
        ({"colour": "green"}, "colour"),
        ({"chunking_strategy": "server_vad"}, "chunking_strategy"),
    ],
)
def test_what_cannot_be_served_names_its_field(url: str, fields: dict[str, Any], param: str) -> None:
    answer = post(url, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_bodies_that_are_no_forms_are_refused(url: str) -> None:
    to = f"{url}/v1/audio/transcriptions"
    for content, kind in (
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"--a\r\nbroken", "multipart/form-data; boundary=a"),
        (b"nothing", "multipart/form-data; boundary=a"),
    ):
        answer = httpx.post(to, content=content, headers={"content-type": kind})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_form", answer.text
    assert post(url, model="gpt-5").status_code == 404


def test_each_kind_of_model_tells_of_its_own_routes(url: str, tmp_path: Path) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat)
    assert answer.status_code == 400 and "/v1/audio/transcriptions" in answer.text
    assert httpx.post(f"{url}/generate", json={"text": "hello"}).json()["error"]["code"] == "wrong_task"
    with phloem.Engine(model_path=str(tiny_checkpoint("llama", tmp_path))) as text, pytest.raises(BadRequest) as told:
        text.transcribe(SHORT)
    assert "/v1/chat/completions" in told.value.message


@pytest.mark.slow
def test_the_command_writes_files(tmp_path: Path, engine: phloem.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    from phloem.cli import main

    (tmp_path / "one.wav").write_bytes(SHORT)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    model = ["--model-path", engine.config.model.model_path, "--language", "en", "--seed", "1"]
    files = [str(tmp_path / name) for name in ("one.wav", "bad.wav")]
    status = main(["transcribe", *files, *model, "--format", "verbose_json", "--output", str(tmp_path / "out")])
    assert status == 1 and "bad.wav: file: the file is of no known format" in capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "one.json").read_text())
    assert told["duration"] == 0.4 and told["text"] == engine.transcribe(SHORT, language="en", seed=1)["text"]
    assert main(["transcribe", files[0], *model, "--words", "--format", "json"]) == 0
    words = json.loads(capsys.readouterr().out)["words"]
    assert words == engine.transcribe(SHORT, language="en", seed=1, timestamp_granularities=["word"])["words"]
    with pytest.raises(BadRequest, match="--words"):
        transcribe.main([files[0], *model, "--words", "--translate"])


@pytest.mark.slow
def test_the_command_takes_directories_and_standard_input(
    tmp_path: Path, engine: phloem.Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "talks"
    (folder / "within.wav").mkdir(parents=True)
    for name in ("b.wav", "a.WAV", "notes.txt"):
        (folder / name).write_bytes(SHORT)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(SHORT)))
    model = ["--model-path", engine.config.model.model_path, "--language", "en", "--seed", "1"]
    assert transcribe.main([str(folder), "-", *model, "--output", str(tmp_path / "out")]) == 0
    told = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert set(told) == {"a.txt", "b.txt", "stdin.txt"}
    assert set(told.values()) == {engine.transcribe(SHORT, language="en", seed=1)["text"] + "\n"}


def test_a_directory_without_sounds_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no sound file is in this directory"):
        transcribe.main([str(tmp_path), "--model", str(tmp_path / "none")])


def test_words_in_every_format() -> None:
    one, two = {"word": "ab", "start": 0.0, "end": 0.5}, {"word": "c", "start": 1.25, "end": 2.0}
    answer = {"text": "ab c", "words": [one, two], "segments": [{"start": 0.0, "end": 2.0, "text": " ab c"}]}
    assert transcribe._as(answer, "text", True) == "0.00\t0.50\tab\n1.25\t2.00\tc\n"
    assert transcribe._as(answer, "text", False) == "ab c\n"
    assert transcribe._as(answer, "srt", True).count(" --> ") == 2
    assert transcribe._as(answer, "vtt", False).count(" --> ") == 1
    assert json.loads(transcribe._as(answer, "json", True)) == {"text": "ab c", "words": [one, two]}


# forms


def form(*parts: tuple[str, bytes]) -> bytes:
    head = b"--b\r\nContent-Disposition: form-data; name="
    return b"".join(head + name.encode() + b"\r\n\r\n" + data + b"\r\n" for name, data in parts) + b"--b--\r\n"


def read(body: bytes, kind: str = "multipart/form-data; boundary=b") -> dict[str, Any]:
    return form_of(body, kind, frozenset({"file"}), frozenset({"many"}))


def test_a_form_keeps_bytes_text_and_lists_apart() -> None:
    data = bytes(range(256)) + b"\r\n--no boundary\r\n\r\n"
    body = form(('"file"; filename="a;b.wav"', data), ('"model"', b"tiny"), ('"many[]"', b"1"), ("many", b"2"))
    assert read(body) == {"file": data, "model": "tiny", "many": ["1", "2"]}
    assert read(form(('"model"', b"")), 'multipart/form-data; boundary="b"') == {}
    assert read(b"a preamble\r\n" + form(('"x"', "é".encode()))) == {"x": "é"}


@pytest.mark.parametrize(
    "body",
    [
        form(('"x"', b"1"), ('"x"', b"2")),
        form(('"x"', b"\xff")),
        form(*[(f'"{n}"', b"1") for n in range(200)]),
        b"--b\r\nContent-Type: text/plain\r\n\r\n1\r\n--b--\r\n",
        form(('"x"', b"1"))[:-12],
        b"--b",
        b"",
    ],
)
def test_forms_that_are_broken_are_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read(body)


def test_transcripts_that_would_have_one_name_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"b/talk.mp3 would be written to one file"):
        transcribe.main(["a/talk.wav", "b/talk.mp3", "--model", str(tmp_path / "none"), "--output", str(tmp_path)])
