"""GPT-2: learned positions, layer norms, matrices stored the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, each_layer, renamed, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True}
SPELLING = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
NEEDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
GGUF = {
    "architecture": "gpt2",
    "hf_class": "GPT2LMHeadModel",
    "keys": {"layer_norm_epsilon": "attention.layer_norm_epsilon", "n_inner": "feed_forward_length"},
    "config": {"activation_function": "gelu_new", "outputs_first": True},
    "names": {
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}
TINY = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 512,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": None,
}
VARIANTS = {
    "inner": {"n_inner": 96, "activation_function": "gelu"},
    "by-layer": {"scale_attn_by_inverse_layer_idx": True},
}

_RENAMED = {
    "wte.": "model.embed_tokens.",
    "wpe.": "model.embed_positions.",
    "ln_f.": "model.norm.",
    "h.": "model.layers.",
}


class GPT2(Decoder):
    """A decoder whose files have other names, with or without `transformer.` before them."""

    def checkpoint_name(self, name: str) -> str | None:
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return None  # buffers that old files keep
        return renamed(name.removeprefix("transformer."), _RENAMED) or name


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("add_cross_attention"):
        raise ModelLoadError("add_cross_attention: not a language model alone")
    size, heads, rows = config["hidden_size"], config["num_attention_heads"], config["max_position_embeddings"]
    inner = config.get("n_inner") or 4 * size
    turned = not config.get("outputs_first")  # GGUF files have matrices the usual way round
    feed = Plain(inner, config["activation_function"], True, ("c_fc", "c_proj"), transposed=turned)
    scale = (size // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0

    def layer(n: int) -> LayerKind:
        attention = usual_attention(
            config, rope=None, fused="c_attn", transposed=turned, o_proj="c_proj", qkv_bias=True, out_bias=True,
            name="attn", scale=scale / (n + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1),
        )  # fmt: skip
        return LayerKind(attention, feed, norm_names=("ln_1", "ln_2"))

    config_of_all = usual(
        config,
        layers=each_layer(config, layer),
        eps=float(config["layer_norm_epsilon"]),
        tied=bool(config.get("tie_word_embeddings", True)),
        norms="layer",
        positions=(rows, 0),
    )
    return GPT2(ctx, config_of_all, max_positions)
