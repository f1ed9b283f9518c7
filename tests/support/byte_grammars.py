"""Grammars over a vocabulary of single bytes, ready at once: for tests that count steps."""

from __future__ import annotations

import time
from typing import Any

from phloem.grammar._base import Vocabulary
from phloem.grammar._manager import GrammarManager, GrammarSettings
from phloem.testing.driver import EOS

FIRST = 8  # token id of the byte 0


def byte_vocabulary() -> Vocabulary:
    """256 one-byte tokens from id 8 on, so that every text has one tokenisation."""
    tokens = [b"<special>"] * FIRST + [bytes([byte]) for byte in range(256)]
    special = frozenset(range(FIRST))
    return Vocabulary(tokens, special, (EOS,), 1000, lambda text: [FIRST + byte for byte in text.encode()])


def text_of(tokens: list[int]) -> str:
    return bytes(token - FIRST for token in tokens if token >= FIRST).decode()


class Ready:
    """A `prepare` whose grammars are ready when it returns: a test counts steps."""

    def __init__(self, jump: bool) -> None:
        self.manager = GrammarManager(byte_vocabulary(), GrammarSettings(jump_forward=jump))

    def __call__(self, submit: Any, prompt: Any) -> Any:
        prepared = self.manager.prepare(submit, prompt)
        while prepared is not None and not prepared.waits[0].ready():
            time.sleep(0.0005)
        return prepared
