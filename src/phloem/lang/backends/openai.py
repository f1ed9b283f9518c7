"""OpenAI's API, and servers that speak it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from phloem.core.errors import BadRequest, PhloemError
from phloem.lang.backends._base import Answer, Backend, Meta, Prompt
from phloem.lang.chat import FORMATS, ChatFormat
from phloem.lang.choices import ChoicesDecision, ChoicesMethod, Scored
from phloem.lang.ir import Sampling

# Parameters of the API itself; those of the second list go to servers that extend it.
_SAME = ("temperature", "top_p", "n", "frequency_penalty", "presence_penalty", "logit_bias")
_EXTENSIONS = {
    "top_k": "top_k",
    "min_p": "min_p",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "regex": "regex",
    "ebnf": "ebnf",
    "structural_tag": "structural_tag",
    "stop_token_ids": "stop_token_ids",
    "stop_regex": "stop_regex",
    "ignore_eos": "ignore_eos",
    "no_stop_trim": "no_stop_trim",
    "skip_special_tokens": "skip_special_tokens",
    "spaces_between_special_tokens": "spaces_between_special_tokens",
    "lora_path": "lora_path",
    "priority": "priority",
    "cache_salt": "cache_salt",
    "extra_key": "extra_key",
}


class OpenAI(Backend):
    """Chat or text completions.

    Args:
        model_name: the API's name of the model.
        is_chat_model: None takes chat, but for `*-instruct` models of the text API.
        chat_template: a name of `phloem.lang.chat.FORMATS`, for `s.text()` alone.
        is_azure: use Azure's client.
        options: keywords of the client of the `openai` package (`api_key`, `base_url`, ...).
    """

    max_stops = 4

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: str | ChatFormat | None = None,
        is_azure: bool = False,
        **options: Any,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise PhloemError("this backend needs the openai package: pip install openai") from None
        self._failures: tuple[type[Exception], ...] = (openai.OpenAIError,)
        self._client: Any = openai.AzureOpenAI(**options) if is_azure else openai.OpenAI(**options)
        self.model_name = model_name
        self.chat_only = not model_name.endswith("-instruct") if is_chat_model is None else is_chat_model
        # The API proper refuses fields that it does not know; other servers take them.
        self._extends = "base_url" in options and "api.openai.com" not in str(options["base_url"])
        self._format = FORMATS[chat_template] if isinstance(chat_template, str) else chat_template
        if self._extends:
            self.max_stops = None

    @property
    def format(self) -> ChatFormat:
        return self._format or FORMATS["default"]

    def get_model_name(self) -> str:
        return self.model_name

    def shutdown(self) -> None:
        self._client.close()

    def _fields(self, sampling: Sampling) -> dict[str, Any]:
        given = sampling.given()
        fields: dict[str, Any] = {"model": self.model_name}
        fields |= {name: given.pop(name) for name in _SAME if name in given}
        extra: dict[str, Any] = {}
        for name, theirs in _EXTENSIONS.items():
            if name in given:
                value = given.pop(name)
                if not self._extends:
                    raise BadRequest(f"OpenAI's API has no {name}", param=name)
                extra[theirs] = value
        if "sampling_seed" in given:
            fields["seed"] = given.pop("sampling_seed")
        if "json_schema" in given:
            fields |= self._schema(given.pop("json_schema"), extra)
        self._stops(given, fields)
        limit = given.pop("max_new_tokens", None)
        if limit is not None:
            fields["max_completion_tokens" if self.chat_only and not self._extends else "max_tokens"] = limit
        if given.pop("return_logprob", False):
            fields["logprobs"] = True if self.chat_only else max(1, given.get("top_logprobs_num") or 1)
            if self.chat_only and given.get("top_logprobs_num"):
                fields["top_logprobs"] = given["top_logprobs_num"]
        for name in ("top_logprobs_num", "return_text_in_logprobs"):
            given.pop(name, None)
        if given:
            raise BadRequest(f"OpenAI's API has no {', '.join(given)}", param=next(iter(given)))
        if extra:
            fields["extra_body"] = extra
        return fields

    def _stops(self, given: dict[str, Any], fields: dict[str, Any]) -> None:
        stop = given.pop("stop", None)
        if stop:
            stops = [stop] if isinstance(stop, str) else list(stop)
            if self.max_stops is not None and len(stops) > self.max_stops:
                raise BadRequest(f"OpenAI's API takes {self.max_stops} stop strings, not {len(stops)}", param="stop")
            fields["stop"] = stops

    def _schema(self, schema: str, extra: dict[str, Any]) -> dict[str, Any]:
        import json

        if not self.chat_only:
            if not self._extends:
                raise BadRequest("OpenAI's text completions have no json_schema", param="json_schema")
            extra["json_schema"] = schema
            return {}
        value = {"name": "answer", "schema": json.loads(schema)}
        return {"response_format": {"type": "json_schema", "json_schema": value}}

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        if prompt.role != "assistant":
            raise BadRequest("a chat model writes only in the assistant's turn: put gen into assistant(...)")
        if prompt.partial:
            raise BadRequest(
                "this API cannot continue a turn that has begun: put gen first in assistant(...), "
                "or give the function num_api_spec_tokens"
            )
        return prompt.messages

    def _create(self, prompt: Prompt, fields: dict[str, Any]) -> Any:
        try:
            if self.chat_only:
                return self._client.chat.completions.create(messages=self._messages(prompt), **fields)
            if prompt.media:
                raise BadRequest("text completions take no images or videos")
            return self._client.completions.create(prompt=prompt.text, **fields)
        except self._failures as error:
            raise PhloemError(f"{type(error).__name__}: {error}") from error

    def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        answer = self._create(prompt, self._fields(sampling))
        usage = _usage(answer.usage)
        texts = [(choice.message.content or "") if self.chat_only else choice.text for choice in answer.choices]
        metas: list[Meta] = [
            {"id": answer.id, "finish_reason": {"type": choice.finish_reason}, **usage, **_logprobs(choice)}
            for choice in answer.choices
        ]
        return (texts, metas) if (sampling.n or 1) > 1 else (texts[0], metas[0])

    def generate_stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[tuple[str, Meta]]:
        if (sampling.n or 1) > 1:
            raise BadRequest("a stream has one continuation: n must be 1", param="n")
        fields = self._fields(sampling)
        stream = self._create(prompt, {**fields, "stream": True, "stream_options": {"include_usage": True}})
        meta: Meta = {}
        try:
            for chunk in stream:
                meta = {**meta, "id": chunk.id, **_usage(chunk.usage)}
                for choice in chunk.choices:
                    if choice.finish_reason:
                        meta["finish_reason"] = {"type": choice.finish_reason}
                    yield ((choice.delta.content if self.chat_only else choice.text) or ""), meta
        except self._failures as error:
            raise PhloemError(f"{type(error).__name__}: {error}") from error
        yield "", meta

    def select(self, prompt: Prompt, choices: list[str], method: ChoicesMethod) -> ChoicesDecision:
        """Text completions score the choices through `echo`; chat models are asked to repeat one of them."""
        return self._ask(prompt, choices) if self.chat_only else self._score(prompt, choices, method)

    def _score(self, prompt: Prompt, choices: list[str], method: ChoicesMethod) -> ChoicesDecision:
        if method.needs_unconditional:
            raise BadRequest("this method needs log-probabilities that OpenAI's API does not give")
        ids: list[list[int]] = []
        rows: list[list[float]] = []
        numbers: dict[str, int] = {}
        for choice in choices:
            whole = Prompt(prompt.text + choice)
            fields = {"model": self.model_name, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0.0}
            found = self._create(whole, fields).choices[0].logprobs
            if found is None or not found.text_offset:
                raise PhloemError("the server gives no log-probabilities of a prompt (echo with logprobs)")
            places = [
                at
                for at, offset in enumerate(found.text_offset)
                if offset + len(found.tokens[at]) > len(prompt.text) and found.token_logprobs[at] is not None
            ]
            rows.append([float(found.token_logprobs[at]) for at in places])
            ids.append([numbers.setdefault(found.tokens[at], len(numbers)) for at in places])
        return method(Scored(choices, ids, rows))

    def _ask(self, prompt: Prompt, choices: list[str]) -> ChoicesDecision:
        """No likelihoods of given text here: the model is told the choices, and must answer with one of them."""
        listed = "\n".join(f"- {choice}" for choice in choices)
        request = {"role": "user", "content": f"Answer with exactly one of these, and nothing else:\n{listed}"}
        longest = max(len(choice) for choice in choices)
        asked = Prompt(prompt.text, [*self._messages(prompt), request], "assistant")
        text, meta = self.generate(asked, Sampling(temperature=0.0, max_new_tokens=longest + 16))
        assert isinstance(text, str) and isinstance(meta, dict)
        said = text.strip().lower()
        for choice in sorted(choices, key=len, reverse=True):
            if said.startswith(choice.strip().lower()) or said.lstrip("-\"' ").startswith(choice.strip().lower()):
                return ChoicesDecision(choice, meta)
        raise PhloemError(f"asked for one of {choices}, the model answered {text!r:.200}")


def _usage(usage: Any) -> Meta:
    if usage is None:
        return {}
    details = getattr(usage, "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None) or 0
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": cached,
    }


def _logprobs(choice: Any) -> Meta:
    found = getattr(choice, "logprobs", None)
    return {} if found is None else {"logprobs": found.model_dump()}


BACKEND = OpenAI
