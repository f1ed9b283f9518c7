"""Gemma 3n text models: four streams of hidden states, a low-rank branch beside attention, an input for each layer.

Keys and values of the last layers are those of layers before them. Norm weights are stored as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.layers.linear import Linear
from phloem.layers.mlp import GatedMLP
from phloem.layers.norm import RMSNorm
from phloem.layers.rope import rope_spec
from phloem.layers.weight import Layer, Weight
from phloem.models._common import each_layer, layer_types, usual, usual_attention
from phloem.models._layer import LayerKind, MixerAlone, Place
from phloem.models._per_layer import InputDecoder, OwnInput, sources

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.layers.norm import AnyNorm
    from phloem.models._common import DecoderConfig

DEFAULTS = {
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
GGUF = {
    "architecture": "gemma3n",
    "hf_class": "Gemma3nForCausalLM",
    "keys": {
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "head_dim": ("attention.key_length", 256),
        "sliding_window": "attention.sliding_window",
        "layer_types": ("attention.sliding_window_pattern", None),
        "rope_local_base_freq": ("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": ("final_logit_softcapping", 30.0),
        "hidden_size_per_layer_input": "embedding_length_per_layer_input",
        "num_kv_shared_layers": "attention.shared_kv_layers",
        "altup_active_idx": "altup.active_idx",
        "altup_num_inputs": "altup.num_inputs",
    },
    "config": {"altup_correct_scale": True, "hidden_activation": "gelu_pytorch_tanh"},
    "lists": {"intermediate_size": "feed_forward_length", "gate_deviations": "activation_sparsity_scale"},
    "rows": {"laurel_rank": "blk.0.laurel_l.weight", "vocab_size_per_layer_input": "per_layer_token_embd.weight"},
    # The converter adds rows of zeros for tokens that have none, where the model reads the first row instead.
    "filled": {"filled_per_layer_input": "per_layer_token_embd.weight"},
    "names": {
        "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
        "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
        "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
        "model.altup_projections.{}.weight": "altup_proj.weight",
        "model.altup_unembed_projections.{}.weight": "altup_unembd_proj.weight",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "altup.correction_coefs": "altup_correct_coef",
        "altup.prediction_coefs": "altup_predict_coef",
        "altup.correct_output_scale": "altup_correct_scale.weight",
        "altup.modality_router": "altup_router",
        "altup.router_norm": "altup_router_norm",
        "laurel.linear_left": "laurel_l",
        "laurel.linear_right": "laurel_r",
        "laurel.post_laurel_norm": "laurel_post_norm",
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
    },
}
NEEDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
TINY = {
    "num_hidden_layers": 5,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
    "num_kv_shared_layers": 2,
    "laurel_rank": 6,
    "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.0, 0.0],
    "intermediate_size": [64, 64, 48, 64, 64],
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ],
}
VARIANTS = {
    "plain": {
        "num_kv_shared_layers": 0,
        "altup_correct_scale": False,
        "altup_num_inputs": 3,
        "altup_active_idx": 1,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0, 0.0],
    }
}

_EVERY = 5  # of so many layers the last one is global
_SPARSE, _SHARE = 10, 0.95  # so many first layers keep the largest of their gates, unless a file says otherwise


@dataclass(frozen=True)
class StreamSizes:
    """What the layers of one model share."""

    streams: int
    active: int  # the stream that a layer computes with
    rank: int  # of the branch beside attention
    own_input: int
    scaled: bool


@dataclass(frozen=True)
class SparseGate:
    """Makes a `SparseGatedMLP`. `deviations`: so many of them above the mean a gate counts; None: all gates do."""

    inner_size: int
    activation: str
    deviations: float | None

    def __call__(self, ctx: BuildContext, place: Place) -> GatedMLP:
        sizes = place.hidden_size, self.inner_size, self.activation
        if self.deviations is None:
            return GatedMLP(ctx.child("mlp"), *sizes)
        return SparseGatedMLP(ctx.child("mlp"), *sizes, deviations=self.deviations)


class SparseGatedMLP(GatedMLP):
    """A gated block whose gates count as far as they stand out of their row."""

    def __init__(
        self, ctx: BuildContext, hidden_size: int, inner_size: int, activation: str, *, deviations: float
    ) -> None:
        super().__init__(ctx, hidden_size, inner_size, activation)
        self.deviations, self.comm = deviations, ctx.comm

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `GatedMLP`."""
        hidden, total_TN = self.gate_up(x_TN, norm=norm, residual=residual_TN)
        gate, up = hidden.chunk(2, -1)
        hidden = self.ops.gelu_tanh_and_mul(self.ops.join(self._sparse(gate), up))
        total_TN = x_TN if norm is None else total_TN
        return self.down(hidden, add=total_TN) if add else (self.down(hidden)[0], total_TN)

    def _sparse(self, gate_TI: Tensor) -> Tensor:
        """How far a gate stands out is a matter of the whole row: of all ranks' gates."""
        if self.comm is None:
            return self.ops.sparsify(gate_TI, self.deviations)
        whole_TI = torch.cat(self.comm.all_gather(gate_TI), -1)
        return self.ops.sparsify(whole_TI, self.deviations).chunk(self.comm.size, -1)[self.comm.rank]


class Streams(Layer):
    """How a layer guesses what its streams become, and mends the guess by what it has computed of one of them."""

    def __init__(self, ctx: BuildContext, sizes: StreamSizes, place: Place) -> None:
        count, self.ops, self.active = sizes.streams, ctx.ops, sizes.active
        self.norm = RMSNorm(ctx.child("router_norm"), place.hidden_size, place.eps)
        self.router = Linear(ctx, place.hidden_size, {"modality_router": count})
        self.guess = Linear(ctx, count, {"prediction_coefs": count * count})
        self.mend = Linear(ctx, count, {"correction_coefs": count})
        self.scale = 1.0 / place.hidden_size

    def _modes(self, x_TN: Tensor) -> Tensor:
        return self.ops.softcap(self.router(self.ops.scale(self.norm(x_TN), self.scale))[0], 1.0)  # tanh

    def predict(self, x_TSN: Tensor) -> Tensor:
        mix = self.guess(self._modes(x_TSN[:, self.active]))[0].unflatten(-1, (x_TSN.shape[1], -1))
        return self.ops.mix_streams(x_TSN, mix)

    def correct(self, guessed_TSN: Tensor, x_TN: Tensor) -> Tensor:
        news_TN = self.ops.add(x_TN, self.ops.scale(guessed_TSN[:, self.active], -1.0))
        return self.ops.spread_streams(guessed_TSN, news_TN, self.mend(self._modes(x_TN))[0], 1.0)


@dataclass(frozen=True)
class Kind(LayerKind):
    """Makes a `Gemma3nLayer`."""

    sizes: StreamSizes | None = None

    def make(self, ctx: BuildContext, place: Place) -> Gemma3nLayer:
        assert self.sizes is not None and self.feed is not None
        return Gemma3nLayer(ctx, self, self.sizes, place)


class Gemma3nLayer(MixerAlone):
    """A layer over streams [T, S N], one beside the other. Its rest: the guessed streams, then what goes beside
    attention."""

    def __init__(self, ctx: BuildContext, kind: Kind, sizes: StreamSizes, place: Place) -> None:
        super().__init__(ctx, kind, place)
        assert kind.feed is not None
        self.sizes, self.hidden_size, self.mlp = sizes, place.hidden_size, kind.feed(ctx, place)
        self.streams = Streams(ctx.child("altup"), sizes, place)
        beside = ctx.child("laurel")
        self.left = Linear(beside, place.hidden_size, {"linear_left": sizes.rank})
        self.right = Linear(beside, sizes.rank, {"linear_right": place.hidden_size})
        self.beside_norm = RMSNorm(beside.child("post_laurel_norm"), place.hidden_size, place.eps)
        self.own = OwnInput(ctx, sizes.own_input, place)
        name = ctx.child("altup").child("correct_output_scale").name
        self.scale = Weight((name,), ((place.hidden_size,),), "bias")
        self.others = (torch.arange(sizes.streams) > 0).float()[None].to(ctx.device)

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        del residual_TN
        guessed_TSN = self.streams.predict(x_TN.unflatten(-1, (self.sizes.streams, -1)))
        active_TN = guessed_TSN[:, self.sizes.active]
        normed_TN = self.norms[0](active_TN)
        out, _ = self.mixer.attend(None, normed_TN, None, step)
        beside_TN = self.ops.add(normed_TN, self.beside_norm(self.right(self.left(normed_TN)[0])[0]))
        return out, self.ops.join(guessed_TSN.flatten(1), beside_TN)

    def close(self, out: Tensor, rest: Tensor, input_TH: Tensor | None) -> Tensor:
        """As `InputLayer`."""
        ops, wide = self.ops, self.sizes.streams * self.hidden_size
        assert input_TH is not None, "every layer has an input of its own"
        guessed_TSN, beside_TN = rest[:, :wide].unflatten(-1, (self.sizes.streams, -1)), rest[:, wide:]
        _, after, before, last = self.norms
        attended_TN = ops.add(guessed_TSN[:, self.sizes.active], after(self.mixer.out(out)[0]))
        x_TN = ops.scale(ops.add(attended_TN, beside_TN), 0.5**0.5)
        x_TN = ops.add(x_TN, last(self.mlp(None, before(x_TN), None, add=False)[0]))
        x_TSN = self.streams.correct(guessed_TSN, x_TN)
        first_TN = x_TSN[:, self.sizes.active]
        if self.sizes.scaled:
            first_TN = ops.mul(first_TN, self.scale.value)
        return ops.spread_streams(x_TSN, self.own(first_TN, input_TH), self.others, 0.0).flatten(1)


class Gemma3n(InputDecoder):
    """The streams are made of embeddings, and become one again. Of the `rows` of layers' inputs the first `filled` are
    of tokens."""

    def __init__(
        self,
        ctx: BuildContext,
        config: DecoderConfig,
        max_positions: int,
        sizes: StreamSizes,
        rows: int,
        filled: int,
        place: Place,
    ) -> None:
        body, hidden_size, self.sizes = ctx.child("model"), config.hidden_size, sizes
        ends = [
            [Linear(body.child(name), hidden_size, {str(i): hidden_size}) for i in range(sizes.streams - 1)]
            for name in ("altup_projections", "altup_unembed_projections")
        ]
        self.apart, self.together = ends
        super().__init__(ctx, config, max_positions, sizes.own_input, rows, place)
        if self.inputs is not None and filled < config.vocab_size:
            self.inputs.last = filled

    def begin(self, x_TN: Tensor) -> Tensor:
        found = x_TN
        for linear in self.apart:
            found = self.ops.join(found, self.ops.match_rms(linear(x_TN)[0], x_TN))
        return found

    def end(self, x: Tensor) -> Tensor:
        x_TSN = x.unflatten(-1, (self.sizes.streams, -1))
        total_TN = x_TSN[:, 0]
        for number, linear in enumerate(self.together, 1):
            total_TN = self.ops.add(total_TN, self.ops.match_rms(linear(x_TSN[:, number])[0], x_TSN[:, 0]))
        return self.ops.scale(total_TN, 1.0 / self.sizes.streams)


def gate_deviations(config: dict[str, Any]) -> list[float | None]:
    """Of each layer: how many deviations above the mean a gate must stand; None: it need not."""
    count = config["num_hidden_layers"]
    if "gate_deviations" in config:  # GGUF; minus infinity: no gate is cut off
        found = config["gate_deviations"]
        odd = [value for value in found if math.isnan(value) or value == math.inf]
        if odd:
            raise ModelLoadError(f"activation_sparsity_scale holds {odd[0]}")
        return [value if math.isfinite(value) else None for value in found]
    default = [_SHARE if count > _SPARSE and number < _SPARSE else 0.0 for number in range(count)]
    shares = config.get("activation_sparsity_pattern") or default
    shares = shares if isinstance(shares, list) else [shares] * count
    return [NormalDist().inv_cdf(share) if share else None for share in shares]


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> InputDecoder:
    count, eps, head = config["num_hidden_layers"], float(config["rms_norm_eps"]), config["head_dim"]
    sliding = layer_types(config, [bool((number + 1) % _EVERY) for number in range(count)])
    kinds = ["sliding_attention" if local else "full_attention" for local in sliding]
    source = sources(kinds, int(config["num_kv_shared_layers"]))
    inner = config["intermediate_size"]
    inners = inner if isinstance(inner, list) else [inner] * count
    deviations, activation = gate_deviations(config), config.get("hidden_activation", "gelu_pytorch_tanh")
    sizes = StreamSizes(
        config["altup_num_inputs"],
        config["altup_active_idx"],
        config["laurel_rank"],
        config["hidden_size_per_layer_input"],
        bool(config["altup_correct_scale"]),
    )
    nested = "sliding_attention" in (config.get("rope_parameters") or {})
    odd = [size for size in inners if not isinstance(size, int) or not 0 < size < 1 << 24]
    if odd:
        raise ModelLoadError(f"intermediate_size holds {odd[0]!r}, expected whole numbers above 0")
    if not 0 <= config["altup_active_idx"] < config["altup_num_inputs"]:
        raise ModelLoadError(
            f"altup_active_idx is {config['altup_active_idx']}, but there are {config['altup_num_inputs']} streams"
        )
    old = {**config, "rope_theta": config.get("rope_theta", 1e6)}
    local_source = old if nested else {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    ropes = rope_spec(local_source, head, "sliding_attention"), rope_spec(old, head, "full_attention")

    def layer(n: int) -> LayerKind:
        attention = usual_attention(
            config,
            rope=ropes[0] if sliding[n] else ropes[1],
            window=int(config["sliding_window"]) if sliding[n] else 0,
            scale=1.0,
            qk_norm="head",
            v_norm=True,
            source=source[n],
        )
        return Kind(attention, SparseGate(inners[n], activation, deviations[n]), norms="sandwich", sizes=sizes)

    config_of_all = usual(
        config,
        layers=each_layer(config, layer),
        embed_scale=config["hidden_size"] ** 0.5,
        logit_softcap=float(config["final_logit_softcapping"] or 0.0),
    )
    place = Place(config["hidden_size"], eps, 0.0, max_positions)
    rows = config["vocab_size_per_layer_input"]
    filled = config.get("filled_per_layer_input", rows)
    return Gemma3n(ctx, config_of_all, max_positions, sizes, rows, filled, place)
