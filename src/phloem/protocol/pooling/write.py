"""Answers of models that do not generate."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any, Literal

from msgspec import UNSET, UnsetType

from phloem.protocol.answers import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.client.continuation import Continuation

    Vector = NDArray[np.float32]


class PooledUsage(Answer, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(Answer, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: PooledUsage


class RankedDocument(Answer, kw_only=True):
    text: str


class Ranked(Answer, kw_only=True):
    index: int
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class RerankAnswer(Answer, kw_only=True):
    """Jina's keys and Cohere's."""

    id: str
    model: str
    results: list[Ranked]
    usage: PooledUsage
    meta: dict[str, Any]


class Score(Answer, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoresAnswer(Answer, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PooledUsage


class Class(Answer, kw_only=True):
    """Of a text; of a model that labels tokens, lists with an entry for each of its tokens."""

    index: int
    label: str | list[str]
    probs: list[float | list[float]]
    num_classes: int


class ClassifyAnswer(Answer, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Class]
    usage: PooledUsage


class Encoded(Answer, kw_only=True):
    embedding: list[float | list[float]]
    meta_info: dict[str, Any]


def usage(tokens: int) -> PooledUsage:
    return PooledUsage(prompt_tokens=tokens, total_tokens=tokens)


def embedding(index: int, vector: Vector, base64: bool) -> Embedding:
    """A vector as numbers, or as the base64 of little-endian float32."""
    if base64:
        return Embedding(index=index, embedding=b64encode(vector.astype("<f4", copy=False).tobytes()).decode())
    return Embedding(index=index, embedding=vector.tolist())


def ranked(scores: Sequence[Vector], texts: Sequence[str] | None, top: int | None) -> list[Ranked]:
    """The best first, of equals the first; `top`: so many of them, 0 or None: all. `texts`: documents to be shown."""
    numbers = [float(score[0]) for score in scores]
    order = sorted(range(len(numbers)), key=lambda at: -numbers[at])[: top or None]
    return [
        Ranked(
            index=at,
            relevance_score=numbers[at],
            document=RankedDocument(text=texts[at]) if texts is not None else UNSET,
        )
        for at in order
    ]


def classes(index: int, scores: Vector, labels: Sequence[str]) -> Class:
    """The best label and every label's score; of a matrix, those of each token."""
    best: str | list[str] = labels[int(scores.argmax(-1))] if scores.ndim == 1 else []
    if scores.ndim > 1:
        best = [str(labels[int(at)]) for at in scores.argmax(-1)]
    return Class(index=index, label=best, probs=scores.tolist(), num_classes=len(labels))


def encoded(values: Vector, output: Continuation) -> Encoded:
    """SGLang's shape."""
    about = {"id": output.id, "prompt_tokens": output.prompt_tokens, "cached_tokens": 0, "finish_reason": None}
    return Encoded(embedding=values.tolist(), meta_info=about)
