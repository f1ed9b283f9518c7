"""Beside the host the step that verifies is begun before anybody there has seen a draft, and gives the same tokens.

The host is taken for a device: values lie in its memory, but are treated as if they did not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dflash_support import dflash, dspark
from draft_support import eagle, eagle3

import phloem
from phloem.engine.transfer import LastTokens
from phloem.engine.wanted import Wanted
from phloem.platforms._facts import StepFacts
from phloem.platforms.cpu import Platform
from phloem.testing.checkpoints import tiny_checkpoint

LAYERS = 6
KINDS = ("itself", "another", "eagle", "eagle3", "dflash", "dspark")
PLAIN: dict[str, Any] = {
    "ops": "reference",
    "dtype": "float32",
    "max_total_tokens": 400,
    "max_running_requests": 3,
    "random_seed": 5,
    "disable_speculative_adaptive": True,
    "speculative_num_steps": 3,
    "debug_invariants": True,
}
PROMPTS = ["the dog a page table ", "Paris is sugar, and sugar is 1 2 3", "x", "the dog a page table and sugar"]
SCHEMA = '{"type": "array", "items": {"enum": ["xx", "yy"]}, "minItems": 1, "maxItems": 2}'
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True}
DRAWN: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.9, "sampling_seed": 3, "ignore_eos": True}
ASKED: dict[str, list[dict[str, Any]]] = {
    "greedy": [GREEDY] * 4,
    "drawn": [DRAWN, {**DRAWN, "top_k": 9}, GREEDY, {**DRAWN, "top_p": 0.8}],
    "looked at": [
        {**GREEDY, "ignore_eos": False, "json_schema": SCHEMA},
        {**DRAWN, "frequency_penalty": 1.5, "max_new_tokens": 9},
        GREEDY,
        {**DRAWN, "max_new_tokens": 100},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_checkpoint("llama", path / "target", num_hidden_layers=LAYERS)
    tiny_checkpoint("llama", path / "small", num_hidden_layers=1, hidden_size=16, seed=3)
    eagle(path / "eagle")
    eagle3(path / "eagle3")
    dflash(path / "dflash")
    dspark(path / "dspark")
    return path


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Iterator[dict[str, Any]]:
    """What is answered without drafts, on the host."""
    settings = {**PLAIN, "speculative_algorithm": "none"}
    with phloem.Engine(model_path=str(folder / "target"), **settings) as engine:
        yield {name: answered(engine, asked) for name, asked in ASKED.items()}


def answered(engine: phloem.Engine, asked: list[dict[str, Any]]) -> list[Any]:
    answers: Any = engine.generate(PROMPTS, asked, return_logprob=True)
    return [(one["output_ids"], [item[0] for item in one["meta_info"]["output_token_logprobs"]]) for one in answers]


def speculating(folder: Path, kind: str) -> dict[str, Any]:
    algorithm = {"dflash": "DFLASH", "dspark": "DFLASH", "eagle": "EAGLE", "eagle3": "EAGLE3"}.get(kind, "STANDALONE")
    name = {"itself": "target", "another": "small"}.get(kind, kind)
    return {"speculative_algorithm": algorithm, "speculative_draft_model_path": str(folder / name)}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each step with drafts, whether the host had seen those when its tokens were chosen: "early" or "seen"."""
    found: list[str] = []
    keep = LastTokens.keep

    def kept(self: LastTokens, wanted: Wanted, *rest: Any) -> Any:
        if wanted.drafted:
            found.append("early" if wanted.late else "seen")
        return keep(self, wanted, *rest)

    monkeypatch.setattr(LastTokens, "keep", kept)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_that_stay_on_the_device_give_the_same_answers(
    folder: Path, kind: str, wanted: dict[str, Any], steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Platform, "facts", StepFacts())
    with phloem.Engine(model_path=str(folder / "target"), **PLAIN, **speculating(folder, kind)) as engine:
        for name, asked in ASKED.items():
            steps.clear()
            for one, other in zip(answered(engine, asked), wanted[name], strict=True):
                assert one[0] == other[0]
                assert one[1] == pytest.approx(other[1], abs=1e-4)
            # A grammar and a penalty look at drafts: steps with those wait for them.
            assert "early" in steps and ("seen" in steps) == (name == "looked at")


@pytest.mark.slow
def test_a_model_that_drafts_for_itself_is_always_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "facts", StepFacts())
    with phloem.Engine(model_path=str(folder / "target"), **PLAIN, **speculating(folder, "itself")) as engine:
        answer: Any = engine.generate("the dog a page table ", {**GREEDY, "max_new_tokens": 25})
        assert answer["meta_info"]["spec_correct_drafts_histogram"] == [0, 0, 0, 6]
