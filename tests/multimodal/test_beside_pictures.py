"""Pictures beside what else a request may ask for: adapters, tools, schemas, drafts, and a memory that is too small."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_doors import OTHER, PNG, door, image, user
from vision_support import Theirs, picture, png, seeing_checkpoint

from phloem.core.errors import ConfigError
from phloem.llm import Engine

PICTURES = [picture(1, 24, 16), picture(2, 17, 40), picture(3, 32, 32)]
CONVERSATIONS: list[tuple[list[Any], list[int]]] = [
    ([105, 117, 200, "P", 301, 144, 109, 112], [0]),
    ([109, "P", 144, 103], [1]),
    ([105, "P", 107, "P", 103, 102], [2, 0]),
    ([108, 109, 110, 111, 112] * 3, []),
]
SETTINGS: dict[str, Any] = {
    "ops": "reference",
    "dtype": "float32",
    "page_size": 4,
    "threads": 1,
    "debug_invariants": True,
    "log_level": "error",
}
LENGTH = 40


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def state(engine: Engine) -> dict[str, Any]:
    return engine.get_server_info()["internal_states"][0]


def asked(engine: Engine, conversations: list[tuple[list[Any], list[int]]], length: int, **more: Any) -> Any:
    mark = engine.tokenizer.encode(engine._client.pictures.processors["image"].mark, add_special_tokens=False)[0]
    return engine.generate(
        input_ids=[[mark if token == "P" else token for token in ids] for ids, _ in conversations],
        image_data=[[png(PICTURES[number]) for number in which] for _, which in conversations],
        sampling_params={"temperature": 0, "max_new_tokens": length, "ignore_eos": True},
        return_prompt_token_ids=True,
        **more,
    )


FAST = "qwen2_5_vl"
FAMILIES = ["gemma3", "llava", "glm4v", "smolvlm", "qwen3_vl", "mistral3"]


@pytest.fixture(scope="module", params=[FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def made(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Theirs, Path]]:
    path = seeing_checkpoint(request.param, tmp_path_factory.mktemp("beside"))
    yield Theirs(request.param, path), path


@pytest.mark.some(9)
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"chunked_prefill_size": 16},
        {"chunked_prefill_size": 7, "mm_encoder_cache": "0"},
        {"speculative_algorithm": "suffix", "disable_speculative_adaptive": True},
        {"speculative_algorithm": "ngram", "disable_speculative_adaptive": True, "chunked_prefill_size": 9},
    ],
    ids=["chunks", "no encoder cache", "suffix", "ngram in chunks"],
)
def test_conversations_that_do_not_fit_beside_one_another_end_as_alone(made: Any, settings: dict[str, Any]) -> None:
    """A pool with room for one of them: each is preempted and begun again, in the middle of pictures and behind them,
    and says what transformers says."""
    theirs, path = made
    with Engine(model_path=str(path), max_total_tokens=4096, **SETTINGS) as engine:
        prompts = [one["meta_info"]["prompt_token_ids"] for one in asked(engine, CONVERSATIONS, 1)]
    wanted = [
        theirs.greedy(ids, [PICTURES[number] for number in which], LENGTH)
        for ids, (_, which) in zip(prompts, CONVERSATIONS, strict=True)
    ]
    room = (max(map(len, prompts)) + LENGTH) // 4 * 4 + 16
    with Engine(model_path=str(path), max_total_tokens=room, **SETTINGS, **settings) as engine:
        found = [one["output_ids"] for one in asked(engine, CONVERSATIONS * 2, LENGTH)]
        assert found == wanted * 2
        assert state(engine)["preemptions"] > 0


def adapters(path: Path, out: Path, target: Any, count: int = 2) -> list[Any]:
    """Random adapters in `out`/0, `out`/1, ..., and PEFT's own models of them."""
    peft: Any = pytest.importorskip("peft", reason="PEFT writes the adapters")
    import transformers

    found: list[Any] = []
    for number in range(count):
        torch.manual_seed(number)
        base: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=target, init_lora_weights=False)
        found.append(peft.get_peft_model(base, config).eval())
        found[-1].save_pretrained(out / str(number))
    return found


@pytest.mark.some(3)
@pytest.mark.slow
def test_adapters_share_what_the_tower_made_and_no_keys_and_values(made: Any, tmp_path: Path) -> None:
    """The same prompt about the same picture under two adapters and none: the text is PEFT's, the tower runs once."""
    theirs, path = made
    models = [*adapters(path, tmp_path, r".*(language|text)_model.*\.(q_proj|v_proj|o_proj|down_proj)"), theirs.model]
    paths = [f"first={tmp_path / '0'}", f"second={tmp_path / '1'}"]
    with Engine(model_path=str(path), max_total_tokens=4096, lora_paths=paths, **SETTINGS) as engine:
        texts: list[Any] = []
        for again in (False, True):
            for name, model in zip(("first", "second", None), models, strict=True):
                (found,) = asked(engine, CONVERSATIONS[:1], 8, lora_path=[name])
                ids, cached = found["meta_info"]["prompt_token_ids"], found["meta_info"]["cached_tokens"]
                assert cached == ((len(ids) - 1) // 4 * 4 if again else 0)
                theirs.model = model
                assert found["output_ids"] == theirs.greedy(ids, PICTURES[:1], 8)
                texts.append(found["output_ids"])
        assert len({tuple(text) for text in texts[:3]}) == 3
        assert (state(engine)["pictures_encoded"], state(engine)["pictures_found"]) == (1, 2)
        # All of them in one step, beside a text.
        found = asked(engine, [*CONVERSATIONS[:1] * 3, CONVERSATIONS[3]], 8, lora_path=["second", None, "first", None])
        assert [one["output_ids"] for one in found[:3]] == [texts[1], texts[2], texts[0]]
    theirs.model = models[-1]


@pytest.mark.slow
def test_an_adapter_of_the_tower_is_refused_by_its_modules(tmp_path: Path) -> None:
    """What a tower makes is kept by content alone, for all adapters: one that changes it would be seen by others."""
    path = seeing_checkpoint("llava", tmp_path / "model")
    adapters(path, tmp_path, ["q_proj", "v_proj"], count=1)
    settings = {**SETTINGS, "lora_paths": [f"first={tmp_path / '0'}"]}
    with pytest.raises(ConfigError, match=r"vision_tower.*\.q_proj"):
        Engine(model_path=str(path), max_total_tokens=512, **settings)


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"what": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["what", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": SCHEMA}}


def test_tools_and_schemas_hold_behind_pictures_in_every_continuation(tmp_path: Path) -> None:
    """Called, or answered by the schema, as `tool_choice` has it, each of n at its own; the pictures are read once."""
    path = seeing_checkpoint("qwen2_vl", tmp_path)
    named = {"type": "function", "function": {"name": "look"}}
    messages = user("look at ", image(PNG), " and ", image(OTHER))
    body = {"messages": messages, "tools": [TOOL], "temperature": 1.0, "seed": 3, "n": 3, "max_tokens": 120}
    body["parallel_tool_calls"] = False

    async def run() -> None:
        async with door(path, tool_call_parser="hermes") as http:
            for choice, kinds in (
                ("required", {"tool_calls"}),
                (named, {"tool_calls"}),
                ("auto", {"tool_calls", "stop"}),
                ("none", {"stop"}),
            ):
                asks = {**body, "tool_choice": choice, "response_format": FORMAT}
                answer = await http.post("/v1/chat/completions", json=asks)
                assert answer.status_code == 200, answer.text
                choices = answer.json()["choices"]
                assert len(choices) == 3
                assert {one["finish_reason"] for one in choices} <= kinds
                for one in choices:
                    told, calls = one["message"]["content"], one["message"].get("tool_calls")
                    assert (told is None) != (not calls)
                    for call in calls or ():
                        assert call["function"]["name"] == "look"
                        assert list(json.loads(call["function"]["arguments"])) == ["at"]
                    assert told is None or json.loads(told)["what"] in ("cat", "dog")
            metrics = (await http.get("/metrics")).text
            encoded = [line for line in metrics.splitlines() if line.startswith("phloem:pictures_encoded_total")]
            assert [float(line.rsplit(" ", 1)[1]) for line in encoded] == [2.0]

    asyncio.run(run())
