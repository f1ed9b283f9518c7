"""Drafts from the request's own text, from its siblings' and from past answers of the same namespace.

After suffix decoding (Oliaro et al. 2024, arXiv 2411.04975): a text's own places first, and those of other answers
where they agree for longer. The store of answers is bounded by tokens; whole answers leave it, the oldest first.
Requests see only answers of their namespace, within which prefixes are shared too.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from phloem.speculation.drafters._base import Draft
from phloem.speculation.drafters._match import LONG, agreement
from phloem.speculation.drafters.ngram import Drafter as Own

if TYPE_CHECKING:
    from phloem.core.speculation import Wanted
    from phloem.speculation.texts import Text


ANSWERS = 4  # of a key, the latest


class Store:
    """Answers by the last tokens of each of their positions: of each key the latest places, in an answer one.

    `capacity`: tokens, prompts of the answers included.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._places: dict[tuple[object, ...], list[tuple[Text, int]]] = {}
        self._kept: deque[Text] = deque()
        self.tokens = 0

    def take(self, text: Text) -> None:
        """What has come of the text's output since the last time."""
        tokens, namespace = text.tokens, text.namespace
        if not text.shared:
            if text.num_prompt >= self._capacity or len(tokens) < text.num_prompt + 2:
                return
            self._kept.append(text)
            text.shared = max(text.num_prompt - 1, LONG - 1)
            self.tokens += text.shared
        for end in range(text.shared, len(tokens) - 1):
            places = self._places.setdefault((namespace, *tokens[end + 1 - LONG : end + 1]), [])
            if places and places[-1][0] is text:
                places[-1] = text, end
            else:
                del places[: len(places) - ANSWERS + 1]
                places.append((text, end))
        if len(tokens) - 1 > text.shared:
            self.tokens += len(tokens) - 1 - text.shared
            text.shared = len(tokens) - 1
        while self.tokens > self._capacity and len(self._kept) > 1:
            self._forget(self._kept.popleft())

    def find(self, text: Text, most: int) -> tuple[int, Text | None, int]:
        """(Tokens of the longest agreement in another answer, that one, where it ends there)."""
        best: tuple[int, Text | None, int] = 0, None, -1
        if len(text.tokens) < LONG:
            return best
        for other, end in reversed(self._places.get((text.namespace, *text.tokens[-LONG:]), ())):
            count = 0 if other is text else agreement(text.tokens, other.tokens, end, most)
            if count > best[0]:
                best = count, other, end
        return best

    def __len__(self) -> int:
        return len(self._kept)

    def _forget(self, text: Text) -> None:
        for end in range(max(text.num_prompt - 1, LONG - 1), text.shared):
            key = (text.namespace, *text.tokens[end + 1 - LONG : end + 1])
            left = [place for place in self._places.get(key, ()) if place[0] is not text]
            if left:
                self._places[key] = left
            else:
                self._places.pop(key, None)
        self.tokens -= text.shared
        text.shared = len(text.tokens) + (1 << 30)  # never taken again


class Drafter(Own):
    """Own places and the store's; the longer agreement wins, its own where both are as long."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.store = Store(wanted.capacity)

    def exact(self, text: Text, room: int) -> Draft | None:
        own = super().exact(text, room)
        self.store.take(text)
        count, other, end = self.store.find(text, self._most)
        if other is None or count < self._least or (own is not None and count <= own.matched):
            return own
        tokens = list(other.tokens[end + 1 : end + 1 + room])
        return Draft(tokens, "shared", count) if tokens else own

    def ended(self, text: Text) -> None:
        self.store.take(text)
        super().ended(text)

    def facts(self) -> dict[str, int]:
        return {"answers": len(self.store), "tokens": self.store.tokens}
