"""Multi-token prediction: the layer of each family says what transformers' own layer says between the same norms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_support import chain, random_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import phloem
from phloem.core.batch import Batch
from phloem.core.errors import ConfigError
from phloem.engine.drafting import DraftWork
from phloem.testing.checkpoints import tiny_checkpoint

PLAIN: dict[str, Any] = {
    "ops": "reference",
    "dtype": "float32",
    "max_total_tokens": 400,
    "max_running_requests": 3,
    "random_seed": 5,
    "debug_invariants": True,
}
NEXTN: dict[str, Any] = {
    "speculative_algorithm": "NEXTN",
    "disable_speculative_adaptive": True,
    "speculative_num_steps": 3,
}
LAYERS = 2


def with_mtp(path: Path, model_type: str) -> tuple[Path, Path]:
    """(A checkpoint whose last layer drafts, the one that it was made of, where it is a layer like the others)."""
    whole = tiny_checkpoint(model_type, path / "whole", num_hidden_layers=LAYERS + 1)
    target = path / "target"
    target.mkdir()
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    prefix = f"model.layers.{LAYERS}"
    norms = {f"{prefix}.{name}.weight": (32,) for name in ("enorm", "hnorm", "shared_head.norm")}
    more = random_tensors({**norms, f"{prefix}.eh_proj.weight": (32, 64)}, 9)
    tensors = load_file(whole / "model.safetensors")
    more[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    more[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({**tensors, **more}, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:LAYERS]
    (target / "config.json").write_text(json.dumps(config))
    return target, whole


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def reference(target: Path, whole: Path) -> Callable[[list[int], int], list[int]]:
    """Drafts behind so many tokens: the whole model's last layer, by transformers, between the MTP norms."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    tensors, eps, prefix = load_file(target / "model.safetensors"), model.config.rms_norm_eps, f"model.layers.{LAYERS}"
    last, body = model.model.layers[LAYERS], model.model

    def through(x_1TN: Tensor) -> Tensor:
        positions = torch.arange(x_1TN.shape[1])[None]
        rotation = body.rotary_emb(x_1TN, position_ids=positions)
        mask = torch.full((x_1TN.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        out = last(x_1TN, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        return out[0] if isinstance(out, tuple) else out

    def run(ids: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        embedded = normed(tensors["model.embed_tokens.weight"][ids], tensors[f"{prefix}.enorm.weight"], eps)
        state = normed(states, tensors[f"{prefix}.hnorm.weight"], eps)
        x = torch.cat([embedded, state], -1) @ tensors[f"{prefix}.eh_proj.weight"].T
        out = normed(through(x[None])[0], tensors[f"{prefix}.shared_head.norm.weight"], eps)
        return out, out

    def drafts(tokens: list[int], count: int) -> list[int]:
        with torch.no_grad():
            states = body(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            # What enters the last layer, behind the model's norm: the model without that layer.
            known = normed(states[LAYERS][0], tensors["model.norm.weight"], eps)
            head_VN = tensors["lm_head.weight"]
            return chain(run, lambda x: int((x @ head_VN.T).argmax()), tokens, known, count)

    return drafts


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
def test_the_layer_says_what_transformers_says(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, whole = with_mtp(tmp_path, model_type)
    found, run = list[tuple[int, list[int]]](), DraftWork.run

    def spied(self: DraftWork, batch: Batch) -> tuple[Batch, float]:
        sent, seconds = run(self, batch)
        known = int(batch.prefix_lens[0] + batch.query_lens[0])
        found.append((known, sent.input_ids[batch.num_tokens :].tolist()))
        return sent, seconds

    monkeypatch.setattr(DraftWork, "run", spied)
    params = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    prompt = "the dog a page table"
    with phloem.Engine(model_path=str(target), speculative_algorithm="none", **PLAIN) as engine:
        want: Any = engine.generate(prompt, params, return_logprob=True, logprob_start_len=0)
    with phloem.Engine(model_path=str(target), **PLAIN, **NEXTN) as engine:
        got: Any = engine.generate(prompt, params)
        decisions = {name: reason for name, _, reason in engine.ready["decisions"]}
    assert got["output_ids"] == want["output_ids"]
    assert "embedding, then state" in decisions["speculative_draft"]
    tokens = [*(one[1] for one in want["meta_info"]["input_token_logprobs"]), *want["output_ids"]]
    drafts = reference(target, whole)
    assert len(found) >= 2 and len(found[0][1]) == 3
    for known, said in found:
        assert said == drafts(tokens[:known], len(said)), known


@pytest.mark.slow
def test_a_checkpoint_without_the_layer_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("glm4_moe", tmp_path)
    with pytest.raises(ConfigError, match="this checkpoint has no MTP layer"):
        phloem.Engine(model_path=str(path), **PLAIN, **NEXTN)
