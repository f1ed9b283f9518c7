"""Language models of diffusion in plain torch, by the names of their files, and the loop that decodes them.

Everything is computed anew in each pass, whole texts, one at a time: no cache, no batch, none of the product's layers.
A family's test reference is the class that `DENSE` names for it.

Legend: T tokens, H heads, D head size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from phloem.engine.sampling.sampler import uniforms


class Qwen3Like:
    """SDAR: Qwen3's layers, in which a token sees all of its own block and of the blocks before it."""

    attention, q_norm, k_norm, out = "self_attn", "q_norm", "k_norm", "o_proj"
    whole = False  # a token sees the whole text
    shifted = False  # logits of a place stand before it
    embedding = "model.embed_tokens.weight"
    usual: dict[str, Any] = {"block_size": 4}

    def __init__(self, path: Path) -> None:
        self.config = {**self.usual, **json.loads((path / "config.json").read_text())}
        self.tensors = load_file(path / "model.safetensors")
        self.block = int(self.config["block_size"])
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.size = self.config["head_dim"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.get("rms_norm_eps", 1e-6))
        return x * scale * self.tensors[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def gated(self, x: Tensor, name: str) -> Tensor:
        inner = F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")
        return self.linear(inner, f"{name}.down_proj")

    def feed(self, x: Tensor, name: str, number: int) -> Tensor:
        return self.gated(x, name)

    def qkv(self, x: Tensor, name: str) -> tuple[Tensor, ...]:
        return tuple(self.linear(x, f"{name}.{part}_proj") for part in "qkv")

    def turned(self, x_THD: Tensor) -> Tensor:
        size = int(self.size * self.config.get("partial_rotary_factor", 1.0))
        base = self.config.get("rope_theta", 10000.0)
        angles = torch.arange(len(x_THD))[:, None] / base ** (torch.arange(0, size, 2) / size)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second, rest = x_THD[..., : size // 2], x_THD[..., size // 2 : size], x_THD[..., size:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def attend(self, x: Tensor, name: str) -> Tensor:
        q, k, v = self.qkv(x, name)
        q, k, v = (one.unflatten(-1, (-1, self.size)) for one in (q, k, v))
        if f"{name}.{self.q_norm}.weight" in self.tensors:
            q, k = self.norm(q, f"{name}.{self.q_norm}"), self.norm(k, f"{name}.{self.k_norm}")
        q, k = self.turned(q), self.turned(k)
        k, v = (one.repeat_interleave(self.heads // self.kv_heads, 1) for one in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * self.size**-0.5
        place = torch.arange(len(x)) // self.block
        scores.masked_fill_(place[None, :] > place[:, None], -torch.inf)
        values = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
        return self.linear(values, f"{name}.{self.out}")

    def logits(self, ids: list[int]) -> Tensor:
        """Of every position, [T, V]."""
        x = self.tensors[self.embedding][torch.tensor(ids)]
        for number in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{number}"
            x = x + self.attend(self.norm(x, f"{name}.input_layernorm"), f"{name}.{self.attention}")
            x = x + self.feed(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp", number)
        return F.linear(self.norm(x, "model.norm"), self.tensors["lm_head.weight"])


class Qwen3MoeLike(Qwen3Like):
    """SDAR with experts."""

    def feed(self, x: Tensor, name: str, number: int) -> Tensor:
        weights, chosen = self.linear(x, f"{name}.gate").softmax(-1).topk(self.config["num_experts_per_tok"])
        return self.mixed(x, name, weights / weights.sum(-1, keepdim=True), chosen)

    def mixed(self, x: Tensor, name: str, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            out.index_add_(0, rows, weights[rows, place, None] * self.gated(x[rows], f"{name}.experts.{expert}"))
        return out


class LLaDA2(Qwen3MoeLike):
    """LLaDA 2.0 mini and flash."""

    attention, q_norm, k_norm, out = "attention", "query_layernorm", "key_layernorm", "dense"
    embedding = "model.word_embeddings.weight"
    usual = {
        "block_size": 32, "partial_rotary_factor": 0.5, "rope_theta": 600000.0, "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
    }  # fmt: skip

    def qkv(self, x: Tensor, name: str) -> tuple[Tensor, ...]:
        own = self.kv_heads * self.size
        return self.linear(x, f"{name}.query_key_value").split([self.heads * self.size, own, own], -1)

    def feed(self, x: Tensor, name: str, number: int) -> Tensor:
        if number < self.config["first_k_dense_replace"]:
            return self.gated(x, name)
        scores = self.linear(x, f"{name}.gate").sigmoid()
        biased = scores + self.tensors[f"{name}.gate.expert_bias"]
        grouped = biased.unflatten(-1, (self.config["n_group"], -1))
        best = grouped.topk(2, -1)[0].sum(-1).topk(self.config["topk_group"], -1)[1]
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        open_to = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        chosen = open_to.topk(self.config["num_experts_per_tok"], -1)[1]
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config["routed_scaling_factor"]
        return self.mixed(x, name, weights, chosen) + self.gated(x, f"{name}.shared_experts")


class LLaDA(Qwen3Like):
    """LLaDA 8B: Llama's layers; a token sees the whole text, and blocks are those of the answer."""

    out = "attn_out"
    whole = True
    usual = {"block_size": 32, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "head_dim": None}

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = self.config["hidden_size"] // self.heads

    def logits(self, ids: list[int]) -> Tensor:
        x, self.block, answered = self.tensors["model.transformer.wte.weight"][torch.tensor(ids)], len(ids), self.block
        for number in range(self.config["num_hidden_layers"]):
            name = f"model.transformer.blocks.{number}"
            x = x + self.attend(self.norm(x, f"{name}.attn_norm"), name)
            y = self.norm(x, f"{name}.ff_norm")
            y = F.silu(self.linear(y, f"{name}.ff_proj")) * self.linear(y, f"{name}.up_proj")
            x = x + self.linear(y, f"{name}.ff_out")
        self.block = answered
        return F.linear(self.norm(x, "model.transformer.ln_f"), self.tensors["model.transformer.ff_out.weight"])


class Dream(Qwen3Like):
    """Dream 7B: Qwen2's layers; a token sees the whole text, and its logits stand one place before it."""

    out = "o_proj"
    whole = shifted = True
    usual = {"block_size": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "head_dim": None}

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = self.config["hidden_size"] // self.heads

    def logits(self, ids: list[int]) -> Tensor:
        answered, self.block = self.block, len(ids)
        found, self.block = super().logits(ids), answered
        return found


DENSE = {"sdar": Qwen3Like, "sdar_moe": Qwen3MoeLike, "llada2_moe": LLaDA2, "llada": LLaDA, "dream": Dream}


@dataclass
class How:
    """How a block is filled, and how tokens are drawn."""

    mask: int = 2
    threshold: float = 0.95
    steps: int = 0
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0
    ends: tuple[int, ...] = ()


@torch.inference_mode()
def decode(model: Qwen3Like, prompt: list[int], count: int, how: How) -> tuple[list[int], int]:
    """(The answer, cut behind its first end, the passes that it took)."""
    known, passes, block, end = list(prompt), 0, model.block, len(prompt) + count
    while len(known) < end:
        start = len(known) // block * block if not model.whole else 0
        until = start + block
        if model.whole:  # blocks of the answer, and masks to its end
            until = min(end, len(prompt) + ((len(known) - len(prompt)) // block + 1) * block)
        canvas: list[int | None] = [*known[start:], *[None] * (until - len(known))]
        first, number = len(known) - start, 0
        while None in canvas:
            ids = known[:start] + [how.mask if token is None else token for token in canvas]
            ids += [how.mask] * (end - until) if model.whole else []
            logits = model.logits(ids)
            logits = torch.cat([logits[:1], logits[:-1]]) if model.shifted else logits
            said = _said(logits[start:], canvas, start, number, how)
            steps = how.steps or block
            least = min(len(said), block // steps + (number < block % steps))
            ranked = sorted(said, key=lambda place: (-said[place][1], place))
            sure = [place for place in ranked if said[place][1] > how.threshold]
            for place in sure if len(sure) >= least else ranked[:least]:
                canvas[place] = said[place][0]
            number, passes = number + 1, passes + 1
            filled = canvas[first : canvas.index(None)] if None in canvas else canvas[first:]
            if any(token in how.ends for token in filled) or len(known) + len(filled) >= end:
                canvas = canvas[: first + len(filled)]
        known += [token for token in canvas[first:] if token is not None]
        found = [at for at in range(len(prompt), len(known)) if known[at] in how.ends]
        if found:
            return known[len(prompt) : found[0] + 1][:count], passes
    return known[len(prompt) : end], passes


def _said(logits: Tensor, canvas: list[int | None], start: int, number: int, how: How) -> dict[int, tuple[int, float]]:
    """What is said at each open place, and how likely it is."""
    import numpy as np

    found: dict[int, tuple[int, float]] = {}
    for place in (place for place, token in enumerate(canvas) if token is None):
        row = logits[place].clone()
        row[how.mask] = -torch.inf
        if how.temperature == 0:
            weights = row.softmax(-1)
            token = int(row.argmax())
        else:
            weights = (row / how.temperature).softmax(-1)
            if how.top_k:
                weights = torch.where(weights >= weights.topk(how.top_k)[0][-1], weights, torch.zeros(()))
                weights = weights / weights.sum()
            at = np.array([(start + place) | (number << 32)], np.uint64)
            draw = float(uniforms(np.array([how.seed], np.uint64), at)[0])
            sums = weights.double().cumsum(-1)
            token = int(torch.searchsorted(sums, torch.tensor(draw * float(sums[-1])).double(), right=True))
        found[place] = token, float(weights[token])
    return found
