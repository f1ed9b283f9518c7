"""Multi-token prediction: the layer of each family says what transformers' own layer says between the same norms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
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
from phloem.engine.drafts.drafting import DraftWork
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


@dataclass(frozen=True)
class Kind:
    """How a family's file looks. `base`: the family of which transformers has the layers."""

    base: str
    prefix: str
    embed_norm: str = "enorm"
    hidden_norm: str = "hnorm"
    fuse: str = "eh_proj"
    norm: str = "shared_head.norm"
    embed_first: bool = True
    layer: str = ""  # where the layer lies; "": at the prefix
    shift: float = 0.0  # added to the weights of norms
    sizes: dict[str, Any] = field(default_factory=dict[str, Any])


USUAL = f"model.layers.{LAYERS}"
KINDS = {
    "glm4_moe": Kind("glm4_moe", USUAL),
    "deepseek_v3": Kind("deepseek_v3", USUAL),
    "mimo": Kind(
        *("qwen2", "model.mtp_layers.0", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        embed_first=False,
    ),
    **{
        base: Kind(
            *(base, "mtp", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
            layer="mtp.layers.0", shift=1.0, sizes={"layer_types": ["linear_attention", *["full_attention"] * 2]},
        )
        for base in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
}  # fmt: skip


def with_mtp(path: Path, model_type: str) -> tuple[Path, Path]:
    """(A checkpoint whose last layer drafts, the one that it was made of, where it is a layer like the others)."""
    kind = KINDS[model_type]
    whole = tiny_checkpoint(kind.base, path / "whole", num_hidden_layers=LAYERS + 1, **kind.sizes)
    target = path / "target"
    target.mkdir()
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    stored = load_file(whole / "model.safetensors")
    own = kind.layer or kind.prefix
    tensors = {name.replace(f"{USUAL}.", f"{own}."): tensor for name, tensor in stored.items()}
    norms = {f"{kind.prefix}.{name}.weight": (32,) for name in (kind.embed_norm, kind.hidden_norm, kind.norm)}
    tensors |= random_tensors({**norms, f"{kind.prefix}.{kind.fuse}.weight": (32, 64)}, 9)
    tensors[f"{kind.prefix}.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    tensors[f"{kind.prefix}.shared_head.head.weight"] = stored["lm_head.weight"].clone()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": model_type, "num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    for name in ("layer_types", "mlp_layer_types"):
        if config.get(name):
            config[name] = config[name][:LAYERS]
    (target / "config.json").write_text(json.dumps(config))
    return target, whole


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def reference(target: Path, whole: Path, kind: Kind) -> Callable[[list[int], int], list[int]]:
    """Drafts behind so many tokens: the whole model's last layer, by transformers, between the MTP norms."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    tensors, eps, prefix = load_file(target / "model.safetensors"), model.config.rms_norm_eps, kind.prefix
    last, body = model.model.layers[LAYERS], model.model

    def through(x_1TN: Tensor) -> Tensor:
        positions = torch.arange(x_1TN.shape[1])[None]
        rotation = body.rotary_emb(x_1TN, position_ids=positions)
        mask = torch.full((x_1TN.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        out = last(x_1TN, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        return out[0] if isinstance(out, tuple) else out

    def run(ids: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        embed_TN = tensors["model.embed_tokens.weight"][ids]
        if not kind.embed_first:
            embed_TN[0] = 0  # nobody has told MiMo's layer what stands at position 0
        embedded = normed(embed_TN, tensors[f"{prefix}.{kind.embed_norm}.weight"] + kind.shift, eps)
        state = normed(states, tensors[f"{prefix}.{kind.hidden_norm}.weight"] + kind.shift, eps)
        both = [embedded, state] if kind.embed_first else [state, embedded]
        x = torch.cat(both, -1) @ tensors[f"{prefix}.{kind.fuse}.weight"].T
        out = normed(through(x[None])[0], tensors[f"{prefix}.{kind.norm}.weight"] + kind.shift, eps)
        return out, out

    def drafts(tokens: list[int], count: int) -> list[int]:
        with torch.no_grad():
            states = body(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            # What enters the last layer, behind the model's norm: the model without that layer.
            known = normed(states[LAYERS][0], tensors["model.norm.weight"] + kind.shift, eps)
            head_VN = tensors["lm_head.weight"]
            return chain(run, lambda x: int((x @ head_VN.T).argmax()), tokens, known, count)

    return drafts


@pytest.mark.slow
@pytest.mark.parametrize("model_type", list(KINDS))
def test_the_layer_says_what_transformers_says(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, whole = with_mtp(tmp_path, model_type)
    found, run = list[tuple[int, list[int]]](), DraftWork.run

    def spied(self: DraftWork, batch: Batch, late: bool = False) -> tuple[Batch, float]:
        sent, seconds = run(self, batch, late)
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
    order = "embedding, then state" if KINDS[model_type].embed_first else "state, then embedding"
    assert order in decisions["speculative_draft"]
    tokens = [*(one[1] for one in want["meta_info"]["input_token_logprobs"]), *want["output_ids"]]
    drafts = reference(target, whole, KINDS[model_type])
    assert len(found) >= 2 and len(found[0][1]) == 3
    for known, said in found:
        assert said == drafts(tokens[:known], len(said)), known


@pytest.mark.slow
def test_a_checkpoint_without_the_layer_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("glm4_moe", tmp_path)
    with pytest.raises(ConfigError, match="this checkpoint has no MTP layer"):
        phloem.Engine(model_path=str(path), **PLAIN, **NEXTN)
