"""The engine in your own process: `Engine` with the field names of `/generate`, `LLM` for prompts in, texts out.

Both use the scheduler and runner that the server uses; there is no second path.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import msgspec

from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.errors import BadRequest, ConfigError, EngineDead, ModelLoadError, PhloemError
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
    from concurrent.futures import Future

    from phloem.client.call import Call

T = TypeVar("T")
_FAILURES = {error.__name__: error for error in (BadRequest, ConfigError, ModelLoadError)}
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

    def cancel(self, future: Future[Any]) -> None:
        """Harmless when the loop has ended."""
        with contextlib.suppress(RuntimeError):
            future.cancel()

    def stop(self) -> None:
        """End what still runs, then the loop."""

        async def end_all() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.loop.shutdown_asyncgens()

        self.run(end_all())
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
        self._pid = os.getpid()
        self._closed = ""  # why it takes no more calls
        try:
            self.ready: dict[str, Any] = self._door.run(self._start())
        except BaseException as error:
            self._end("the engine did not start")
            failed = self._client.connection.failed
            kind = None if failed is None else _FAILURES.get(failed.kind)
            if isinstance(error, EngineDead) and failed is not None and kind is not None:
                raise kind(failed.error) from None
            raise
        # A step that runs while Python tears its threads down would abort the process.
        atexit.register(_end_at_exit, weakref.ref(self))

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

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_open()
        except EngineDead:
            work.close()
            raise
        return self._door.run(work)

    def _check_open(self) -> None:
        """Raises EngineDead in a forked child, which has none of the engine's threads, and after `shutdown`."""
        if os.getpid() != self._pid:
            raise EngineDead(
                f"this engine belongs to process {self._pid}: a forked child has none of its threads; "
                "make an engine of its own, or start processes by spawn"
            )
        if self._closed:
            raise EngineDead(self._closed)

    # generation

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: Any = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | Generator[Answer]:
        """Continue a prompt or several; fields and results have the names and shapes of `/generate`.

        `input_ids`: a list of token ids or several, or arrays or tensors of them. With `stream` an iterator of growing
        answers (`index` tells the prompt of a batch).

        Raises:
            BadRequest: a field is unknown, of a wrong type, or asks for what cannot be served.
            EngineDead: the engine has stopped.
        """
        body = self._body(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._stream(body)
        return self._run(self._collect(body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: Any = None,
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
        self._check_open()
        values = {
            "text": prompt,
            "sampling_params": sampling_params,
            "input_ids": _listed(input_ids),
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
            self._door.cancel(future)

    async def _stream_async(self, body: GenerateBody) -> AsyncGenerator[Answer]:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Answer | BaseException | None] = asyncio.Queue()

        def tell(item: Answer | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop has ended: nobody waits
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
            self._door.cancel(future)

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

        return self._run(run())

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

        return self._run(open_it())

    def close_session(self, session_id: str) -> None:
        """Forget a session. Raises NotFound."""

        async def close_it() -> None:
            self._client.sessions.close(session_id)

        self._run(close_it())

    # administration

    def flush_cache(self, timeout: float = 0.0) -> bool:
        """Forget every cached prefix; False while requests run (waits up to `timeout` seconds for them)."""
        return self._run(self._client.control("flush_cache", timeout=timeout)).ok

    def abort_request(self, rid: str = "", abort_all: bool = False) -> int:
        """End requests by id; gives how many."""

        async def abort() -> int:
            return self._client.abort(rid, everything=abort_all)

        return self._run(abort())

    def pause_generation(self, mode: str = "abort") -> None:
        """Stop launching steps. `mode`: abort what runs, retract it into the queue, or freeze it in place."""
        self._check(self._run(self._client.control("pause", mode=mode)))

    def continue_generation(self) -> None:
        self._check(self._run(self._client.control("resume")))

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
        state = self._run(self._client.control("state")).data
        settings = {name: value for name, value in self.config.flat().items() if name != "api_key"}
        return {**settings, **self.ready, "internal_states": [state]}

    def shutdown(self) -> None:
        """End the engine; what runs is cut. Harmless when repeated, and in a forked child."""
        if self._closed or os.getpid() != self._pid:
            return
        self._end("the engine was shut down")

    def _end(self, why: str) -> None:
        self._closed = why
        self._client.draining = True  # what its link says from now on is no failure
        if self._link.alive:
            with contextlib.suppress(EngineDead):
                self._link.send(Drain(timeout=0.0))
        self._door.run(self._client.close())
        self._door.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _end_at_exit(held: weakref.ref[Engine]) -> None:
    engine = held()
    if engine is not None:
        engine.shutdown()


@runtime_checkable
class _Array(Protocol):
    """A numpy array or number, a tensor, or another library's."""

    def tolist(self) -> Any: ...


def _listed(ids: Any) -> Any:
    """Arrays and tensors of token ids as lists; all else as it is."""
    if isinstance(ids, _Array):
        return ids.tolist()
    if isinstance(ids, list | tuple):
        return [one.tolist() if isinstance(one, _Array) else one for one in ids]
    return ids


def _plain(answer: Answer) -> Answer:
    """Only dicts, lists and values, as a client would read them from JSON."""
    return msgspec.to_builtins(answer)


class LLM:
    """Prompts in, texts out.

    LLM("demo").generate(["One, two,", "Roses are"], {"max_new_tokens": 8})
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        self.engine = Engine(model_path=model, **settings)

    def generate(
        self, prompts: str | Sequence[str], sampling_params: dict[str, Any] | None = None
    ) -> list[str] | list[list[str]]:
        """One text for each prompt, in order; with `n` above 1 a list of n texts for each."""
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        if not asked:
            return []
        return _by_prompt(self.engine.generate(asked, sampling_params), len(asked))

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: dict[str, Any] | None = None,
    ) -> list[str] | list[list[str]]:
        """The assistant's answer to one conversation, or to each of several; with `n` above 1 n answers to each.

        Raises:
            BadRequest: a conversation has no messages.
        """
        if not messages:
            return []
        several: Any = [messages] if isinstance(messages[0], dict) else messages
        if not all(several):
            raise BadRequest("messages: a conversation has no messages", param="messages")
        template, tokenizer = self.engine.chat_template, self.engine.tokenizer
        ids = [tokenizer.encode(template.render(list(talk)), add_special_tokens=False) for talk in several]
        return _by_prompt(self.engine.generate(input_ids=ids, sampling_params=sampling_params), len(ids))

    def shutdown(self) -> None:
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _by_prompt(answers: Any, prompts: int) -> list[str] | list[list[str]]:
    """Texts in order, in lists of their own where each prompt has several."""
    texts = [answer["text"] for answer in answers]
    each = len(texts) // prompts
    return texts if each == 1 else [texts[at : at + each] for at in range(0, len(texts), each)]
