"""Mamba 2: recurrent layers alone, so that a token costs the same after any text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.recurrent import Mamba2, MambaSizes
from phloem.models._common import Decoder, each_layer, renamed, usual
from phloem.models._layer import LayerKind, Recurrent

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, 1e30],
}
GGUF = {
    "architecture": "mamba2",
    "hf_class": "Mamba2ForCausalLM",
    "keys": {
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "num_heads": "ssm.time_step_rank",
        "n_groups": "ssm.group_count",
        "state_size": "ssm.state_size",
        "conv_kernel": "ssm.conv_kernel",
    },
    "config": {"time_step_limit": [0.0, 1e30]},
    "flags": {"use_bias": "ssm_in.bias", "use_conv_bias": "ssm_conv1d.bias"},
    "shares": {"head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    "names": {"norm": "attn_norm"},
}
NEEDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "state_size")
TINY = {
    "intermediate_size": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
VARIANTS = {
    "bias": {"use_bias": True, "use_conv_bias": False, "n_groups": 1, "time_step_limit": [0.05, 0.5]},
    "tied": {"tie_word_embeddings": True},
}

_RENAMED = {
    "backbone.embeddings.": "model.embed_tokens.",
    "backbone.embedding.": "model.embed_tokens.",
    "backbone.": "model.",
}


class Mamba2Model(Decoder):
    """A decoder whose files have other names."""

    def checkpoint_name(self, name: str) -> str | None:
        return renamed(name, _RENAMED) or name


def number(value: Any) -> float:
    """A bound as config.json has it: JSON knows no infinity."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    eps = float(config["layer_norm_epsilon"])
    lowest, highest = (number(value) for value in config["time_step_limit"])
    sizes = MambaSizes(
        config["num_heads"],
        config["head_dim"],
        config["n_groups"],
        config["state_size"],
        config["conv_kernel"],
        eps,
        bool(config["use_bias"]),
        bool(config["use_conv_bias"]),
        lowest,
        highest,
    )
    kind = LayerKind(Recurrent(Mamba2, sizes, "mixer"), None, "alone")
    config_of_all = usual(config, layers=each_layer(config, lambda n: kind), eps=eps, norm_name="norm_f")
    return Mamba2Model(ctx, config_of_all, max_positions)
