"""A request that is computed again behind an update of the base's weights has its adapter as of these, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import write_adapter
from safetensors.torch import load_file

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("peft", reason="PEFT writes the adapters")
pytestmark = pytest.mark.slow
PROMPT, TOKENS = list(range(40, 60)), 60


def values(answer: Any) -> list[float]:
    return [one[0] for one in answer["meta_info"]["output_token_logprobs"]]


@pytest.mark.parametrize("first", ["set back", "updated"])
def test_magnitudes_follow_the_base_of_a_request_that_is_computed_again(first: str, tmp_path: Path) -> None:
    base = tiny_checkpoint("llama", tmp_path / "base")
    dora = write_adapter(base, tmp_path / "dora", use_dora=True)
    # Norms of rows, and so DoRA's factors, are others; what the rows look at stays.
    scaled = {
        name: tensor * torch.linspace(0.4, 3.0, len(tensor))[:, None] if "_proj" in name else tensor
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 1024, "lora_paths": [f"dora={dora}"]}
    ask: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    with Engine(model_path=str(base), **settings) as engine:
        stream: Any = engine.generate(
            input_ids=PROMPT,
            sampling_params={**ask, "max_new_tokens": TOKENS},
            lora_path="dora",
            return_logprob=True,
            stream=True,
        )
        told = 0
        for number, event in enumerate(stream):
            last = event
            if number == 4:
                engine.pause_generation("retract" if first == "set back" else "in_place")
                engine.update_weights_from_tensor(list(scaled.items()))
                if first == "updated":
                    engine.pause_generation("retract")
                told = len(last["output_ids"])
                engine.continue_generation()
        ids = last["output_ids"]
        assert told < TOKENS - 20 and len(ids) == TOKENS, "it ended before the update"
        late = told + 8  # what was on its way when the update came is of the weights before it
        fresh: Any = engine.generate(
            input_ids=PROMPT + ids[:late],
            sampling_params={**ask, "max_new_tokens": TOKENS - late},
            lora_path="dora",
            return_logprob=True,
        )
        assert fresh["output_ids"] == ids[late:]
        assert values(last)[late:] == pytest.approx(values(fresh), abs=1e-4)
        state: Any = engine.get_server_info()["internal_states"][0]
        assert state["loras_loaded"] == 1, "the old one keeps its place"
