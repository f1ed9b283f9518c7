"""LLM judge with branches: one essay, read once, judged from several sides at the same time."""

from __future__ import annotations

import random
from typing import Any

from _common import prose, run

from phloem import lang

SIDES = {
    "clarity": "Is it easy to understand?",
    "order": "Does each sentence follow from the one before?",
    "depth": "Does it explain why, and not only what?",
    "language": "Are grammar and spelling right?",
}
GRADES = ["1", "2", "3", "4", "5"]


@lang.function
def program(s: Any, essay: str) -> None:
    s += lang.system("You are a fair judge of technical writing. You judge one thing at a time.")
    s += lang.user(f"Here is an essay. Read it with care.\n\n{essay}")
    s += lang.assistant("I have read it.")
    forks = s.fork(len(SIDES))
    for fork, (side, asked) in zip(forks, SIDES.items(), strict=True):
        fork += lang.user(f"Judge its {side}. {asked} Write one sentence, then a grade from 1 (poor) to 5 (excellent).")
        fork += lang.assistant(
            lang.gen("sentence", max_tokens=40, stop="\n") + "\nGrade: " + lang.select("grade", GRADES)
        )
    forks.join()
    s["mean"] = sum(int(grade) for grade in s["grade"]) / len(SIDES)
    report = "\n".join(f"- {side}: {grade}" for side, grade in zip(SIDES, s["grade"], strict=True))
    s += lang.user(f"These are your grades:\n{report}\nGive your verdict in one sentence.")
    s += lang.assistant(lang.gen("verdict", max_tokens=40))


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"essay": prose(320, skip=draw.randrange(400))} for _ in range(count)]


def show(state: Any) -> str:
    rows = zip(SIDES, state["grade"], state["sentence"], strict=True)
    lines = [f"{side:>9} {grade}/5  {sentence.strip()}" for side, grade, sentence in rows]
    return "\n".join([*lines, f"mean {state['mean']:.2f}  {state['verdict'].strip()}"])


if __name__ == "__main__":
    run(__doc__, program, cases, show)
