"""From bodies to texts, and from vectors to what was asked for. Order: dense layers, `dimensions`, length 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from phloem.client.pooled import Reading
from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.checkpoint.pooling import Pooling
    from phloem.client.pooled import Text
    from phloem.protocol.pooling.body import Document, EmbeddingsBody, PooledBody

    Vector = NDArray[np.float32]

# What clients call the two sides of a search -> names of prompts that models have for them, the first that is there.
_SIDES = {
    "query": ("query", "s2p_query", "search_query"),
    "search_query": ("search_query", "query"),
    "document": ("document", "passage", "search_document"),
    "passage": ("passage", "document"),
    "search_document": ("search_document", "document", "passage"),
}


def texts_of(given: Any, param: str) -> list[Text]:
    """A text, several, token ids, or several lists of them: one entry each.

    Raises:
        BadRequest: texts and numbers stand side by side, or there is nothing.
    """
    if isinstance(given, str):
        return [given]
    items = cast("list[Any]", given or [])
    if not items:
        raise BadRequest(f"{param}: at least one text is needed", param=param)
    if all(isinstance(item, int) for item in items):
        return [items]
    if any(isinstance(item, int) for item in items):
        raise BadRequest(f"{param}: token ids and texts cannot stand side by side", param=param)
    return items


def reading_of(body: PooledBody, param: str, cut: int | None = None, instruction: str | None = None) -> Reading:
    """How the body's texts become tokens."""
    return Reading(
        truncate=body.truncate_prompt_tokens,
        special=body.add_special_tokens is not False,
        priority=body.priority or 0,
        rid=body.rid,
        param=param,
        cut=cut,
        instruction=instruction,
    )


def with_prompt(texts: Sequence[Text], body: EmbeddingsBody, pooling: Pooling) -> list[Text]:
    """With the prompt before each text that the body asks for, or the model's default."""
    if body.prompt is not None:
        return prefixed(texts, body.prompt)
    name = body.prompt_name
    if name is not None and name not in pooling.prompts:
        known = ", ".join(sorted(pooling.prompts)) or "none"
        raise BadRequest(f"prompt_name: no prompt {name!r:.100}; the model has {known}", param="prompt_name")
    if body.input_type is not None and name is None:
        return prefixed(texts, side_prompt(pooling, body.input_type))
    return prefixed(texts, pooling.prompts.get(name or pooling.default_prompt, ""))


def side_prompt(pooling: Pooling, side: str) -> str:
    """The model's prompt for queries or for documents; "" where it has none."""
    names = _SIDES.get(side)
    if names is None:
        raise BadRequest(f"input_type: {side!r:.100} is not one of {', '.join(_SIDES)}", param="input_type")
    return next((pooling.prompts[name] for name in names if name in pooling.prompts), "")


def prefixed(texts: Sequence[Text], prompt: str) -> list[Text]:
    if not prompt:
        return list(texts)
    if any(not isinstance(text, str) for text in texts):
        return list(texts)  # token ids are whole as they are
    return [prompt + text for text in texts if isinstance(text, str)]


def finished(
    vectors: Sequence[Vector], pooling: Pooling, dimensions: int | None, normalize: bool | None
) -> list[Vector]:
    """Cut to `dimensions`, and of length 1 where the model or the body says so.

    Raises:
        BadRequest: vectors of this model may not be cut, or not so.
    """
    if dimensions is not None:
        _check_dimensions(pooling, dimensions)
        vectors = [vector[:dimensions] for vector in vectors]
    cut = dimensions is not None and dimensions != pooling.size
    if not (pooling.normalize or cut if normalize is None else normalize):
        return list(vectors)
    return [unit(vector) for vector in vectors]


def unit(vector: Vector) -> Vector:
    return vector / np.maximum(np.linalg.norm(vector), np.float32(1e-12))


def _check_dimensions(pooling: Pooling, dimensions: int) -> None:
    allowed, size = pooling.dimensions, pooling.size
    if dimensions == size:
        return
    if allowed is None:
        why = f"this model's vectors have {size} numbers and were not trained to be cut"
    elif allowed and dimensions not in allowed:
        why = f"{dimensions} is not one of {', '.join(map(str, allowed))}"
    elif not 0 < dimensions <= size:
        why = f"{dimensions} is not in [1, {size}]"
    else:
        return
    raise BadRequest(f"dimensions: {why}", param="dimensions")


def activated(logits: Vector, pooling: Pooling, wanted: bool | None) -> Vector:
    """Logits [.., labels] as scores: by the model's own activation, which `wanted` leaves out or, for a model that has
    none, puts there."""
    kind = pooling.activation
    if wanted is False:
        return logits
    if wanted and kind == "none":
        kind = "sigmoid" if len(pooling.labels) == 1 else "softmax"
    if kind == "sigmoid":
        return (1.0 / (1.0 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    if kind == "softmax":
        wide = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        return (wide / wide.sum(-1, keepdims=True)).astype(np.float32)
    return logits


def document_text(document: Document, at: int, fields: Sequence[str] | None) -> str:
    """A document's text: itself, its `text`, its parts of content, or the fields that it is ranked by."""
    if isinstance(document, str):
        return document
    if fields:
        return "\n".join(f"{name}: {document[name]}" for name in fields if name in document)
    content = document.get("content")
    if isinstance(content, list):
        parts: list[Any] = cast("list[Any]", content)
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            return "".join(str(part["text"]) for part in parts)
    text = document.get("text", content)
    if not isinstance(text, str):
        raise BadRequest(f"documents[{at}]: expected a text or an object with a text", param="documents")
    return text
