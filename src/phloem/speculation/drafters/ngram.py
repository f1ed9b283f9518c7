"""Drafts from the request's own prompt and output: what followed the longest earlier place that ends as the text does.

Prompt lookup decoding (Saxena 2023), with the longest agreement of all kept places instead of a fixed length. Where few
tokens agree or none, what follows earlier lines of the output that have the form of the last one (`_forms`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.speculation.drafters import _forms
from phloem.speculation.drafters._base import Draft
from phloem.speculation.drafters._base import Drafter as Base
from phloem.speculation.drafters._match import LONG, after, agreement, candidates, index

if TYPE_CHECKING:
    from phloem.core.speculation import Wanted
    from phloem.speculation.texts import Text


class Drafter(Base):
    """The text's own places alone."""

    def __init__(self, wanted: Wanted) -> None:
        self._least, self._most = wanted.min_match, wanted.max_match

    def draft(self, text: Text, room: int) -> Draft | None:
        exact = self.exact(text, room)
        if exact is not None and exact.matched >= LONG:
            return exact
        _forms.index(text)
        found = _forms.follow(text, self._most)
        if found is None or found[1] < self._least:
            return exact
        form = Draft(found[0][:room], "form", found[1], found[2])
        return form if exact is None or self._chance(form) > self._chance(exact) else exact

    def _chance(self, draft: Draft) -> float:
        return draft.matched if self.likely is None else self.likely(draft.source, draft.sure, draft.matched)

    def exact(self, text: Text, room: int) -> Draft | None:
        """Behind tokens that are those at the end of the text."""
        index(text)
        best, where, tied = self.best(text)
        if best < self._least:
            return None
        tokens = after(text.tokens, where, room)
        return Draft(tokens, "own", best, not tied) if tokens else None

    def best(self, text: Text) -> tuple[int, int, bool]:
        """(Tokens of the longest agreement, where it ends, whether others as long are followed by something else)."""
        tokens = text.tokens
        best, where, tied = 0, -1, False
        found = candidates(text)
        follow = self._followed(text)
        for end in (*found, follow) if follow >= 0 else found:
            count = agreement(tokens, tokens, end, self._most)
            if count > best:
                best, where, tied = count, end, False
            elif count == best and best:
                tied = tied or tokens[end + 1] != tokens[where + 1]
                where = max(where, end)
        if best:
            text.followed, text.followed_at = (tokens, where), len(tokens)
        return best, where, tied

    def _followed(self, text: Text) -> int:
        """Where the place of the last draft has moved to: long copies stay in their place, however often its tokens
        stand elsewhere."""
        if text.followed is None or text.followed[0] is not text.tokens:
            return -1
        end = text.followed[1] + len(text.tokens) - text.followed_at
        return end if end < len(text.tokens) - 1 else -1

    def ended(self, text: Text) -> None:
        text.index, text.forms = {}, {}

    def facts(self) -> dict[str, int]:
        return {}
