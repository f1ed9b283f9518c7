"""From the sampling fields of a request body to `SamplingParams`."""

from __future__ import annotations

import json
from typing import Any

from phloem.client.processors import named
from phloem.core.request import RECOMMENDED, SamplingParams
from phloem.grammar.schema.numbers import all_doubles
from phloem.protocol.fields import OpenAIBody
from phloem.protocol.generate.body import SamplingBody
from phloem.protocol.structured import check, constraint_fields

_SAME = (
    "min_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "n",
    "logit_bias",
    "sampling_seed",
)
_OPENAI_NAMES = {"min_new_tokens": "min_tokens", "sampling_seed": "seed"}


def native_params(body: SamplingBody | None, processor: str | None = None) -> SamplingParams:
    """`sampling_params` of `/generate`; unset fields have the defaults of `SamplingParams`."""
    body = body if body is not None else SamplingBody()
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    values["max_new_tokens"] = body.max_new_tokens
    values["processors"] = named(processor, all_doubles(body.custom_params))
    return _params({**values, **constraint_fields(body)}, body)


def openai_params(body: OpenAIBody, max_tokens: int | None, defaults: dict[str, Any] | None = None) -> SamplingParams:
    """Sampling fields of the OpenAI routes. `max_tokens` None: as much as the context holds.

    `defaults`: what the model recommends (`core.request.recommended`), for fields that the request leaves unset.
    """
    values: dict[str, Any] = {name: getattr(body, _OPENAI_NAMES.get(name, name)) for name in _SAME}
    for name in RECOMMENDED:
        if values[name] is None:
            values[name] = (defaults or {}).get(name)
    if values["top_k"] == 0:
        values["top_k"] = -1  # vLLM's other way to say off, which its clients send by default
    if body.seed is None:
        values["sampling_seed"] = body.sampling_seed
    values["processors"] = named(body.custom_logit_processor, all_doubles(body.custom_params))
    params = _params({**values, **constraint_fields(body)}, body)
    params.max_new_tokens = max_tokens
    return params


def openai_names(max_tokens: str, prompt_logprobs: str) -> dict[str, str]:
    """What clients of OpenAI's routes call fields that the engine knows by the names of `/generate` (`Item.names`).
    `max_tokens`, `prompt_logprobs`: by which they said how long an answer may be, and that its prompt's are wanted."""
    return {**_OPENAI_NAMES, "max_new_tokens": max_tokens, "logprob_start_len": prompt_logprobs}


def namespace(cache_salt: str | None, extra_key: str | None) -> str:
    """Requests share cached prefixes only with equal namespaces."""
    if not (cache_salt or extra_key):
        return ""
    return json.dumps([cache_salt or "", extra_key or ""])


def _params(values: dict[str, Any], body: SamplingBody | OpenAIBody) -> SamplingParams:
    stop, stop_regex = body.stop, body.stop_regex
    kept = {name: value for name, value in values.items() if value is not None}
    seed = kept.get("sampling_seed")
    if seed is not None and seed < 0:
        kept["sampling_seed"] = seed & (2**63 - 1)
    if stop:
        kept["stop"] = [stop] if isinstance(stop, str) else stop
    if stop_regex:
        kept["stop_regex"] = [stop_regex] if isinstance(stop_regex, str) else stop_regex
    if body.include_stop_str_in_output:
        kept["no_stop_trim"] = True
    params = SamplingParams(**kept)
    check(params)
    return params
