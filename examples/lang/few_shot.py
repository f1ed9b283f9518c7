"""Few-shot multiple choice: many questions behind the same worked examples.

The examples are one common prefix: it is computed once for the batch, and every question and every choice of it hits
the cache.
"""

from __future__ import annotations

import calendar
import random
import string
from typing import Any

from _common import run

from phloem import lang

LETTERS = ["A", "B", "C", "D"]


def question(draw: random.Random) -> tuple[str, str]:
    """A question with four answers, and the letter of the right one."""
    kind = draw.choice(["month", "day", "letter", "sum", "largest"])
    if kind in ("month", "day", "letter"):
        names = {
            "month": list(calendar.month_name)[1:],
            "day": list(calendar.day_name),
            "letter": list(string.ascii_uppercase),
        }[kind]
        at = draw.randrange(len(names) - 1)
        right = names[at + 1]
        text = f"Which {kind} comes directly after {names[at]}?"
        others = draw.sample([name for name in names if name not in (right, names[at])], 3)
    elif kind == "sum":
        a, b = draw.randint(2, 60), draw.randint(2, 60)
        right, text = str(a + b), f"What is {a} plus {b}?"
        others = [str(a + b + step) for step in draw.sample([-11, -10, -2, -1, 1, 2, 10, 11], 3)]
    else:
        numbers = draw.sample(range(10, 999), 4)
        right, text = str(max(numbers)), "Which of these numbers is the largest?"
        others = [str(number) for number in numbers if number != max(numbers)]
    answers = draw.sample([right, *others], 4)
    listed = "\n".join(f"{letter}. {answer}" for letter, answer in zip(LETTERS, answers, strict=True))
    return f"Question: {text}\n{listed}\nAnswer:", LETTERS[answers.index(right)]


@lang.function
def program(s: Any, shots: str, asked: str, right: str) -> None:
    s += shots + asked + " "
    s += lang.select("answer", choices=LETTERS)
    s["right"] = right


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    shots = "Choose the right answer.\n\n"
    for _ in range(24):
        asked, right = question(draw)
        shots += f"{asked} {right}\n\n"
    found = [question(draw) for _ in range(count)]
    return [{"shots": shots, "asked": asked, "right": right} for asked, right in found]


def show(state: Any) -> str:
    asked = state.text().rpartition("\n\n")[2]
    return f"{asked}   ({'right' if state['answer'] == state['right'] else 'wrong, it is ' + state['right']})"


if __name__ == "__main__":
    run(__doc__, program, cases, show, count=8)
