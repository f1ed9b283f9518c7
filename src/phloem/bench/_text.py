"""English prompts of an exact length in tokens, from the documentation that ships with Python."""

from __future__ import annotations

import random
import re
from typing import Protocol


class Encoder(Protocol):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


def sentences() -> list[str]:
    """Sentences of plain prose, a few thousand of them."""
    from pydoc_data.topics import topics

    prose = re.sub(r"[\"*`\\]|\n\s*\n", " ", "\n".join(topics.values()))
    prose = re.sub(r"\s+", " ", prose)
    found = re.split(r"(?<=[a-z)]\.) (?=[A-Z])", prose)
    return [
        text for text in found if 40 < len(text) < 400 and sum(c.isalpha() or c == " " for c in text) > 0.85 * len(text)
    ]


class Texts:
    """Draws prompts; every one begins differently, so that nothing is shared unless a workload shares it."""

    def __init__(self, encoder: Encoder, seed: int) -> None:
        self._encoder = encoder
        self._random = random.Random(seed)
        self._sentences = sentences()

    def draw(self, tokens: int) -> str:
        """A text that is `tokens` tokens long (to within one, where the tokenizer does not join as it splits)."""
        parts = [f"Note {self._random.randrange(10**6)}."]
        while True:
            parts += self._random.choices(self._sentences, k=max(4, tokens // 20))
            ids = self._encoder.encode(" ".join(parts), add_special_tokens=False)
            if len(ids) >= tokens:
                return self._encoder.decode(ids[:tokens], skip_special_tokens=False)
