"""From a `/generate` body to a request; the in-process engine asks through the same functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import BadRequest
from phloem.multimodal import KINDS
from phloem.protocol.fields import dp_rank
from phloem.protocol.media import of_prompts, with_sound
from phloem.protocol.promises import promise
from phloem.protocol.rooms import place
from phloem.protocol.sampling import namespace, native_params

if TYPE_CHECKING:
    from phloem.protocol.generate.body import GenerateBody


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
    starts = each("logprob_start_len", None)
    tops = each("top_logprobs_num", 0)
    processors, steps = each("custom_logit_processor", None), each("session_params", None)
    hidden, routed = each("return_hidden_states", False), each("return_routed_experts", False)
    salts, keys = each("cache_salt", None), each("extra_key", None)
    adapters = each("lora_path", None)
    chosen = _chosen(body, count)
    media = [of_prompts(getattr(body, f"{kind}_data"), f"{kind}_data", count, batch, kind) for kind in KINDS]
    watched = body.use_audio_in_video, body.mm_processor_kwargs
    items: list[Item] = []
    for at, prompt in enumerate(prompts):
        sampling = params[at]
        drawn = native_params(sampling, processors[at])
        # Logprobs of a request that generates nothing can only be meant of its prompt.
        start = 0 if drawn.max_new_tokens == 0 and wants[at] else -1
        items.append(
            Item(
                sampling=drawn,
                text=prompt if isinstance(prompt, str) else None,
                ids=prompt if isinstance(prompt, list) else None,
                id=_rid(ids, at, body.rid, count),
                return_logprob=bool(wants[at]),
                logprob_start=start if starts[at] is None else starts[at],
                top_logprobs=tops[at] if wants[at] else 0,
                token_ids_logprob=chosen[at] if wants[at] else [],
                priority=body.priority or 0,
                reasons=bool(body.require_reasoning),
                namespace=namespace(salts[at], keys[at]),
                adapter=adapters[at] or "",
                return_hidden=bool(hidden[at]),
                return_routed=bool(routed[at]),
                routed_start=body.routed_experts_start_len or 0,
                session=steps[at].step() if steps[at] is not None else None,
                thinking_budget=body.max_thinking_tokens,
                dp_rank=dp_rank(body),
                pictures=with_sound([source for each in media for source in each[at]], *watched),
                stream_interval=(sampling.stream_interval if sampling is not None else None) or 1,
            )
        )
    place(items, body)
    promise(items, body)
    return GenerateRequest(items, bool(body.stream), bool(body.background))


def _prompts(body: GenerateBody) -> list[str | list[int]]:
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("exactly one of text and input_ids is needed", param="text")
    if body.text is not None:
        found: list[Any] = body.text if isinstance(body.text, list) else [body.text]
    else:
        found = [*split_ids(body.input_ids or [], "input_ids")]
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
