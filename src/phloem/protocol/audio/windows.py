"""How a long audio is gone through in windows, and what a window's tokens say. All of it is pure.

Sequentially, as in Whisper (Radford et al., 2022): the next window begins where the last whole segment of this one has
ended, so that no word is cut. Or cut beforehand where it is quietest, and all windows at a time.

Legend: a frame is 10 ms, a tick (of a timestamp token) 20 ms.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phloem.multimodal._speech import FRAMES_PER_TICK, TICK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.multimodal._speech import Speech

QUIET_FRAMES, SEARCHED_FRAMES = 10, 300  # the quietest 100 ms of a window's last three seconds


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text with its tokens (timestamps too), and where in the audio it was said, in seconds."""

    start: float
    end: float
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Doubts:
    """What makes a window's transcript doubtful, or leaves it out."""

    regular: float = 2.4  # a text that deflate makes so much shorter repeats itself
    unlikely: float = -1.0  # mean log probability of a token
    silent: float = 0.6  # probability that nobody speaks


@dataclass(frozen=True, slots=True)
class Told:
    """What became of one window at one temperature."""

    tokens: tuple[int, ...]  # without the end
    text: str
    temperature: float
    mean_logprob: float
    no_speech: float
    doubts: Doubts = Doubts()

    @property
    def compression(self) -> float:
        """How many times shorter deflate makes the text."""
        data = self.text.encode()
        return len(data) / len(zlib.compress(data)) if data else 0.0

    @property
    def silent(self) -> bool:
        return self.no_speech > self.doubts.silent and self.unlikely

    @property
    def unlikely(self) -> bool:
        return self.mean_logprob < self.doubts.unlikely

    @property
    def repeats(self) -> bool:
        return self.compression > self.doubts.regular

    @property
    def doubtful(self) -> bool:
        """Worth another try at a higher temperature."""
        return not self.silent and (self.repeats or self.unlikely)


def best(tries: Sequence[Told]) -> Told:
    """Of doubtful transcripts the one to keep: the most likely that does not repeat itself, or else the last."""
    sound = [told for told in tries if not told.repeats]
    return max(sound, key=lambda told: told.mean_logprob) if sound else tries[-1]


def pieces(tokens: Sequence[int], speech: Speech, offset: float, frames: int) -> tuple[list[Piece], int]:
    """The segments of a window's transcript, and how many frames the next window begins behind this one.

    Args:
        tokens: without the end.
        offset: seconds at which the window begins.
        frames: of the window that are sound.
    """
    stamps = np.array([token >= speech.first_timestamp for token in tokens], dtype=bool)

    def at(token: int) -> float:
        # Of what is heard the silence behind the sound is no part.
        return offset + min((token - speech.first_timestamp) * TICK, frames / 100)

    # Where one segment has ended and the next begins: two timestamps side by side.
    borders = (np.flatnonzero(stamps[1:] & stamps[:-1]) + 1).tolist()
    closed = len(stamps) >= 2 and bool(stamps[-1]) and not stamps[-2]  # the last segment is whole, nothing follows
    if not borders:
        ticks = [tokens[place] - speech.first_timestamp for place in np.flatnonzero(stamps).tolist()]
        end = ticks[-1] * TICK if ticks and ticks[-1] else frames / 100
        start = at(tokens[0]) if stamps.any() and stamps[0] and len(tokens) > 1 else offset
        return [Piece(start, max(start, offset + min(end, frames / 100)), tuple(tokens))], frames
    found: list[Piece] = []
    first = 0
    for border in [*borders, len(tokens)] if closed else borders:
        part = tuple(tokens[first:border])
        start = at(part[0]) if stamps[first] else found[-1].end if found else offset
        found.append(Piece(start, max(start, at(part[-1])), part))
        first = border
    if closed:
        return found, frames
    spoken = (tokens[borders[-1] - 1] - speech.first_timestamp) * FRAMES_PER_TICK
    return found, min(spoken, frames) or frames


def cuts(mel: NDArray[np.float32], frames: int, window: int) -> list[tuple[int, int]]:
    """Parts of at most a window each, [first, last) in frames, cut where it is quietest."""
    loudness = mel[:, :frames].mean(0)
    found: list[tuple[int, int]] = []
    start = 0
    while frames - start > window:
        last = loudness[start + window - min(SEARCHED_FRAMES, window // 2) : start + window]
        smooth = np.convolve(last, np.ones(QUIET_FRAMES) / QUIET_FRAMES, "valid")
        end = start + window - len(last) + int(smooth.argmin()) + QUIET_FRAMES // 2
        found.append((start, end))
        start = end
    return [*found, (start, frames)]


def part_of(mel: NDArray[np.float32], start: int, window: int, end: int) -> bytes:
    """A window's features as the engine takes them; behind `end` there is nothing."""
    given = np.zeros((mel.shape[0], window), "<f4")
    part = mel[:, start : min(start + window, end)]
    given[:, : part.shape[1]] = part
    return given.tobytes()
