"""Backends that speak `/generate`: prompts are text, likelihoods of given text can be asked for."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

from phloem.core.errors import BadRequest, PhloemError
from phloem.lang.backends._base import Answer, Backend, Meta, Prompt, media_url
from phloem.lang.chat import ChatFormat
from phloem.lang.choices import ChoicesDecision, ChoicesMethod, Scored
from phloem.lang.ir import Sampling

HEALING = 4  # tokens in front of a choice that may be cut otherwise once the choice follows
_NOTHING = {"max_new_tokens": 0, "temperature": 0.0}


class NativeBackend(Backend):
    """What an in-process engine and a server have in common; they differ in how a body is sent."""

    def __init__(self) -> None:
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
            found = [media_url(item) for item in prompt.media if item.kind == kind]
            if found:
                body[f"{kind}_data"] = found
        return body

    def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        answer = self.post(self._body(prompt, sampling))
        if isinstance(answer, list):
            return [one["text"] for one in answer], [one["meta_info"] for one in answer]
        return answer["text"], answer["meta_info"]

    def generate_stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[tuple[str, Meta]]:
        if (sampling.n or 1) > 1:
            raise BadRequest("a stream has one continuation: n must be 1", param="n")
        seen = 0
        for answer in self.post_stream(self._body(prompt, sampling)):
            text: str = answer["text"]
            yield text[seen:], answer["meta_info"]
            seen = len(text)

    def cache_prefix(self, text: str) -> None:
        self.post({"text": text, "sampling_params": _NOTHING})

    def select(self, prompt: Prompt, choices: list[str], method: ChoicesMethod) -> ChoicesDecision:
        """Each choice is scored as a continuation of the prompt; all share the prompt's cached prefix."""
        count = self._count_and_cache(prompt)
        start = max(count - HEALING, 0)
        body: dict[str, Any] = {
            "text": [prompt.text + choice for choice in choices],
            "sampling_params": _NOTHING,
            "return_logprob": True,
            "logprob_start_len": start,
        }
        answers = self.post(body)
        scored = self._scored(
            choices, [answer["meta_info"]["input_token_logprobs"] for answer in answers], count - start
        )
        if method.needs_unconditional:
            scored.unconditional = self._unconditional(scored)
        decision = method(scored)
        decision.meta_info["prompt_tokens"] = sum(answer["meta_info"]["prompt_tokens"] for answer in answers)
        decision.meta_info["cached_tokens"] = sum(answer["meta_info"]["cached_tokens"] or 0 for answer in answers)
        return decision

    def _count_and_cache(self, prompt: Prompt) -> int:
        """Tokens of the prompt; computing them first lets every choice find them."""
        answer = self.post({"text": prompt.text, "sampling_params": _NOTHING})
        return answer["meta_info"]["prompt_tokens"]

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
        answers = self.post(body)
        if isinstance(answers, dict):
            answers = [answers]
        found: list[list[float]] = []
        for answer, row in zip(answers, scored.ids, strict=True):
            values = answer["meta_info"]["input_token_logprobs"][-len(row) :]
            if len(values) != len(row):
                raise PhloemError("the server gave fewer log-probabilities than tokens were sent")
            found.append([float(entry[0]) for entry in values])
        return found
