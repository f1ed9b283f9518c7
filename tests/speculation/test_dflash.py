"""Drafters of blocks (DFlash): what they say is what plain torch says, answers are plain decoding's, and what does not
fit does not start."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash_support import MASK, block_states, dflash, shapes, speculator
from draft_support import eagle, eagle3, said_by
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import phloem
from phloem.core.batch import Batch
from phloem.core.errors import ConfigError, PhloemError
from phloem.engine.blocks import BlockWork
from phloem.speculation.drafters.dflash import read
from phloem.testing.checkpoints import tiny_checkpoint

LAYERS = 6
PLAIN: dict[str, Any] = {
    "ops": "reference",
    "dtype": "float32",
    "max_total_tokens": 400,
    "max_running_requests": 3,
    "random_seed": 5,
    "disable_speculative_adaptive": True,
    "debug_invariants": True,
}
PROMPTS = ["the dog a page table ", "Paris is sugar, and sugar is 1 2 3", "x"]


@dataclass
class Said:
    """What was drafted: the number of known tokens, how many drafts there was room for, and the drafts."""

    found: list[tuple[int, int, list[int]]] = field(default_factory=list)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    kept, run = Said(), BlockWork.run

    def spied(self: BlockWork, batch: Batch) -> tuple[Batch, float]:
        sent, seconds = run(self, batch)
        ends = sent.query_lens.cumsum()
        for row in range(batch.num_rows):
            more = int(sent.outputs[row] - batch.outputs[row])
            if more:
                known = int(batch.prefix_lens[row] + batch.query_lens[row])
                assert batch.drafts is not None
                drafts = sent.input_ids[ends[row] - more : ends[row]].tolist()
                kept.found.append((known, int(batch.drafts[row]), drafts))
        return sent, seconds

    monkeypatch.setattr(BlockWork, "run", spied)
    return kept


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS)


class Reference:
    """What a drafter says behind a text, by transformers' model and `block_states`."""

    def __init__(self, target: Path, drafter: Path, inputs: Sequence[int], **options: Any) -> None:
        import transformers

        self.drafter, self.inputs = drafter, inputs
        self.skips, self.size = 1 - options.pop("anchor", False), options.pop("size", 8)
        self.options = options
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self.embed = self.model.get_input_embeddings().weight.detach()
        self.say = said_by(drafter, self.model.get_output_embeddings().weight.detach())

    def drafts(self, tokens: list[int], room: int) -> list[int]:
        """As many as there is room for, a block at most."""
        with torch.no_grad():
            found = self.model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        features = torch.cat([found[number][0] for number in self.inputs], -1)
        size = min(self.size, room + self.skips)
        block = self.embed[[tokens[-1], *[MASK] * (size - 1)]]
        states = block_states(self.drafter, features, block, **self.options)
        return [self.say(one) for one in states[self.skips :]]


def check(target: Path, said: Said, reference: Reference, **values: Any) -> None:
    """The text is plain decoding's, and every draft is the reference's, near the text's end too."""
    answers: list[list[int]] = []
    head = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": str(reference.drafter)}
    for algorithm in ({"speculative_algorithm": "none"}, head):
        with phloem.Engine(model_path=str(target), **{**PLAIN, **algorithm, **values}) as engine:
            for prompt in PROMPTS:
                params = {"max_new_tokens": 23, "temperature": 0.0, "ignore_eos": True}
                said.found.clear()
                one: Any = engine.generate(prompt, params, return_logprob=True, logprob_start_len=0)
                answers.append(one["output_ids"])
                tokens = [*(entry[1] for entry in one["meta_info"]["input_token_logprobs"]), *one["output_ids"]]
                for known, room, drafts in said.found:
                    assert drafts == reference.drafts(tokens[:known], room)[: len(drafts)], known
                    assert len(drafts) == min(room, reference.size - reference.skips)
                assert algorithm != head or len({room for _, room, _ in said.found}) > 2
    assert answers[:3] == answers[3:]


@pytest.mark.slow
def test_a_drafter_says_what_plain_torch_says(target: Path, said: Said, tmp_path: Path) -> None:
    drafter = dflash(tmp_path)
    check(target, said, Reference(target, drafter, (1, 3, 5)))


def test_fewer_drafts_are_fewer_masks(target: Path, said: Said, tmp_path: Path) -> None:
    drafter = dflash(tmp_path, ids=(3, 0), layers=1, block=16)
    check(
        target, said, Reference(target, drafter, (4, 1), size=6, windows=((0, True),)), speculative_num_steps=5
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_other_models(family: str, said: Said, tmp_path: Path) -> None:
    target = tiny_checkpoint(family, tmp_path / "target", num_hidden_layers=LAYERS)
    config = json.loads((target / "config.json").read_text())
    assert config["hidden_size"] == 32 and config["vocab_size"] == 384
    drafter = dflash(tmp_path / "drafter", ids=(1, 2, 3, 4), block=5)
    check(target, said, Reference(target, drafter, (2, 3, 4, 5), size=5))


SPECULATORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the model's head": ({}, {}),
    "a vocabulary of its own": ({"vocab": 96}, {}),
    "sampled from the anchor": ({"vocab": 96, "sample_from_anchor": True}, {"anchor": True}),
}


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", list(SPECULATORS))
def test_speculators_files(target: Path, said: Said, tmp_path: Path, kind: str) -> None:
    made, told = SPECULATORS[kind]
    drafter = speculator(tmp_path, **made)
    check(target, said, Reference(target, drafter, (1, 3, 5), **told))


SLIDING = {"use_sliding_window": True, "sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWS: dict[str, tuple[dict[str, Any], tuple[tuple[int, bool], ...]]] = {
    "causal in a window": (SLIDING, ((11, False), (0, True))),
    "both ways in a window": ({**SLIDING, "is_causal": False}, ((11, True), (0, True))),
    "causal everywhere": ({"is_causal": True}, ((0, False), (0, False))),
}


@pytest.mark.parametrize("kind", list(WINDOWS))
def test_windows(target: Path, said: Said, tmp_path: Path, kind: str) -> None:
    config, windows = WINDOWS[kind]
    check(target, said, Reference(target, dflash(tmp_path, **config), (1, 3, 5), windows=windows))
