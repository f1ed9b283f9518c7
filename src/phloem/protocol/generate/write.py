"""Answers of `/generate`, whole and as events; the in-process engine answers in the same shape."""

from __future__ import annotations

import time
import uuid
from base64 import b64encode
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from phloem.grammar.schema.numbers import as_double
from phloem.protocol.answers import Answer
from phloem.protocol.generate.logprobs import native_pairs, native_prompt, native_triples

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.protocol.generate.body import GenerateBody
    from phloem.text.tokenizer import Tokenizer

_encode = msgspec.json.Encoder(enc_hook=as_double).encode


class GenerateAnswer(Answer, kw_only=True):
    """One item of `/generate`; a batch answers with a list of these."""

    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]
    index: int | UnsetType = UNSET


def hidden_lists(states: list[bytes]) -> list[list[float]]:
    """Hidden states as JSON has them: one list per output token."""
    return [np.frombuffer(state, dtype="<f4").tolist() for state in states]


def routed_experts(output: Continuation) -> str:
    """Base64 of little-endian int32 [prompt and output tokens but the last, from `routed_start` on; layers; k]."""
    width = output.routed_width
    end = (len(output.prompt_ids) + len(output.ids) - 1) * width
    told = np.frombuffer(b"".join(output.routed), dtype="<i2")[output.item.routed_start * width : end]
    return b64encode(told.astype("<i4").tobytes()).decode()


class Renderer:
    """Writes outputs as `/generate` answers them."""

    def __init__(self, body: GenerateBody, tokenizer: Tokenizer | None, *, prompts: bool = True) -> None:
        """`prompts`: whether what is known of prompts is told; else it is empty."""
        self.body = body
        self._prompts = prompts
        wants_text = bool(body.return_text_in_logprobs) and tokenizer is not None
        self._text: Callable[[int], str] | None = tokenizer.token_text if wants_text and tokenizer is not None else None

    def answer(self, output: Continuation) -> dict[str, Any]:
        """The whole of an output so far."""
        meta = self.meta(output)
        if output.item.return_logprob:
            meta |= self._logprobs(output, 0)
            meta |= self._of_prompt(output)
        if output.item.return_hidden:
            meta["hidden_states"] = hidden_lists(output.hidden)
        return {"text": output.text, "output_ids": output.ids, "meta_info": meta}

    def _of_prompt(self, output: Continuation) -> dict[str, Any]:
        return native_prompt(output, self._text) if self._prompts else {"input_token_logprobs": []}

    def news(self, output: Continuation, first: bool) -> dict[str, Any]:
        """Only what the last iteration added. Prompt logprobs come with the first news."""
        meta = self.meta(output)
        if output.item.return_logprob:
            meta |= self._logprobs(output, output.new_from)
            if first:
                meta |= self._of_prompt(output)
        if output.item.return_hidden:
            meta["hidden_states"] = hidden_lists(output.hidden[output.new_from :])
        return {"text": output.delta, "output_ids": output.ids[output.new_from :], "meta_info": meta}

    def meta(self, output: Continuation) -> dict[str, Any]:
        """Of `meta_info` what every answer has."""
        meta: dict[str, Any] = {
            "id": output.id,
            "finish_reason": output.finish,
            "prompt_tokens": output.prompt_tokens,
            "completion_tokens": output.completion_tokens,
            "cached_tokens": output.cached_tokens,
            "cached_tokens_details": _sources(output),
            "weight_version": output.version,
            "e2e_latency": time.monotonic() - output.arrival,
            "queue_time": output.queue_seconds,
            "dp_rank": output.dp_rank if output.dp_rank >= 0 else None,
        }
        if output.spans:
            meta["weight_versions"] = output.versions()
        if output.drafts:
            meta |= speculation(output)
        if output.passes:
            meta |= {"dllm_passes": output.passes, "tokens_per_forward": output.completion_tokens / output.passes}
        if output.item.return_routed and output.finish is not None:
            meta["routed_experts"] = routed_experts(output)
        if self.body.return_prompt_token_ids:
            meta["prompt_token_ids"] = output.prompt_ids
        return meta

    def _logprobs(self, output: Continuation, begin: int) -> dict[str, Any]:
        known, text = output.logprobs, self._text
        found: dict[str, Any] = {
            "output_token_logprobs": native_triples(known.values[begin:], output.ids[begin:], text)
        }
        if output.item.top_logprobs:
            found["output_top_logprobs"] = native_pairs(known.top[begin:], text)
        if output.item.token_ids_logprob:
            found["output_token_ids_logprobs"] = native_pairs(known.chosen[begin:], text)
        return found


def speculation(output: Continuation) -> dict[str, Any]:
    """The fields of `meta_info` that tell of drafts: complete with the last event.

    Every decode step counts as one that verifies, with drafts or without: `spec_accept_length` is tokens a step.
    """
    jumped, proposed, *histogram = output.drafts
    correct = sum(count * steps for count, steps in enumerate(histogram))
    steps = max(0, output.completion_tokens - jumped - correct)
    return {
        "spec_verify_ct": steps,
        "spec_accept_length": (steps + correct) / steps if steps else 0.0,
        "spec_accept_rate": correct / proposed if proposed else 0.0,
        "spec_num_correct_drafts": correct,
        "spec_num_proposed_drafts": proposed,
        "spec_correct_drafts_histogram": histogram,
        "spec_accept_token_num": correct,
        "spec_draft_token_num": proposed,
    }


class Cumulative:
    """One output's stream of cumulative events. What was encoded once is kept as bytes and only appended to."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._text = bytearray(b'"')
        self._ids = bytearray(b"[")
        self._lists: dict[str, bytearray] = {}
        self._first = True

    def render(self, output: Continuation) -> dict[str, Any]:
        news = self._renderer.news(output, self._first)
        self._first = False
        text, ids = self.grow(news["text"], news["output_ids"])
        meta = news["meta_info"]
        for name in [key for key in meta if key.startswith(("output_", "input_", "hidden_"))]:
            _extend(self._lists.setdefault(name, bytearray(b"[")), meta[name])
        for name, data in self._lists.items():
            meta[name] = msgspec.Raw(data + b"]")
        return {
            "text": msgspec.Raw(text),
            "output_ids": msgspec.Raw(ids),
            "meta_info": meta,
        }

    def grow(self, text: str, ids: list[int]) -> tuple[bytes, bytes]:
        """All of the text and of the ids, encoded, with these at their ends."""
        self._text += _encode(text)[1:-1]
        _extend(self._ids, ids)
        return bytes(self._text) + b'"', bytes(self._ids) + b"]"


class PlainEvents:
    """The events of an output between its first and its last: encoded once around what changes from one to the next.

    Args:
        renderer: writes whole events, for an output without logprobs and hidden states.
        kept: what has been written of a stream of cumulative events; None: each event brings only what is new.
        index: of the output in the answer, where the answer has several.
    """

    def __init__(self, renderer: Renderer, kept: Cumulative | None, index: int | None) -> None:
        self._renderer, self._kept, self._index = renderer, kept, index
        self._parts: list[bytes] = []
        self._of: tuple[int, float, str] | None = None  # what the parts were made for

    def __call__(self, output: Continuation, text: str) -> bytes:
        if self._of != (output.cached_tokens, output.queue_seconds, output.version):
            self._prepare(output)
        fresh = output.ids[output.new_from :]
        if self._kept is None:
            said, ids = _encode(text), _encode(fresh)
        else:
            said, ids = self._kept.grow(text, fresh)
        begin, between, meta, latency, end = self._parts
        seconds = _encode(time.monotonic() - output.arrival)
        count = _encode(output.completion_tokens)
        return b"".join((begin, said, between, ids, meta, count, latency, seconds, end))

    def _prepare(self, output: Continuation) -> None:
        marks = [uuid.uuid4().hex.encode() for _ in range(4)]
        said, ids, count, seconds = map(msgspec.Raw, marks)
        meta = self._renderer.meta(output) | {"completion_tokens": count, "e2e_latency": seconds}
        data: dict[str, Any] = {"text": said, "output_ids": ids, "meta_info": meta}
        if self._index is not None:
            data["index"] = self._index
        rest, self._parts = b"data: " + _encode(data) + b"\n\n", []
        for mark in marks:
            part, _, rest = rest.partition(mark)
            self._parts.append(part)
        self._parts.append(rest)
        self._of = (output.cached_tokens, output.queue_seconds, output.version)


def _extend(data: bytearray, items: list[Any]) -> None:
    if items:
        if len(data) > 1:
            data += b","
        data += _encode(items)[1:-1]


def _sources(output: Continuation) -> dict[str, int]:
    """Where the cached tokens were found."""
    host, storage = output.cached_host, output.cached_storage
    found = {"device": output.cached_tokens - host - storage, "host": host}
    return {**found, "storage": storage} if storage else found


def strip(answers: list[dict[str, Any]], single: bool) -> dict[str, Any] | list[dict[str, Any]]:
    return answers[0] if single and len(answers) == 1 else answers
