"""Speech to text: each window of an audio is a request to the engine; a doubtful one is made again, less greedily."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.client.request import GenerateRequest, Item
from phloem.core.errors import BadRequest
from phloem.core.request import Align, SamplingParams
from phloem.multimodal._audio import FRAMES_PER_SECOND, Heard, hear
from phloem.protocol.audio.body import TranscriptionBody, TranslationBody, language_code
from phloem.protocol.audio.windows import Doubts, Piece, Told, best, cuts, part_of, pieces
from phloem.protocol.audio.words import Word, begins, shared, split, timed

if TYPE_CHECKING:
    from phloem.client.client import EngineClient
    from phloem.client.continuation import Continuation
    from phloem.multimodal._speech import Speech

Submit = Callable[[GenerateRequest], Awaitable[list["Continuation"]]]


@dataclass(frozen=True, slots=True)
class Asked:
    """How an audio is to be written down."""

    task: str = "transcribe"
    language: str | None = None  # code; None: the model tells
    prompt: str = ""
    temperatures: tuple[float, ...] = (0.0,)
    timestamps: bool = True
    together: bool = False  # cut where it is quiet, all windows at a time
    seed: int | None = None
    words: bool = False  # with their times
    segments: bool = True  # are told
    doubts: Doubts = Doubts()


@dataclass(frozen=True, slots=True)
class Segment:
    """Some of the text. Times in seconds, `seek` in frames of 10 ms."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] = ()


@dataclass(slots=True)
class Transcript:
    """Grows while the audio is gone through."""

    seconds: float
    language: str
    segments: list[Segment] = field(default_factory=list)
    done: float = 0.0  # seconds that have been gone through

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()


class Transcriber:
    """Of one model. `submit` brings requests to the engine and waits for their end."""

    def __init__(self, client: EngineClient, submit: Submit) -> None:
        if client.info.speech is None:
            raise client.info.wrong_task()
        if client.tokenizer is None:
            raise BadRequest("a model of speech needs its tokenizer, which skip_tokenizer_init leaves out")
        self.speech: Speech = client.info.speech
        self._tokenizer, self._submit = client.tokenizer, submit
        self._context, self._decoders = client.info.context_length, client.decoders

    def check(self, asked: Asked) -> Asked:
        """With the language's code. Raises BadRequest for what this model cannot do."""
        speech = self.speech
        if asked.task == "translate" and (not speech.multilingual or speech.translate is None):
            raise BadRequest("this model knows English alone: there is nothing to translate", param="model")
        language = asked.language
        if language is not None:
            language = language_code(language, speech.languages)
        return replace(asked, language=language if speech.multilingual else "en")

    async def hear(self, data: bytes, most_seconds: float) -> Heard:
        """Features of a file, made in a thread. Raises BadRequest, as `multimodal._audio.hear`."""
        async with self._decoders:
            return await asyncio.to_thread(hear, data, self.speech.bands, self.speech.frames, most_seconds)

    async def whole(
        self, data: bytes, asked: Asked, most_seconds: float, progress: Callable[[float, float], None] | None = None
    ) -> Transcript:
        """All of a file's transcript; `progress` as that of `llm.Engine.transcribe`."""
        heard = await self.hear(data, most_seconds)
        found: Transcript | None = None
        async for found in self.run(heard, asked):
            if progress is not None:
                progress(found.done, found.seconds)
        assert found is not None  # there are samples, so there is a window
        return found

    async def run(self, heard: Heard, asked: Asked) -> AsyncGenerator[Transcript]:
        """The transcript, whenever there is more of it."""
        language = asked.language or await self._language(heard)
        asked = replace(asked, language=language)
        found = Transcript(heard.seconds, language)
        if not asked.together:
            async for more, done in self._windows(heard, asked, 0, heard.frames):
                _add(found, more, done)
                yield found
            return
        parts = cuts(heard.mel, heard.frames, self.speech.frames)
        tasks = [asyncio.create_task(self._part(heard, asked, *part)) for part in parts]
        try:
            for task, (_, done) in zip(tasks, parts, strict=True):
                _add(found, await task, done)
                yield found
        finally:
            for task in tasks:
                task.cancel()

    async def _part(self, heard: Heard, asked: Asked, start: int, end: int) -> list[Segment]:
        return [one async for more, _ in self._windows(heard, asked, start, end) for one in more]

    async def _windows(
        self, heard: Heard, asked: Asked, start: int, end: int
    ) -> AsyncGenerator[tuple[list[Segment], int]]:
        """Between two frames each window's segments, and the frame that has been come to."""
        seek, size = start, self.speech.frames
        while seek < end:
            # A short file has been filled up with silence, which is part of what is heard.
            last = end if end < heard.frames else heard.mel.shape[1]
            window = await asyncio.to_thread(part_of, heard.mel, seek, size, last)
            frames = min(size, end - seek)
            told = await self._told(window, asked)
            parts, more = [], frames
            if not told.silent and asked.timestamps:
                parts, more = pieces(told.tokens, self.speech, seek / 100, frames)
            elif not told.silent:
                parts = [Piece(seek / 100, (seek + frames) / 100, told.tokens)]
            found = [one for part in parts if (one := self._segment(part, told, seek)).text.strip()]
            if asked.words and found:
                found = await self._with_words(found, window, asked, seek / 100, frames, more)
            yield found, seek + more
            seek += more

    def _segment(self, part: Piece, told: Told, seek: int) -> Segment:
        return Segment(
            id=0,
            seek=seek,
            start=round(part.start, 2),
            end=round(part.end, 2),
            text=self._text(part.tokens),
            tokens=part.tokens,
            temperature=told.temperature,
            avg_logprob=told.mean_logprob,
            compression_ratio=told.compression,
            no_speech_prob=told.no_speech,
        )

    def _text(self, tokens: tuple[int, ...]) -> str:
        return self._tokenizer.decode([token for token in tokens if token < self.speech.end])

    async def _with_words(
        self, segments: list[Segment], window: bytes, asked: Asked, offset: float, frames: int, last: int
    ) -> list[Segment]:
        """A window's segments with their words; `frames`: of its own sound, which begins at `offset` seconds; `last`:
        of these, those that are gone through."""
        speech = self.speech
        plain, _ = self._prompt(replace(asked, prompt="", timestamps=False))
        lengths = [sum(token < speech.end for token in one.tokens) for one in segments]
        tokens = [token for one in segments for token in one.tokens if token < speech.end]
        states = max(1, frames // 2)
        item = Item(
            SamplingParams(max_new_tokens=0),
            ids=[*plain, *tokens, speech.end],
            namespace=hashlib.blake2b(window, digest_size=16).hexdigest(),
            audio=window,
            align=Align(len(plain) - 1, states, list(speech.heads), speech.width),
        )
        (output,) = await self._submit(GenerateRequest([item]))
        if not output.pooled:
            raise BadRequest("the request ended before its words were found", code="aborted")

        def made() -> list[Word]:
            drawn = np.frombuffer(output.pooled, "<f4").reshape(len(tokens) + 1, states)
            parts = split(tokens, self._tokenizer.decode, asked.language or "en")
            return timed(parts, begins(-drawn).tolist(), offset, offset + last / FRAMES_PER_SECOND)

        words = await asyncio.to_thread(made)
        return [replace(one, words=part) for one, part in zip(segments, shared(words, lengths), strict=True)]

    async def _told(self, window: bytes, asked: Asked) -> Told:
        """A window's transcript, the first that looks right, or the best of them."""
        tries: list[Told] = []
        for temperature in asked.temperatures:
            tries.append(await self._try(window, asked, temperature))
            if not tries[-1].doubtful:
                return tries[-1]
        return best(tries)

    async def _try(self, window: bytes, asked: Asked, temperature: float) -> Told:
        speech, prompt, started = self.speech, *self._prompt(asked)
        (output,) = await self._submit(GenerateRequest([self._item(window, asked, prompt, started, temperature)]))
        if output.finish is None:
            raise BadRequest("the request ended before its transcript", code="aborted")
        tokens = [token for token in output.ids if token != speech.end]
        values = output.logprobs.values
        # Behind the token that begins a transcript: at the prompt's next one, or at the first that was chosen.
        before = output.prompt_logprobs.chosen if output.prompt_logprobs is not None else []
        chosen = [*before, *output.logprobs.chosen]
        silence = next((value for value, token in chosen[0] if token == speech.no_speech), -math.inf) if chosen else 0
        return Told(
            tuple(tokens),
            self._text(tuple(tokens)).strip(),
            temperature,
            sum(values) / max(1, len(values)),
            math.exp(silence),
            asked.doubts,
        )

    def _item(self, window: bytes, asked: Asked, prompt: list[int], started: int, temperature: float) -> Item:
        speech = self.speech
        rules: dict[str, Any] = {
            "end": speech.end,
            "first_timestamp": speech.first_timestamp,
            "timestamps": asked.timestamps,
            "suppressed": list(speech.suppressed),
            "suppressed_first": list(speech.suppressed_first),
        }
        if speech.latest_first is not None:
            rules["latest_first"] = speech.latest_first
        params = SamplingParams(
            temperature=temperature,
            max_new_tokens=min(self._context // 2, self._context - len(prompt)),
            stop_token_ids=[speech.end],
            processors={"speech": rules},
            sampling_seed=asked.seed,
        )
        return Item(
            params,
            ids=prompt,
            return_logprob=True,
            logprob_start=started + 1 if started + 1 < len(prompt) else -1,
            token_ids_logprob=[] if speech.no_speech is None else [speech.no_speech],
            # Tokens of another audio are no prefix, whatever they are.
            namespace=hashlib.blake2b(window, digest_size=16).hexdigest(),
            audio=window,
        )

    def _prompt(self, asked: Asked) -> tuple[list[int], int]:
        """What a transcript follows, and where in it stands the token that begins one."""
        speech = self.speech
        ids: list[int] = []
        if asked.prompt.strip() and speech.previous is not None:
            text = self._tokenizer.encode(" " + asked.prompt.strip(), add_special_tokens=False)
            text = [token for token in text if token < speech.end]
            ids = [speech.previous, *text[-(self._context // 2 - 1) :]]
        started = len(ids)
        ids.append(speech.start)
        if speech.multilingual and asked.language is not None:
            task = speech.translate if asked.task == "translate" else speech.transcribe
            ids += [speech.languages[asked.language], *([] if task is None else [task])]
        if not asked.timestamps:
            ids.append(speech.no_timestamps)
        return ids, started

    async def _language(self, heard: Heard) -> str:
        """What the first window is spoken in, by the model's own word."""
        speech = self.speech
        window = await asyncio.to_thread(part_of, heard.mel, 0, speech.frames, heard.mel.shape[1])
        params = SamplingParams(
            temperature=0.0,
            max_new_tokens=1,
            processors={"allowed_tokens": {"token_ids": list(speech.languages.values())}},
        )
        name = hashlib.blake2b(window, digest_size=16).hexdigest()
        (output,) = await self._submit(
            GenerateRequest([Item(params, ids=[speech.start], namespace=name, audio=window)])
        )
        return next((code for code, token in speech.languages.items() if output.ids == [token]), "en")


def _add(found: Transcript, more: list[Segment], done: int) -> None:
    first = len(found.segments)
    found.segments += [replace(one, id=first + number) for number, one in enumerate(more)]
    found.done = done / FRAMES_PER_SECOND


def asked_of(body: TranscriptionBody | TranslationBody) -> Asked:
    """What a body asks for."""
    if isinstance(body, TranslationBody):
        return Asked("translate", None, body.prompt or "", body.temperatures, seed=body.seed, doubts=body.doubts)
    together = body.chunking_strategy is not None
    grains = body.timestamp_granularities or ["segment"]
    return Asked(
        language=body.language,
        prompt=body.prompt or "",
        temperatures=body.temperatures,
        # Where nobody sees them they still say where the next window begins; cut beforehand, none need be told.
        timestamps=not together or body.response_format not in ("json", "text"),
        together=together,
        seed=body.seed,
        words="word" in grains,
        segments="segment" in grains,
        doubts=body.doubts,
    )


def read_file(path: str | Path) -> bytes:
    """Raises BadRequest, with the reason."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror or error}", param="file") from None
