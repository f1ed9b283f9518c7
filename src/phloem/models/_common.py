"""The usual decoder with its named differences. A family's file says which of them it has.

Legend: T packed tokens, N hidden size, L rows whose next token is wanted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.attention import SelfAttention
from phloem.layers.context import AttentionSpec
from phloem.layers.embed import Embedding, Head
from phloem.layers.mlp import GatedMLP
from phloem.layers.moe import SparseMLP
from phloem.layers.norm import RMSNorm
from phloem.layers.rope import Rope, RopeSpec, rope_spec
from phloem.layers.weight import Layer
from phloem.models._weights import WeightIndex, open_sources, some

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.layers.moe import ExpertsConfig
    from phloem.models._weights import Progress

LOG = logging.getLogger("phloem.models")


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer."""

    rope: RopeSpec
    window: int = 0  # 0: full attention
    experts: ExpertsConfig | None = None  # a sparse block in place of the MLP


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes, and the differences between families by name."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    layers: tuple[LayerKind, ...]
    activation: str = "silu"
    scale: float = 0.0  # of attention logits; 0: head_size ** -0.5
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False  # a norm also after attention and after the MLP, before the residual is added
    norm_shift: float = 0.0
    embed_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0


def usual(config: dict[str, Any], **differences: Any) -> DecoderConfig:
    """A `DecoderConfig` from config.json, with what the family says otherwise."""
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias", False))
    base = DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        inner_size=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=head_size,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        layers=(LayerKind(rope_spec(config, head_size)),) * config["num_hidden_layers"],
        activation=config.get("hidden_act", "silu"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        out_bias=bool(config.get("attention_out_bias", bias)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
    return replace(base, **differences)


def layer_types(config: dict[str, Any], sliding: list[bool]) -> list[bool]:
    """Whether each layer attends in a window: from `layer_types` if the checkpoint has it, else `sliding`."""
    named = config.get("layer_types")
    if not named:
        return sliding
    unknown = sorted(set(named) - {"sliding_attention", "full_attention"})
    if unknown or len(named) != len(sliding):
        raise ModelLoadError(f"layer_types: {len(named)} entries for {len(sliding)} layers, unknown: {unknown}")
    return [kind == "sliding_attention" for kind in named]


class DecoderLayer(Layer):
    """Attention and MLP, each behind a norm. Takes and gives (what the last block computed, residual), or their sum
    and None."""

    def __init__(
        self, ctx: BuildContext, config: DecoderConfig, spec: AttentionSpec, rope: Rope, experts: ExpertsConfig | None
    ) -> None:
        size, eps, shift = config.hidden_size, config.eps, config.norm_shift
        self.input_norm = RMSNorm(ctx.child("input_layernorm"), size, eps, shift)
        self.attention = SelfAttention(
            ctx.child("self_attn"),
            spec,
            size,
            rope,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_eps=eps if config.qk_norm else None,
            norm_shift=shift,
        )
        after = RMSNorm(ctx.child("post_attention_layernorm"), size, eps, shift)
        self.attention_norm, self.mlp_norm, self.output_norm = None, after, None
        if config.sandwich_norms:
            self.attention_norm = after
            self.mlp_norm = RMSNorm(ctx.child("pre_feedforward_layernorm"), size, eps, shift)
            self.output_norm = RMSNorm(ctx.child("post_feedforward_layernorm"), size, eps, shift)
        if experts is not None:
            self.mlp = SparseMLP(ctx.child("mlp"), size, experts, config.activation)
        else:
            self.mlp = GatedMLP(ctx.child("mlp"), size, config.inner_size, config.activation, bias=config.mlp_bias)

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Up to and with attention: (its output [T, heads * head_size], residual)."""
        return self.attention.attend(self.input_norm, x_TN, residual_TN, step)

    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        """From attention's output on, row by row."""
        if self.attention_norm is not None and self.output_norm is not None:
            out = self.attention_norm(self.attention.out(out)[0])
            out, total_TN = self.mlp(self.mlp_norm, out, residual_TN, add=False)
            return self.output_norm(out), total_TN
        out, rest_TN = self.attention.out(out, add=residual_TN)
        return self.mlp(self.mlp_norm, out, rest_TN, add=True)


class Decoder(Layer):
    """A causal language model over the op table of its context."""

    def __init__(self, ctx: BuildContext, config: DecoderConfig, max_positions: int) -> None:
        self.config = config
        self.ops = ctx.ops
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        scale = config.scale or config.head_size**-0.5
        self.attention_specs = [
            AttentionSpec(
                index,
                config.heads,
                config.kv_heads,
                config.head_size,
                scale,
                kind.window,
                config.attention_softcap,
            )
            for index, kind in enumerate(config.layers)
        ]
        ropes = {spec: Rope(ctx, spec, max_positions) for spec in {kind.rope for kind in config.layers}}
        body = ctx.child("model")
        self.embed = Embedding(body.child("embed_tokens"), config.vocab_size, config.hidden_size, config.embed_scale)
        self.layers = [
            DecoderLayer(body.child("layers").child(spec.pool), config, spec, ropes[kind.rope], kind.experts)
            for spec, kind in zip(self.attention_specs, config.layers, strict=True)
        ]
        self.norm = RMSNorm(body.child("norm"), config.hidden_size, config.eps, config.norm_shift)
        self.head = Head(
            ctx.child("lm_head"),
            config.vocab_size,
            config.hidden_size,
            self.embed if config.tied else None,
            config.logit_softcap,
        )
        self.index = WeightIndex(self.weights(), ctx, self.embed.weight.names[0])

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, hidden_size] of the rows `step.logit_index`, final norm applied; `head` takes them."""
        return self.finish(*self.trunk(step), step.logit_index)

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Up to and with the last layer's attention: (its output [T, heads * head_size], residual [T, N])."""
        x_TN, residual_TN = self.embed(step.input_ids), None
        if step.embeds is not None:  # torch arithmetic: such a step is never recorded
            index, rows = step.embeds
            x_TN.index_copy_(0, index, rows.to(x_TN.dtype))
        for layer in self.layers[:-1]:
            # In two calls under the same names: what a layer was given is not kept through its MLP, the largest part.
            x_TN, residual_TN = layer.attend(x_TN, residual_TN, step)
            x_TN, residual_TN = layer.feed(x_TN, residual_TN)
        return self.layers[-1].attend(x_TN, residual_TN, step)

    def finish(self, out: Tensor, residual_TN: Tensor, keep_L: Tensor | None) -> Tensor:
        """What `forward` gives, from what `trunk` gave, for the rows `keep_L` alone (None: all)."""
        if keep_L is not None:
            out, residual_TN = self.ops.select_rows(out, keep_L), self.ops.select_rows(residual_TN, keep_L)
        return self.norm.add(*self.layers[-1].feed(out, residual_TN))[0]

    def greedy(self, hidden_LD: Tensor) -> Tensor:
        """The most likely token of each row, integer [L]."""
        return self.head.argmax(hidden_LD)

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The k largest logits of each row, their ids and log-sum-exps; see `Head.best`."""
        return self.head.best(hidden_LD, k, scale_LJ, norms)

    @property
    def weight_bytes(self) -> int:
        return self.index.nbytes

    def weight_names(self) -> list[str]:
        """Checkpoint names of every tensor that `update_weights` takes."""
        return self.index.names()

    def get_weight(self, name: str) -> Tensor:
        """The tensor as a checkpoint would hold it; out of a packed weight, dequantised.

        Raises:
            ModelLoadError: if there is no tensor of that name.
        """
        return self.index.get(name)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Replace tensors by checkpoint name, between steps. True if a weight moved in memory, so that recorded
        steps are stale.

        Raises:
            ModelLoadError: for an unknown name or a wrong shape; tensors before it have been taken.
        """
        return self.index.push(tensors)

    def checkpoint_name(self, name: str) -> str | None:
        """Our name of a tensor in a safetensors file; None: knowingly left out. A family with other names overrides."""
        return name

    def load(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        """Read every weight. Raises ModelLoadError."""
        sources, unused = open_sources(checkpoint, self.index, self.checkpoint_name)
        if unused:
            LOG.warning("%s: %d tensors are not used: %s", checkpoint.path, len(unused), some(unused))
        self.index.pull(sources, str(checkpoint.path), progress)
        if checkpoint.gguf is not None:
            checkpoint.gguf.release()  # the weights are packed: a second copy of them would stay resident
