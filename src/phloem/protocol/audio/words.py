"""When each word was said: the path through where its tokens attend, and what to make of it. All of it is pure.

As in the published code of Whisper (`timing.py`): the row of a token says where the *next* one is heard, so a word
begins where the row before its first token does, and ends where the row of its last token begins.

Legend: T rows of tokens, S states of 20 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from phloem.multimodal._speech import TICK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

# Languages that put no spaces between words: each character that a token completes is one.
WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
BEFORE, BEHIND = (
    "\"'“¿([{-",
    "\"'.。,，!！?？:：”)]}、",
)  # punctuation that belongs to the next word, or to the one before
ENDS = ".。!！?？"  # of sentences: a pause follows
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_BROKEN = "\ufffd"
USUAL_MOST = 0.7  # seconds that a usual word may take; one of more than twice the usual has a pause in it
_DIAGONAL, _UP, _LEFT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Word:
    """Times in seconds of the audio; `tokens`: how many it has."""

    text: str
    start: float
    end: float
    tokens: int


def begins(cost_TS: NDArray[np.floating]) -> NDArray[np.int64]:
    """The state at which each row begins, on the cheapest path from the first corner to the last (dynamic time warping:
    each step goes on by a row, a state, or both). Computed along the diagonals, whose entries do not depend on each
    other; in float32, and ties are broken as transformers does."""
    rows, states = cost_TS.shape
    steps = np.empty((rows + 1, states + 1), np.uint8)
    steps[0], steps[:, 0] = _LEFT, _UP
    flat, taken = np.ascontiguousarray(cost_TS, np.float64).reshape(-1), steps.reshape(-1)
    before, last = (np.full(rows + 1, np.inf, np.float32) for _ in range(2))  # by row: the two diagonals before
    before[0] = 0
    for diagonal in range(2, rows + states + 1):
        low, high = max(1, diagonal - states), min(rows, diagonal - 1) + 1
        both, up, left = before[low - 1 : high - 1], last[low - 1 : high - 1], last[low:high]
        step = np.full(high - low, _LEFT, np.uint8)
        step[(up < both) & (up < left)] = _UP
        step[(both < up) & (both < left)] = _DIAGONAL
        best = np.where(step == _DIAGONAL, both, np.where(step == _UP, up, left))
        # Entries (row, diagonal - row), rows from `low` on: of the path's table, and of the costs, one less each.
        first, here = low * (states + 1) + diagonal - low, (low - 1) * states + diagonal - low - 1
        count = high - low
        taken[first : first + (count - 1) * states + 1 : max(1, states)] = step
        stride = max(1, states - 1)
        entries = flat[here : here + (count - 1) * stride + 1 : stride]
        new = np.full(rows + 1, np.inf, np.float32)
        new[low:high] = (entries + best).astype(np.float32)
        before, last = last, new
    found = np.zeros(rows, np.int64)
    row, state = rows, states
    while row > 0:
        found[row - 1] = max(0, state - 1)
        step = steps[row, state]
        row, state = row - (step != _LEFT), state - (step != _UP)
    return found


def split(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], language: str) -> list[tuple[str, int]]:
    """Parts of a text with their numbers of tokens: words with the space before them, and punctuation apart."""
    whole, parts, begun, offset = decode(tokens), list[tuple[str, int]](), list[int](), 0
    for token in tokens:
        begun.append(token)
        text = decode(begun)
        at = text.find(_BROKEN)
        if at < 0 or offset + at >= len(whole) or whole[offset + at] == _BROKEN:  # or the text itself is broken there
            parts.append((text, len(begun)))
            begun, offset = [], offset + len(text)
    if begun:
        parts.append((decode(begun), len(begun)))
    if language in WITHOUT_SPACES:
        return parts
    found: list[tuple[str, int]] = []
    for text, count in parts:
        if not found or text.startswith(" ") or text.strip() in PUNCTUATION:
            found.append((text, count))
        else:
            found[-1] = found[-1][0] + text, found[-1][1] + count
    return found


def timed(parts: Sequence[tuple[str, int]], begins_T: Sequence[int], offset: float, most: float) -> list[Word]:
    """Words with their times, punctuation beside the word that it belongs to.

    Args:
        begins_T: a row more than the parts have tokens.
        offset: seconds at which the window begins; most: at which its sound ends.
    """
    at, words = 0, list[Word]()
    for text, count in parts:
        start, end = (min(most, offset + begins_T[row] * TICK) for row in (at, at + count))
        words.append(Word(text, start, end, count))
        at += count
    return _joined(_without_pauses(words))


def _without_pauses(words: list[Word]) -> list[Word]:
    """A part beside the end of a sentence that takes more than twice the usual has the pause in it."""
    lengths = [word.end - word.start for word in words if word.end > word.start]
    most = 2 * min(USUAL_MOST, float(np.median(lengths))) if lengths else 0.0
    found = words[:1]
    if words and words[0].end - words[0].start > most:
        found = [replace(words[0], start=words[0].end - most)]  # silence before the first
    for before, word in pairwise(words):
        if word.end - word.start > most:
            if word.text.strip() in ENDS:
                word = replace(word, end=word.start + most)
            elif before.text.strip() in ENDS:
                word = replace(word, start=word.end - most)
        found.append(word)
    return found


def _joined(words: list[Word]) -> list[Word]:
    found: list[Word] = []
    opened: Word | None = None  # punctuation that waits for its word
    for word in words:
        text = word.text.strip()
        if opened is not None:
            word = Word(opened.text + word.text, word.start, word.end, opened.tokens + word.tokens)
            opened = None
        elif (
            found
            and (not text or text in BEHIND)
            and not word.text.startswith(" ")
            and not found[-1].text.endswith(" ")
        ):
            last = found[-1]
            found[-1] = Word(last.text + word.text, last.start, last.end, last.tokens + word.tokens)
            continue
        if text and text in BEFORE and word.text.startswith(" "):
            opened = word
            continue
        found.append(word)
    return found if opened is None else [*found, opened]


def shared(words: Sequence[Word], lengths: Sequence[int]) -> list[tuple[Word, ...]]:
    """The words of each of some segments, which have so many tokens: each word is of that in which it begins."""
    found: list[list[Word]] = [[] for _ in lengths]
    number, at, end = 0, 0, lengths[0] if lengths else 0
    for word in words:
        while at >= end and number + 1 < len(lengths):
            number += 1
            end += lengths[number]
        found[number].append(word)
        at += word.tokens
    return [tuple(some) for some in found]
