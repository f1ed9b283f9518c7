"""From a `/v1/score` body to a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams

if TYPE_CHECKING:
    from phloem.protocol.score.body import ScoreBody


def to_request(body: ScoreBody) -> GenerateRequest:
    """One prompt per item.

    Raises:
        BadRequest: where fields are missing or do not fit together.
    """
    labels = body.label_token_ids or []
    if not labels:
        raise BadRequest("label_token_ids: at least one is needed", param="label_token_ids")
    rid = body.rid or new_id("score-")
    items = [
        Item(
            sampling=SamplingParams(max_new_tokens=1, temperature=0.0),
            text=prompt if isinstance(prompt, str) else None,
            ids=prompt if isinstance(prompt, list) else None,
            id=f"{rid}-{at}",
            return_logprob=True,
            token_ids_logprob=labels,
            priority=body.priority or 0,
        )
        for at, prompt in enumerate(_prompts(body))
    ]
    return GenerateRequest(items)


def both_texts(body: ScoreBody) -> tuple[list[str], list[str]]:
    """`text_1` and `text_2` as lists. Raises BadRequest where one is missing."""
    for name, value in (("text_1", body.text_1), ("text_2", body.text_2)):
        if not value and value != "":
            raise BadRequest(f"{name} is needed", param=name)
    first, second = ([text] if isinstance(text, str) else list(text or ()) for text in (body.text_1, body.text_2))
    return first, second


def _prompts(body: ScoreBody) -> list[str | list[int]]:
    """Query and item in one, for each item; both texts, or both token ids."""
    query, items = body.query, body.items
    if query is None or items is None:
        name = "query" if query is None else "items"
        raise BadRequest(f"{name} is needed", param=name)
    found: list[str | list[int]] = []
    ids = [item for item in items if isinstance(item, int)]
    several = [items] if isinstance(items, str) else [ids] if ids and len(ids) == len(items) else items
    for at, item in enumerate(several):
        if isinstance(query, str) and isinstance(item, str):
            found.append(item + query if body.item_first else query + item)
            continue
        if not (isinstance(query, list) and isinstance(item, list)):
            raise BadRequest(f"items[{at}]: query and items are both texts or both token ids", param="items")
        found.append(item + query if body.item_first else query + item)
    if not found:
        raise BadRequest("items: at least one is needed", param="items")
    return found
