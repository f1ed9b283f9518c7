"""Through the public door: with trees of drafts, answers are those of plain decoding, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_support import eagle, eagle3, eagle3_run, fused, said_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_support import built
from safetensors.torch import load_file

import phloem
from phloem.core.batch import Batch
from phloem.core.errors import ConfigError
from phloem.engine.drafts import growing
from phloem.engine.drafts.branches import ROOT, Branches
from phloem.engine.drafts.growing import TreeWork
from phloem.engine.drafts.growing_late import LateTrees
from phloem.platforms._facts import StepFacts
from phloem.platforms.cpu import Platform
from phloem.speculation.capture import aux_layers
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")
TIGHT: dict[str, Any] = {
    "max_total_tokens": 320,
    "max_running_requests": 4,
    "chunked_prefill_size": 24,
    "random_seed": 5,
    "debug_invariants": True,
}
TREE: dict[str, Any] = {
    "disable_speculative_adaptive": True,
    "speculative_eagle_topk": 3,
    "speculative_num_steps": 4,
    "speculative_num_draft_tokens": 8,
}
SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["xx", "yy"]}, "b": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 4}}, "required": ["a", "b"], "additionalProperties": false}'  # noqa: E501
KINDS = ("itself", "another", "eagle3", "eagle", "by measured times")
LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_checkpoint("llama", path / "target", num_hidden_layers=LAYERS)
    tiny_checkpoint("llama", path / "small", num_hidden_layers=1, hidden_size=16, seed=3)
    eagle3(path / "eagle3")
    eagle(path / "eagle")
    return path


def asked(folder: Path, kind: str) -> dict[str, Any]:
    algorithm = kind.upper() if kind.startswith("eagle") else "STANDALONE"
    name = {"itself": "target", "another": "small", "by measured times": "target"}.get(kind, kind)
    tree = {**TREE, "disable_speculative_adaptive": kind != "by measured times"}
    return {"speculative_algorithm": algorithm, "speculative_draft_model_path": str(folder / name), **tree}


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=str(folder / "target"), speculative_algorithm="none", **TIGHT) as engine:
        yield engine


@pytest.fixture(scope="module", params=KINDS)
def drafting(folder: Path, request: pytest.FixtureRequest) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, request.param)) as engine:
        yield engine


PARAMS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(8, 40),
        "temperature": st.sampled_from([0.0, 0.8]),
        "sampling_seed": st.integers(0, 3),
        "ignore_eos": st.booleans(),
    },
    optional={
        "top_p": st.just(0.9),
        "frequency_penalty": st.just(1.5),
        "repetition_penalty": st.just(1.2),
        "min_new_tokens": st.integers(0, 8),
        "json_schema": st.just(SCHEMA),
    },
)
WORDS = ("the dog ", "a page table ", "Paris is ", "x y z ", "sugar, ", "1 2 3 4 5 6 7 8 9 ")
PROMPT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join)


@pytest.mark.some(2)
@pytest.mark.slow
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=st.lists(st.tuples(PROMPT, PARAMS), min_size=1, max_size=7))
def test_answers_are_those_of_plain_decoding(
    plain: phloem.Engine, drafting: phloem.Engine, requests: list[tuple[str, dict[str, Any]]]
) -> None:
    """Seven requests of long texts do not fit: some are preempted; their prompts share beginnings."""
    prompts, params = [prompt for prompt, _ in requests], [dict(params) for _, params in requests]
    fields: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 2}
    want: Any = plain.generate(prompts, params, **fields)
    got: Any = drafting.generate(prompts, params, **fields)
    for a, b in zip(got, want, strict=True):
        assert a["output_ids"] == b["output_ids"] and a["text"] == b["text"]
        ours, theirs = (one["meta_info"]["output_token_logprobs"] for one in (a, b))
        assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], abs=1e-5)
        tops, others = (one["meta_info"]["output_top_logprobs"] for one in (a, b))
        assert [[one[1] for one in each] for each in tops] == [[one[1] for one in each] for each in others]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many drafts counted of each tree of which another branch than the first was right."""
    found, keep = list[int](), Branches.keep

    def spied(self: Branches, batch: Batch, laid: Any, kept: dict[int, int]) -> None:
        for row, place in kept.items():
            tree = laid.trees[row]
            if tree.split.homes[place]:
                found.append(tree.split.depths[place])
        keep(self, batch, laid, kept)

    monkeypatch.setattr(Branches, "keep", spied)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_branches_beside_the_first_come_to_count(
    folder: Path, plain: phloem.Engine, moved: list[int], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """What is likeliest to a drafting model is not always first in its trees: then keys and values are moved, and the
    tokens behind them are still those of plain decoding. Texts are longer than a page. (A model that drafts for itself
    by the request's draws is always right at first, so that what it draws is made no likelier than it is.)"""
    monkeypatch.setattr(growing, "SHARED", 0.05)
    params = {"max_new_tokens": 60, "temperature": temperature, "sampling_seed": 2, "ignore_eos": True}
    prompts = ["Paris is sugar, ", "the dog a page table " * 3, "x y z 1 2 3"]
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, "another")) as engine:
        got: Any = engine.generate(prompts, params)
    want: Any = plain.generate(prompts, params)
    assert [one["output_ids"] for one in got] == [one["output_ids"] for one in want]
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, "itself")) as engine:
        got = engine.generate(prompts, params)
        told = engine.get_server_info()["internal_states"][0]["prepared"]["speculation"]
    assert [one["output_ids"] for one in got] == [one["output_ids"] for one in want]
    assert all(one["meta_info"]["spec_accept_length"] > 1.2 for one in got)
    assert told["accept_length"] > 1.2 and set(told["acceptance"]) >= {"draft_model 1", "draft_model 2"}
    assert moved and max(moved) >= 1


@pytest.mark.slow
def test_hidden_states_are_those_of_plain_decoding(folder: Path) -> None:
    params = {"max_new_tokens": 24, "temperature": 0.8, "sampling_seed": 4, "ignore_eos": True}
    model, told = str(folder / "target"), {"enable_return_hidden_states": True}
    with phloem.Engine(model_path=model, **TIGHT, **told, **asked(folder, "itself")) as engine:
        got: Any = engine.generate("Paris is ", params, return_hidden_states=True)
    with phloem.Engine(model_path=model, **TIGHT, **told, speculative_algorithm="none") as engine:
        want: Any = engine.generate("Paris is ", params, return_hidden_states=True)
    ours, theirs = (
        [np.array(state, np.float32).reshape(-1, 32)[-1] for state in one["meta_info"]["hidden_states"]]
        for one in (got, want)
    )
    np.testing.assert_allclose(np.stack(ours), np.stack(theirs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3", "gemma3_text", "mistral", "deepseek_v2"])
def test_other_kinds_of_attention(tmp_path: Path, model: str) -> None:
    """Windows, which are a group of memory of their own, and latents. Both draft by an EAGLE head of random weights."""
    path = tiny_checkpoint(model, tmp_path / model)
    size = int(phloem_size(path))
    head = eagle(tmp_path / "eagle") if size == 32 else None
    if head is None:
        pytest.skip(f"the heads of these tests have 32 numbers, and {model} has {size}")
    params = {"max_new_tokens": 30, "temperature": 0.8, "sampling_seed": 1, "ignore_eos": True}
    prompts, found = ["the dog a page table ", "Paris is sugar, " * 3], list[Any]()
    for values in ({"speculative_algorithm": "none"}, head_of(head)):
        with phloem.Engine(model_path=str(path), **TIGHT, **values) as engine:
            answers: Any = engine.generate(prompts, params)
            found.append([one["output_ids"] for one in answers])
            drafted = [one["meta_info"].get("spec_num_proposed_drafts", 0) for one in answers]
    assert found[0] == found[1] and min(drafted) > 100


def phloem_size(path: Path) -> int:
    import json

    return json.loads((path / "config.json").read_text())["hidden_size"]


def head_of(head: Path, algorithm: str = "EAGLE") -> dict[str, Any]:
    return {"speculative_algorithm": algorithm, "speculative_draft_model_path": str(head), **TREE}


Grown = list[tuple[int, list[int], list[int]]]
WORKS = {"host": TreeWork, "device": LateTrees}


def spied_on(where: str, monkeypatch: pytest.MonkeyPatch) -> Grown:
    """Of each tree how many tokens are known, its tokens, and who follows whom; `where` the model is taken to be."""
    work, grown = WORKS[where], Grown()
    run = work.run
    if where == "device":
        monkeypatch.setattr(Platform, "facts", StepFacts())

    def spied(self: TreeWork, batch: Batch, late: bool = False) -> tuple[Batch, float]:
        sent, seconds = run(self, batch, late)
        more = int(sent.outputs[0]) - 1
        if more > 0:
            root = sent.num_tokens - more - 1
            parents = np.arange(-1, sent.num_tokens - 1) if sent.parents is None else sent.parents
            ids = sent.input_ids[root + 1 :].tolist()
            known = int(batch.prefix_lens[0] + batch.query_lens[0])
            grown.append((known, ids, (parents[root + 1 :] - root - 1).tolist()))
        return sent, seconds

    monkeypatch.setattr(work, "run", spied)
    return grown


VALUES: dict[str, Any] = {"ops": "reference", "dtype": "float32", "max_total_tokens": 400, "max_running_requests": 3}


@pytest.mark.slow
@pytest.mark.parametrize("where", WORKS)
def test_a_head_grows_the_tree_that_plain_torch_grows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """EAGLE-3 by whole texts, without a cache: every tree of every step, its tokens and who follows whom."""
    grown = spied_on(where, monkeypatch)
    head, params = folder / "eagle3", {"max_new_tokens": 9, "temperature": 0.0, "ignore_eos": True}
    with phloem.Engine(model_path=str(folder / "target"), **VALUES, **head_of(head, "EAGLE3")) as engine:
        answer: Any = engine.generate("the dog a page table ", params, return_logprob=True, logprob_start_len=0)
    tokens = [one[1] for one in answer["meta_info"]["input_token_logprobs"]] + answer["output_ids"]
    assert len(grown) >= 3
    for known, ids, parents in grown:
        want = eagle2(folder / "target", head, tokens[:known], len(ids))
        got: list[tuple[int, ...]] = []
        for token, parent in zip(ids, parents, strict=True):
            got.append((*(got[parent] if parent != ROOT else ()), token))
        assert got == want, known


@pytest.mark.slow
def test_a_device_grows_the_trees_of_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests that draw and of greedy ones, one after the other and together."""
    drawn = {"max_new_tokens": 20, "temperature": 0.9, "sampling_seed": 3, "ignore_eos": True}
    greedy = {"max_new_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    found: list[Any] = []
    for where in WORKS:
        with monkeypatch.context() as patch:
            grown = spied_on(where, patch)
            with phloem.Engine(model_path=str(folder / "target"), **VALUES, **head_of(folder / "eagle")) as engine:
                alone = [
                    engine.generate("the dog a page table ", one) for one in (drawn, {**drawn, "top_k": 7}, greedy)
                ]
                trees = list(grown)
                both: Any = engine.generate(["the dog a page", "Paris is sugar"], [drawn, greedy])
            found.append((trees, [one["output_ids"] for one in (*alone, *both)]))  # type: ignore[index]
    assert found[0] == found[1] and len(found[0][0]) >= 12
    assert any(parents != list(range(ROOT, len(parents) - 1)) for _, _, parents in found[0][0])


def eagle2(target: Path, head: Path, tokens: list[int], count: int) -> list[tuple[int, ...]]:
    """The likeliest drafts, each as the way to it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        entering = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    states = fused(head, torch.cat([entering[number][0] for number in aux_layers(LAYERS)], -1))
    weights = load_file(target / "model.safetensors")
    run = eagle3_run(head, weights["model.embed_tokens.weight"])
    logs = said_logits(head, weights["lm_head.weight"])
    topk, steps = min(TREE["speculative_eagle_topk"], count), min(TREE["speculative_num_steps"], count)
    seen: dict[tuple[int, ...], float] = {}
    kept: list[tuple[tuple[int, ...], torch.Tensor]] = [((), states)]
    for _ in range(steps):
        found: dict[tuple[int, ...], tuple[float, torch.Tensor]] = {}
        for way, states in kept:
            out, carried = run([*tokens[1:], *way], states)
            likely = logs(out[-1]).log_softmax(-1)
            for score, token in zip(*(one.tolist() for one in likely.topk(topk)), strict=True):
                more = torch.cat([states, carried[-1:]])
                found[*way, token] = seen.get(way, 0.0) + score, more
        seen |= {way: score for way, (score, _) in found.items()}
        best = sorted(found, key=lambda way: -found[way][0])[:topk]
        kept = [(way, found[way][1]) for way in best]
    return sorted(seen, key=lambda way: -seen[way])[:count]


@pytest.mark.slow
def test_the_choice_is_printed(drafting: phloem.Engine) -> None:
    found = {name: (value, reason) for name, value, reason in drafting.ready["decisions"]}
    assert "up to 7 drafts as a tree, 3 wide and 4 deep" in found["speculative_algorithm"][1]
    assert found["speculative_eagle_topk"][0] == "3" and "pages beside" in found["speculative_eagle_topk"][1]
    assert drafting.ready["max_total_tokens"] == 320 if "max_total_tokens" in drafting.ready else True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "more", "reason"),
    [
        ("mamba", {}, "a recurrent state takes in tokens in one order"),
        ("qwen3_moe", {"enable_return_routed_experts": True}, "several drafts share"),
    ],
)
def test_models_whose_drafts_cannot_branch_are_refused(
    folder: Path, tmp_path: Path, model: str, more: dict[str, Any], reason: str
) -> None:
    path = tiny_checkpoint(model, tmp_path / model, num_hidden_layers=LAYERS)
    with pytest.raises(ConfigError, match=f"speculative_eagle_topk: .*{reason}"):
        phloem.Engine(model_path=str(path), **TIGHT, **head_of(folder / "eagle"), **more)
