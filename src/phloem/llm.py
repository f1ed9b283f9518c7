"""The engine in your own process: `Engine` with the field names of `/generate`, `LLM` for prompts in, texts out.

Both use the scheduler and runner that the server uses; there is no second path.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import msgspec

from phloem.administration import Administered
from phloem.client.pooled import Reading
from phloem.client.start import make_client
from phloem.core.config import Config, log_format
from phloem.core.errors import BadRequest, ConfigError, EngineDead
from phloem.launch.door import EngineDoor, beginning
from phloem.launch.replicas import engine_of
from phloem.launch.thread import EngineThread
from phloem.protocol.audio.body import TranscriptionBody, TranslationBody
from phloem.protocol.audio.run import Transcriber, asked_of, read_file
from phloem.protocol.audio.write import verbose
from phloem.protocol.body import Parser
from phloem.protocol.generate.body import GenerateBody
from phloem.protocol.generate.convert import is_batch, to_request
from phloem.protocol.generate.write import Renderer, strip
from phloem.protocol.media import seen
from phloem.protocol.pooling import write
from phloem.protocol.pooling.body import EmbeddingsBody, EncodeBody
from phloem.protocol.pooling.convert import activated, finished, reading_of, texts_of
from phloem.protocol.pooling.run import Pool
from phloem.protocol.score.body import ScoreBody
from phloem.protocol.score.convert import to_request as score_request
from phloem.protocol.score.write import scores
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.client.request import GenerateRequest

T = TypeVar("T")
Answer = dict[str, Any]


class Engine(Administered):
    """A model in this process. Keywords are the settings of `phloem serve`, with underscores.

        engine = Engine(model_path="demo")
        engine.generate("The phloem carries", {"max_new_tokens": 16, "temperature": 0})["text"]

    Raises:
        ConfigError: a setting is unknown or cannot be served.
        ModelLoadError: the checkpoint is missing something.
        EngineDead: Python is ending.
    """

    def __init__(self, **settings: Any) -> None:
        if "model" in settings:
            settings["model_path"] = settings.pop("model")
        self.config = Config.from_flat({"log_level": "warning", **settings})
        log.configure(self.config.server.log_level, form=log_format())
        with beginning():
            self._client, self.info, checkpoint = make_client(self.config)
            if self.info.draws:
                raise ConfigError("this folder draws pictures: use `phloem serve` or `phloem generate`")
            if self.info.encodes:
                raise ConfigError("encoder_only: towers alone serve other servers: use `phloem serve`")
            several = self.config.runtime.dp_size > 1
            self._link = engine_of(self.config) if several else EngineThread(self.config, checkpoint)
            self._door = EngineDoor(self._client, self._link)
        weakref.finalize(self, self._door.end_soon).atexit = False  # the door ends with Python by itself
        try:
            self.ready: dict[str, Any] = self._door.run(self._start())
        except BaseException as error:
            self._door.end("the engine did not start")
            failure = self._client.connection.failure
            if isinstance(error, EngineDead) and failure is not None:
                raise failure from None
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

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """A conversation's token ids, by the model's chat template and ready for its answer: `input_ids` of `generate`.

        Raises:
            BadRequest: there are no messages, something else stands in their place, or the template refuses them.
        """
        self.info.check_pooled(False)
        if self.tokenizer is None or self.chat_template is None:
            raise BadRequest("messages: a chat needs the tokenizer, which skip_tokenizer_init leaves out")
        found: list[Any] = list(messages) if isinstance(messages, list | tuple) else [messages]
        if not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in found):
            raise BadRequest("messages: expected a list of objects with a role each", param="messages")
        if not found:
            raise BadRequest("messages: at least one is needed", param="messages")
        shown, _ = seen(found, self._client.pictures, self.chat_template)
        return self.tokenizer.encode(self.chat_template.render(shown), add_special_tokens=False)

    def pictures_of(self, messages: Sequence[dict[str, Any]]) -> list[Any]:
        """A conversation's media, in the order of their places in `encode_chat`: `image_data` of `generate`.

        Raises:
            BadRequest: the model takes none, or something else stands where one belongs.
        """
        return seen(list(messages), self._client.pictures, self.chat_template)[1]

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
        return self._door.run(self._collect(body))

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
        future = self._door.start(self._collect(body))
        try:
            return await asyncio.wrap_future(future)
        except BaseException as error:
            task, told = asyncio.current_task(), self._door.told(error)
            if told is error or (task is not None and task.cancelling()):
                raise
            raise told from None

    def _body(
        self,
        prompt: str | list[str] | None,
        sampling_params: Any,
        input_ids: Any,
        stream: bool,
        fields: dict[str, Any],
    ) -> GenerateBody:
        self._door.check()
        values = {
            "text": prompt,
            "sampling_params": sampling_params,
            "input_ids": input_ids,
            "stream": stream,
            **fields,
        }
        return Parser(GenerateBody).convert(_listed(values), self.info.features)

    async def _collect(self, body: GenerateBody) -> Answer | list[Answer]:
        request = to_request(body)
        single = not is_batch(body) and request.items[0].sampling.n == 1
        renderer = Renderer(body, self._client.tokenizer)
        outputs = await self._outputs(request)
        return strip([_plain(renderer.answer(output)) for output in outputs], single)

    async def _events(self, body: GenerateBody) -> AsyncGenerator[Answer]:
        request = to_request(body)
        single = not is_batch(body) and request.items[0].sampling.n == 1
        renderer = Renderer(body, self._client.tokenizer)
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

        future = self._door.start(pump())
        try:
            while (item := news.get()) is not None:
                if isinstance(item, BaseException):
                    raise self._door.told(item)
                yield item
                if self._door.foreign:
                    self._door.check()  # nothing would ever come
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

        future = self._door.start(pump())
        try:
            while (item := await news.get()) is not None:
                if isinstance(item, BaseException):
                    raise self._door.told(item)
                yield item
                if self._door.foreign:
                    self._door.check()
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
        self._door.check()
        body = Parser(ScoreBody).convert(_listed(values))

        async def run() -> list[list[float]]:
            return scores(body, await self._outputs(score_request(body)))

        return self._door.run(run())

    async def _outputs(self, request: GenerateRequest) -> list[Continuation]:
        call = await self._client.submit(request)
        try:
            async for _ in call:
                pass
        finally:
            call.cancel()
        return call.outputs

    # models that do not generate

    def encode(
        self, prompt: str | list[str] | None = None, input_ids: Any = None, **fields: Any
    ) -> Answer | list[Answer]:
        """What the model makes of a text, or of each of several: a vector, or raw scores; as `/encode`.

        Gives `embedding` and `meta_info`. Fields: `dimensions`, `normalize`, `truncate_prompt_tokens`.

        Raises:
            BadRequest: the model generates, a text is too long, or a field is wrong.
        """
        self._door.check()
        body = Parser(EncodeBody).convert(_listed({"text": prompt, "input_ids": input_ids, **fields}))
        if (body.text is None) == (body.input_ids is None):
            raise BadRequest("either a prompt or input_ids is needed", param="text")
        given = body.text if body.text is not None else body.input_ids

        async def run() -> list[Answer]:
            pool = Pool(self._client, self._outputs)
            found = await pool.raw(texts_of(given, "text"), reading_of(body, "text"))
            values = found.values
            if pool.pooling.task == "embed":
                values = finished(values, pool.pooling, body.dimensions, body.normalize)
            answers = [write.encoded(one, output) for one, output in zip(values, found.outputs, strict=True)]
            return [msgspec.to_builtins(answer) for answer in answers]

        answers = self._door.run(run())
        single = isinstance(given, str) or (isinstance(given, list) and bool(given) and isinstance(given[0], int))
        return answers[0] if single else answers

    def embed(self, texts: str | Sequence[str], **fields: Any) -> list[list[float]]:
        """A vector for each text, as `/v1/embeddings`; fields as there: `dimensions`, `prompt_name`, ..."""
        self._door.check()
        body = Parser(EmbeddingsBody).convert(_listed({"input": texts, **fields}))

        async def run() -> list[list[float]]:
            found = await Pool(self._client, self._outputs).embeddings(texts_of(body.input, "input"), body)
            return [vector.tolist() for vector in found.values]

        return self._door.run(run())

    def score_pairs(
        self, text_1: str | Sequence[str], text_2: str | Sequence[str], truncate_prompt_tokens: int | None = None
    ) -> list[float]:
        """How well texts fit together: one with each of several, or one by one; as `/v1/score` with the same fields."""
        self._door.check()
        first, second = ([text] if isinstance(text, str) else list(text) for text in (text_1, text_2))

        async def run() -> list[float]:
            reading = Reading(truncate_prompt_tokens, param="text_2")
            found = await Pool(self._client, self._outputs).pairs(first, second, reading)
            return [float(value[0]) for value in found.values]

        return self._door.run(run())

    def classify(self, texts: str | Sequence[str], use_activation: bool | None = None) -> list[Answer]:
        """`label` and `probs` of each text, as `/classify`."""
        self._door.check()

        async def run() -> list[Answer]:
            pool = Pool(self._client, self._outputs)
            pool.must_be("classify", "score", "tokens")
            asked = [texts] if isinstance(texts, str) else list(texts)
            found = await pool.raw(asked, Reading())
            labels, many = pool.pooling.labels, found.values
            return [
                msgspec.to_builtins(write.classes(at, activated(one, pool.pooling, use_activation), labels))
                for at, one in enumerate(many)
            ]

        return self._door.run(run())

    # models of speech

    def transcribe(
        self,
        audio: str | Path | bytes,
        *,
        task: str = "transcribe",
        language: str | None = None,
        prompt: str = "",
        temperature: float = 0.0,
        chunking_strategy: str | None = None,
        timestamp_granularities: Sequence[str] | None = None,
        seed: int | None = None,
        thresholds: Mapping[str, float] | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> Answer:
        """What is said in a sound file (a path, or its bytes); as `/v1/audio/transcriptions` with `verbose_json`.

        Gives `text`, `language`, `duration` and `segments` with times in seconds. `task` "translate": in English.
        `thresholds`: `compression_ratio_threshold`, `logprob_threshold`, `no_speech_threshold`, by name.
        `timestamp_granularities`: "word" for `words` with their times, "segment" (the default), or both.
        `chunking_strategy` "auto": a long file is cut where it is quiet, and its parts are computed together.
        `progress`: called with the seconds that are done and those that there are, from another thread.

        Raises:
            BadRequest: the file cannot be read, or the model cannot do what is asked.
        """
        self._door.check()
        data = audio if isinstance(audio, bytes) else read_file(audio)
        values: dict[str, Any] = {"file": data, "prompt": prompt, "temperature": temperature, "seed": seed}
        values.update(thresholds or {})
        values["response_format"] = "verbose_json"
        if task == "translate":
            body: TranscriptionBody | TranslationBody = Parser(TranslationBody).convert(values)
        elif task == "transcribe":
            grains = None if timestamp_granularities is None else list(timestamp_granularities)
            more = {"language": language, "chunking_strategy": chunking_strategy, "timestamp_granularities": grains}
            body = Parser(TranscriptionBody).convert({**values, **more})
        else:
            raise BadRequest(f"task: expected transcribe or translate, got {task!r:.50}", param="task")
        most = self.config.server.max_audio_seconds

        async def run() -> Answer:
            transcriber = Transcriber(self._client, self._outputs)
            asked = transcriber.check(asked_of(body))
            return msgspec.to_builtins(verbose(await transcriber.whole(body.file, asked, most, progress), asked))

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

    # what administers it stands in `Administered`

    def get_server_info(self) -> dict[str, Any]:
        """The resolved configuration, flat, with the decisions and the state of the engine."""
        state = self._door.run(self._client.control("state")).data
        settings = {
            name: value for name, value in self.config.flat().items() if name not in ("api_key", "admin_api_key")
        }
        return {**settings, **self.ready, "internal_states": state.pop("ranks", None) or [state]}

    def shutdown(self) -> None:
        """End the engine; what runs is cut. Harmless when repeated, and in a forked child."""
        self._door.end("the engine was shut down")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


@runtime_checkable
class _Array(Protocol):
    """A numpy array or number, a tensor, or another library's."""

    def tolist(self) -> Any: ...


def _listed(values: Any) -> Any:
    """Arrays and tensors as lists and their single values as Python's, wherever they stand; all else as it is."""
    if isinstance(values, dict):
        return {key: _listed(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        # Token ids by the thousand are nearly always plain.
        return [one if type(one) is int else _listed(one) for one in values]
    if values is None or isinstance(values, str | int | float):
        return values
    return values.tolist() if isinstance(values, _Array) else values


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
            BadRequest: a conversation has no messages, or something else in their place.
        """
        if not messages:
            return []
        several: Any = [messages] if isinstance(messages[0], dict) else messages
        ids = [self.engine.encode_chat(talk) for talk in several]
        return _by_prompt(self.engine.generate(input_ids=ids, sampling_params=sampling_params), len(ids))

    def transcribe(self, audio: str | Path | bytes, **fields: Any) -> str:
        """The text of a sound file. Fields are those of `Engine.transcribe`."""
        return self.engine.transcribe(audio, **fields)["text"]

    def embed(self, texts: str | Sequence[str], **fields: Any) -> list[list[float]]:
        """A vector for each text. Fields are those of `/v1/embeddings`."""
        return self.engine.embed(texts, **fields)

    def score(self, text_1: str | Sequence[str], text_2: str | Sequence[str]) -> list[float]:
        """A score for each pair: one text with each of several, or as many with as many."""
        return self.engine.score_pairs(text_1, text_2)

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[dict[str, Any]]:
        """`index`, `relevance_score` and `document` of the documents, the best first; `top_n`: so many of them."""
        scores = self.engine.score_pairs(query, list(documents))
        order = sorted(range(len(scores)), key=lambda at: -scores[at])[: top_n or None]
        return [{"index": at, "relevance_score": scores[at], "document": documents[at]} for at in order]

    def classify(self, texts: str | Sequence[str]) -> list[dict[str, Any]]:
        """`label` and `probs` of each text."""
        return self.engine.classify(texts)

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
