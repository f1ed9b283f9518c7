"""Where norms stand, and what may stand around attention, against the formulas written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from phloem.kernels.ops import Ops
from phloem.layers.attention import AttentionOptions, SelfAttention
from phloem.layers.context import AttentionSpec, BuildContext, Heads
from phloem.layers.linear import Linear
from phloem.layers.rope import Rope, rope_spec
from phloem.layers.weight import Layer
from phloem.models._layer import MLP, LayerKind, Place

CTX = BuildContext(Ops(), torch.float32, torch.device("cpu"), name="layer")
SIZE, EPS = 8, 1e-5


class Doubled(Layer):
    """A mixer that doubles what it is given, with a projection behind it."""

    def __init__(self, ctx: BuildContext, place: Place) -> None:
        self.ops = ctx.ops
        self.out = Linear(ctx, SIZE, {"out": SIZE})

    def attend(self, norm: Any, x: torch.Tensor, residual: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else x + residual
        return 2 * (total if norm is None else norm(total)), total


def filled(layer: Layer) -> dict[str, torch.Tensor]:
    """Random values in every slot, by name."""
    found: dict[str, torch.Tensor] = {}
    for number, weight in enumerate(layer.weights()):
        generator = torch.Generator().manual_seed(number)
        parts = [torch.randn(shape, generator=generator) * 0.5 for shape in weight.shapes]
        found.update(zip(weight.names, parts, strict=True))
        weight.value = torch.cat(parts)
    return {name.removeprefix("layer.").removesuffix(".weight"): value for name, value in found.items()}


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("norms", ["pre", "post", "sandwich", "parallel"])
@pytest.mark.parametrize("residual", [False, True])
def test_where_norms_stand(norms: Any, scale: float, residual: bool) -> None:
    kind = LayerKind(Doubled, MLP(12), norms=norms, residual_scale=scale)
    layer = kind.make(CTX, Place(SIZE, EPS, 0.0, 16))
    w = filled(layer)
    x, rest = torch.randn(3, SIZE), torch.randn(3, SIZE) if residual else None
    out, total = layer.attend(x, rest, SimpleNamespace())  # pyright: ignore[reportArgumentType]
    ours, left = layer.feed(out, total)
    ours = ours if left is None else ours + left

    def mix(v: torch.Tensor) -> torch.Tensor:
        return 2 * v @ w["out"].T

    def feed(v: torch.Tensor) -> torch.Tensor:
        return (F.silu(v @ w["mlp.gate_proj"].T) * (v @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T

    h = x if rest is None else x + rest
    if norms == "pre":
        h = h + scale * mix(rms(h, w["input_layernorm"]))
        h = h + scale * feed(rms(h, w["post_attention_layernorm"]))
    elif norms == "post":
        h = h + scale * rms(mix(h), w["post_attention_layernorm"])
        h = h + scale * rms(feed(h), w["post_feedforward_layernorm"])
    elif norms == "sandwich":
        h = h + scale * rms(mix(rms(h, w["input_layernorm"])), w["post_attention_layernorm"])
        fed = feed(rms(h, w["pre_feedforward_layernorm"]))
        h = h + scale * rms(fed, w["post_feedforward_layernorm"])
    else:
        normed = rms(h, w["input_layernorm"])
        h = h + scale * (mix(normed) + feed(normed))
    torch.testing.assert_close(ours, h, atol=1e-5, rtol=1e-4)


class Dense:
    """A step's memory for one row without pages: causal attention in float32. Rotates as it is asked."""

    def attend(self, spec: AttentionSpec, heads: Heads) -> torch.Tensor:
        q, k, rotation = heads.q.clone(), heads.k.clone(), heads.rotation
        if rotation is not None:
            if rotation.q_norm is not None and rotation.k_norm is not None:
                q, k = rms(q, rotation.q_norm), rms(k, rotation.k_norm)
            Ops().rope_(q, k, rotation.positions, rotation.cos_sin, rotation.interleaved)
        k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, 1) for x in (k, heads.v))
        return (
            F.scaled_dot_product_attention(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=spec.scale
            )
            .transpose(0, 1)
            .contiguous()
        )


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(eps=EPS),
        AttentionOptions(eps=EPS, qk_norm="head"),
        AttentionOptions(eps=EPS, qk_norm="after", q_norm="query_norm", k_norm="key_norm"),
        AttentionOptions(eps=EPS, qk_norm="whole"),
        AttentionOptions(eps=EPS, v_norm=True),
        AttentionOptions(eps=EPS, gate=True, qk_norm="head"),
    ],
    ids=lambda options: options.qk_norm + ("v" if options.v_norm else "") + ("gate" if options.gate else ""),
)
def test_what_stands_around_attention(options: AttentionOptions, turned: bool) -> None:
    heads, kv_heads, size, tokens = 4, 2, 6, 5
    rope = Rope(CTX, rope_spec({}, size), 16) if turned else None
    layer = SelfAttention(CTX, AttentionSpec(0, heads, kv_heads, size, 0.4), SIZE, rope, options)
    w = filled(layer)
    x, positions = torch.randn(tokens, SIZE), torch.arange(2, 2 + tokens)
    step: Any = SimpleNamespace(positions=positions, memory=Dense(), distances=None)
    ours, total = layer.attend(None, x, None, step)
    assert torch.equal(total, x)

    q, k, v = (x @ w[name].T for name in ("q_proj", "k_proj", "v_proj"))
    if options.qk_norm == "whole":
        q, k = rms(q, w["q_norm"]), rms(k, w["k_norm"])
    q, k, v = q.view(tokens, heads, -1), k.view(tokens, kv_heads, -1), v.view(tokens, kv_heads, -1)
    gate = q[..., size:]
    q = q[..., :size].contiguous()
    if options.qk_norm == "head":
        q, k = rms(q, w["q_norm"]), rms(k, w["k_norm"])
    if rope is not None:
        Ops().rope_(q, k, positions, rope.cos_sin, False)
    if options.qk_norm == "after":
        q, k = rms(q, w["query_norm"]), rms(k, w["key_norm"])
    v = rms(v, torch.ones(size)) if options.v_norm else v
    expected = Dense().attend(layer.spec, Heads(q, k, v))
    expected = expected * torch.sigmoid(gate) if options.gate else expected
    torch.testing.assert_close(ours, expected.reshape(tokens, -1), atol=1e-5, rtol=1e-4)


def test_the_page_of_models_is_what_its_script_writes() -> None:
    import model_table

    assert model_table.main(["--check"]) == 0
