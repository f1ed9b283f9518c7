"""Backends that speak `/generate`: prompts are text, likelihoods of given text can be asked for."""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from phloem.core.errors import BadRequest, PhloemError
from phloem.lang.backends._base import Answer, Backend, Meta, Prompt, media_object, media_url
from phloem.lang.chat import ChatFormat
from phloem.lang.choices import ChoicesDecision, ChoicesMethod, Scored
from phloem.lang.ir import Sampling

HEALING = 4  # tokens in front of a choice that may be cut otherwise once the choice follows
_NOTHING = {"max_new_tokens": 0, "temperature": 0.0}


class NativeBackend(Backend):
    """What an in-process engine and a server have in common; they differ in how a body is sent.

    `sharing=False` is for comparisons: every request gets a `cache_salt` of its own and so finds nothing in the cache,
    choices are scored one by one, and no request is made whose only use is to fill the cache.
    """

    def __init__(self, sharing: bool = True) -> None:
        self.sharing = sharing
        self._lock = threading.Lock()
        self._format: ChatFormat | None = None
        self._neutral: list[int] | None = None

    def post(self, body: dict[str, Any]) -> Any:
        """Send a `/generate` body; gives the answer, or a list of answers."""
        raise NotImplementedError

    def post_stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a `/generate` body; gives answers whose `text` is all so far."""
        raise NotImplementedError

    def make_format(self) -> ChatFormat:
        raise NotImplementedError

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    @property
    def format(self) -> ChatFormat:
        with self._lock:
            if self._format is None:
                self._format = self.make_format()
            return self._format

    def _body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        params, beside = sampling.native()
        stops = [*sampling.stops(), *(stop for stop in self.format.stop if prompt.role == "assistant")]
        if stops:
            params["stop"] = stops
        body: dict[str, Any] = {"text": prompt.text, "sampling_params": params, **beside}
        for kind in ("image", "video"):
            found = [
                media_url(item) if item.frames is None else media_object(item)
                for item in prompt.media
                if item.kind == kind
            ]
            if found:
                body[f"{kind}_data"] = found
        return body

    def _send(self, body: dict[str, Any]) -> Any:
        return self.post(self._salted(body))

    def _salted(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self.sharing else {**body, "cache_salt": uuid.uuid4().hex}

    def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        answer = self._send(self._body(prompt, sampling))
        if isinstance(answer, list):
            return [one["text"] for one in answer], [one["meta_info"] for one in answer]
        return answer["text"], answer["meta_info"]

    def generate_stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[tuple[str, Meta]]:
        if (sampling.n or 1) > 1:
            raise BadRequest("a stream has one continuation: n must be 1", param="n")
        seen = 0
        for answer in self.post_stream(self._salted(self._body(prompt, sampling))):
            text: str = answer["text"]
            yield text[seen:], answer["meta_info"]
            seen = len(text)

    def cache_prefix(self, text: str) -> Meta | None:
        if not self.sharing:
            return None
        return self.post({"text": text, "sampling_params": _NOTHING})["meta_info"]

    def select(self, prompt: Prompt, choices: list[str], method: ChoicesMethod) -> ChoicesDecision:
        """Each choice is scored as a continuation of the prompt; all share the prompt's cached prefix."""
        first = self.cache_prefix(prompt.text)  # so that every choice finds it
        count = len(self.encode(prompt.text, True)) if first is None else first["prompt_tokens"]
        start = max(count - HEALING, 0)
        body: dict[str, Any] = {
            "text": [prompt.text + choice for choice in choices],
            "sampling_params": _NOTHING,
            "return_logprob": True,
            "logprob_start_len": start,
        }
        answers = self._each(body, "text")
        scored = self._scored(
            choices, [answer["meta_info"]["input_token_logprobs"] for answer in answers], count - start
        )
        if method.needs_unconditional:
            scored.unconditional = self._unconditional(scored)
        decision = method(scored)
        metas = [answer["meta_info"] for answer in answers] + ([first] if first is not None else [])
        for name in ("prompt_tokens", "cached_tokens"):
            decision.meta_info[name] = sum(meta[name] or 0 for meta in metas)
        return decision

    def _each(self, body: dict[str, Any], field: str) -> list[dict[str, Any]]:
        """The answers to a body with several prompts: in one request where they share, else one by one."""
        if self.sharing:
            return self.post(body)
        return [self._send({**body, field: item}) for item in body[field]]

    @staticmethod
    def _scored(choices: list[str], rows: list[list[list[Any]]], before: int) -> Scored:
        """Cut each row where the choices' tokens begin: behind what all rows share, and not behind the prompt.

        A choice may change how the prompt's last tokens are cut; those places are then scored too.
        """
        ids = [[int(entry[1]) for entry in row] for row in rows]
        common = 0
        limit = min(before, *(len(row) - 1 for row in ids))
        while common < limit and len({row[common] for row in ids}) == 1:
            common += 1
        logprobs = [[-math.inf if entry[0] is None else float(entry[0]) for entry in row] for row in rows]
        if common == 0:  # the first token of all has no likelihood
            common = int(any(row[0][0] is None for row in rows) and limit > 0)
        return Scored(choices, [row[common:] for row in ids], [row[common:] for row in logprobs])

    def _unconditional(self, scored: Scored) -> list[list[float]]:
        """The choices' tokens behind nothing but what every prompt begins with (or a line break)."""
        with self._lock:
            if self._neutral is None:
                self._neutral = self.encode("", True) or self.encode("\n", False)
            neutral = self._neutral
        body: dict[str, Any] = {
            "input_ids": [neutral + row for row in scored.ids],
            "sampling_params": _NOTHING,
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answers = self._each(body, "input_ids")
        found: list[list[float]] = []
        for answer, row in zip(answers, scored.ids, strict=True):
            values = answer["meta_info"]["input_token_logprobs"][-len(row) :]
            if len(values) != len(row):
                raise PhloemError("the server gave fewer log-probabilities than tokens were sent")
            found.append([float(entry[0]) for entry in values])
        return found
