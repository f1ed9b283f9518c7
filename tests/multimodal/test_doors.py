"""Pictures through every door of a server, and what is refused there."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from vision_support import clip, pdf, picture, png, seeing_checkpoint

from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.errors import BadRequest, ConfigError
from phloem.core.messages import Drain
from phloem.launch.thread import EngineThread
from phloem.multimodal import _pages, _reader
from phloem.multimodal._pages import Document
from phloem.server.app import create_app
from phloem.testing.checkpoints import tiny_checkpoint

PNG = png(picture(1, 24, 16))
OTHER = png(picture(2, 32, 40))
SETTINGS = {"ops": "reference", "dtype": "float32", "max_total_tokens": 4096, "threads": 1, "log_level": "error"}
SHORT = {"temperature": 0, "max_tokens": 4}


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    made = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": made}]


def image(data: bytes | str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else uri(data), "detail": "low"}}


@asynccontextmanager
async def door(path: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = Config.from_flat({**SETTINGS, "model_path": str(path), "page_size": 1, **settings})
    client, info, checkpoint = make_client(config)
    link = EngineThread(config, checkpoint)
    client.attach(link)
    client.start()
    transport = httpx.ASGITransport(create_app(client, config, info), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door", timeout=60) as http:
        await client.wait_ready()
        yield http
    link.send(Drain(timeout=0.0))
    await asyncio.to_thread(link.close)
    await client.close()


@pytest.fixture(scope="module")
def sees(tmp_path_factory: Any) -> Path:
    return seeing_checkpoint("qwen2_vl", tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: Any) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("blind"))


def test_the_doors_show_the_model_the_same(sees: Path) -> None:
    """One question about two pictures, asked in every way: the same prompt, the same answer, from the cache."""

    async def run() -> None:
        async with door(sees) as http:
            asked = user("What is ", image(PNG), " beside ", image(OTHER), "?")
            chat = (await http.post("/v1/chat/completions", json={"messages": asked, **SHORT})).json()
            text = chat["choices"][0]["message"]["content"]
            tokens = chat["usage"]["prompt_tokens"]
            assert tokens > 20
            blocks = [
                {"type": "text", "text": "What is "},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": uri(PNG)[22:]}},
                {"type": "text", "text": " beside "},
                {"type": "image", "source": {"type": "url", "url": uri(OTHER)}},
                {"type": "text", "text": "?"},
            ]
            body = {"model": "default", "messages": [{"role": "user", "content": blocks}], **SHORT}
            message = (await http.post("/v1/messages", json=body)).json()
            assert message["content"][0]["text"] == text
            usage = message["usage"]
            assert usage["input_tokens"] + usage.get("cache_read_input_tokens", 0) == tokens
            assert usage["cache_read_input_tokens"] == tokens - 1
            del body["max_tokens"], body["temperature"]
            assert (await http.post("/v1/messages/count_tokens", json=body)).json()["input_tokens"] == tokens
            spelled = (await http.post("/tokenize", json={"messages": asked})).json()
            assert spelled["count"] == len(spelled["tokens"]) == tokens
            parts = [
                {"type": "input_text", "text": "What is "},
                {"type": "input_image", "image_url": uri(PNG)},
                {"type": "input_text", "text": " beside "},
                {"type": "input_image", "image_url": uri(OTHER), "detail": "auto"},
                {"type": "input_text", "text": "?"},
            ]
            given = {"input": [{"role": "user", "content": parts}], "temperature": 0, "max_output_tokens": 4}
            response = (await http.post("/v1/responses", json=given)).json()
            assert response["output"][0]["content"][0]["text"] == text
            assert response["usage"]["input_tokens"] == tokens
            again = {"input": "And?", "previous_response_id": response["id"], "temperature": 0, "max_output_tokens": 4}
            follow = (await http.post("/v1/responses", json=again)).json()
            assert follow["usage"]["input_tokens_details"]["cached_tokens"] >= tokens - 1
            native = {
                "text": "<|im_start|>user\nWhat is <image> beside <image>?<|im_end|>\n<|im_start|>assistant\n",
                "image_data": [uri(PNG), {"url": uri(OTHER)}],
                "sampling_params": {"temperature": 0, "max_new_tokens": 4},
            }
            answer = (await http.post("/generate", json=native)).json()
            assert answer["text"] == text
            assert answer["meta_info"]["cached_tokens"] == tokens - 1
            metrics = (await http.get("/metrics")).text
            assert "phloem:pictures_encoded_total" in metrics
            assert (await http.get("/model_info")).json()["has_image_understanding"] is True

    asyncio.run(run())


BAD = [
    (image("data:image/png;base64,%%%"), "base64"),
    (image("data:image/png;base64,aGVsbG8="), "no picture of a known kind"),
    (image(uri(PNG[:60])), "broken"),
    (image("http://127.0.0.1/a.png"), "not fetched here"),
    (image("file:///etc/passwd"), "files are not read"),
    (image("ftp://a/b.png"), "unknown kind of address"),
    (image(""), "expected an address"),
    ({"type": "image_url"}, "is missing"),
    ({"type": "audio_url", "audio_url": {"url": "x"}}, "takes no sounds"),
    ({"type": "video_url", "video_url": {"url": "x"}}, "no valid base64"),
    ({"type": "video_url", "video_url": {"url": uri(PNG)}}, "no video of a known kind"),
    ({"type": "video_url", "video_url": {"url": uri(b"GIF89a" + bytes(9))}}, "the video is broken"),
    ({"type": "video_url", "video_url": {"url": "x", "fps": -1}}, "fps must be"),
    ({"type": "video_url", "video_url": {"url": "x", "num_frames": 1 << 40}}, "num_frames must be"),
    ({"type": "file", "file": {"file_id": "file-1"}}, "files are not kept here"),
    ({"type": "file", "file": {"file_data": uri(PNG).replace("image/png", "text/plain")}}, "no PDF document"),
    ({"type": "file", "file": {"file_data": uri(PNG[:60])}}, "broken"),
]


def test_bad_pictures_are_400_with_their_field(sees: Path) -> None:
    async def run() -> None:
        async with door(sees, limit_mm_data_per_request='{"image": 2}') as http:
            for part, said in BAD:
                found = await http.post("/v1/chat/completions", json={"messages": user("a", part), **SHORT})
                assert found.status_code == 400, (part, found.text)
                error = found.json()["error"]
                assert said in error["message"], error
                assert error["param"].startswith("messages[0].content[1]"), error
            many = await http.post("/v1/chat/completions", json={"messages": user(*[image(PNG)] * 3), **SHORT})
            assert many.status_code == 400
            assert "limit-mm-data-per-request" in many.json()["error"]["message"]
            places = await http.post("/generate", json={"text": "no place", "image_data": uri(PNG)})
            assert places.status_code == 400
            assert "0 places" in places.text
            faked = await http.post("/v1/chat/completions", json={"messages": user("<image>", image(PNG)), **SHORT})
            assert faked.status_code == 400
            assert (
                await http.post("/v1/chat/completions", json={"messages": user("well"), **SHORT})
            ).status_code == 200

    asyncio.run(run())


def test_a_jpeg_in_base64_is_no_path_at_any_door(sees: Path) -> None:
    buffer = io.BytesIO()
    picture(1, 24, 16).save(buffer, "JPEG")
    data = base64.b64encode(buffer.getvalue()).decode()

    def message(text: str) -> dict[str, Any]:
        block = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": text}}
        return {"model": "default", "messages": [{"role": "user", "content": [block]}], **SHORT}

    async def run() -> None:
        async with door(sees, enable_mm_urls=True) as http:
            assert (await http.post("/v1/messages", json=message(data))).status_code == 200
            asked = {"text": "a <image>", "image_data": data, "sampling_params": {"max_new_tokens": 2}}
            assert (await http.post("/generate", json=asked)).status_code == 200
            for other in ("http://8.8.8.8/a.jpg", f"data:image/jpeg;base64,{data}", "/etc/passwd"):
                found = await http.post("/v1/messages", json=message(other))
                assert found.status_code == 400 and "no valid base64" in found.text

    asyncio.run(run())


def test_the_code_of_a_fetch_that_failed_says_what_was_asked_for(sees: Path) -> None:
    async def run() -> None:
        async with door(sees, enable_mm_urls=True) as http:
            for kind in ("image", "video"):
                part = {"type": f"{kind}_url", f"{kind}_url": {"url": "http://user@8.8.8.8/a"}}
                found = await http.post("/v1/chat/completions", json={"messages": user(part), **SHORT})
                assert (found.status_code, found.json()["error"]["code"]) == (400, f"bad_{kind}")

    asyncio.run(run())


def test_a_tool_may_answer_with_a_picture(sees: Path) -> None:
    """Also where the template knows no tools, and their results are spelled."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "here: "}, image(PNG)]
    chat = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": parts, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": parts},
    ]
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "look"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": uri(PNG)}]},
    ]

    async def run() -> None:
        async with door(sees) as http:
            found = await http.post("/v1/chat/completions", json={"messages": chat, **SHORT})
            assert found.status_code == 200, found.text
            found = await http.post("/v1/responses", json={"input": items, "max_output_tokens": 2})
            assert found.status_code == 200, found.text
            items[2]["output"] = [{"type": "input_image", "image_url": "%"}]
            found = await http.post("/v1/responses", json={"input": items})
            assert (found.status_code, found.json()["error"]["param"]) == (400, "input[2].output[0].image_url")

    asyncio.run(run())


def test_a_slow_address_keeps_no_picture_waiting_that_is_here(sees: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More addresses than there are threads of either kind."""
    answers = threading.Event()

    def slow(source: str, where: str, rules: Any) -> bytes:
        answers.wait(20)
        return PNG

    async def run() -> None:
        async with door(sees, enable_mm_urls=True) as http:
            monkeypatch.setattr(_reader, "fetch", slow)
            asked = user(*[image(f"http://8.8.8.8/{number}.png") for number in range(12)])
            waiting = asyncio.create_task(http.post("/v1/chat/completions", json={"messages": asked, **SHORT}))
            await asyncio.sleep(0.1)
            monkeypatch.undo()
            quick = await http.post("/v1/chat/completions", json={"messages": user(image(PNG)), **SHORT})
            assert quick.status_code == 200 and not waiting.done()
            answers.set()
            assert (await waiting).status_code == 200

    asyncio.run(run())


@pytest.mark.slow
def test_videos_and_documents_at_every_door(sees: Path) -> None:
    """A video in chat and beside a text; a PDF's pages are so many pictures in a row, whoever sends it."""
    film = uri(clip([picture(at, 24, 16) for at in range(4)]))
    paper = uri(pdf([(72, 36), (36, 72)]))
    data = paper.partition(",")[2]
    source = {"type": "base64", "media_type": "application/pdf", "data": data}

    def prompt_tokens(body: Any) -> int:
        usage = body["usage"]
        return usage.get("prompt_tokens") or usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)

    async def run() -> None:
        async with door(sees) as http:
            seen = {"type": "video_url", "video_url": {"url": film, "fps": 4}}
            chat = (await http.post("/v1/chat/completions", json={"messages": user(seen, "What?"), **SHORT})).json()
            text = "<|im_start|>user\n<|vision_start|><video><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
            native = {"text": text, "video_data": {"url": film, "num_frames": 4}}
            native["sampling_params"] = {"temperature": 0, "max_new_tokens": 4}
            answer = (await http.post("/generate", json=native)).json()
            assert answer["text"] == chat["choices"][0]["message"]["content"]
            assert answer["meta_info"]["cached_tokens"] == chat["usage"]["prompt_tokens"] - 1
            file = {"type": "file", "file": {"file_data": paper, "filename": "a.pdf"}}
            found = (await http.post("/v1/chat/completions", json={"messages": user(file, "What?"), **SHORT})).json()
            told = found["choices"][0]["message"]["content"]
            block = {"type": "document", "source": source}
            note = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "What?"}}
            body = {"model": "default", "messages": [{"role": "user", "content": [block, note]}], **SHORT}
            message = (await http.post("/v1/messages", json=body)).json()
            assert message["content"][0]["text"] == told
            assert prompt_tokens(message) == prompt_tokens(found)
            parts = [{"type": "input_file", "file_data": paper}, {"type": "input_text", "text": "What?"}]
            given = {"input": [{"role": "user", "content": parts}], "temperature": 0, "max_output_tokens": 4}
            response = (await http.post("/v1/responses", json=given)).json()
            assert response["output"][0]["content"][0]["text"] == told
            assert response["usage"]["input_tokens"] == prompt_tokens(found)
            mp4 = film.replace("image/png", "video/mp4")
            films: list[dict[str, Any]] = [
                {"type": "input_video", "video_url": {"url": film, "fps": 4}},
                {"type": "input_video", "video_url": film, "fps": 4},
                {"type": "video_url", "video_url": film},
                {"type": "input_file", "file_data": mp4},
                {"type": "input_file", "file_data": film.partition(",")[2], "filename": "a.mp4"},
            ]
            for part in films:
                given["input"] = [{"role": "user", "content": [part, {"type": "input_text", "text": "What?"}]}]
                response = (await http.post("/v1/responses", json=given)).json()
                # Frames that nobody asks for otherwise are two a second: of one second two.
                assert response["usage"]["input_tokens"] <= prompt_tokens(chat), part
                assert part not in films[:2] or response["output"][0]["content"][0]["text"] == answer["text"]
            seen = {"type": "file", "file": {"file_data": mp4}}
            again = (await http.post("/v1/chat/completions", json={"messages": user(seen, "What?"), **SHORT})).json()
            assert again["choices"][0]["message"]["content"] == response["output"][0]["content"][0]["text"]

    asyncio.run(run())


BAD_ITEMS: list[tuple[dict[str, Any], str]] = [
    ({"type": "input_video"}, "video_url"),
    ({"type": "input_video", "video_url": 5}, "video_url"),
    ({"type": "input_video", "video_url": {"url": "data:video/mp4;base64,AAAA", "fps": 0}}, "video_url.fps"),
    ({"type": "input_video", "video_url": "data:video/mp4;base64,AAAA"}, "video_url"),
    ({"type": "input_video", "video_url": "data:video/mp4;base64,AAAA", "num_frames": "2"}, "video_url.num_frames"),
    ({"type": "input_video", "video_url": "http://192.0.2.1/a.mp4"}, "video_url"),
    ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data"),
    ({"type": "input_audio", "input_audio": "UklGRg=="}, "input_audio.data"),
    ({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}, "input_audio.data"),
    ({"type": "input_image", "file_id": "file-1"}, "file_id"),
    ({"type": "input_image"}, "image_url"),
    ({"type": "input_file", "file_id": "file-1"}, "file_id"),
    ({"type": "input_file", "file_data": "data:audio/wav;base64,UklGRg=="}, "file_data"),
    ({"type": "input_file", "file_data": "data:video/mp4;base64,%"}, "file_data"),
    ({"type": "input_picture"}, ""),
]


def test_bad_media_of_responses_name_their_field(sees: Path) -> None:
    async def run() -> None:
        async with door(sees) as http:
            for part, field in BAD_ITEMS:
                parts = [{"type": "input_image", "image_url": uri(PNG)}, part]
                found = await http.post("/v1/responses", json={"input": [{"role": "user", "content": parts}]})
                place = "input[0].content[1]" + (f".{field}" if field else "")
                assert (found.status_code, found.json()["error"]["param"]) == (400, place), (part, found.text)

    asyncio.run(run())


BAD_PAPERS = [
    (b"%PDF-1.4 and no more", "document is broken"),
    (pdf([]), "the document is broken"),
    (pdf([(72, 72)], lock=True), "encrypted"),
    (pdf([(72, 72)] * 3), "3 pages, 2 are the most"),
    (b"plain", "no PDF"),
]


@pytest.mark.parametrize(("data", "said"), BAD_PAPERS, ids=[said for _, said in BAD_PAPERS])
def test_bad_documents_are_told(data: bytes, said: str) -> None:
    with pytest.raises(BadRequest, match=said) as error:
        Document(data, "here", 2)
    assert error.value.param == "here"


def test_a_page_of_any_size_is_a_picture_of_a_bounded_one() -> None:
    for size in ((72, 36), (14_400, 3), (14_400, 14_400)):
        page = Document(pdf([size]), "here", 1).drawn(0)
        assert max(page.size) <= _pages.LONGEST and min(page.size) >= 1


def test_a_model_of_texts_takes_no_pictures(blind: Path) -> None:
    async def run() -> None:
        async with door(blind) as http:
            found = await http.post("/v1/chat/completions", json={"messages": user("a", image(PNG)), **SHORT})
            assert (found.status_code, found.json()["error"]["param"]) == (400, "messages[0].content[1].image_url.url")
            found = await http.post("/generate", json={"text": "a", "image_data": uri(PNG)})
            assert found.status_code == 400
            blocks = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}]
            body = {"model": "default", "messages": [{"role": "user", "content": blocks}], "max_tokens": 1}
            assert (await http.post("/v1/messages", json=body)).status_code == 400
            assert (await http.get("/model_info")).json()["has_image_understanding"] is False

    asyncio.run(run())


@pytest.mark.parametrize("settings", [{"size": 224}, {"min_pixels": "x"}, {"image_mean": [0.5]}, {"image_mean": 0.5}])
def test_settings_that_no_picture_can_be_read_by_are_told_at_start(sees: Path, tmp_path: Path, settings: Any) -> None:
    for file in sees.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="preprocessor_config"):
        make_client(Config.from_flat({**SETTINGS, "model_path": str(tmp_path)}))


def test_a_root_that_is_no_directory_is_told_at_start(sees: Path) -> None:
    with pytest.raises(ConfigError, match="mm_file_root"):
        make_client(Config.from_flat({**SETTINGS, "model_path": str(sees), "mm_file_root": str(sees / "config.json")}))


def test_files_below_the_root_alone(sees: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG)
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "b.png")

    async def run() -> None:
        async with door(sees, mm_file_root=str(tmp_path / "in")) as http:
            for name, status in (
                ("in/a.png", 200),
                ("b.png", 400),
                ("in/../b.png", 400),
                ("in/link.png", 400),
                ("in/no.png", 400),
            ):
                asked = user("a", image(f"file://{tmp_path}/{name}"))
                found = await http.post("/v1/chat/completions", json={"messages": asked, **SHORT})
                assert found.status_code == status, name

    asyncio.run(run())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_picture_of_the_system_stays_beside_its_text_in_responses(sees: Path) -> None:
    """Instructions and developers' texts join it, and nothing of them is lost."""
    shown = [{"type": "input_text", "text": "Look:"}, {"type": "input_image", "image_url": uri(PNG)}]
    before: dict[str, Any] = {"role": "developer", "content": "Be brief."}

    async def run() -> None:
        async with door(sees) as http:
            given = [before, {"role": "system", "content": shown}, {"role": "user", "content": "What?"}]
            asked = {"instructions": "Be kind.", "input": given, "temperature": 0, "max_output_tokens": 4}
            found = (await http.post("/v1/responses", json=asked)).json()
            texts = [{"type": "text", "text": "Be kind.\n\nBe brief.\n\n"}, {"type": "text", "text": "Look:"}]
            system = {"role": "system", "content": [*texts, image(PNG)]}
            body = {"messages": [system, {"role": "user", "content": "What?"}], **SHORT}
            chat = (await http.post("/v1/chat/completions", json=body)).json()
            assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
            assert found["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]

    asyncio.run(run())
