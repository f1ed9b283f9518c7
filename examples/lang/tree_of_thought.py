"""Tree of thought: several plans, several attempts at each, a judgement of every attempt; the best answer wins.

All branches share the task and its worked examples, and siblings share what their parent wrote. The forks run side by
side.
"""

from __future__ import annotations

import random
from typing import Any

from _common import run

from phloem import lang

EXAMPLES = """You solve word problems. First you plan, then you follow the plan step by step, then you look back.

Problem: Ana has 3 baskets with 12 apples each. She gives away 7 apples and eats 2. How many apples are left?
Plan: Find how many apples there are in all, then take away those given away and eaten.
Work: There are 3 * 12 = 36 apples. 7 + 2 = 9 are gone. 36 - 9 = 27.
Looking back: Each step uses the right numbers, and 27 is less than 36, as it must be.
Answer: 27

Problem: A train leaves with 45 passengers. At the first stop 12 leave and 20 board; at the second 9 leave.
How many are on the train now?
Plan: Follow the number of passengers from stop to stop.
Work: At first 45. After the first stop 45 - 12 + 20 = 53. After the second stop 53 - 9 = 44.
Looking back: The order of the stops is right, and nobody was counted twice.
Answer: 44

Problem: A shop sells pens in boxes of 8. A school needs 100 pens and has 28. How many boxes must it buy?
Plan: Find how many pens are missing, then divide by the size of a box and round up.
Work: 100 - 28 = 72 pens are missing. 72 / 8 = 9 boxes.
Looking back: 9 boxes hold 72 pens, which is exactly what is missing.
Answer: 9

"""
NAMES = ["Bea", "Carl", "Dina", "Emil", "Fatma", "Goran", "Hana", "Ivo"]
THINGS = ["stamps", "shells", "books", "marbles", "coins", "cards", "buttons", "seeds"]
PLANS, ATTEMPTS = 3, 3


@lang.function
def program(s: Any, problem: str, right: int) -> None:
    s += EXAMPLES + f"Problem: {problem}\n"
    plans = s.fork(PLANS)
    for i, plan in enumerate(plans):
        # Sampled, each with a seed of its own: branches that write the same are no branches.
        plan += "Plan:" + lang.gen("plan", max_tokens=32, stop="\n", temperature=0.5, seed=i)
        plan += "\nWork:"
    leaves: list[Any] = []
    groups: list[Any] = []
    for plan in plans:
        attempts = plan.fork(ATTEMPTS)
        groups.append(attempts)
        for i, attempt in enumerate(attempts):
            attempt += lang.gen("work", max_tokens=48, stop="\n", temperature=0.5, seed=i)
            attempt += "\nLooking back:" + lang.gen("back", max_tokens=24, stop="\n")
            attempt += "\nAnswer:" + lang.gen("answer", max_tokens=6, stop="\n")
            attempt += "\nIs every step of this solution right? Yes or no:"
            attempt += lang.select("judgement", [" Yes", " No"])
            leaves.append(attempt)

    def trust(leaf: Any) -> float:
        yes, no = leaf.get_meta_info("judgement")["normalized_prompt_logprobs"]
        return yes - no

    best = max(leaves, key=trust)
    s["answers"] = [leaf["answer"].strip() for leaf in leaves]
    s["best"] = best["answer"].strip()
    s["solution"] = best.text()[len(EXAMPLES) :]
    s["right"] = str(right)


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        name, thing = draw.choice(NAMES), draw.choice(THINGS)
        boxes, each, lost, got = draw.randint(2, 9), draw.randint(3, 12), draw.randint(1, 5), draw.randint(2, 15)
        problem = (
            f"{name} has {boxes} boxes with {each} {thing} each. {name} loses {lost} {thing} and then gets {got} more. "
            f"How many {thing} does {name} have now?"
        )
        found.append({"problem": problem, "right": boxes * each - lost + got})
    return found


def show(state: Any) -> str:
    return (
        f"{state['solution']}\n\nanswers: {', '.join(state['answers'])}; best {state['best']}, right {state['right']}"
    )


if __name__ == "__main__":
    run(__doc__, program, cases, show, count=1)
