"""Gemma 4 text models: local and global heads of their own sizes, keys that several layers read, an input per layer.

Norm weights are stored as they are. In the largest, experts stand beside a dense block of each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import ExpertSpec, RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig, SparseMLP
from phloem.layers.norm import RMSNorm
from phloem.layers.rope import rope_spec
from phloem.layers.weight import Layer, Weight
from phloem.models._common import each_layer, layer_types, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind, Place, SandwichNorms
from phloem.models._per_layer import InputDecoder, OwnInput, sources

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.layers.mlp import GatedMLP
    from phloem.layers.norm import AnyNorm
    from phloem.models._layer import MLP

DEFAULTS = {
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
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}
# Sizes of heads there are the global ones; what files leave out, tensors say.
GGUF = {
    "architecture": "gemma4",
    "hf_class": "Gemma4ForCausalLM",
    "keys": {
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "local_head_dim": "attention.key_length_swa",
        "local_value_dim": "attention.value_length_swa",
        "local_turned": ("rope.dimension_count_swa", 0),
        "sliding_window": "attention.sliding_window",
        "layer_types": ("attention.sliding_window_pattern", None),
        "local_rope_theta": ("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": ("final_logit_softcapping", 0.0),
        "hidden_size_per_layer_input": ("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": ("attention.shared_kv_layers", 0),
        "num_experts": ("expert_count", 0),
        "top_k_experts": ("expert_used_count", 0),
        "moe_intermediate_size": ("expert_feed_forward_length", 0),
    },
    "config": {"hidden_activation": "gelu_pytorch_tanh", "projections_apart": True, "num_key_value_heads": 1},
    "lists": {"intermediate_size": "feed_forward_length", "kv_heads": "attention.head_count_kv"},
    "flags": {"enable_moe_block": "ffn_gate_inp.weight"},
    "layers_with": {"own_values": "attn_v.weight"},
    "names": {
        "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
        "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
        "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
        "layer_scalar": "layer_output_scale.weight",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.{}.gate_proj": "ffn_gate_exps",
        "experts.{}.up_proj": "ffn_up_exps",
        "experts.{}.down_proj": "ffn_down_exps",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
    },
}
NEEDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
TINY = {
    "num_hidden_layers": 5,
    "sliding_window": 8,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 384,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ],
}
VARIANTS = {
    "experts": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "final_logit_softcapping": 2.0,
    },
    "plain": {"num_kv_shared_layers": 0, "use_double_wide_mlp": False},
}

_EVERY = 6  # of so many layers the last one is global
_NAMES = ExpertNames(
    router="router.proj",
    gate="experts.gate_up_proj",
    up="experts.gate_up_proj",
    down="experts.down_proj",
)
_APART = ExpertNames(router="router.proj")  # in GGUF files


@dataclass(frozen=True)
class Kind(LayerKind):
    """Makes a `Gemma4Layer`."""

    own_input: int = 0

    def make(self, ctx: BuildContext, place: Place) -> Gemma4Layer:
        return Gemma4Layer(ctx, self, place)


class Gemma4Layer(SandwichNorms):
    """A layer with norms on both sides of its blocks, perhaps its own input, and a factor on all of it."""

    def __init__(self, ctx: BuildContext, kind: Kind, place: Place) -> None:
        super().__init__(ctx, kind, place)
        self.own = OwnInput(ctx, kind.own_input, place) if kind.own_input else None
        self.scalar = Weight((ctx.child("layer_scalar").name,), ((1,),), "norm")

    def close(self, out: Tensor, rest: Tensor, input_TH: Tensor | None) -> Tensor:
        """As `InputLayer`."""
        fed, total_TN = self.feed(out, rest)
        x_TN = fed if total_TN is None else self.ops.add(fed, total_TN)
        if self.own is not None and input_TH is not None:
            x_TN = self.ops.add(x_TN, self.own(x_TN, input_TH))
        return self.ops.scale_rows(x_TN, self.scalar.value)


@dataclass(frozen=True)
class Beside:
    """Makes a `DenseAndSparse`."""

    dense: MLP
    sparse: ExpertsConfig

    def __call__(self, ctx: BuildContext, place: Place) -> DenseAndSparse:
        return DenseAndSparse(ctx, self.dense(ctx, place), self.sparse, place)


class ScaledExperts(SparseMLP):
    """Experts whose router reads hidden states normalised in its own way, and weights the chosen by a factor each."""

    def __init__(self, ctx: BuildContext, config: ExpertsConfig, place: Place) -> None:
        super().__init__(ctx, place.hidden_size, config)
        router, self.eps, self.factor = ctx.child("router"), place.eps, place.hidden_size**-0.5
        self.scale = Weight((router.child("scale").name,), ((place.hidden_size,),), "norm")
        self.each = Weight((router.child("per_expert_scale").name,), ((config.count,),), "norm")

    def chosen(self, x_TN: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of hidden states that are not normalised, and their weights."""
        read = self.ops.scale(self.ops.rms_norm(x_TN, self.scale.value, self.eps), self.factor)
        ids_Tk, weights_Tk = self._routed(self.router(read)[0])
        each = self.ops.select_rows(self.each.value.view(-1, 1), ids_Tk.view(-1))
        return ids_Tk, self.ops.mul(weights_Tk, each.view(weights_Tk.shape))

    def of(self, x_TN: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
        """What the chosen experts make of x."""
        if self.placed is not None:
            return self.placed.end(self.placed.begin(x_TN, *chosen))
        at_Tk, weights = self.placed_at(chosen[0]), (self.gate_up.value, self.down.value)
        return self._summed(self.ops.experts(x_TN, at_Tk, chosen[1], *weights, self.spec, None))


class DenseAndSparse(Layer):
    """A dense block and experts, each with norms of its own, of the same hidden states."""

    def __init__(self, ctx: BuildContext, dense: GatedMLP, config: ExpertsConfig, place: Place) -> None:
        self.ops, self.dense, self.sparse = ctx.ops, dense, ScaledExperts(ctx, config, place)
        names = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")
        self.norms = [RMSNorm(ctx.child(name), place.hidden_size, place.eps) for name in names]

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `SparseMLP`, of the sum with the residual."""
        del add
        assert norm is not None, "experts beside a dense block stand behind a norm"
        x_TN, total_TN = norm.add(x_TN, residual_TN)
        after, before, last = self.norms
        dense_TN = after(self.dense(None, x_TN, None, add=False)[0])
        sparse_TN = last(self.sparse.of(before(total_TN), self.sparse.chosen(total_TN)))
        return self.ops.add(dense_TN, sparse_TN), total_TN


def sizes(config: dict[str, Any], number: int, local: bool) -> tuple[int, int]:
    """(head size, kv heads) of a layer: global ones have their own, which files say for all of them or for each."""
    head, kv = config["head_dim"], config["num_key_value_heads"]
    if "kv_heads" in config:  # GGUF
        return head if local else config["global_head_dim"], config["kv_heads"][number]
    each: dict[str, Any] = config.get("per_layer_config") or {}
    if each:
        own = each.get(str(number), {})
        return own.get("head_dim", head), own.get("num_key_value_heads", kv)
    if local:
        return head, kv
    if config.get("attention_k_eq_v"):
        kv = config.get("num_global_key_value_heads") or kv
    return config["global_head_dim"], kv


def experts(config: dict[str, Any]) -> ExpertsConfig:
    """Sizes of the sparse block."""
    count = config["num_experts"]
    router = RouterSpec(config["top_k_experts"], renormalise=True)
    # Not the fused op, which knows no factor on the weights.
    spec = ExpertSpec(count, "gelu_tanh")
    names = _APART if config.get("projections_apart") else _NAMES
    return ExpertsConfig(count, config["moe_intermediate_size"], router, spec, names=names)


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a GGUF file's metadata stands for: both kinds of heads and of rotations by their names.

    Raises:
        ModelLoadError: for sizes of local heads that do not fit together.
    """
    local = config["local_head_dim"]
    odd = [size for size in (config["local_value_dim"], config["local_turned"] or local) if size != local]
    if odd or local < 1:
        raise ModelLoadError(
            f"attention.key_length_swa is {local}, attention.value_length_swa {config['local_value_dim']} and "
            f"rope.dimension_count_swa {config['local_turned']}: only heads of one size that turn as a whole are served"
        )
    turned = {"rope_theta": config.get("rope_theta", 1e6), **config.get("rope_parameters", {})}
    ropes = {"sliding_attention": {"rope_theta": config["local_rope_theta"]}, "full_attention": turned}
    return {
        **config,
        "head_dim": local,
        "global_head_dim": config["head_dim"],
        "rope_parameters": ropes,
        "vocab_size_per_layer_input": config["vocab_size"],
    }


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> InputDecoder:
    if config.get("use_bidirectional_attention") == "all":
        raise ModelLoadError("use_bidirectional_attention: an encoder cannot be served as a causal language model")
    config = as_published(config) if "local_head_dim" in config else config
    count, eps, size = config["num_hidden_layers"], float(config["rms_norm_eps"]), config["hidden_size_per_layer_input"]
    sliding = layer_types(config, [bool((number + 1) % _EVERY) and number < count - 1 for number in range(count)])
    kinds = ["sliding_attention" if local else "full_attention" for local in sliding]
    source = sources(kinds, int(config["num_kv_shared_layers"]))
    activation = config.get("hidden_activation", "gelu_pytorch_tanh")
    inner, double = config["intermediate_size"], bool(config.get("use_double_wide_mlp"))
    # Local layers have values of their own; GGUF files do not say whether global ones have.
    own = config.get("own_values", [] if config.get("attention_k_eq_v") else list(range(count)))

    def layer(n: int) -> LayerKind:
        local = sliding[n]
        head, kv_heads = sizes(config, n, local)
        attention = usual_attention(
            config,
            head_size=head,
            kv_heads=kv_heads,
            rope=rope_spec(config, head, kinds[n]),
            window=int(config["sliding_window"]) if local else 0,
            scale=1.0,
            qk_norm="head",
            v_norm=True,
            k_as_v=n not in own and not local,
            source=source[n],
        )
        wide = inner[n] if isinstance(inner, list) else inner * (2 if double and source[n] is not None else 1)
        dense = usual_mlp(config, activation=activation, inner_size=wide)
        feed = Beside(dense, experts(config)) if config.get("enable_moe_block") else dense
        return Kind(attention, feed, norms="sandwich", own_input=size)

    config_of_all = usual(
        config,
        layers=each_layer(config, layer),
        embed_scale=config["hidden_size"] ** 0.5,
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )
    place = Place(config["hidden_size"], eps, 0.0, max_positions)
    return InputDecoder(ctx, config_of_all, max_positions, size, config["vocab_size_per_layer_input"], place)
