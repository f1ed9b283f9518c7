"""Random DFlash drafters, as files of the two published layouts; and what they draft, in plain torch over whole texts.

The reference knows nothing of the engine: no cache, no pages, one dense mask for each layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from draft_support import fed, random_tensors, rms, write_head
from safetensors.torch import load_file
from torch import Tensor

MASK = 7
HEAD, HEADS, KV = 16, 4, 2


def shapes(layers: int, states: int, *, norms: bool = True) -> dict[str, tuple[int, ...]]:
    size, inner = 32, 48
    found: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, states * size), "hidden_norm.weight": (size,), "norm.weight": (size,)
    }  # fmt: skip
    for number in range(layers):
        at = f"layers.{number}"
        found |= {f"{at}.self_attn.{name}_proj.weight": (KV * HEAD, size) for name in "kv"}
        found |= {
            f"{at}.self_attn.q_proj.weight": (HEADS * HEAD, size),
            f"{at}.self_attn.o_proj.weight": (size, HEADS * HEAD),
            f"{at}.mlp.gate_proj.weight": (inner, size),
            f"{at}.mlp.up_proj.weight": (inner, size),
            f"{at}.mlp.down_proj.weight": (size, inner),
            f"{at}.input_layernorm.weight": (size,),
            f"{at}.post_attention_layernorm.weight": (size,),
        }
        found |= {f"{at}.self_attn.{name}_norm.weight": (HEAD,) for name in "qk"} if norms else {}
    return found


def dflash(
    path: Path, ids: Sequence[int] = (0, 2, 4), *, layers: int = 2, block: int = 8, seed: int = 3, **more: Any
) -> Path:
    """As the original's authors publish them. `ids`: layers whose outputs are read."""
    values = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "block_size": block,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": list(ids)},
        "attention_bias": False,
        "num_target_layers": 6,
    }
    return write_head(path, random_tensors(shapes(layers, len(ids)), seed), **{**values, **more})


def speculator(
    path: Path,
    ids: Sequence[int] = (1, 3, 5),
    *,
    layers: int = 2,
    block: int = 8,
    vocab: int = 0,
    seed: int = 4,
    **more: Any,
) -> Path:
    """As vLLM's speculators write them. `ids`: how many layers stand before each state. `vocab` 0: no map."""
    tensors = random_tensors(shapes(layers, len(ids)), seed)
    if vocab:
        tensors |= random_tensors({"lm_head.weight": (vocab, 32)}, seed + 1)
        own = torch.randperm(384, generator=torch.Generator().manual_seed(seed))[:vocab].sort().values
        tensors["d2t"] = own - torch.arange(vocab)
        tensors |= term(vocab, seed) if "markov_rank" in more else {}
        tensors["t2d"] = torch.zeros(384, dtype=torch.bool).index_fill_(0, own, True)
    else:
        tensors |= random_tensors({"embed_tokens.weight": (384, 32)}, seed + 1)  # a copy that is not read
    write_head(path, tensors)
    inner = json.loads((path / "config.json").read_text())
    inner |= {"model_type": "qwen3", "num_hidden_layers": layers, "architectures": None, **more.pop("layer", {})}
    values = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "speculators_config": {"algorithm": "dflash"},
        "transformer_layer_config": inner,
        "aux_hidden_state_layer_ids": list(ids),
        "block_size": block,
        "draft_vocab_size": vocab or 384,
        "mask_token_id": MASK,
        **more,
    }
    (path / "config.json").write_text(json.dumps(values))
    return path


def dspark(path: Path, ids: Sequence[int] = (0, 2, 4), *, layers: int = 2, block: int = 5, seed: int = 5) -> Path:
    """As the authors of DSpark publish them: with copies of the model's embedding and head, and what is not read."""
    tensors = random_tensors(shapes(layers, len(ids)), seed)
    tensors |= random_tensors({"embed_tokens.weight": (384, 32), "lm_head.weight": (384, 32)}, seed + 1)
    tensors |= term(384, seed)
    tensors |= random_tensors({"confidence_head.proj.weight": (1, 48), "confidence_head.proj.bias": (1,)}, seed)
    values = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "block_size": block,
        "mask_token_id": MASK,
        "target_layer_ids": list(ids),
        "num_target_layers": 6,
        "markov_rank": 16,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    return write_head(path, tensors, **values)


def term(vocab: int, seed: int) -> dict[str, Tensor]:
    """Large enough that it changes what is said."""
    names = {"markov_head.markov_w1.weight": (384, 16), "markov_head.markov_w2.weight": (vocab, 16)}
    return {name: 6.0 * one for name, one in random_tensors(names, seed + 9).items()}


def at(x_THD: Tensor, places: Tensor) -> Tensor:
    """Rotated to these positions, halves paired."""
    angles = places[:, None] * 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x_THD.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def block_states(
    drafter: Path,
    features: Tensor,
    block: Tensor,
    windows: Sequence[tuple[int, bool]] = ((0, True), (0, True)),
) -> Tensor:
    """What stands at each place of a block behind a text, normalised, [places, N].

    Args:
        features: the model's states of the text side by side, [tokens, m N].
        block: embeddings, [places, N].
        windows: of each layer, (its window or 0, whether a place sees those behind it).
    """
    tensors = load_file(drafter / "model.safetensors")
    known, size = len(features), len(block)
    context = rms(features @ tensors["fc.weight"].T, tensors["hidden_norm.weight"])
    places = torch.arange(known + size)
    x = block
    for number, (window, ahead) in enumerate(windows):
        name = f"layers.{number}"
        own = rms(x, tensors[f"{name}.input_layernorm.weight"])
        both = torch.cat([context, own])
        q = (own @ tensors[f"{name}.self_attn.q_proj.weight"].T).unflatten(-1, (HEADS, HEAD))
        k, v = ((both @ tensors[f"{name}.self_attn.{one}_proj.weight"].T).unflatten(-1, (KV, HEAD)) for one in "kv")
        if f"{name}.self_attn.q_norm.weight" in tensors:
            q, k = (rms(y, tensors[f"{name}.self_attn.{one}_norm.weight"]) for y, one in ((q, "q"), (k, "k")))
        q, k = at(q, places[known:]), at(k, places)
        distance = places[known:, None] - places[None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if not ahead:
            hidden |= distance < 0
        if window:
            hidden |= distance.abs() >= window
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV, 1)) * HEAD**-0.5
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(HEADS // KV, 1)).flatten(1)
        x = x + out @ tensors[f"{name}.self_attn.o_proj.weight"].T
        x = x + fed(rms(x, tensors[f"{name}.post_attention_layernorm.weight"]), tensors, name)
    return rms(x, tensors["norm.weight"])
