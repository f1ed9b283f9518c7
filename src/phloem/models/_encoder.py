"""The usual encoder: embeddings of tokens, positions and segments, then layers that see every token of their text.

It has no head: `_pooled.py` makes vectors and labels of what it gives. Legend: T packed tokens, N hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from phloem.core.errors import ModelLoadError
from phloem.layers.attention import AttentionOptions
from phloem.layers.embed import Embedding, Positions
from phloem.layers.weight import Layer
from phloem.models._layer import Attention, LayerKind, Place, Plain

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch
    from phloem.models._layer import NormKind

# pooler: BERT's, a dense layer with tanh of its own name; context: that with another activation; dense: one inside the
# classifier; norm: a dense layer with GELU and a norm; pre: a dense layer with ReLU.
HeadKind = Literal["pooler", "context", "dense", "norm", "pre"]
_FARTHEST = 128  # tokens: from here on all distances share a bucket


@dataclass(frozen=True)
class EncoderConfig:
    """What stands around the layers, and the layers. Names are those in files, without the base model's prefix."""

    vocab_size: int
    hidden_size: int
    eps: float
    layers: tuple[LayerKind, ...]
    prefix: str  # before every name in the files of models with a head
    head: HeadKind
    embed: str = "embeddings.word_embeddings"
    embed_norm: str = "embeddings.LayerNorm"
    layer: str = "encoder.layer"
    positions: tuple[int, int] | None = None  # a learned table of positions: its rows, and that of position 0
    types: int = 0  # kinds of segments that have an embedding
    final_norm: str = ""
    norms: NormKind = "layer"
    relative: int = 0  # buckets of distances that have a bias of attention for every head
    heads: int = 0


def bert_like(config: dict[str, Any], **differences: Any) -> EncoderConfig:
    """An `EncoderConfig` with BERT's names and places of norms, from config.json; with what a family says otherwise."""
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ModelLoadError(f"position_embedding_type {config['position_embedding_type']!r} is not served")
    check_encodes(config)
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ModelLoadError("is_decoder, add_cross_attention: only encoders are served")
    kind = bert_layer(config)
    base = EncoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        eps=float(config.get("layer_norm_eps", 1e-12)),
        layers=(kind,) * config["num_hidden_layers"],
        prefix="bert.",
        head="pooler",
        positions=(config["max_position_embeddings"], 0),
        types=int(config.get("type_vocab_size", 2)),
        heads=config["num_attention_heads"],
    )
    return replace(base, **differences)


def check_encodes(config: dict[str, Any]) -> None:
    """Refuse a GGUF file whose tokens see those before them alone, and heads of no whole size."""
    size, heads = config["hidden_size"], config["num_attention_heads"]
    if size % heads:
        raise ModelLoadError(f"hidden_size {size} is not a multiple of num_attention_heads {heads}")
    if config.get("is_causal"):
        raise ModelLoadError("attention.causal is not false: only encoders are served")


def bert_layer(
    config: dict[str, Any],
    *,
    projections: tuple[str, str, str, str] = (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
    ),
    feed: tuple[str, str] = ("intermediate.dense", "output.dense"),
    norms: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm"),
) -> LayerKind:  # fmt: skip
    """Attention to all tokens and a plain MLP, each with a norm of its sum with the residual."""
    heads, size = config["num_attention_heads"], config["hidden_size"]
    q, k, v, out = projections
    options = AttentionOptions(qkv_bias=True, out_bias=True, q_proj=q, k_proj=k, v_proj=v, o_proj=out)
    attention = Attention(heads, heads, size // heads, None, options=options, name="", causal=False)
    activation = str(config.get("hidden_act", "gelu"))
    return LayerKind(attention, Plain(config["intermediate_size"], activation, True, feed, name=""), "sum", norms)


class Distances(Layer):
    """A learned bias of attention for each head and bucket of distances; far ones share buckets (T5's rule)."""

    def __init__(self, ctx: BuildContext, buckets: int, heads: int, max_positions: int) -> None:
        self.table = Embedding(ctx, buckets, heads)
        far = torch.arange(-(max_positions - 1), max_positions)  # key behind query
        side = buckets // 2
        exact = side // 2
        ratio = torch.log(far.abs().clamp_min(1).float() / exact) / math.log(_FARTHEST / exact)
        logarithmic = (exact + (ratio * (side - exact)).long()).clamp_max(side - 1)
        bucket = torch.where(far.abs() < exact, far.abs(), logarithmic)
        self.buckets = (bucket + side * (far > 0)).to(ctx.device)

    def __call__(self) -> Tensor:
        """[heads, 2 * positions - 1]."""
        return self.table(self.buckets).float().T.contiguous()


class Encoder(Layer):
    """Hidden states of packed texts."""

    def __init__(self, ctx: BuildContext, config: EncoderConfig, max_positions: int) -> None:
        self.config, self.ops = config, ctx.ops
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        place = Place(config.hidden_size, config.eps, 0.0, max_positions, norms=config.norms)
        self.embed = Embedding(ctx.child(config.embed), config.vocab_size, config.hidden_size)
        self.positions = self.types = None
        if config.positions is not None:
            name = ctx.child("embeddings.position_embeddings")
            self.positions = Positions(name, config.hidden_size, *config.positions)
        if config.types:
            self.types = Embedding(ctx.child("embeddings.token_type_embeddings"), config.types, config.hidden_size)
        self.embed_norm = place.norm(ctx.child(config.embed_norm))
        self.distances: Distances | None = None
        if config.relative:
            name = ctx.child("encoder.relative_attention_bias")
            self.distances = Distances(name, config.relative, config.heads, max_positions)
        self.layers = [
            kind.make(ctx.child(config.layer).child(number), place) for number, kind in enumerate(config.layers)
        ]
        self.norm = place.norm(ctx.child(config.final_norm)) if config.final_norm else None
        specs = [layer.attention for layer in self.layers]
        self.attention_specs: list[AttentionSpec] = [spec for spec in specs if spec is not None]

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, N] of the rows `step.logit_index` (None: all tokens)."""
        x_TN = self.embed(step.input_ids)
        if self.types is not None:
            types = step.types if step.types is not None else step.input_ids.new_zeros(step.input_ids.shape)
            x_TN = self.ops.add(x_TN, self.types(types))
        if self.positions is not None:
            x_TN = self.positions.add(x_TN, step.positions)
        if self.distances is not None:
            step = replace(step, distances=self.distances())
        x_TN, residual_TN = self.embed_norm(x_TN), None
        embedded_TN = x_TN
        for layer in self.layers[:-1]:
            x_TN, residual_TN = layer.attend(x_TN, residual_TN, step)
            x_TN, residual_TN = layer.feed(x_TN, residual_TN)
            if layer is self.layers[0]:
                x_TN = self.behind_first(x_TN, embedded_TN, step)
        out, residual_TN = self.layers[-1].attend(x_TN, residual_TN, step)
        if step.logit_index is not None:
            out = self.ops.select_rows(out, step.logit_index)
            residual_TN = self.ops.select_rows(residual_TN, step.logit_index)
        x, residual = self.layers[-1].feed(out, residual_TN)
        if self.norm is not None:
            return self.norm.add(x, residual)[0]
        return x if residual is None else self.ops.add(x, residual)

    def behind_first(self, x_TN: Tensor, embedded_TN: Tensor, step: ForwardBatch) -> Tensor:
        """What the first layer gave, as the second takes it; `embedded_TN`: what the first took."""
        return x_TN

    def checkpoint_name(self, name: str) -> str | None:
        """Our name of a tensor in a safetensors file; None: knowingly left out (what models of words in gaps have)."""
        inner = name.removeprefix(self.config.prefix)
        if inner.startswith(("cls.", "lm_head.", "decoder.", "vocab_")) or inner.endswith(".position_ids"):
            return None
        if inner.endswith((".gamma", ".beta")):  # of old files
            inner = inner.replace(".gamma", ".weight").replace(".beta", ".bias")
        return inner
