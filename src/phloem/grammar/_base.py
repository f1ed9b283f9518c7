"""What a grammar engine is: compile a constraint, then mask, accept, roll back and jump, one matcher a request.

Constraints are plain values that no engine owns. An engine *declines with a reason* what it cannot enforce exactly;
the first of an ordered list that accepts compiles. A mask is a bit per token, 32 tokens an int32 word, low bit first.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from phloem.core.errors import BadRequest
from phloem.grammar._format import check_regex, choice, read_ebnf, read_structural_tag
from phloem.grammar._nodes import (
    Choice,
    Constraint,
    Ebnf,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    StructuralTag,
    Tag,
    TagFormat,
    Union,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.request import SamplingParams

Whitespace = Literal["compact", "flexible"]

MAX_CONSTRAINT_BYTES = 256 * 1024
MAX_TAG_BYTES = 1024 * 1024  # of a structural tag, which may hold the schemas of many tools


def fingerprint(constraint: Constraint) -> str:
    """Equal for equal constraints: the key of the cache."""
    return hashlib.blake2b(repr(constraint).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def field_of(params: SamplingParams) -> str | None:
    """The sampling parameter that holds the constraint."""
    return next((name for name in _READERS if getattr(params, name) is not None), None)


def name_of(params: SamplingParams) -> str | None:
    """What the client called the constraint."""
    return params.constraint_name or field_of(params)


def constraint_of(params: SamplingParams) -> Constraint | None:
    """The constraint that a request brings.

    Raises:
        BadRequest: if it is too large or malformed, with `param` naming the field.
    """
    name = field_of(params)
    if name is not None:
        text, shown = getattr(params, name), name_of(params)
        limit = MAX_TAG_BYTES if name == "structural_tag" else MAX_CONSTRAINT_BYTES
        if len(text) > limit:
            raise BadRequest(f"{shown} has {len(text)} characters; at most {limit}", param=shown)
        try:
            return _READERS[name](text)
        except BadRequest as error:
            raise BadRequest(f"{shown}: {error.message}", param=shown) from None
    return None


_READERS: dict[str, Callable[[str], Constraint]] = {
    "json_schema": JsonSchema,
    "regex": check_regex,
    "ebnf": read_ebnf,
    "structural_tag": read_structural_tag,
}


# Vocabulary


def allows(mask: NDArray[np.int32], token: int) -> bool:
    """Whether the token's bit is set in a mask."""
    return bool(mask.view(np.uint32)[token >> 5] >> (token & 31) & 1)


class TokenizerFace(Protocol):
    """What is read from a tokenizer, once."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    def token_bytes(self, token: int, /) -> bytes: ...
    def token_text(self, token: int, /) -> str: ...
    def is_special(self, token: int, /) -> bool: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Vocabulary:
    """The tokens as bytes; a special token has its name there and never matches text.

    `size` counts the logits, which a padded model has more of than tokens. `encode` splits text without adding any
    special token.
    """

    tokens: list[bytes]
    special: frozenset[int]
    eos_ids: tuple[int, ...]
    size: int
    encode: Callable[[str], list[int]] = field(repr=False, compare=False)

    @staticmethod
    def of(tokenizer: TokenizerFace, size: int, eos_ids: Sequence[int] = ()) -> Vocabulary:
        count = min(size, tokenizer.vocab_size)
        special = frozenset(i for i in range(count) if tokenizer.is_special(i))
        tokens = [
            tokenizer.token_text(i).encode("utf-8", "surrogatepass") if i in special else tokenizer.token_bytes(i)
            for i in range(count)
        ]
        ends = tuple(dict.fromkeys([*eos_ids, *tokenizer.eos_ids]))
        return Vocabulary(tokens, special, ends, size, lambda text: tokenizer.encode(text, add_special_tokens=False))

    @property
    def mask_words(self) -> int:
        return (self.size + 31) // 32

    def new_mask(self) -> NDArray[np.int32]:
        return np.zeros(self.mask_words, dtype=np.int32)

    def only_ends(self, mask: NDArray[np.int32]) -> None:
        """Allow the end-of-text tokens and nothing else."""
        mask[:] = 0
        for token in self.eos_ids:
            mask.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))

    @cached_property
    def existing(self) -> NDArray[np.int32]:
        """The tokens that there are, as a mask."""
        bits = np.zeros(self.mask_words * 32, dtype=np.uint8)
        bits[: len(self.tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    @cached_property
    def special_by_text(self) -> dict[str, int]:
        return {self.tokens[i].decode("utf-8", "replace"): i for i in self.special if i < len(self.tokens)}

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted({text for i, text in enumerate(self.tokens) if i not in self.special and text})

    def extends(self, text: bytes) -> bool:
        """Whether some token begins with `text` and goes on."""
        place = bisect.bisect_right(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)

    def text_of(self, ids: Sequence[int]) -> bytes:
        return b"".join(b"" if i in self.special or i >= len(self.tokens) else self.tokens[i] for i in ids)

    def split_forced(self, recent: Sequence[int], forced: bytes, ends: bool) -> list[int]:
        """Tokens for `forced` after the tokens `recent`, as this tokenizer would have split the whole.

        The last tokens are left out where what follows could join them to other tokens, unless the text `ends` there.
        Empty where the boundary itself would be split in another way: then the model decides.
        """
        before = list(recent)
        ids: list[int] = []
        try:
            ids = self.encode((self.text_of(before) + forced).decode())
        except UnicodeDecodeError:
            return []
        if ids[: len(before)] != before or self.text_of(ids[len(before) :]) != forced:
            return []
        tail = ids[len(before) :]
        keep = len(tail)
        if not ends:
            suffix = b""
            for place in range(len(tail) - 1, -1, -1):
                suffix = self.tokens[tail[place]] + suffix
                if len(suffix) > 128:
                    break
                if self.extends(suffix):
                    keep = place
        return tail[:keep]


# Engines


class Matcher(Protocol):
    """One request's place in a grammar. Not shared between threads.

    Law: after `accept(ids)` and `rollback(len(ids))` every answer is what it was before.
    """

    def accept(self, ids: Sequence[int]) -> int:
        """Take tokens, one after the other; returns how many fitted. After fewer than all, the rest was not taken.

        Raises:
            BadRequest: if this grammar went over a limit.
        """
        ...

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        ...

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Write which tokens may come next: `[mask_words]` int32.

        Raises:
            BadRequest: if this grammar went over a limit at run time; the request must end.
        """
        ...

    def jump(self) -> list[int]:
        """The tokens that must come next, in the tokenisation that the model itself would use; may be empty."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing but an end-of-text token may follow."""
        ...


class Compiled(Protocol):
    """A compiled grammar, shared by every request that brings the same constraint."""

    engine: str
    num_bytes: int

    def matcher(self) -> Matcher: ...


@dataclass(frozen=True)
class EngineOptions:
    """What an engine needs beside the vocabulary. `timeout` bounds one compilation, in seconds."""

    whitespace: Whitespace = "compact"
    timeout: float = 10.0
    memory_limit: int = 1 << 31  # bytes of address space above its start for a compiler that runs as a child


class Engine(Protocol):
    """Each file of this folder has a class `Engine(vocabulary, options)` with this face."""

    name: str

    def decline(self, constraint: Constraint) -> str | None:
        """Why this engine does not take the constraint; None if it does. Cheap."""
        ...

    def compile(self, constraint: Constraint) -> Compiled:
        """
        Raises:
            BadRequest: naming what is wrong and where.
        """
        ...

    def close(self) -> None: ...


class EngineKind(Protocol):
    """What an engine's file has: how an engine is made."""

    def __call__(self, vocabulary: Vocabulary, options: EngineOptions) -> Engine: ...


__all__ = [
    "Choice",
    "Compiled",
    "Constraint",
    "Ebnf",
    "Engine",
    "EngineKind",
    "EngineOptions",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "Matcher",
    "Regex",
    "StructuralTag",
    "Tag",
    "TagFormat",
    "Union",
    "Vocabulary",
    "choice",
    "constraint_of",
    "field_of",
    "fingerprint",
    "name_of",
    "read_structural_tag",
]
