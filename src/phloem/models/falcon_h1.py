"""Falcon-H1: attention and Mamba 2 side by side in every layer, and factors on what goes in and out of everything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phloem.layers.mlp import GatedMLP
from phloem.layers.recurrent import Mamba2
from phloem.layers.weight import Layer
from phloem.models._common import Decoder, each_layer, usual, usual_attention
from phloem.models._layer import LayerKind, Recurrent
from phloem.models.bamba import mamba_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.layers.attention import SelfAttention
    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.layers.norm import AnyNorm
    from phloem.models._layer import Attention, Mixer, Place

DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "projectors_bias": False,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
    "ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 1.0],
    "mlp_multipliers": [1.0, 1.0],
    "key_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
}
GGUF = {
    "architecture": "falcon-h1",
    "hf_class": "FalconH1ForCausalLM",
    "keys": {
        "mamba_d_ssm": "ssm.inner_size",
        "mamba_n_heads": "ssm.time_step_rank",
        "mamba_n_groups": "ssm.group_count",
        "mamba_d_state": "ssm.state_size",
        "mamba_d_conv": "ssm.conv_kernel",
    },
    # The converter has multiplied the weights by them.
    "config": {
        "mamba_norm_before_gate": False,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
        "ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 1.0],
        "mlp_multipliers": [1.0, 1.0],
        "key_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
    },
    "flags": {
        "mamba_conv_bias": "ssm_conv1d.bias",
        "mamba_proj_bias": "ssm_in.bias",
        "projectors_bias": "ssm_out.bias",
        "mamba_rms_norm": "ssm_norm.weight",
    },
    "shares": {"mamba_d_head": ("ssm.inner_size", "ssm.time_step_rank")},
    "names": {
        "pre_ff_layernorm.weight": "ffn_norm",  # so is it in files
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
}
TINY = {
    "head_dim": None,
    "mamba_d_ssm": 48,
    "mamba_n_heads": 6,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6,
    "ssm_multipliers": [0.8, 0.5, 1.3, 0.7, 1.1],
    "mlp_multipliers": [0.9, 1.4],
    "key_multiplier": 0.6,
    "embedding_multiplier": 5.0,
    "lm_head_multiplier": 0.5,
}
VARIANTS = {
    "norm": {"mamba_rms_norm": True, "mamba_n_groups": 2, "mamba_proj_bias": True},
    "gate": {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "projectors_bias": True},
}


@dataclass(frozen=True)
class Factors:
    """On what the two mixers read, and on what their projections give."""

    attention_in: float
    attention_out: float
    mamba_in: float
    mamba_out: float


@dataclass(frozen=True)
class Both:
    """Makes a `SideBySide`."""

    attention: Attention
    mamba: Recurrent[Any]
    factors: Factors

    def __call__(self, ctx: BuildContext, place: Place) -> SideBySide:
        behind = replace(place, pool=place.pool + 1)
        return SideBySide(ctx, self.attention(ctx, place), self.mamba(ctx, behind), self.factors)


class SideBySide(Layer):
    """Attention and Mamba 2 of the same normalised input; their outputs are summed."""

    def __init__(self, ctx: BuildContext, attention: SelfAttention, mamba: Mixer, factors: Factors) -> None:
        self.ops, self.attention, self.mamba, self.factors = ctx.ops, attention, mamba, factors
        self.spec = attention.spec
        self.width = self.spec.heads * self.spec.values

    @property
    def memory(self) -> tuple[MemorySpec, ...]:
        kept = self.attention.memory, self.mamba.memory
        return tuple(one for one in kept if one is not None and not isinstance(one, tuple))

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """As `Mixer`: what both give, one beside the other."""
        assert norm is not None, "a layer of two mixers has one norm before both"
        x_TN, total_TN = norm.add(x_TN, residual_TN)
        read = self.ops.scale(x_TN, self.factors.attention_in), self.ops.scale(x_TN, self.factors.mamba_in)
        attended, _ = self.attention.attend(None, read[0], None, step)
        mixed, _ = self.mamba.attend(None, read[1], None, step)
        return self.ops.join(attended, mixed), total_TN

    def out(self, x: Tensor, *, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `Output`."""
        attended, _ = self.attention.out(x[:, : self.width])
        mixed, _ = self.mamba.out(x[:, self.width :])
        factors = self.factors
        out_TN = self.ops.add(self.ops.scale(attended, factors.attention_out), self.ops.scale(mixed, factors.mamba_out))
        return (out_TN if add is None else self.ops.add(out_TN, add)), None


@dataclass(frozen=True)
class ScaledMLP:
    """Makes a `ScaledGatedMLP`."""

    inner_size: int
    activation: str
    bias: bool
    scales: tuple[float, float]  # on the gate, and on what the block gives

    def __call__(self, ctx: BuildContext, place: Place) -> ScaledGatedMLP:
        ctx = ctx.child("feed_forward")
        return ScaledGatedMLP(ctx, place.hidden_size, self.inner_size, self.activation, self.bias, self.scales)


class ScaledGatedMLP(GatedMLP):
    """b down(silu(a gate(x)) * up(x))."""

    def __init__(
        self,
        ctx: BuildContext,
        hidden_size: int,
        inner_size: int,
        activation: str,
        bias: bool,
        scales: tuple[float, float],
    ) -> None:
        super().__init__(ctx, hidden_size, inner_size, activation, bias=bias)
        self.scales, self.act = scales, ctx.ops.silu_and_mul if self.activation == "silu" else ctx.ops.gelu_tanh_and_mul

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `GatedMLP`."""
        hidden, total_TN = self.gate_up(x_TN, norm=norm, residual=residual_TN)
        gate, up = hidden.chunk(2, -1)
        hidden = self.act(self.ops.join(self.ops.scale(gate, self.scales[0]), up))
        out_TN = self.ops.scale(self.down(hidden)[0], self.scales[1])
        if norm is None or total_TN is None:
            total_TN = x_TN
        return (self.ops.add(out_TN, total_TN), None) if add else (out_TN, total_TN)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # Keys are multiplied, which their rotation does not change: so may be the logits of attention.
    attention = usual_attention(config, scale=head_size**-0.5 * float(config["key_multiplier"]))
    norm = ("first" if config["mamba_norm_before_gate"] else "gated") if config["mamba_rms_norm"] else "none"
    sizes = mamba_sizes(
        config,
        out_bias=bool(config["projectors_bias"]),
        norm=norm,
        scales=tuple(float(scale) for scale in config["ssm_multipliers"]),
    )
    ends = ("attention_in", "attention_out", "ssm_in", "ssm_out")
    both = Both(
        attention,
        Recurrent(Mamba2, sizes, "mamba"),
        Factors(*(float(config[f"{end}_multiplier"]) for end in ends)),
    )
    gate, down = (float(scale) for scale in config["mlp_multipliers"])
    feed = ScaledMLP(
        config["intermediate_size"], config.get("hidden_act", "silu"), bool(config.get("mlp_bias")), (gate, down)
    )
    kind = LayerKind(both, feed, norm_names=("input_layernorm", "pre_ff_layernorm"))
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        norm_name="final_layernorm",
        embed_scale=float(config["embedding_multiplier"]),
        logit_scale=float(config["lm_head_multiplier"]),
    )
    return Decoder(ctx, config_of_all, max_positions)
