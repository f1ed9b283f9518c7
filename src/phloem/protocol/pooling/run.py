"""What is asked of a model that does not generate, from texts to results: for HTTP and for `Engine` alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phloem.client.pooled import pooled_request, vectors
from phloem.core.errors import BadRequest
from phloem.protocol.pooling.convert import activated, finished, prefixed, reading_of, side_prompt, unit, with_prompt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from numpy.typing import NDArray

    from phloem.checkpoint.pooling import Pooling
    from phloem.client.client import EngineClient
    from phloem.client.continuation import Continuation
    from phloem.client.pooled import Reading, Text
    from phloem.client.request import GenerateRequest
    from phloem.protocol.pooling.body import EmbeddingsBody

    Vector = NDArray[np.float32]
    Collect = Callable[[GenerateRequest], Awaitable[list[Continuation]]]


@dataclass(frozen=True)
class Results:
    """One for each text (or pair), and the tokens that were read for all of them."""

    values: list[Vector]
    tokens: int
    outputs: list[Continuation]


class Pool:
    """Runs texts through the engine of a client. `collect` submits a request and waits for its end."""

    def __init__(self, client: EngineClient, collect: Collect) -> None:
        client.info.check_pooled(True)
        self._client, self._collect = client, collect

    @property
    def pooling(self) -> Pooling:
        pooling = self._client.info.pooling
        assert pooling is not None  # `check_pooled`
        return pooling

    async def raw(self, texts: Sequence[Text], reading: Reading) -> Results:
        """What the model makes of texts, as it is."""
        outputs = await self._collect(await pooled_request(self._client, texts, reading))
        found = vectors(outputs)
        if self.pooling.task == "tokens":
            found = [one.reshape(-1, self.pooling.size) for one in found]
        return Results(found, sum(output.prompt_tokens for output in outputs), outputs)

    async def embeddings(self, texts: Sequence[Text], body: EmbeddingsBody) -> Results:
        """Vectors, as `/v1/embeddings` gives them."""
        self.must_be("embed")
        finished([], self.pooling, body.dimensions, body.normalize)  # refused before anything is computed
        found = await self.raw(with_prompt(texts, body, self.pooling), reading_of(body, "input"))
        values = finished(found.values, self.pooling, body.dimensions, body.normalize)
        return Results(values, found.tokens, found.outputs)

    async def pairs(
        self, firsts: Sequence[str], seconds: Sequence[str], reading: Reading, activate: bool | None = None
    ) -> Results:
        """A score for each pair: of a cross-encoder what it says, of vectors the cosine. `firsts`: one, or as many."""
        self.must_be("embed", "score", "classify")
        if not seconds:
            raise BadRequest(f"{reading.param}: at least one text is needed", param=reading.param)
        if len(firsts) not in (1, len(seconds)):
            raise BadRequest(
                f"{reading.param}: {len(firsts)} texts on one side and {len(seconds)} on the other", param=reading.param
            )
        if self.pooling.task == "embed":
            return await self._cosines(firsts, seconds, reading)
        if len(self.pooling.labels) != 1:
            raise BadRequest(
                f"this model has {len(self.pooling.labels)} labels, a score has one: use /classify", param="model"
            )
        each = list(firsts) * (len(seconds) if len(firsts) == 1 else 1)
        found = await self.raw(list(zip(each, seconds, strict=True)), reading)
        return Results([activated(one, self.pooling, activate) for one in found.values], found.tokens, found.outputs)

    async def _cosines(self, firsts: Sequence[str], seconds: Sequence[str], reading: Reading) -> Results:
        asked = prefixed(firsts, side_prompt(self.pooling, "query"))
        found = await self.raw([*asked, *prefixed(seconds, side_prompt(self.pooling, "document"))], reading)
        units = [unit(one) for one in found.values]
        left, right = units[: len(firsts)], units[len(firsts) :]
        scores = [np.array([left[at if len(left) > 1 else 0] @ one], np.float32) for at, one in enumerate(right)]
        return Results(scores, found.tokens, found.outputs)

    def must_be(self, *tasks: str) -> None:
        """Raises BadRequest unless the model is for one of these."""
        if self.pooling.task not in tasks:
            raise self._client.info.wrong_task()
