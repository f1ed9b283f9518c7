"""Random heads that draft, as files of the published layouts; and what they draft, in plain torch without a cache.

The reference knows nothing of the engine: it runs whole texts through one layer, position by position.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

SIZES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
}
# Ids (of a head) -> states [positions, N] and what is carried on from each of them.
Run = Callable[[list[int], Tensor], tuple[Tensor, Tensor]]


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        wide = shape[-1] ** -0.5 if len(shape) > 1 else 0.2
        centre = 1.0 if "norm" in name else 0.0
        found[name] = torch.empty(shape).normal_(centre, wide, generator=generator)
    return found


def layer_shapes(prefix: str, wide: int, norms: Sequence[str]) -> dict[str, tuple[int, ...]]:
    size, inner, heads, kv, head = 32, SIZES["intermediate_size"], 4, 2, 16
    return {
        f"{prefix}.self_attn.q_proj.weight": (heads * head, wide * size),
        f"{prefix}.self_attn.k_proj.weight": (kv * head, wide * size),
        f"{prefix}.self_attn.v_proj.weight": (kv * head, wide * size),
        f"{prefix}.self_attn.o_proj.weight": (size, heads * head),
        f"{prefix}.mlp.gate_proj.weight": (inner, size),
        f"{prefix}.mlp.up_proj.weight": (inner, size),
        f"{prefix}.mlp.down_proj.weight": (size, inner),
        **{f"{prefix}.{norm}.weight": (size,) for norm in norms},
    }


def write_head(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**SIZES, **config}))
    return path


def eagle(path: Path, seed: int = 1, bias: bool = True) -> Path:
    shapes = {"fc.weight": (32, 64), "embed_tokens.weight": (384, 32)} | ({"fc.bias": (32,)} if bias else {})
    tensors = random_tensors({**shapes, **layer_shapes("layers.0", 1, ["post_attention_layernorm"])}, seed)
    return write_head(path, tensors)


def eagle3(
    path: Path, seed: int = 1, vocab: int = 96, layer: str = "midlayer", norms: bool = False, **config: Any
) -> Path:
    """`vocab` 0: no head of its own."""
    own = ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    shapes = {"fc.weight": (32, 96), "norm.weight": (32,), **layer_shapes(layer, 2, own)}
    shapes |= {"lm_head.weight": (vocab, 32)} if vocab else {}
    shapes |= {f"fc_norm.{third}.weight": (32,) for third in range(3)} if norms else {}
    tensors = random_tensors(shapes, seed)
    if vocab:
        ids = torch.randperm(384, generator=torch.Generator().manual_seed(seed))[:vocab].sort().values
        tensors["d2t"] = ids - torch.arange(vocab)
        tensors["t2d"] = torch.zeros(384, dtype=torch.bool).index_fill_(0, ids, True)
    values = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": vocab or None, **config}
    return write_head(path, tensors, **values)


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x_THD: Tensor) -> Tensor:
    """Rotation, halves paired."""
    size = x_THD.shape[-1]
    angles = torch.arange(len(x_THD))[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x_THD.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attended(x: Tensor, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    q, k, v = (x @ tensors[f"{prefix}.self_attn.{name}_proj.weight"].T for name in "qkv")
    q, k, v = (one.unflatten(-1, (-1, 16)) for one in (q, k, v))
    q, k = turned(q), turned(k)
    q, k, v = (one.transpose(0, 1) for one in (q, k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    return out.transpose(0, 1).flatten(1) @ tensors[f"{prefix}.self_attn.o_proj.weight"].T


def fed(x: Tensor, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    gate, up = (x @ tensors[f"{prefix}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (F.silu(gate) * up) @ tensors[f"{prefix}.mlp.down_proj.weight"].T


def eagle_run(head: Path, embed_VN: Tensor) -> Run:
    """Of states behind the model's last norm."""
    tensors = load_file(head / "model.safetensors")

    def run(ids: list[int], states: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([embed_VN[ids], states], -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(32))
        x = x + attended(x, tensors, "layers.0")
        x = x + fed(rms(x, tensors["layers.0.post_attention_layernorm.weight"]), tensors, "layers.0")
        return x, x

    return run


def eagle3_run(head: Path, embed_VN: Tensor, layer: str = "midlayer", normed: bool = False) -> Run:
    """Of fused states. `normed`: what is carried on is normalised."""
    tensors = load_file(head / "model.safetensors")

    def run(ids: list[int], g: Tensor) -> tuple[Tensor, Tensor]:
        first = rms(embed_VN[ids], tensors[f"{layer}.input_layernorm.weight"])
        second = rms(g, tensors[f"{layer}.hidden_norm.weight"])
        x = g + attended(torch.cat([first, second], -1), tensors, layer)
        x = x + fed(rms(x, tensors[f"{layer}.post_attention_layernorm.weight"]), tensors, layer)
        out = rms(x, tensors["norm.weight"])
        return out, out if normed else x

    return run


def fused(head: Path, aux_TA: Tensor) -> Tensor:
    tensors = load_file(head / "model.safetensors")
    if "fc_norm.0.weight" in tensors:
        thirds = aux_TA.chunk(3, -1)
        aux_TA = torch.cat([rms(one, tensors[f"fc_norm.{at}.weight"]) for at, one in enumerate(thirds)], -1)
    return aux_TA @ tensors["fc.weight"].T


def said_by(head: Path, model_head_VN: Tensor) -> Callable[[Tensor], int]:
    """The most likely token by a head's own logits, or by the model's."""
    tensors = load_file(head / "model.safetensors")
    if "lm_head.weight" not in tensors:
        return lambda x: int((x @ model_head_VN.T).argmax())
    return lambda x: (best := int((x @ tensors["lm_head.weight"].T).argmax())) + int(tensors["d2t"][best])


def said_logits(head: Path, model_head_VN: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits over the model's vocabulary by a head's own ones, -inf for what it cannot say, or by the model's."""
    tensors = load_file(head / "model.safetensors")
    if "lm_head.weight" not in tensors:
        return lambda x: x @ model_head_VN.T
    ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    empty = torch.full((len(model_head_VN),), float("-inf"))
    return lambda x: empty.index_copy(0, ids, x @ tensors["lm_head.weight"].T)


def chain(run: Run, say: Callable[[Tensor], int], tokens: Sequence[int], states: Tensor, count: int) -> list[int]:
    """`count` drafts behind `tokens`; `states`: the model's, of all tokens but the last."""
    ids, found = list(tokens[1:]), list[int]()
    for _ in range(count):
        out, carried = run(ids, states)
        found.append(say(out[-1]))
        ids.append(found[-1])
        states = torch.cat([states, carried[-1:]])
    return found
