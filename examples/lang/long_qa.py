"""Long-document question answering: one long document, many questions; the document is computed once."""

from __future__ import annotations

import random
import re
from typing import Any

from _common import prose, run

from phloem import lang

WORDS = 1000


@lang.function
def program(s: Any, document: str, question: str) -> None:
    s += lang.system("You answer questions about a document, in one sentence.")
    s += lang.user(f"{document}\n\nQuestion: {question}")
    s += lang.assistant(lang.gen("answer", max_tokens=40))
    s["question"] = question


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    document = prose(WORDS)
    words = sorted({word for word in re.findall(r"[a-z]{6,12}", document) if document.count(word) > 2})
    draw = random.Random(seed)
    return [{"document": document, "question": f"What is said about {draw.choice(words)}?"} for _ in range(count)]


def show(state: Any) -> str:
    cached = state.get_meta_info("answer").get("cached_tokens")
    return f"{state['question']}\n{state['answer'].strip()}\n({cached} tokens of the prompt were in the cache)"


if __name__ == "__main__":
    run(__doc__, program, cases, show, count=4)
