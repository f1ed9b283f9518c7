"""DeBERTa V2 and V3: BERT whose attention also weighs how far tokens stand from each other (He et al., 2021).

A logit has three terms: a query with a key, a query with the key of the distance, and a key with the query of the
distance. Legend: T packed tokens, N hidden size, H heads, D head size, B rows of distances.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from phloem.core.errors import ModelLoadError
from phloem.layers.attention import SelfAttention
from phloem.layers.context import Relative
from phloem.layers.embed import Embedding
from phloem.layers.linear import Linear
from phloem.layers.norm import LayerNorm
from phloem.layers.weight import Layer, Weight
from phloem.models._encoder import Encoder, bert_layer, bert_like
from phloem.models._layer import Attention, MixerAlone

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.layers.context import BuildContext, ForwardBatch

ENCODER = {}
DEFAULTS = {
    "layer_norm_eps": 1e-7,
    "type_vocab_size": 0,
    "hidden_act": "gelu",
    "relative_attention": False,
    "position_buckets": -1,
    "max_relative_positions": -1,
    "position_biased_input": True,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "conv_kernel_size": 0,
}
TINY = {
    "num_key_value_heads": None,
    "head_dim": None,
    "relative_attention": True,
    "position_buckets": 8,
    "max_position_embeddings": 64,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"],
}
VARIANTS = {
    "apart": {"share_att_key": False, "pos_att_type": "c2p|p2c", "max_relative_positions": 8, "position_buckets": -1},
    "keys": {"share_att_key": False, "pos_att_type": ["c2p"], "norm_rel_ebd": "none", "type_vocab_size": 2},
    "queries": {"pos_att_type": ["p2c"], "position_biased_input": True, "pooler_hidden_act": "tanh"},
    "conv": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "plain": {"relative_attention": False, "pos_att_type": None, "position_biased_input": True},
}

_CONV_ACTS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu}


def distance_rows(positions: int, buckets: int, farthest: int) -> Tensor:
    """The row of each distance (query behind key) -(positions - 1) to positions - 1, int64. With `buckets` far ones
    share rows: exact up to half of them, logarithmic from there to `farthest`."""
    far = torch.arange(-(positions - 1), positions)
    span = buckets if buckets > 0 else farthest
    if buckets > 0:
        half = buckets // 2
        ratio = torch.log(far.abs().clamp_min(half) / half) / torch.log(torch.tensor((farthest - 1) / half))
        logarithmic = torch.ceil(ratio * (half - 1)).long() + half
        far = torch.where(far.abs() <= half, far, far.sign() * logarithmic)
    return (far + span).clamp(0, 2 * span - 1)


class Distances(Layer):
    """What layers multiply with for each distance: the rows of a learned table, through projections of each layer: its
    own for keys and queries, or some for this alone. They change with the weights alone, and are made once."""

    def __init__(self, ctx: BuildContext, config: dict[str, Any], kinds: list[str], max_positions: int) -> None:
        size, heads = config["hidden_size"], config["num_attention_heads"]
        farthest, buckets = int(config["max_relative_positions"]), int(config["position_buckets"])
        farthest = farthest if farthest > 0 else config["max_position_embeddings"]
        self.kinds, self.heads = kinds, heads
        self.count = 2 * (buckets if buckets > 0 else farthest)
        self.rows = distance_rows(max_positions, buckets, farthest).to(ctx.device)
        body = ctx.child("encoder")
        self.table = Embedding(body.child("rel_embeddings"), self.count, size)
        normed = "layer_norm" in [part.strip() for part in str(config["norm_rel_ebd"]).lower().split("|")]
        self.norm = LayerNorm(body.child("LayerNorm"), size, float(config["layer_norm_eps"])) if normed else None
        self.own: list[dict[str, Linear]] = []
        if not config["share_att_key"]:
            names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
            for number in range(config["num_hidden_layers"]):
                place = body.child("layer").child(number).child("attention.self")
                self.own.append({kind: Linear(place, size, {names[kind]: size}, bias=True) for kind in kinds})

    def __call__(self, mixers: list[SelfAttention]) -> list[Relative]:
        """Of each layer."""
        table_BN = self.table(torch.arange(self.count, device=self.rows.device))
        table_BN = table_BN if self.norm is None else self.norm(table_BN)
        found: list[Relative] = []
        for number, mixer in enumerate(mixers):
            if self.own:
                parts = {kind: layer(table_BN)[0] for kind, layer in self.own[number].items()}
            else:
                qkv = mixer.qkv(table_BN)[0]
                parts = {"p2c": qkv[:, : mixer.q_end], "c2p": qkv[:, mixer.q_end : mixer.k_end]}
            heads = {kind: parts[kind].unflatten(-1, (self.heads, -1)).transpose(0, 1) for kind in self.kinds}
            found.append(Relative(self.rows, heads.get("c2p"), heads.get("p2c")))
        return found


class Convolution(Layer):
    """What the first layer's output has added: a convolution of the embeddings over each text. A norm of the sum."""

    def __init__(self, ctx: BuildContext, config: dict[str, Any]) -> None:
        size, width, act = config["hidden_size"], int(config["conv_kernel_size"]), str(config.get("conv_act", "tanh"))
        if int(config.get("conv_groups", 1)) != 1 or width % 2 == 0 or act not in _CONV_ACTS:
            why = (
                f"conv_kernel_size {width}, conv_groups {config.get('conv_groups', 1)}, conv_act {act!r} are not served"
            )
            raise ModelLoadError(f"{why}; known: an odd width in one group, with {', '.join(_CONV_ACTS)}")
        self.reach, self.act = width // 2, _CONV_ACTS[act]
        self.weight = Weight((ctx.child("conv.weight").name,), ((size, size, width),), "bias")
        self.bias = Weight((ctx.child("conv.bias").name,), ((size,),), "bias")
        self.norm = LayerNorm(ctx.child("LayerNorm"), size, float(config["layer_norm_eps"]))

    def __call__(self, x_TN: Tensor, out_TN: Tensor, positions_T: Tensor) -> Tensor:
        text_T = (positions_T == 0).cumsum(0)
        at_T = torch.arange(len(x_TN), device=x_TN.device)
        taps: list[Tensor] = []
        for step in range(-self.reach, self.reach + 1):
            there_T = (at_T + step).clamp(0, len(x_TN) - 1)
            same_T = (text_T[there_T] == text_T) & (there_T == at_T + step)  # none of another text
            taps.append(x_TN[there_T].masked_fill(~same_T[:, None], 0.0))
        weight_NM = self.weight.value.transpose(1, 2).flatten(1).to(x_TN.dtype)  # [N, width * N], taps in their order
        mixed_TN = self.act(F.linear(torch.cat(taps, -1), weight_NM, self.bias.value.to(x_TN.dtype)))
        return self.norm.add(mixed_TN, out_TN)[0]


class DebertaV2(Encoder):
    """An encoder that tells its layers what distances count for."""

    def __init__(self, ctx: BuildContext, config: dict[str, Any], kinds: list[str], max_positions: int) -> None:
        own = {
            "prefix": "deberta.",
            "head": "context",
            "types": int(config["type_vocab_size"]),
            "positions": (config["max_position_embeddings"], 0) if config["position_biased_input"] else None,
            "layers": (_layer(config, kinds),) * config["num_hidden_layers"],
        }
        super().__init__(ctx, bert_like(config, **own), max_positions)
        self.relative = Distances(ctx, config, kinds, max_positions) if config["relative_attention"] else None
        self.mixed = Convolution(ctx.child("encoder.conv"), config) if int(config["conv_kernel_size"]) > 0 else None
        self.told = False

    def forward(self, step: ForwardBatch) -> Tensor:
        if self.relative is not None and not self.told:
            mixers = [layer.mixer for layer in self.layers if isinstance(layer, MixerAlone)]
            mixers = [mixer for mixer in mixers if isinstance(mixer, SelfAttention)]
            for mixer, found in zip(mixers, self.relative(mixers), strict=True):
                mixer.relative = found
            self.told = True
        return super().forward(step)

    def behind_first(self, x_TN: Tensor, embedded_TN: Tensor, step: ForwardBatch) -> Tensor:
        return x_TN if self.mixed is None else self.mixed(embedded_TN, x_TN, step.positions)

    def checkpoint_name(self, name: str) -> str | None:
        found = super().checkpoint_name(name)
        if found is None or found.startswith(("lm_predictions.", "mask_predictions.")):
            return None
        # Files may have a table of positions that the embeddings do not know, and a norm of a table that there is not.
        idle = ["embeddings.position_embeddings."] if self.positions is None else []
        idle += ["encoder.LayerNorm."] if self.relative is None else []
        return None if found.startswith(tuple(idle)) else found


def _layer(config: dict[str, Any], kinds: list[str]) -> Any:
    names = tuple(f"attention.self.{part}_proj" for part in ("query", "key", "value"))
    kind = bert_layer(config, projections=(*names, "attention.output.dense"))  # pyright: ignore[reportArgumentType]
    attention = kind.mixer
    assert isinstance(attention, Attention)
    scale = (attention.head_size * (1 + len(kinds))) ** -0.5
    return replace(kind, mixer=replace(attention, scale=scale))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    size, heads = config["hidden_size"], config["num_attention_heads"]
    for key, served in (("embedding_size", size), ("attention_head_size", size // heads)):
        if config.get(key, served) != served:
            raise ModelLoadError(f"{key}: {config[key]!r} is not served; known: {served}")
    said = config.get("pos_att_type") or []
    kinds = [part.strip() for part in said.lower().split("|")] if isinstance(said, str) else [str(one) for one in said]
    unknown = sorted(set(kinds) - {"c2p", "p2c", "none", ""})
    if unknown:
        raise ModelLoadError(f"pos_att_type: {', '.join(unknown)} is not served; known: c2p, p2c")
    if int(config["conv_kernel_size"]) > 0 and config["num_hidden_layers"] < 2:
        raise ModelLoadError("conv_kernel_size: a convolution behind the only layer is not served")
    return DebertaV2(ctx, config, [kind for kind in ("c2p", "p2c") if kind in kinds], max_positions)
