"""Multi-turn chat: each turn sends all that was said before, and pays only for what is new."""

from __future__ import annotations

import random
from typing import Any

from _common import run

from phloem import lang

SUBJECTS = ["trees", "rivers", "bread", "clocks", "bees", "bridges", "glass", "maps", "salt", "whales", "paper", "wind"]
TURNS = [
    "Tell me one interesting thing about {subject}.",
    "Why is that so?",
    "Give me an example from everyday life.",
    "Now say all of that in one sentence.",
]


@lang.function
def program(s: Any, subject: str) -> None:
    s += lang.system("You are a friendly teacher. Answer in one or two short sentences.")
    for i, turn in enumerate(TURNS):
        s += lang.user(turn.format(subject=subject))
        s += lang.assistant(lang.gen(f"answer {i}", max_tokens=48))


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    order = draw.sample(SUBJECTS, len(SUBJECTS))
    return [{"subject": order[i % len(order)]} for i in range(count)]


def show(state: Any) -> str:
    return "\n".join(f"{m['role']:>9}: {m['content'].strip()}" for m in state.messages())


if __name__ == "__main__":
    run(__doc__, program, cases, show)
