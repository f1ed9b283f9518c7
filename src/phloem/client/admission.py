"""Before anything is submitted: prompts to token ids, every value checked against model and context."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from phloem.client.processors import thinking_budget
from phloem.client.request import FAKE_HOST, Prompt
from phloem.client.sessions import Sessions
from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.engine import processors

if TYPE_CHECKING:
    from phloem.client.info import ModelInfo
    from phloem.client.request import Item
    from phloem.multimodal._reader import MediaReader
    from phloem.text.tokenizer import Tokenizer

THREAD_CHARACTERS = 20_000  # longer texts are tokenised off the event loop (a few milliseconds)
PROBE_CHARACTERS = 16  # per token of context: a text longer than that is first measured by its beginning
MAX_TOP_LOGPROBS = 1024
_INT32 = 2**31 - 1


class Admission:
    """Pure but for the tokenizer. Every refusal is a `BadRequest` that names the field."""

    def __init__(self, tokenizer: Tokenizer | None, info: ModelInfo, pictures: MediaReader | None = None) -> None:
        self.pictures = pictures
        self.tokenizer = tokenizer
        self.info = info
        self.sessions = Sessions()

    async def prompts(self, items: list[Item]) -> list[Prompt]:
        """Token ids of every item, and its media, checked. Long texts are tokenised in a thread."""
        for item in items:
            self._check_item(item)
        if any(item.pictures for item in items):
            return [await self._seen(item) if item.pictures else (await self.prompts([item]))[0] for item in items]
        if sum(len(item.text or "") for item in items) > THREAD_CHARACTERS:
            found = await asyncio.to_thread(self._prompts, items)
        else:
            found = self._prompts(items)
        return [Prompt(self._whole(item, ids)) for item, ids in zip(items, found, strict=True)]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenise one text.

        Raises:
            BadRequest: no tokenizer is loaded, or the text is no valid Unicode.
        """
        if self.tokenizer is None:
            raise BadRequest("no tokenizer is loaded: send input_ids", param="text")
        try:
            return self.tokenizer.encode(text, add_special_tokens)
        except UnicodeError:
            raise BadRequest("the text holds lone surrogates: it is no valid Unicode", param="text") from None

    def params(self, item: Item, prompt: Prompt) -> SamplingParams:
        """The item's sampling parameters with `max_new_tokens` clipped to what the context has left."""
        params = item.sampling
        left = self.info.context_length - prompt.places
        chosen = params.processors
        if item.thinking_budget is not None:
            chosen = {**chosen, **thinking_budget(item.thinking_budget, prompt.ids, self.tokenizer, self.info)}
        wanted = left if params.max_new_tokens is None else min(params.max_new_tokens, left)
        return msgspec.structs.replace(
            params,
            max_new_tokens=wanted,
            min_new_tokens=min(params.min_new_tokens, wanted),
            top_k=min(params.top_k, self.info.vocab_size),
            processors=chosen,
        )

    def _whole(self, item: Item, ids: list[int]) -> list[int]:
        """With what the item's session holds in front of it, checked."""
        if item.session is not None:
            ids = self.sessions.extend(item.session, ids, self.tokenizer.bos_id if self.tokenizer is not None else None)
        self._check_length(item, ids)
        return ids

    async def _seen(self, item: Item) -> Prompt:
        """A prompt with pictures, videos or sounds, checked."""
        prompt, where = await self.grown(item), item.pictures[0].where
        self._check_length(item, prompt.ids)
        self._check_places(item, prompt, where)
        return prompt

    async def grown(self, item: Item) -> Prompt:
        """A prompt with as many tokens as its pictures, videos and sounds take, however long it is.

        Raises:
            BadRequest: one of them cannot be had, read or taken, or they do not fit the prompt.
        """
        reader, where = self.pictures, item.pictures[0].where
        if reader is None:
            raise BadRequest("this model takes texts alone", param=where, code="not_supported")
        if item.session is not None:
            raise BadRequest("sessions take no media", param="session_params", code="not_supported")
        made = await reader.read(item.pictures)
        if item.ids is not None:
            self._prompt(item)
            ids, made = reader.with_ids(item.ids, made, lambda text: self.encode(text, False), where)
        else:
            text, made = reader.with_places(item.text or "", made, where)
            ids = await asyncio.to_thread(self.encode, text, item.add_special_tokens)
        return Prompt(*reader.grown(ids, made, where))

    def _check_places(self, item: Item, prompt: Prompt, where: str) -> None:
        """Seconds of a video may lead further than its tokens."""
        context, needed = self.info.context_length, prompt.places + (item.sampling.max_new_tokens != 0)
        if needed > context:
            raise BadRequest(
                f"the prompt's videos reach up to position {needed}, the context holds {context}: ask for more frames "
                "of a second (fps), or for a shorter part",
                param=where,
                code="context_length_exceeded",
            )

    def _prompts(self, items: list[Item]) -> list[list[int]]:
        return [self._prompt(item) for item in items]

    def _prompt(self, item: Item) -> list[int]:
        context = self.info.context_length
        if item.ids is not None:
            ids = item.ids
            most = self._most(item)
            if ids and not (min(ids) >= 0 and max(ids) < most):
                bad = next(token for token in ids if not 0 <= token < most)
                raise BadRequest(f"input_ids: token id {bad} is not in [0, {most})", param="input_ids")
        else:
            text = item.text or ""
            if len(text) > PROBE_CHARACTERS * context:
                start = self.encode(text[: PROBE_CHARACTERS * context], item.add_special_tokens)
                if len(start) > context + 1:
                    raise BadRequest(
                        f"the prompt has more than {len(start) - 1} tokens ({len(text)} characters), "
                        f"the context holds {context}",
                        param="prompt",
                        code="context_length_exceeded",
                    )
            ids = self.encode(text, item.add_special_tokens)
            if not ids and self.tokenizer is not None and self.tokenizer.bos_id is not None:
                ids = [self.tokenizer.bos_id]
        return ids

    def _most(self, item: Item) -> int:
        """Token ids that it may name. How many its adapter knows, the scheduler does."""
        return 1 << 30 if item.adapter else self.info.vocab_size

    def _check_length(self, item: Item, ids: list[int]) -> None:
        context = self.info.context_length
        if not ids:
            raise BadRequest("the prompt is empty", param="prompt")
        if len(ids) > context or (len(ids) == context and item.sampling.max_new_tokens != 0):
            room = "" if len(ids) > context else ": no room for output"
            raise BadRequest(
                f"the prompt has {len(ids)} tokens, the context holds {context}{room}",
                param="prompt",
                code="context_length_exceeded",
            )
        if item.logprob_start >= len(ids):
            raise BadRequest(
                f"logprob_start_len ({item.logprob_start}) is beyond the prompt's {len(ids)} tokens",
                param="logprob_start_len",
            )

    def _check_item(self, item: Item) -> None:
        params = item.sampling
        params.validate(self._most(item))
        processors.make(params.processors, self.info.vocab_size)
        if self.tokenizer is None:
            for name in ("stop", "stop_regex"):
                if getattr(params, name):
                    raise BadRequest(f"{name} needs a tokenizer, and none is loaded", param=name)
        if item.logprob_start < -1:
            raise BadRequest(
                f"logprob_start_len must be at least -1, got {item.logprob_start}", param="logprob_start_len"
            )
        top = min(MAX_TOP_LOGPROBS, self.info.vocab_size)
        if not 0 <= item.top_logprobs <= top:
            raise BadRequest(f"top_logprobs must be in [0, {top}], got {item.top_logprobs}", param="top_logprobs")
        for token in item.token_ids_logprob:
            if not 0 <= token < self.info.vocab_size:
                raise BadRequest(
                    f"token_ids_logprob: token id {token} is not in [0, {self.info.vocab_size})",
                    param="token_ids_logprob",
                )
        if item.dp_rank is not None and not 0 <= item.dp_rank < self.info.replicas:
            message = f"data_parallel_rank: {item.dp_rank} is not one of the {self.info.replicas} there are, from 0 on"
            raise BadRequest(message, param="data_parallel_rank")
        if self.info.role != "null" and not item.pooled and item.prefill[0] != FAKE_HOST:
            if item.room < 0:
                text = f"this is a {self.info.role} server: bootstrap_room is needed, which its gateway chooses"
                raise BadRequest(text, param="bootstrap_room")
            if self.info.role == "decode" and not item.prefill[0]:
                raise BadRequest("bootstrap_host is needed beside bootstrap_room", param="bootstrap_host")
        if not -_INT32 <= item.priority <= _INT32:
            raise BadRequest(f"priority must fit 32 bits, got {item.priority}", param="priority")
        if item.stream_interval < 1:
            raise BadRequest(f"stream_interval must be at least 1, got {item.stream_interval}", param="stream_interval")
