"""Skeleton of thought: a list of points first, then every point written out at the same time."""

from __future__ import annotations

import random
from typing import Any

from _common import run

from phloem import lang

TOPICS = [
    "sleeping well",
    "keeping a houseplant alive",
    "learning a new language",
    "packing for a long walk",
    "speaking in front of people",
    "baking bread at home",
    "keeping a diary",
    "repairing a bicycle",
]
POINTS = 4


@lang.function
def program(s: Any, topic: str) -> None:
    s += lang.system("You are a helpful assistant who gives practical advice.")
    s += lang.user(f"List {POINTS} short tips for {topic}, a few words each.")
    with s.assistant():
        for i in range(POINTS):
            s += f"{i + 1}." + lang.gen(f"tip {i}", max_tokens=14, stop="\n") + "\n"
    forks = s.fork(POINTS)
    for i, fork in enumerate(forks):
        fork += lang.user(f"Write out tip {i + 1} in two sentences.")
        fork += lang.assistant(lang.gen("detail", max_tokens=56))
    forks.join()
    s["tips"] = [s[f"tip {i}"].strip() for i in range(POINTS)]


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    order = random.Random(seed).sample(TOPICS, len(TOPICS))
    return [{"topic": order[i % len(order)]} for i in range(count)]


def show(state: Any) -> str:
    pairs = zip(state["tips"], state["detail"], strict=True)
    return "\n".join(f"{i}. {tip}\n   {detail.strip()}" for i, (tip, detail) in enumerate(pairs, 1))


if __name__ == "__main__":
    run(__doc__, program, cases, show)
