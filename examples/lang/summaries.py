"""Parallel document summary: every part of a document is summarised at the same time, then the summaries are."""

from __future__ import annotations

import random
from typing import Any

from _common import prose, run

from phloem import lang

PARTS = 4


@lang.function
def program(s: Any, parts: list[str]) -> None:
    s += lang.system("You summarise technical documents. You keep to what the text says and leave out examples.")
    forks = s.fork(len(parts))
    for fork, part in zip(forks, parts, strict=True):
        fork += lang.user(f"Summarise this part in one sentence.\n\n{part}")
        fork += lang.assistant(lang.gen("summary", max_tokens=48))
    forks.join()
    listed = "\n".join(f"{i}. {summary.strip()}" for i, summary in enumerate(s["summary"], 1))
    s += lang.user(f"These are summaries of the parts of one document. Write one paragraph about it.\n\n{listed}")
    s += lang.assistant(lang.gen("whole", max_tokens=80))


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    starts = [draw.randrange(400) for _ in range(count)]
    return [{"parts": [prose(180, skip=start + 12 * i) for i in range(PARTS)]} for start in starts]


def show(state: Any) -> str:
    listed = "\n".join(f"{i}. {summary.strip()}" for i, summary in enumerate(state["summary"], 1))
    return f"{listed}\n\n{state['whole'].strip()}"


if __name__ == "__main__":
    run(__doc__, program, cases, show)
