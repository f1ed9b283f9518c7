"""Requests to a model that does not generate: texts, pairs of texts or token ids, cut to length where that is asked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phloem.client.admission import THREAD_CHARACTERS
from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.checkpoint.pooling import Judge
    from phloem.client.client import EngineClient
    from phloem.client.continuation import Continuation

Text = str | tuple[str, str] | list[int]  # a text, a pair of them, or token ids


@dataclass(frozen=True, slots=True)
class Reading:
    """How texts become tokens. `truncate`: most tokens of each; -1: as many as the model takes; None: what is too long
    is refused."""

    truncate: int | None = None
    special: bool = True
    priority: int = 0
    rid: str | list[str] | None = None  # of the request, or of each text
    param: str = "input"  # the field that the texts stand in
    cut: int | None = None  # most tokens of a pair's second text, before all else
    instruction: str | None = None  # to a model that is asked in words


async def pooled_request(client: EngineClient, texts: Sequence[Text], reading: Reading) -> GenerateRequest:
    """One item for each text.

    Raises:
        BadRequest: there is none, one is too long, or the model is not for this; it names the field.
    """
    client.info.check_pooled(True)
    if not texts:
        raise BadRequest(f"{reading.param}: at least one text is needed", param=reading.param)
    size = sum(map(_characters, texts))
    make = _Maker(client, reading)
    found = await asyncio.to_thread(make.items, texts) if size > THREAD_CHARACTERS else make.items(texts)
    return GenerateRequest(found)


def vectors(outputs: Sequence[Continuation]) -> list[NDArray[np.float32]]:
    """What the model has made of each text."""
    return [np.frombuffer(output.pooled, dtype="<f4") for output in outputs]


def _characters(text: Text) -> int:
    if isinstance(text, str):
        return len(text)
    return 0 if isinstance(text, list) else len(text[0]) + len(text[1])


class _Maker:
    def __init__(self, client: EngineClient, reading: Reading) -> None:
        self._tokenizer, self._info, self._reading = client.tokenizer, client.info, reading
        asked = reading.truncate
        if asked is not None and (asked < -1 or asked == 0):
            raise BadRequest(
                f"truncate_prompt_tokens must be -1 or at least 1, got {asked}", param="truncate_prompt_tokens"
            )
        context = self._info.context_length
        self._most = context if asked is None or asked == -1 else min(asked, context)

    def items(self, texts: Sequence[Text]) -> list[Item]:
        rid, found = self._reading.rid or new_id("pool-"), self._tokens(texts)
        if isinstance(rid, list) and len(rid) != len(found):
            raise BadRequest(f"rid: {len(rid)} ids for {len(found)} texts", param="rid")
        if isinstance(rid, str):
            rid = [rid] if len(found) == 1 else [f"{rid}-{at}" for at in range(len(found))]
        return [
            Item(
                sampling=SamplingParams(max_new_tokens=0),
                ids=ids,
                id=own,
                priority=self._reading.priority,
                pooled=True,
                second=second,
            )
            for own, (ids, second) in zip(rid, found, strict=True)
        ]

    def _tokens(self, texts: Sequence[Text]) -> list[tuple[list[int], int]]:
        judge = self._info.pooling.judge if self._info.pooling is not None else None
        if judge is not None:
            return [self._asked(judge, text, at) for at, text in enumerate(texts)]
        plain = [text for text in texts if not isinstance(text, list)]
        if plain and self._tokenizer is None:
            raise BadRequest("no tokenizer is loaded: send token ids", param=self._reading.param)
        if self._info.pooling is not None and self._info.pooling.lower:
            plain = [text.lower() if isinstance(text, str) else (text[0].lower(), text[1].lower()) for text in plain]
        if self._reading.cut is not None:
            plain = [self._shortened(text) for text in plain]
        special = self._reading.special
        encoded = iter(zip(plain, self._tokenizer.encode_pairs(plain, special), strict=True) if self._tokenizer else ())
        found: list[tuple[list[int], int]] = []
        for at, text in enumerate(texts):
            if isinstance(text, list):
                found.append((self._fitting(text, at), 0))
                continue
            own, (ids, second) = next(encoded)
            if len(ids) > self._most and self._tokenizer is not None:
                self._refuse(len(ids), at)
                ids, second = self._tokenizer.encode_cut(own, self._most, special)
            found.append((ids or self._nothing(), second))
        return found

    def _asked(self, judge: Judge, text: Text, at: int) -> tuple[list[int], int]:
        """A pair in the words that the model is asked in; of too long a one the document is cut."""
        param, tokenizer = self._reading.param, self._tokenizer
        if not isinstance(text, tuple) or tokenizer is None:
            raise BadRequest(f"{param}[{at}]: this model is asked for pairs of texts: use /v1/rerank", param=param)
        question = judge.question(text[0], self._reading.instruction)
        before, document, after = tokenizer.encode_batch([question, text[1], judge.after], add_special_tokens=False)
        document = document[: self._reading.cut]
        room, whole = self._most - len(before) - len(after), len(before) + len(document) + len(after)
        if len(document) > room:
            self._refuse(whole, at)
            if room < 1:
                raise BadRequest(f"{param}[{at}]: {self._most} tokens have no room for both texts", param=param)
            document = document[:room]
        return [*before, *document, *after], 0

    def _shortened(self, text: str | tuple[str, str]) -> str | tuple[str, str]:
        """A pair whose second text has no more tokens than asked; its text is cut where the next one begins."""
        most, tokenizer = self._reading.cut, self._tokenizer
        if isinstance(text, str) or most is None or tokenizer is None:
            return text
        ends = tokenizer.backend.encode(text[1], add_special_tokens=False).offsets
        return (text[0], text[1][: ends[most - 1][1]]) if len(ends) > most else text

    def _fitting(self, ids: list[int], at: int) -> list[int]:
        if len(ids) > self._most:
            self._refuse(len(ids), at)
            return ids[: self._most]
        if not ids:
            raise BadRequest(f"{self._reading.param}[{at}]: no token ids", param=self._reading.param)
        return ids

    def _refuse(self, count: int, at: int) -> None:
        if self._reading.truncate is None:
            raise BadRequest(
                f"{self._reading.param}[{at}] has {count} tokens, the model takes {self._info.context_length}: "
                "truncate_prompt_tokens -1 leaves the rest out",
                param=self._reading.param,
                code="context_length_exceeded",
            )

    def _nothing(self) -> list[int]:
        """An empty text, where the tokenizer puts nothing around one."""
        bos = self._tokenizer.bos_id if self._tokenizer is not None else None
        return [bos if bos is not None else next(iter(self._info.eos_ids), 0)]
