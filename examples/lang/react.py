"""ReAct: the model thinks, calls a tool, reads what it found, and goes on.

The tools are local: a calculator, and the topics of the documentation that ships with Python. The prompt grows with
every step; all but the new lines is in the cache.
Source: "ReAct: Synergizing Reasoning and Acting in Language Models" (Yao et al., 2022).
"""

from __future__ import annotations

import ast
import operator
import random
import re
from typing import Any

from _common import run

from phloem import lang

EXAMPLES = """Answer questions by thinking and by using tools. The tools are Calculate[expression] and Lookup[topic].

Question: How many hours do 3 weeks have?
Thought: 3 weeks are 3 * 7 days, and each day has 24 hours.
Action: Calculate[3 * 7 * 24]
Observation: 504
Thought: I have the number.
Action: Finish[504]

Question: What does the while statement do in Python?
Thought: I look up the topic while.
Action: Lookup[while]
Observation: The while statement is used for repeated execution as long as an expression is true.
Thought: I have the answer.
Action: Finish[It repeats its body as long as an expression is true.]

Question: What is 15 percent of 240?
Thought: That is 240 * 15 / 100.
Action: Calculate[240 * 15 / 100]
Observation: 36
Thought: I have the number.
Action: Finish[36]

"""
TOPICS = ["break", "continue", "lambda", "global", "assert", "import", "raise", "return", "for", "with"]
STEPS = 4
OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(text: str) -> str:
    """Numbers and + - * / alone: what a model writes is never evaluated as Python."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("only numbers and + - * / are understood")

    try:
        return f"{value(ast.parse(text.strip(), mode='eval').body):g}"
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"That cannot be calculated: {error}"


def lookup(topic: str) -> str:
    """The first sentence about a topic of Python's documentation."""
    from pydoc_data.topics import topics

    text = topics.get(topic.strip().lower(), "")
    prose = re.sub(r"[\"*`]|\s+", " ", text)
    found = re.search(r"(?:The|A|An|If|When|This)\b[^.]{30,240}\.", prose)
    return re.sub(r" +", " ", found.group(0)) if found else f"There is nothing about {topic.strip()!r:.40}."


TOOLS = {"Calculate": calculate, "Lookup": lookup}


@lang.function
def program(s: Any, question: str) -> None:
    s += EXAMPLES + f"Question: {question}\n"
    s["answer"] = "(no answer)"
    for step in range(STEPS):
        s += "Thought:" + lang.gen(f"thought {step}", max_tokens=40, stop="\n") + "\nAction: "
        s += lang.select(f"tool {step}", ["Calculate", "Lookup", "Finish"])
        s += "[" + lang.gen(f"input {step}", max_tokens=32, stop=["]", "\n"]) + "]\n"
        if s[f"tool {step}"] == "Finish":
            s["answer"] = s[f"input {step}"]
            return
        s += f"Observation: {TOOLS[s[f'tool {step}']](s[f'input {step}'])}\n"


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for i in range(count):
        if i % 2:
            found.append({"question": f"What does the {draw.choice(TOPICS)} statement do in Python?"})
        else:
            found.append(
                {"question": f"How many minutes do {draw.randint(2, 9)} days and {draw.randint(2, 20)} hours have?"}
            )
    return found


def show(state: Any) -> str:
    return state.text()[len(EXAMPLES) :] + f"answer: {state['answer']}"


if __name__ == "__main__":
    run(__doc__, program, cases, show)
