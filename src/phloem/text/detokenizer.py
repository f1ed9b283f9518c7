"""Token ids to text that is safe to send, for one growing answer.

Everything is decided token by token, so an answer's text and the place where it stops do not depend on how its ids
arrive in chunks. Text that may be the beginning of a stop string, and bytes that are the beginning of a character,
are held back until that is settled. The work per token is bounded, whatever the stop strings are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.request import SamplingParams
    from phloem.text.tokenizer import Tokenizer

MAX_REGEXES = 16
MAX_REGEX_LENGTH = 1024
REGEX_WINDOW = 512  # characters before the newest token in which a stop regex may begin to match
REGEX_SECONDS = 0.2  # for one search
REGEX_SECONDS_TOTAL = 1.0  # processor time of one answer


class Piece(NamedTuple):
    """What a push brought: new text, the stop that was met (if any), and how many of the pushed ids count."""

    text: str
    stop: str | None
    keep: int


class StreamDecoder:
    """Decodes one answer and watches for its stop strings and stop regexes.

    Of several stop strings the one that is complete first wins; of those complete at the same character, the longest.
    The stop is cut off the text unless `no_stop_trim`; what follows it is dropped in either case.

    Raises:
        BadRequest: from the constructor for a bad `stop_regex`, from `push` for one that takes too long.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._decoder = tokenizer.stream(params.skip_special_tokens)
        self._stops = _StopStrings(params.stop) if params.stop else None
        self._regexes = _StopRegexes(params.stop_regex) if params.stop_regex else None
        self._trim = not params.no_stop_trim
        # The text of the next token, which is not the last, where nothing can stop the answer at it; else None.
        self.follow = None if self._stops is not None or self._regexes is not None else self._decoder.push
        self._held = ""  # decoded, not yet given out
        self._stopped: str | None = None
        self._finished = False

    def push(self, ids: Sequence[int], last: bool = False) -> Piece:
        """Take the next ids; `last` says that no more will come, so nothing is held back any longer.

        After a stop (or after `last`) further ids are ignored: `keep` is 0.
        """
        if self._stopped is not None or self._finished:
            return Piece("", self._stopped, 0)
        if self._stops is None and self._regexes is None:
            text = (
                self._decoder.push(ids[0]) if len(ids) == 1 else "".join([self._decoder.push(token) for token in ids])
            )
            return Piece(text + self._end() if last else text, None, len(ids))
        out: list[str] = []
        for number, token in enumerate(ids, 1):
            if self._take(self._decoder.push(token), out):
                return Piece("".join(out), self._stopped, number)
        if last and not self._take(self._end(), out):
            out.append(self._held)
            self._held = ""
        return Piece("".join(out), self._stopped, len(ids))

    def _end(self) -> str:
        self._finished = True
        return self._decoder.finish()

    def _take(self, text: str, out: list[str]) -> bool:
        """Add one token's text, move what is safe to `out`; True when the answer stops here."""
        if not text:
            return False
        begin = len(self._held)
        self._held += text
        found: tuple[int, int, str] | None = None  # start and end in what is held, and which
        hold = 0
        if self._stops is not None:
            found = self._stops.feed(text)
            if found is not None:
                found = (begin + found[0], begin + found[1], found[2])
            hold = self._stops.pending
        if self._regexes is not None:
            match, partial = self._regexes.feed(text, len(self._held))
            if match is not None and (found is None or match[1] < found[1]):
                found = match
            hold = max(hold, partial)
        if found is None:
            safe = len(self._held) - hold
            if safe > 0:
                out.append(self._held[:safe])
                self._held = self._held[safe:]
            return False
        start, end, self._stopped = found
        out.append(self._held[: max(0, start)] if self._trim else self._held[:end])
        self._held = ""
        return True


class _StopStrings:
    """Knuth-Morris-Pratt over all stop strings at once; a failure table grows only as far as a string has matched."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in dict.fromkeys(stops) if stop]
        self._fails: list[list[int]] = [[0] for _ in self._stops]
        self._states = [0] * len(self._stops)
        self._firsts = {stop[0] for stop in self._stops}

    @property
    def pending(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        return max(self._states, default=0)

    def feed(self, text: str) -> tuple[int, int, str] | None:
        """The first stop completed inside `text`: where it starts (negative: before `text`), ends, and which it is."""
        if not any(self._states) and self._firsts.isdisjoint(text):
            return None
        for at, char in enumerate(text, 1):
            best: str | None = None
            for which, stop in enumerate(self._stops):
                state = self._step(which, stop, char)
                if state == len(stop) and (best is None or len(stop) > len(best)):
                    best = stop
            if best is not None:
                return at - len(best), at, best
        return None

    def _step(self, which: int, stop: str, char: str) -> int:
        state, fails = self._states[which], self._fails[which]
        while state and stop[state] != char:
            state = fails[state - 1]
        if stop[state] == char:
            state += 1
        self._states[which] = state
        while len(fails) < state < len(stop):
            length = fails[-1]
            at = len(fails)
            while length and stop[at] != stop[length]:
                length = fails[length - 1]
            fails.append(length + 1 if stop[at] == stop[length] else 0)
        return state


class _StopRegexes:
    """Searches the newest text after each token, with a time limit per search and per answer.

    A match may begin in the last `REGEX_WINDOW` characters before the newest token. `^` means the answer's beginning.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        import regex

        if len(patterns) > MAX_REGEXES:
            raise BadRequest(f"stop_regex takes at most {MAX_REGEXES} patterns", param="stop_regex")
        self._compiled: list[tuple[str, Any]] = []
        for pattern in patterns:
            if not pattern or len(pattern) > MAX_REGEX_LENGTH:
                message = f"a stop_regex has 1 to {MAX_REGEX_LENGTH} characters, got {len(pattern)}"
                raise BadRequest(message, param="stop_regex")
            try:
                compiled = regex.compile(pattern, cache_pattern=False)
                if compiled.search("", timeout=REGEX_SECONDS):
                    raise BadRequest(f"stop_regex {pattern!r} matches the empty text", param="stop_regex")
                self._compiled.append((pattern, compiled))
            except (regex.error, RecursionError, OverflowError, TimeoutError) as error:
                raise BadRequest(f"stop_regex {pattern!r} is not valid: {error}", param="stop_regex") from None
        self._text = ""
        self._left = REGEX_SECONDS_TOTAL

    def feed(self, text: str, held: int) -> tuple[tuple[int, int, str] | None, int]:
        """A match (start, end, pattern) in the coordinates of the last `held` characters, and how many to hold back."""
        begin = max(0, len(self._text) - REGEX_WINDOW)
        self._text += text
        base = len(self._text) - held
        best: tuple[int, int, str] | None = None
        hold = 0
        for pattern, compiled in self._compiled:
            match = self._search(pattern, compiled, begin, False)
            if match is not None and match.end() > match.start():
                if best is None or match.end() < best[1]:
                    best = (match.start(), match.end(), pattern)
                continue
            partial = self._search(pattern, compiled, begin, True)
            if partial is not None:
                hold = max(hold, len(self._text) - partial.start())
        found = None if best is None else (best[0] - base, best[1] - base, best[2])
        return found, min(hold, held)

    def _search(self, pattern: str, compiled: Any, begin: int, partial: bool) -> Any:
        started = time.thread_time()
        try:
            return compiled.search(self._text, begin, partial=partial, timeout=min(REGEX_SECONDS, self._left))
        except TimeoutError:
            raise BadRequest(f"stop_regex {pattern!r} takes too long to match", param="stop_regex") from None
        finally:
            self._left = max(1e-4, self._left - (time.thread_time() - started))
