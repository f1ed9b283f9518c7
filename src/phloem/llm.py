"""The engine in your own process: `Engine` with the field names of `/generate`, `LLM` for prompts in, texts out.

Both use the scheduler and runner that the server uses; there is no second path.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.errors import EngineDead, PhloemError
from phloem.core.messages import Drain
from phloem.launch.thread import EngineThread
from phloem.protocol.body import Parser
from phloem.protocol.generate.body import GenerateBody
from phloem.protocol.generate.convert import is_batch, to_request
from phloem.protocol.generate.write import Renderer, strip
from phloem.protocol.score.body import ScoreBody
from phloem.protocol.score.convert import to_request as score_request
from phloem.protocol.score.write import scores
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.client.call import Call

T = TypeVar("T")
Answer = dict[str, Any]


class _LoopThread:
    """An event loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="phloem-door", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Engine:
    """A model in this process. Keywords are the settings of `phloem serve`, with underscores.

        engine = Engine(model_path="demo")
        engine.generate("The phloem carries", {"max_new_tokens": 16, "temperature": 0})["text"]

    Raises:
        ConfigError: a setting is unknown or cannot be served.
        ModelLoadError: the checkpoint is missing something.
    """

    def __init__(self, **settings: Any) -> None:
        if "model" in settings:
            settings["model_path"] = settings.pop("model")
        self.config = Config.from_flat({"log_level": "warning", **settings})
        log.configure(self.config.server.log_level)
        self._client, self.info, checkpoint = make_client(self.config)
        self._link = EngineThread(self.config, checkpoint)
        self._door = _LoopThread()
        self._closed = False
        try:
            self.ready: dict[str, Any] = self._door.run(self._start())
        except BaseException:
            self._door.stop()
            raise

    async def _start(self) -> dict[str, Any]:
        self._client.attach(self._link)
        self._client.start()
        return await self._client.wait_ready()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (`encode`, `decode`), or None with `skip_tokenizer_init`."""
        return self._client.tokenizer

    @property
    def chat_template(self) -> Any:
        """The model's chat template (`render(messages)`), or None with `skip_tokenizer_init`."""
        return self._client.template

    # generation

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | Generator[Answer]:
        """Continue a prompt or several; fields and results have the names and shapes of `/generate`.

        With `stream` an iterator of growing answers (`index` tells the prompt of a batch).

        Raises:
            BadRequest: a field is unknown, of a wrong type, or asks for what cannot be served.
            EngineDead: the engine has stopped.
        """
        body = self._body(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._stream(body)
        return self._door.run(self._collect(body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | AsyncIterator[Answer]:
        """`generate` for callers inside an event loop: awaits the answer, or gives an async iterator."""
        body = self._body(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._stream_async(body)
        future = asyncio.run_coroutine_threadsafe(self._collect(body), self._door.loop)
        return await asyncio.wrap_future(future)

    def _body(
        self,
        prompt: str | list[str] | None,
        sampling_params: Any,
        input_ids: Any,
        stream: bool,
        fields: dict[str, Any],
    ) -> GenerateBody:
        if self._closed:
            raise EngineDead("the engine was shut down")
        values = {
            "text": prompt,
            "sampling_params": sampling_params,
            "input_ids": input_ids,
            "stream": stream,
            **fields,
        }
        return Parser(GenerateBody).convert(values, self.info.features)

    async def _collect(self, body: GenerateBody) -> Answer | list[Answer]:
        request = to_request(body)
        single = not is_batch(body) and request.items[0].sampling.n == 1
        renderer = Renderer(body, self._client.tokenizer, self.info.weight_version)
        call = await self._client.submit(request)
        try:
            async for _ in call:
                pass
        finally:
            call.cancel()
        return strip([_plain(renderer.answer(output)) for output in call.outputs], single)

    async def _events(self, body: GenerateBody) -> AsyncGenerator[Answer]:
        request = to_request(body)
        single = not is_batch(body) and request.items[0].sampling.n == 1
        renderer = Renderer(body, self._client.tokenizer, self.info.weight_version)
        call: Call = await self._client.submit(request)
        numbers = {output.id: at for at, output in enumerate(call.outputs)}
        try:
            async for outputs in call:
                for output in outputs:
                    answer = _plain(renderer.answer(output))
                    yield answer if single else {**answer, "index": numbers[output.id]}
        finally:
            call.cancel()

    def _stream(self, body: GenerateBody) -> Generator[Answer]:
        news: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for answer in self._events(body):
                    news.put(answer)
                news.put(None)
            except BaseException as error:
                news.put(error)
                raise

        future = asyncio.run_coroutine_threadsafe(pump(), self._door.loop)
        try:
            while (item := news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    async def _stream_async(self, body: GenerateBody) -> AsyncGenerator[Answer]:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Answer | BaseException | None] = asyncio.Queue()

        def tell(item: Answer | BaseException | None) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        async def pump() -> None:
            try:
                async for answer in self._events(body):
                    tell(answer)
                tell(None)
            except BaseException as error:
                tell(error)
                raise

        future = asyncio.run_coroutine_threadsafe(pump(), self._door.loop)
        try:
            while (item := await news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    def score(
        self,
        query: str | list[int],
        items: str | list[str] | list[list[int]],
        label_token_ids: list[int],
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """Probabilities of the label tokens behind query and item, a list for each item; as `/v1/score`."""
        values = {
            "query": query,
            "items": items,
            "label_token_ids": label_token_ids,
            "apply_softmax": apply_softmax,
            "item_first": item_first,
        }
        body = Parser(ScoreBody).convert(values)

        async def run() -> list[list[float]]:
            call = await self._client.submit(score_request(body))
            try:
                async for _ in call:
                    pass
            finally:
                call.cancel()
            return scores(body, call.outputs)

        return self._door.run(run())

    def open_session(
        self,
        capacity_of_str_len: int = 0,
        session_id: str | None = None,
        *,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> str:
        """A session's id, for `session_params`. The capacity is read and not used: the context bounds every prompt.

        `streaming`: each request goes on from the last one. `timeout`: seconds without a request until it closes.
        """

        async def open_it() -> str:
            return self._client.sessions.open(session_id, timeout, streaming)

        return self._door.run(open_it())

    def close_session(self, session_id: str) -> None:
        """Forget a session. Raises NotFound."""

        async def close_it() -> None:
            self._client.sessions.close(session_id)

        self._door.run(close_it())

    # administration

    def flush_cache(self, timeout: float = 0.0) -> bool:
        """Forget every cached prefix; False while requests run (waits up to `timeout` seconds for them)."""
        return self._door.run(self._client.control("flush_cache", timeout=timeout)).ok

    def abort_request(self, rid: str = "", abort_all: bool = False) -> int:
        """End requests by id; gives how many."""

        async def abort() -> int:
            return self._client.abort(rid, everything=abort_all)

        return self._door.run(abort())

    def pause_generation(self, mode: str = "abort") -> None:
        """Stop launching steps. `mode`: abort what runs, retract it into the queue, or freeze it in place."""
        self._check(self._door.run(self._client.control("pause", mode=mode)))

    def continue_generation(self) -> None:
        self._check(self._door.run(self._client.control("resume")))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first rows of the weight that the checkpoint calls `name`, as numbers. Read between two steps.

        Raises:
            PhloemError: there is no such weight.
        """
        reply = self._door.run(self._client.control("get_weights_by_name", name=name, rows=truncate_size))
        self._check(reply)
        return reply.data["weight"]

    @staticmethod
    def _check(reply: Any) -> None:
        if not reply.ok:
            raise PhloemError(reply.message)

    def get_server_info(self) -> dict[str, Any]:
        """The resolved configuration, flat, with the decisions and the state of the engine."""
        state = self._door.run(self._client.control("state")).data
        settings = {name: value for name, value in self.config.flat().items() if name != "api_key"}
        return {**settings, **self.ready, "internal_states": [state]}

    def shutdown(self) -> None:
        """End the engine. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        if self._link.alive:
            self._link.send(Drain(timeout=0.0))
        self._door.run(self._client.close())
        self._door.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _plain(answer: Answer) -> Answer:
    """Only dicts, lists and values, as a client would read them from JSON."""
    return msgspec.to_builtins(answer)


class LLM:
    """Prompts in, texts out.

    LLM("demo").generate(["One, two,", "Roses are"], {"max_new_tokens": 8})
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        self.engine = Engine(model_path=model, **settings)

    def generate(self, prompts: str | Sequence[str], sampling_params: dict[str, Any] | None = None) -> list[str]:
        """One text for each prompt, in order."""
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        if not asked:
            return []
        answers: Any = self.engine.generate(asked, sampling_params)
        return [answer["text"] for answer in answers]

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: dict[str, Any] | None = None,
    ) -> list[str]:
        """The assistant's answer to one conversation, or to each of several."""
        if not messages:
            return []
        several: Any = [messages] if isinstance(messages[0], dict) else messages
        template, tokenizer = self.engine.chat_template, self.engine.tokenizer
        ids = [tokenizer.encode(template.render(list(talk)), add_special_tokens=False) for talk in several]
        answers: Any = self.engine.generate(input_ids=ids, sampling_params=sampling_params)
        return [answer["text"] for answer in answers]

    def shutdown(self) -> None:
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
