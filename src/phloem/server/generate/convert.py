"""`/generate` without HTTP: from its body to a `GenerateRequest`, from an `Continuation` to its answer.

The in-process engine answers in the same shape through the same functions.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from phloem.client.continuation import Continuation
from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import BadRequest
from phloem.server.logprobs import native_pairs, native_prompt, native_triples
from phloem.server.sampling import namespace, native_params

if TYPE_CHECKING:
    from phloem.server.protocol import GenerateBody
    from phloem.text.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


def is_batch(body: GenerateBody) -> bool:
    """Whether the answer is a list of prompts' answers."""
    ids = body.input_ids
    return isinstance(body.text, list) or (ids is not None and any(isinstance(item, list) for item in ids))


def to_request(body: GenerateBody) -> GenerateRequest:
    """Raises BadRequest where fields do not fit together."""
    prompts = _prompts(body)
    count = len(prompts)
    batch = is_batch(body)
    each: Callable[[str, Any], list[Any]] = lambda name, default: _spread(body, name, count, batch, default)  # noqa: E731
    params = each("sampling_params", None)
    ids = each("rid", None)
    wants = each("return_logprob", False)
    starts = each("logprob_start_len", -1)
    tops = each("top_logprobs_num", 0)
    processors, steps = each("custom_logit_processor", None), each("session_params", None)
    hidden = each("return_hidden_states", False)
    salts, keys = each("cache_salt", None), each("extra_key", None)
    chosen = _chosen(body, count)
    items: list[Item] = []
    for at, prompt in enumerate(prompts):
        sampling = params[at]
        items.append(
            Item(
                sampling=native_params(sampling, processors[at]),
                text=prompt if isinstance(prompt, str) else None,
                ids=prompt if isinstance(prompt, list) else None,
                id=_rid(ids, at, body.rid, count),
                return_logprob=bool(wants[at]),
                logprob_start=starts[at],
                top_logprobs=tops[at] if wants[at] else 0,
                token_ids_logprob=chosen[at] if wants[at] else [],
                priority=body.priority or 0,
                reasons=bool(body.require_reasoning),
                namespace=namespace(salts[at], keys[at]),
                return_hidden=bool(hidden[at]),
                session=steps[at].step() if steps[at] is not None else None,
                thinking_budget=body.max_thinking_tokens,
                stream_interval=(sampling.stream_interval if sampling is not None else None) or 1,
            )
        )
    return GenerateRequest(items, bool(body.stream), bool(body.background))


def _prompts(body: GenerateBody) -> list[str | list[int]]:
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("exactly one of text and input_ids is needed", param="text")
    if body.text is not None:
        found: list[Any] = body.text if isinstance(body.text, list) else [body.text]
    else:
        found = split_ids(body.input_ids or [], "input_ids")
    if not found:
        raise BadRequest("the batch is empty", param="text" if body.text is not None else "input_ids")
    return found


def split_ids(ids: list[int | list[int]], name: str) -> list[list[int]]:
    """One list of ids, or a list of such lists, as the latter. Raises BadRequest for a mixture."""
    nested = [item for item in ids if isinstance(item, list)]
    if nested and len(nested) != len(ids):
        raise BadRequest(f"{name} mixes token ids and lists of token ids", param=name)
    return nested if nested else [[item for item in ids if isinstance(item, int)]]


def _spread(body: GenerateBody, name: str, count: int, batch: bool, default: Any) -> list[Any]:
    """A per-item field: one value for all, or a list with one per prompt; null takes the default."""
    value = getattr(body, name)
    if not isinstance(value, list):
        return [default if value is None else value] * count
    if not batch and len(value) != 1:
        raise BadRequest(f"{name} is a list, but the prompt is a single one", param=name)
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} prompts", param=name)
    return [default if item is None else item for item in value]


def _chosen(body: GenerateBody, count: int) -> list[list[int]]:
    """`token_ids_logprob`: one list of ids for all prompts, or one (or null) for each."""
    given = body.token_ids_logprob
    if given is None:
        return [[]] * count
    flat = [item for item in given if isinstance(item, int)]
    if len(flat) == len(given):
        return [flat] * count
    if flat:
        raise BadRequest("token_ids_logprob mixes token ids and lists of token ids", param="token_ids_logprob")
    if len(given) != count:
        raise BadRequest(f"token_ids_logprob has {len(given)} entries for {count} prompts", param="token_ids_logprob")
    return [item if isinstance(item, list) else [] for item in given]


def _rid(ids: list[str | None], at: int, given: str | list[str] | None, count: int) -> str:
    rid = ids[at]
    if not rid:
        return new_id()
    # One id for a batch stands for all its items: they need their own towards the engine.
    return f"{rid}-{at}" if isinstance(given, str) and count > 1 else rid


def hidden_lists(states: list[bytes]) -> list[list[float]]:
    """Hidden states as JSON has them: one list per output token."""
    return [np.frombuffer(state, dtype="<f4").tolist() for state in states]


class Renderer:
    """Writes outputs as `/generate` answers them."""

    def __init__(self, body: GenerateBody, tokenizer: Tokenizer | None, weight_version: str) -> None:
        self.body = body
        self.weight_version = weight_version
        wants_text = bool(body.return_text_in_logprobs) and tokenizer is not None
        self._text: Callable[[int], str] | None = tokenizer.token_text if wants_text and tokenizer is not None else None

    def answer(self, output: Continuation) -> dict[str, Any]:
        """The whole of an output so far."""
        meta = self.meta(output)
        if output.item.return_logprob:
            meta |= self._logprobs(output, 0)
            meta |= native_prompt(output, self._text)
        if output.item.return_hidden:
            meta["hidden_states"] = hidden_lists(output.hidden)
        return {"text": output.text, "output_ids": output.ids, "meta_info": meta}

    def news(self, output: Continuation, first: bool) -> dict[str, Any]:
        """Only what the last iteration added. Prompt logprobs come with the first news."""
        meta = self.meta(output)
        if output.item.return_logprob:
            meta |= self._logprobs(output, output.new_from)
            if first:
                meta |= native_prompt(output, self._text)
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
            "cached_tokens_details": {"device": output.cached_tokens, "host": 0},
            "weight_version": self.weight_version,
            "e2e_latency": time.monotonic() - output.arrival,
            "queue_time": output.queue_seconds,
            "dp_rank": None,
        }
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
        self._of: tuple[int, float] | None = None  # what the parts were made for

    def __call__(self, output: Continuation, text: str) -> bytes:
        if self._of != (output.cached_tokens, output.queue_seconds):
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
        self._of = (output.cached_tokens, output.queue_seconds)


def _extend(data: bytearray, items: list[Any]) -> None:
    if items:
        if len(data) > 1:
            data += b","
        data += _encode(items)[1:-1]


def strip(answers: list[dict[str, Any]], single: bool) -> dict[str, Any] | list[dict[str, Any]]:
    return answers[0] if single and len(answers) == 1 else answers
