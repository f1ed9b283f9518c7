"""OpenAI completions over OpenVINO GenAI's continuous batching, as thin as it can be. For `phloem bench peers`.

Run by the Python of an environment that has `openvino-genai`: it imports nothing of Phloem, and of HTTP knows what a
benchmark needs: `GET /health` and `POST /v1/completions` (streamed or whole).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from typing import Any

Ids = list[int]


class Stream:
    """One request between the pipeline's thread and its connection."""

    def __init__(self, ids: Any, config: Any) -> None:
        self.ids, self.config = ids, config
        self.handle: Any = None
        self.news: asyncio.Queue[str | None] = asyncio.Queue()
        self.tokens: Ids = []
        self.shown = 0  # characters of the window that went out
        self.begin = 0  # first token of the window
        self.reason = "stop"
        self.error = ""


class Batcher:
    """Steps the pipeline in a thread of its own while there are requests; after each step tells the loop the news."""

    def __init__(self, pipeline: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._pipeline, self._loop = pipeline, loop
        self._decode = pipeline.get_tokenizer().decode
        self._waiting: list[Stream] = []
        self._wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, stream: Stream) -> None:
        with self._wake:
            self._waiting.append(stream)
            self._wake.notify()

    def _run(self) -> None:
        running: list[Stream] = []
        count = 0
        while True:
            with self._wake:
                while not self._waiting and not running:
                    self._wake.wait()
                arrived, self._waiting = self._waiting, []
            for stream in arrived:
                count += 1
                try:
                    stream.handle = self._pipeline.add_request(count, stream.ids, stream.config)
                    running.append(stream)
                except Exception as error:
                    self._loop.call_soon_threadsafe(self._fail, [stream], str(error))
            running = self._step(running)

    def _step(self, running: list[Stream]) -> list[Stream]:
        try:
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
        except Exception as error:
            self._loop.call_soon_threadsafe(self._fail, running, str(error))
            return []
        news: list[tuple[Stream, Ids, bool]] = []
        for stream in running:
            ended = stream.handle.get_status().name != "RUNNING"
            fresh: Ids = []
            while stream.handle.can_read():
                for output in stream.handle.read().values():
                    fresh += output.generated_ids
                    if output.finish_reason.name == "LENGTH":
                        stream.reason = "length"
            if fresh or ended:
                news.append((stream, fresh, ended))
        if news:
            self._loop.call_soon_threadsafe(self._tell, news)
        gone = {id(stream) for stream, _, ended in news if ended}
        return [stream for stream in running if id(stream) not in gone]

    def _fail(self, streams: list[Stream], why: str) -> None:
        for stream in streams:
            stream.error = why or "the pipeline failed"
            stream.news.put_nowait(None)

    def _tell(self, news: list[tuple[Stream, Ids, bool]]) -> None:
        """All texts of a step in one call of the tokenizer."""
        for stream, fresh, _ in news:
            stream.tokens += fresh
        texts = self._decode([stream.tokens[stream.begin :] for stream, _, _ in news])
        for (stream, _, ended), text in zip(news, texts, strict=True):
            # A character's first bytes decode to the replacement mark: it waits for the rest.
            whole = ended or not text.endswith("\ufffd")
            if whole and len(text) > stream.shown:
                stream.news.put_nowait(text[stream.shown :])
                stream.shown = len(text)
            if whole and len(stream.tokens) - stream.begin > 48:
                self._move(stream)
            if ended:
                stream.news.put_nowait(None)

    def _move(self, stream: Stream) -> None:
        """Keep a few tokens before the next one, so that the tokenizer joins as within the whole text."""
        stream.begin = len(stream.tokens) - 4
        kept = self._decode([stream.tokens[stream.begin :]])[0]
        if "\ufffd" in kept:
            stream.begin = 0
            kept = self._decode([stream.tokens])[0]
        stream.shown = len(kept)


class Server:
    def __init__(self, genai: Any, pipeline: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._genai = genai
        self._tokenizer = pipeline.get_tokenizer()
        self._batcher = Batcher(pipeline, loop)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split(" ", 2)
                length = 0
                while (header := await reader.readline()) not in (b"\r\n", b""):
                    name, _, value = header.decode().partition(":")
                    if name.lower() == "content-length":
                        length = int(value)
                body = await reader.readexactly(length)
                if (method, path) == ("GET", "/health"):
                    _answer(writer, 200, {})
                elif (method, path) == ("POST", "/v1/completions"):
                    await self._completion(writer, body)
                else:
                    _answer(writer, 404, {"error": f"no {method} {path}"})
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _config(self, body: dict[str, Any]) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = body.get("max_tokens", 16)
        config.ignore_eos = bool(body.get("ignore_eos", False))
        temperature = body.get("temperature", 1.0)
        config.do_sample = temperature > 0
        if temperature > 0:
            config.temperature = temperature
            config.top_p = body.get("top_p", 1.0)
        config.eos_token_id = self._tokenizer.get_eos_token_id()
        config.stop_token_ids = {config.eos_token_id}
        form = body.get("response_format") or {}
        if form.get("type") == "json_schema":
            schema = json.dumps(form["json_schema"]["schema"])
            config.structured_output_config = self._genai.StructuredOutputConfig(json_schema=schema)
        return config

    async def _completion(self, writer: asyncio.StreamWriter, raw: bytes) -> None:
        try:
            body = json.loads(raw)
            ids = self._tokenizer.encode(body["prompt"]).input_ids
            stream = Stream(ids, self._config(body))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            _answer(writer, 400, {"error": f"{type(error).__name__}: {error}"})
            return
        self._batcher.submit(stream)
        if body.get("stream"):
            writer.write(_head(200, "text/event-stream") + b"Transfer-Encoding: chunked\r\n\r\n")
            while (text := await stream.news.get()) is not None:
                _event(writer, {"object": "text_completion", "choices": [{"index": 0, "text": text}]})
                await writer.drain()
            _event(writer, self._last(stream, ""))
            _chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            return
        whole = ""
        while (text := await stream.news.get()) is not None:
            whole += text
        _answer(writer, 500 if stream.error else 200, self._last(stream, whole))

    def _last(self, stream: Stream, text: str) -> dict[str, Any]:
        if stream.error:
            return {"error": stream.error}
        prompt, completion = int(stream.ids.shape[1]), len(stream.tokens)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        choice = {"index": 0, "text": text, "finish_reason": stream.reason}
        return {"object": "text_completion", "choices": [choice], "usage": usage}


def _head(status: int, kind: str) -> bytes:
    return f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: {kind}\r\n".encode()


def _answer(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    writer.write(_head(status, "application/json") + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _event(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(body).encode() + b"\n\n")


async def _serve(options: argparse.Namespace) -> None:
    import openvino_genai as genai  # pyright: ignore[reportMissingImports]

    scheduling: Any = genai.SchedulerConfig()
    scheduling.cache_size = options.cache_gb
    scheduling.max_num_seqs = options.max_num_seqs
    scheduling.max_num_batched_tokens = options.max_num_batched_tokens
    scheduling.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": options.threads} if options.threads else {}
    pipeline: Any = genai.ContinuousBatchingPipeline(options.model, scheduling, "CPU", properties)
    server = Server(genai, pipeline, asyncio.get_running_loop())
    listening = await asyncio.start_server(server.connection, "127.0.0.1", options.port)
    async with listening:
        await listening.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenAI completions over OpenVINO GenAI")
    parser.add_argument("--model", required=True, help="GGUF file or a directory of OpenVINO's format")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: OpenVINO's choice")
    parser.add_argument("--cache-gb", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
