"""JSON decoding: the program writes the braces and the names, the model only the values.

Nothing but the values is generated, so the result has its fields whatever the model is. `by_schema` asks the engine to
keep to a schema instead: one call, and the model may also choose the length of lists.
"""

from __future__ import annotations

import json
import random
from typing import Any

from _common import run

from phloem import lang
from phloem.bench._text import sentences

INSTRUCTION = "Describe the passage from a manual as a JSON object.\n\n"
EXAMPLE = """Passage: A set is a collection of distinct objects. It is written with braces, and it has no order.
JSON: {"subject": "sets", "summary": "Sets hold distinct objects without order.", "level": "beginner", "rating": 8}

Passage: A metaclass is the class of a class. It decides how classes are made, and few programs ever need one.
JSON: {"subject": "metaclasses", "summary": "Metaclasses decide how classes are made.", "level": "expert", "rating": 5}

"""
SCHEMA = {
    "type": "object",
    "properties": {
        "subject": {"type": "string"},
        "summary": {"type": "string"},
        "level": {"enum": ["beginner", "advanced", "expert"]},
        "rating": {"type": "integer"},
    },
    "required": ["subject", "summary", "level", "rating"],
    "additionalProperties": False,
}


@lang.function
def program(s: Any, passage: str) -> None:
    s += INSTRUCTION + EXAMPLE + f"Passage: {passage}\n"
    with s.var_scope("line"):
        s += 'JSON: {"subject": "' + lang.gen("subject", stop=['"', "\n"], max_tokens=12) + '", '
        s += '"summary": "' + lang.gen("summary", stop=['"', "\n"], max_tokens=40) + '", '
        s += '"level": "' + lang.select("level", ["beginner", "advanced", "expert"]) + '", '
        s += '"rating": ' + lang.select("rating", [str(i) for i in range(1, 10)]) + "}"
    names = ("subject", "summary", "level")
    s["object"] = {**{name: s[name] for name in names}, "rating": int(s["rating"])}


@lang.function
def by_schema(s: Any, passage: str) -> None:
    s += INSTRUCTION + EXAMPLE + f"Passage: {passage}\nJSON: " + lang.gen("json", max_tokens=120, json_schema=SCHEMA)
    s["object"] = json.loads(s["json"])


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = sentences()
    starts = [draw.randrange(len(found) - 3) for _ in range(count)]
    return [{"passage": " ".join(found[at : at + 3])} for at in starts]


def show(state: Any) -> str:
    return json.dumps(state["object"], indent=2)


if __name__ == "__main__":
    run(__doc__, program, cases, show, count=4)
