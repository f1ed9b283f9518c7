"""Heads that draft: what they say is what plain torch says, step by step; and what does not fit does not start."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_spy import Said, spy_on
from draft_support import chain, eagle, eagle3, eagle3_run, eagle_run, fused, said_by
from safetensors.torch import load_file, save_file
from torch import Tensor

import phloem
from phloem.core.errors import ConfigError, PhloemError
from phloem.engine.drafts.drafting import DraftWork
from phloem.speculation.capture import aux_layers
from phloem.speculation.drafters.eagle3 import layers_read
from phloem.speculation.token_map import read_token_map
from phloem.testing.checkpoints import tiny_checkpoint

LAYERS = 6
PLAIN: dict[str, Any] = {
    "ops": "reference",
    "dtype": "float32",
    "max_total_tokens": 400,
    "max_running_requests": 3,
    "random_seed": 5,
    "disable_speculative_adaptive": True,
    "speculative_num_steps": 4,
    "debug_invariants": True,
}
PROMPTS = ["the dog a page table ", "Paris is sugar, and sugar is 1 2 3", "x"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    return spy_on(DraftWork, monkeypatch)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def plain(target: Path) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=str(target), **{**PLAIN, "speculative_algorithm": "none"}) as engine:
        yield engine


def states_of(path: Path, tokens: list[int]) -> tuple[Tensor, ...]:
    """What enters each layer, and what the head reads, by transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return tuple(one[0] for one in model(torch.tensor([tokens]), output_hidden_states=True).hidden_states)


Drafts = Callable[[Path, list[int], int], list[int]]


def by_eagle(head: Path) -> Drafts:
    def drafts(target: Path, tokens: list[int], count: int) -> list[int]:
        weights = load_file(target / "model.safetensors")
        states = states_of(target, tokens[:-1])[-1]
        run = eagle_run(head, weights["model.embed_tokens.weight"])
        return chain(run, said_by(head, weights["lm_head.weight"]), tokens, states, count)

    return drafts


def by_eagle3(head: Path, **options: Any) -> Drafts:
    def drafts(target: Path, tokens: list[int], count: int) -> list[int]:
        weights = load_file(target / "model.safetensors")
        found = states_of(target, tokens[:-1])
        states = fused(head, torch.cat([found[number] for number in aux_layers(LAYERS)], -1))
        run = eagle3_run(head, weights["model.embed_tokens.weight"], **options)
        return chain(run, said_by(head, weights["lm_head.weight"]), tokens, states, count)

    return drafts


def check(target: Path, plain: phloem.Engine, said: Said, want: Drafts, **values: Any) -> None:
    """One request after the other: the text is plain decoding's, and every draft is the reference's."""
    with phloem.Engine(model_path=str(target), **{**PLAIN, **values}) as engine:
        for prompt in PROMPTS[:2]:
            said.found.clear()
            params = {"max_new_tokens": 9, "temperature": 0.0, "ignore_eos": True}
            answer: Any = engine.generate(prompt, params, return_logprob=True, logprob_start_len=0)
            expected: Any = plain.generate(prompt, params)
            assert answer["output_ids"] == expected["output_ids"]
            prompt_ids = [one[1] for one in answer["meta_info"]["input_token_logprobs"]]
            tokens = [*prompt_ids, *answer["output_ids"]]
            assert len(said.found) >= 3 and {len(drafts) for _, _, drafts in said.found} >= {4}
            for known, _, drafts in said.found:
                assert drafts == want(target, tokens[:known], len(drafts)), known


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_an_eagle_head_says_what_plain_torch_says(
    target: Path, plain: phloem.Engine, said: Said, tmp_path: Path, bias: bool
) -> None:
    head = eagle(tmp_path, bias=bias)
    path = str(head)
    check(target, plain, said, by_eagle(head), speculative_algorithm="EAGLE", speculative_draft_model_path=path)


@pytest.mark.slow
def test_a_token_map_leaves_an_eagle_head_those_tokens_alone(
    target: Path, plain: phloem.Engine, said: Said, tmp_path: Path
) -> None:
    head, ids = eagle(tmp_path), [*range(3, 384, 7), 5]
    torch.save(torch.tensor(ids), tmp_path / "hot.pt")

    def drafts(target: Path, tokens: list[int], count: int) -> list[int]:
        weights, kept = load_file(target / "model.safetensors"), sorted(ids)
        rows_DN = weights["lm_head.weight"][kept]
        run = eagle_run(head, weights["model.embed_tokens.weight"])
        states = states_of(target, tokens[:-1])[-1]
        return chain(run, lambda x_N: kept[int((x_N @ rows_DN.T).argmax())], tokens, states, count)

    check(
        target, plain, said, drafts,
        speculative_algorithm="EAGLE", speculative_draft_model_path=str(head),
        speculative_token_map=str(tmp_path / "hot.pt"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "algorithm", "why"),
    [
        ([1, 999], "EAGLE", "tokens that the model has not"),
        ([1, 1], "EAGLE", "or one twice"),
        ([1, 2], "EAGLE3", "EAGLE heads alone"),
        (None, "EAGLE", "cannot be read"),
    ],
)
def test_a_token_map_that_does_not_fit_is_refused(
    target: Path, tmp_path: Path, ids: list[int] | None, algorithm: str, why: str
) -> None:
    file, head = tmp_path / "hot.json", eagle(tmp_path / "head")
    if ids is not None:
        file.write_text(str(ids))
    values = {"speculative_algorithm": algorithm, "speculative_draft_model_path": str(head)}
    with pytest.raises(ConfigError, match=why):
        phloem.Engine(model_path=str(target), speculative_token_map=str(file), **values, **PLAIN)


@pytest.mark.parametrize(
    "given",
    [{"d2t": torch.zeros(3, 3, dtype=torch.long)}, {"d2t": torch.zeros(3)}, torch.tensor([True, False]), [[1, 2]]],
    ids=["a square", "fractions", "a mask", "nested"],
)
def test_a_token_map_is_a_list_of_whole_numbers(tmp_path: Path, given: Any) -> None:
    torch.save(given, tmp_path / "hot.pt")
    with pytest.raises(ConfigError, match="a list of whole numbers is expected"):
        read_token_map(tmp_path / "hot.pt", 384, "speculative_token_map")


EAGLE3: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as published": ({}, {}),
    "the model's head": ({"vocab": 0}, {}),
    "layers.0": ({"layer": "layers.0"}, {"layer": "layers.0"}),
    "normed states": ({"norms": True}, {}),
    "3.1": ({"norms": True, "norm_output": True}, {"normed": True}),
    "layers said": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 2]}}, {}),
}


@pytest.mark.some(3)
@pytest.mark.slow
@pytest.mark.parametrize("kind", list(EAGLE3))
def test_an_eagle3_head_says_what_plain_torch_says(
    target: Path, plain: phloem.Engine, said: Said, tmp_path: Path, kind: str
) -> None:
    made, run = EAGLE3[kind]
    head = eagle3(tmp_path, **made)
    path = str(head)
    check(
        target, plain, said, by_eagle3(head, **run), speculative_algorithm="EAGLE3", speculative_draft_model_path=path
    )


def test_ids_of_layers_are_outputs_unless_they_can_only_be_inputs() -> None:
    def read(ids: list[int] | None, count: int = 32) -> tuple[int, ...]:
        return layers_read({} if ids is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}, count)[0]

    assert read(None) == (2, 16, 29) == read([1, 15, 28]) == read([2, 16, 29])
    assert read([3, 10, 20]) == (4, 11, 21)
    for ids in ([1, 2], [1, 2, 32], [-5, 1, 2]):
        with pytest.raises(ConfigError, match="eagle_aux_hidden_state_layer_ids"):
            read(ids)


def changed(path: Path, head: Path, tensors: dict[str, Tensor | None], **config: Any) -> str:
    """A copy with some tensors and settings put in, or left out (None)."""
    path.mkdir()
    found: dict[str, Any] = {**load_file(head / "model.safetensors"), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**json.loads((head / "config.json").read_text()), **config}))
    return str(path)


STATES = "eagle_aux_hidden_state_layer_ids"
BAD: dict[str, tuple[str, dict[str, Tensor | None], dict[str, Any], str]] = {
    "an EAGLE-3 head as EAGLE": ("EAGLE", {}, {}, "this is an EAGLE3 head, and run as EAGLE none of its drafts"),
    "no fc": ("EAGLE3", {"fc.weight": None}, {}, "no tensor fc.weight"),
    "another hidden size": ("EAGLE3", {"fc.weight": torch.zeros(48, 144)}, {}, "hidden size is 32"),
    "another vocabulary": ("EAGLE3", {"t2d": torch.zeros(500, dtype=torch.bool)}, {"vocab_size": 500}, "not of 384"),
    "a row for a map": ("EAGLE3", {"t2d": torch.zeros(1, dtype=torch.bool)}, {}, "a vocabulary of 1, not of 384"),
    "a row for a matrix": ("EAGLE3", {"fc.weight": torch.zeros(32)}, {}, "fc.weight is [32], expected 2 dimensions"),
    "a number for settings": ("EAGLE3", {}, {"eagle_config": 5}, "eagle_config is 5, expected an object"),
    "a word for layers": ("EAGLE3", {}, {"eagle_config": {STATES: ["x"] * 3}}, "is ['x', 'x', 'x'], expected a list"),
    "a number for layers": ("EAGLE3", {}, {"eagle_config": {STATES: 5}}, "is 5, expected a list of layers"),
    "no map": ("EAGLE3", {"d2t": None}, {}, "no d2t"),
    "a map of another length": ("EAGLE3", {"d2t": torch.zeros(5, dtype=torch.int64)}, {}, "no d2t of that length"),
    "a map out of the vocabulary": ("EAGLE3", {"d2t": torch.full((96,), 300)}, {}, "d2t leads to tokens"),
    "two layers": ("EAGLE3", {}, {"num_hidden_layers": 2}, "more than one layer"),
    "a tensor too many": ("EAGLE3", {"midlayer.extra.weight": torch.zeros(3)}, {}, "tensors that no such head has"),
    "a tensor too few": ("EAGLE3", {"norm.weight": None}, {}, "norm.weight"),
    "another order of norms": ("EAGLE3", {}, {"norm_before_fc": True}, "norm_before_fc is not known"),
    "a head as a model": ("STANDALONE", {}, {}, "is a head, not a model"),
    "no MTP layer": ("NEXTN", {}, {}, "multi-token prediction of llama is not known"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_does_not_fit_is_refused_before_ready(target: Path, tmp_path: Path, name: str) -> None:
    algorithm, tensors, config, reason = BAD[name]
    head = changed(tmp_path / "bad", eagle3(tmp_path / "head"), tensors, **config)
    with pytest.raises(PhloemError) as caught:
        phloem.Engine(
            model_path=str(target), speculative_algorithm=algorithm, speculative_draft_model_path=head, **PLAIN
        )
    assert reason in str(caught.value)


def test_an_eagle_head_as_eagle3_is_refused(target: Path, tmp_path: Path) -> None:
    values = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(eagle(tmp_path))}
    with pytest.raises(ConfigError, match="this is an EAGLE head, and run as EAGLE3"):
        phloem.Engine(model_path=str(target), **values, **PLAIN)


@pytest.mark.slow
def test_a_head_beside_recurrent_layers_changes_no_answer(tmp_path: Path) -> None:
    model = tiny_checkpoint("mamba", tmp_path / "mamba", num_hidden_layers=LAYERS)
    head = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(eagle3(tmp_path / "head"))}
    found: list[list[int]] = []
    for values in ({"speculative_algorithm": "none"}, head):
        with phloem.Engine(model_path=str(model), **values, **PLAIN) as engine:
            params = [{"max_new_tokens": 24, "temperature": heat, "sampling_seed": 1} for heat in (0.0, 0.8)]
            answers: Any = engine.generate(["the dog a page"] * 2, params)
        found.append([one["output_ids"] for one in answers])
        drafted = sum(one["meta_info"].get("spec_num_proposed_drafts", 0) for one in answers)
    assert found[0] == found[1]
    assert drafted > 0
