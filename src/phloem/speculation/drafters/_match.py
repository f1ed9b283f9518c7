"""The longest place in texts that ends as a text does, found by its last tokens.

An index maps the last two and the last four tokens of every position to the positions where they last stood. From each
of those the texts are compared backwards: the longest agreement wins, then the latest. A text is indexed when somebody
first asks, and then token by token; per token this takes about a microsecond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.speculation.texts import Text

SHORT, LONG = 2, 4  # tokens of a key
KEPT = 8  # positions of a key, the latest


def index(text: Text) -> None:
    """Take in what has come since the last time. The last position is left out: nothing follows it yet."""
    tokens, places = text.tokens, text.index
    for end in range(max(text.indexed, SHORT - 1), len(tokens) - 1):
        for size in (SHORT, LONG):
            if end + 1 < size:
                continue
            key = tuple(tokens[end + 1 - size : end + 1])
            found = places.get(key)
            if found is None:
                places[key] = [end]
            else:
                if len(found) == KEPT:
                    del found[0]
                found.append(end)
    text.indexed = max(text.indexed, len(tokens) - 1)


def agreement(tokens: Sequence[int], other: Sequence[int], end: int, most: int, skipped: int = 0) -> int:
    """How many tokens before and at `end` of `other` are those at the end of `tokens`, up to `most`; the last `skipped`
    of both are not looked at."""
    last, end, count = len(tokens) - 1 - skipped, end - skipped, 0
    most = min(most, end + 1, last + 1)
    # Copies mostly agree all the way: slices are compared without a turn of Python for each token.
    far = most > LONG and tokens[last - LONG] == other[end - LONG]
    if far and tokens[last + 1 - most : last + 1] == other[end + 1 - most : end + 1]:
        return most
    while count < most and tokens[last - count] == other[end - count]:
        count += 1
    return count


def candidates(text: Text) -> list[int]:
    """Positions of the text that may agree with its end, the latest last."""
    tokens = text.tokens
    if len(tokens) < SHORT:
        return []
    found = text.index.get(tuple(tokens[-LONG:])) if len(tokens) >= LONG else None
    return found or text.index.get(tuple(tokens[-SHORT:]), [])


def after(tokens: Sequence[int], end: int, count: int) -> list[int]:
    """`count` tokens behind `end`; where the text ends before, as if it went on as it did behind `end`."""
    found = list(tokens[end + 1 : end + 1 + count])
    period = len(found)
    if period:
        while len(found) < count:
            found.append(found[len(found) - period])
    return found
