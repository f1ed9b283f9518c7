"""Which experts computed each token: those that the model's own code chooses, however the tokens were computed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from phloem import Engine
from phloem.core.errors import BadRequest, ConfigError
from phloem.scheduler.routed import Routed
from phloem.testing.checkpoints import tiny_checkpoint

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 2048, "context_length": 256}
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
PROMPT = [5 + at % 90 for at in range(70)]  # pages enough for a prefix


def told(answer: Any, layers: int, k: int) -> NDArray[np.int32]:
    flat = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), "<i4")
    return flat.reshape(-1, layers, k)


def plain_routes(path: Path, ids: list[int]) -> dict[int, NDArray[Any]]:
    """Layer -> sorted experts of each token, by transformers' own router over the whole text at once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    found: dict[int, NDArray[Any]] = {}
    k = model.config.num_experts_per_tok

    def hook(number: int) -> Any:
        def see(module: Any, args: Any, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            found[number] = np.sort(logits.float().topk(k, -1).indices.numpy(), -1)

        return see

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(hook(number))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def engine(olmoe: Path) -> Iterator[Engine]:
    with Engine(
        model_path=str(olmoe), enable_return_routed_experts=True, speculative_algorithm="ngram",
        disable_speculative_adaptive=True, chunked_prefill_size=32, **SETTINGS,
    ) as found:  # fmt: skip
        yield found


def sizes(path: Path) -> tuple[int, int]:

    config = json.loads((path / "config.json").read_text())
    return config["num_hidden_layers"], config["num_experts_per_tok"]


@pytest.mark.slow
def test_experts_are_those_of_a_plain_forward_pass_chunked_drafted_and_from_the_cache(
    engine: Engine, olmoe: Path
) -> None:
    layers, k = sizes(olmoe)
    fields: dict[str, Any] = {"input_ids": PROMPT, "sampling_params": GREEDY | {"max_new_tokens": 24}}
    first: Any = engine.generate(return_routed_experts=True, **fields)
    again: Any = engine.generate(return_routed_experts=True, **fields)
    assert again["meta_info"]["cached_tokens"] >= 16 and first["meta_info"]["cached_tokens"] == 0
    ids = PROMPT + first["output_ids"]
    whole = told(first, layers, k)
    assert whole.shape[0] == len(ids) - 1
    assert np.array_equal(whole, told(again, layers, k)), "cached tokens have their experts"
    want = plain_routes(olmoe, ids[:-1])
    for layer in range(layers):
        assert np.array_equal(np.sort(whole[:, layer], -1), want[layer]), layer
    part: Any = engine.generate(return_routed_experts=True, routed_experts_start_len=len(PROMPT), **fields)
    assert np.array_equal(told(part, layers, k), whole[len(PROMPT) :])


@pytest.mark.slow
def test_requests_beside_each_other_streams_and_scores_each_have_their_own(engine: Engine, olmoe: Path) -> None:
    layers, k = sizes(olmoe)
    prompts = [PROMPT[at : at + 20 + at] for at in range(6)]
    alone = [engine.generate(input_ids=one, sampling_params=GREEDY, return_routed_experts=True) for one in prompts]
    engine.flush_cache()
    wanted = [True, False, True, True, True, True]
    together: Any = engine.generate(input_ids=prompts, sampling_params=GREEDY, return_routed_experts=wanted)
    for one, other, asked in zip(alone, together, wanted, strict=True):
        assert ("routed_experts" in other["meta_info"]) is asked
        if asked:
            assert np.array_equal(told(one, layers, k), told(other, layers, k))
    events: list[Any] = list(
        engine.generate(input_ids=prompts[0], sampling_params=GREEDY, return_routed_experts=True, stream=True)
    )
    assert np.array_equal(told(events[-1], layers, k), told(alone[0], layers, k))
    assert not any("routed_experts" in event["meta_info"] for event in events[:-1])
    text = alone[1]["text"]
    if len(text) > 2:  # the door ends it, in the middle
        stopped: Any = engine.generate(
            input_ids=prompts[1], sampling_params={**GREEDY, "stop": [text[1:3]]}, return_routed_experts=True
        )
        count = len(prompts[1]) + len(stopped["output_ids"]) - 1
        assert np.array_equal(told(stopped, layers, k), told(alone[1], layers, k)[:count])
    ids = prompts[0] + alone[0]["output_ids"]
    score: Any = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 0}, return_routed_experts=True)
    assert np.array_equal(told(score, layers, k), told(alone[0], layers, k))


@pytest.mark.slow
def test_after_preemptions_and_with_a_grammar_every_token_still_has_its_experts(olmoe: Path) -> None:
    layers, k = sizes(olmoe)
    small = {**SETTINGS, "max_total_tokens": 192, "page_size": 16}
    params = GREEDY | {"max_new_tokens": 40}
    prompts = [[7 + at, 9, 11] * 8 for at in range(6)]
    with Engine(model_path=str(olmoe), enable_return_routed_experts=True, **small) as engine:
        answers: Any = engine.generate(input_ids=prompts, sampling_params=params, return_routed_experts=True)
        state = engine.get_server_info()["internal_states"][0]
        for prompt, answer in zip(prompts, answers, strict=True):
            one: Any = engine.generate(input_ids=prompt, sampling_params=params, return_routed_experts=True)
            assert one["output_ids"] == answer["output_ids"]
            assert np.array_equal(told(one, layers, k), told(answer, layers, k))
        assert state["preemptions"], sorted(state)
        forced: Any = engine.generate("x", {"regex": "abcdefghij", "max_new_tokens": 30}, return_routed_experts=True)
        count = forced["meta_info"]["prompt_tokens"] + forced["meta_info"]["completion_tokens"] - 1
        assert told(forced, layers, k).shape[0] == count


SPARSE = [
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "ernie4_5_moe",
    "glm4_moe",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2_moe",
    "llama4_text",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
]
GEMMA: dict[str, Any] = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.mark.some(8)
@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPARSE, "gemma4_text"])
def test_every_family_tells_the_experts_that_a_plain_recomputation_chooses(name: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(name, tmp_path, **(GEMMA if name == "gemma4_text" else {}))
    params = {**GREEDY, "max_new_tokens": 3}
    with Engine(model_path=str(path), enable_return_routed_experts=True, chunked_prefill_size=48, **SETTINGS) as engine:
        answer: Any = engine.generate(input_ids=PROMPT, sampling_params=params, return_routed_experts=True)
    text = PROMPT + answer["output_ids"]
    plain = {**SETTINGS, "ops": "reference", "disable_radix_cache": True, "speculative_algorithm": "none"}
    with Engine(model_path=str(path), enable_return_routed_experts=True, **plain) as engine:
        again: Any = engine.generate(input_ids=text, sampling_params={"max_new_tokens": 0}, return_routed_experts=True)
    one, other = (np.frombuffer(base64.b64decode(a["meta_info"]["routed_experts"]), "<i4") for a in (answer, again))
    assert len(one) % (len(text) - 1) == 0 and len(np.unique(one)) > 2
    assert np.array_equal(one, other)


def test_what_cannot_tell_is_refused_when_asked(tmp_path: Path, olmoe: Path) -> None:
    with pytest.raises(ConfigError, match="has no experts"):
        Engine(model_path=str(tiny_checkpoint("llama", tmp_path)), enable_return_routed_experts=True, **SETTINGS)
    with (
        Engine(model_path=str(olmoe), **SETTINGS) as engine,
        pytest.raises(BadRequest, match="--enable-return-routed-experts"),
    ):
        engine.generate("x", GREEDY, return_routed_experts=True)


def test_positions_that_are_computed_again_replace_what_was_told() -> None:
    routed, given = Routed(), bytearray()
    step = lambda start, n, value: routed.take(start, np.full((n, 2, 1), value, np.int16))  # noqa: E731
    step(0, 5, 1)
    given += routed.news(5)
    step(5, 3, 2)  # two drafts, refused
    given += routed.news(6)
    step(6, 1, 3)
    given += routed.news(7)
    assert np.frombuffer(given, "<i2").tolist() == [1] * 10 + [2] * 2 + [3] * 2
    step(0, 4, 4)  # after a preemption
    assert routed.news(7) == b""
    step(4, 5, 4)
    assert np.frombuffer(routed.news(8), "<i2").tolist() == [4] * 2
