"""DiffusionGemma: Gemma 4's sparse layers, which read known text from left to right and a canvas both ways.

It draws its canvas anew at every pass, and reads what the pass before made likely. Both halves share their weights, but
for the factor on each layer. Pictures are not read.

Legend: T packed tokens, n of them of canvases, N hidden size, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.layers.mlp import GatedMLP
from phloem.layers.norm import RMSNorm
from phloem.layers.rope import rope_spec
from phloem.layers.weight import Layer, Weight
from phloem.models._common import each_layer, language_part, layer_types, renamed, usual, usual_attention, usual_mlp
from phloem.models._layer import Place
from phloem.models._per_layer import InputDecoder
from phloem.models.gemma4_text import Beside, Gemma4Layer, Kind, experts, sizes

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.models._common import DecoderConfig
    from phloem.models._layer import LayerKind

DEFAULTS = {
    "canvas_length": 256,
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}
DIFFUSION = {"block": "canvas_length", "fills": "renoise"}
TINY = {
    "canvas_length": 16,
    "sliding_window": 8,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "final_logit_softcapping": 30.0,
}

_EVERY = 6  # of so many layers the last one is global
_CHUNK = 8192  # rows of the table of embeddings that are there at a time
_ENCODER = "model.encoder.language_model."


class Canvases:
    """Which tokens of the step are of canvases: the model says so, and its layers look here."""

    index: Tensor | None = None  # [n] int64; None: none
    alone: bool = False  # all rows are theirs


@dataclass(frozen=True)
class CanvasKind(Kind):
    """Makes a `CanvasLayer`."""

    canvases: Canvases | None = None

    def make(self, ctx: BuildContext, place: Place) -> CanvasLayer:
        return CanvasLayer(ctx, self, place)


class CanvasLayer(Gemma4Layer):
    """A layer with one factor on text and another one on canvases."""

    def __init__(self, ctx: BuildContext, kind: CanvasKind, place: Place) -> None:
        super().__init__(ctx, kind, place)
        assert kind.canvases is not None
        self.canvases = kind.canvases
        self.text_scalar = Weight((ctx.child("text_scalar").name,), ((1,),), "norm")

    def close(self, out: Tensor, rest: Tensor, input_TH: Tensor | None) -> Tensor:
        fed, total_TN = self.feed(out, rest)
        x_TN = fed if total_TN is None else self.ops.add(fed, total_TN)
        if self.canvases.alone:
            return self.ops.scale_rows(x_TN, self.scalar.value)
        factors_T = self.text_scalar.value
        if self.canvases.index is not None:
            factors_T = factors_T.expand(len(x_TN)).index_copy(
                0, self.canvases.index, self.scalar.value.expand(len(self.canvases.index))
            )
        return self.ops.scale_rows(x_TN, factors_T)


class SelfConditioning(Layer):
    """norm(embedding + mlp(norm(what the pass before made likely)))."""

    def __init__(self, ctx: BuildContext, hidden_size: int, inner_size: int, activation: str, eps: float) -> None:
        self.ops, self.eps = ctx.ops, eps
        self.norm = RMSNorm(ctx.child("pre_norm"), hidden_size, eps)
        self.mlp = GatedMLP(ctx, hidden_size, inner_size, activation)
        self.ones = torch.ones(hidden_size, device=ctx.device)

    def __call__(self, x_nN: Tensor, soft_nN: Tensor) -> Tensor:
        signal_nN = self.mlp(None, self.norm(soft_nN.to(x_nN.dtype)), None, add=False)[0]
        return self.ops.rms_norm(self.ops.add(x_nN, signal_nN), self.ones, self.eps)


class DiffusionGemma(InputDecoder):
    """The decoder, and the embeddings of canvases (`models.Conditioned`)."""

    def __init__(
        self, ctx: BuildContext, config: DecoderConfig, max_positions: int, conditioning: SelfConditioning,
        canvases: Canvases,
    ) -> None:  # fmt: skip
        self.conditioning, self.canvases = conditioning, canvases  # before the weights are counted
        super().__init__(ctx, config, max_positions, 0, 0, Place(config.hidden_size, config.eps, 0.0, max_positions))

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        canvases = self.canvases
        canvases.index, canvases.alone = None if step.embeds is None else step.embeds[0], False
        return super().trunk(step)

    def conclude(self, step: ForwardBatch, out: Tensor, residual_TN: Tensor) -> Tensor:
        # A step with canvases wants their logits alone.
        self.canvases.alone = step.embeds is not None and step.logit_index is not None
        return super().conclude(step, out, residual_TN)

    def condition(self, ids_n: Tensor, soft_nN: Tensor) -> Tensor:
        return self.conditioning(self.embed(ids_n), soft_nN)

    def soften(self, weights_nV: Tensor) -> Tensor:
        total_nN = torch.zeros(len(weights_nV), self.hidden_size, dtype=torch.float32, device=weights_nV.device)
        for first in range(0, self.vocab_size, _CHUNK):
            ids = torch.arange(first, min(first + _CHUNK, self.vocab_size), device=weights_nV.device)
            total_nN.addmm_(weights_nV[:, first : first + len(ids)], self.embed(ids).float())
        return total_nN

    def checkpoint_name(self, name: str) -> str | None:
        if name.startswith(_ENCODER):
            bare = name.removeprefix(_ENCODER)
            return f"model.{bare.replace('layer_scalar', 'text_scalar')}" if bare.endswith("layer_scalar") else None
        if name.startswith("model.encoder."):
            return None  # its tower
        return renamed(name, {"model.decoder.": "model."}) or language_part(name)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> DiffusionGemma:
    count, eps = config["num_hidden_layers"], float(config["rms_norm_eps"])
    local = layer_types(config, [bool((number + 1) % _EVERY) and number < count - 1 for number in range(count)])
    activation, canvases = config.get("hidden_activation", "gelu_pytorch_tanh"), Canvases()
    whole = {**config, "attention_k_eq_v": True}

    def layer(n: int) -> LayerKind:
        head, kv_heads = sizes(whole, n, local[n])
        attention = usual_attention(
            config,
            head_size=head,
            kv_heads=kv_heads,
            rope=rope_spec(config, head, "sliding_attention" if local[n] else "full_attention"),
            window=int(config["sliding_window"]) if local[n] else 0,
            scale=1.0,
            qk_norm="head",
            v_norm=True,
            k_as_v=not local[n],
        )
        feed = Beside(usual_mlp(config, activation=activation), experts(config))
        return CanvasKind(attention, feed, norms="sandwich", canvases=canvases)

    sizes_of_all = usual(
        config,
        layers=each_layer(config, layer),
        embed_scale=config["hidden_size"] ** 0.5,
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )
    own = ctx.child("model").child("self_conditioning")
    conditioning = SelfConditioning(own, config["hidden_size"], config["intermediate_size"], activation, eps)
    return DiffusionGemma(ctx, sizes_of_all, max_positions, conditioning, canvases)
