"""Hidden states through a real engine: each is the state that its token was chosen from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phloem.core.errors import BadRequest
from phloem.llm import Engine
from phloem.testing.checkpoints import tiny_checkpoint

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


def test_the_head_finds_the_token_in_its_state(model: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        weights |= load_file(file)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
    settings = {"dtype": "float32", "max_total_tokens": 1024, "ops": "reference"}
    with Engine(model_path=str(model), enable_return_hidden_states=True, **settings) as engine:
        prompts = [[5, 6, 7, 8], [9, 10]]
        answers: Any = engine.generate(input_ids=prompts, sampling_params=GREEDY, return_hidden_states=[True, False])
        assert "hidden_states" not in answers[1]["meta_info"]
        states = torch.tensor(answers[0]["meta_info"]["hidden_states"])
        assert states.shape == (6, head.shape[1])
        assert (states @ head.T).argmax(-1).tolist() == answers[0]["output_ids"]
        again: Any = engine.generate(
            input_ids=prompts[0] + answers[0]["output_ids"][:3], sampling_params=GREEDY, return_hidden_states=True
        )
        torch.testing.assert_close(torch.tensor(again["meta_info"]["hidden_states"][:3]), states[3:], atol=1e-4, rtol=0)


def test_they_are_refused_unless_the_server_allows_them(model: Path) -> None:
    with (
        Engine(model_path=str(model), dtype="float32", max_total_tokens=256) as engine,
        pytest.raises(BadRequest, match="not supported yet: return_hidden_states"),
    ):
        engine.generate("a", GREEDY, return_hidden_states=True)
