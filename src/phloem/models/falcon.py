"""Falcon: attention and MLP read the same input; q, k and v lie by kv head in one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, each_layer, renamed, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "activation": "gelu",
    "tie_word_embeddings": True,
    "multi_query": True,
    "parallel_attn": True,
}
# q, k and v lie one after another there, whatever the age of the model; biases of distance are not known.
GGUF = {
    "architecture": "falcon",
    "hf_class": "FalconForCausalLM",
    "keys": {
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
        "num_kv_heads": "attention.head_count_kv",
        "ffn_hidden_size": "feed_forward_length",
    },
    "config": {"activation": "gelu", "new_decoder_architecture": True, "by_head": False},
    "flags": {"both_norms": "attn_norm_2.weight"},
    "names": {
        "ln_attn": "attn_norm_2",
        "ln_mlp": "attn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
}
NEEDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
TINY = {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, "alibi": False}
VARIANTS = {
    "new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "new-one-norm": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "serial": {"multi_query": False, "parallel_attn": False, "bias": True},
}

_RENAMED = {"word_embeddings.": "model.embed_tokens.", "ln_f.": "model.norm.", "h.": "model.layers."}


class Falcon(Decoder):
    """A decoder whose files have other names."""

    def checkpoint_name(self, name: str) -> str | None:
        return renamed(name.removeprefix("transformer."), _RENAMED) or name


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("alibi"):
        raise ModelLoadError("alibi: biases by distance (Falcon-RW) are not served")
    new, bias = bool(config.get("new_decoder_architecture")), bool(config.get("bias", False))
    heads = config["num_attention_heads"]
    kv_heads = (config.get("num_kv_heads") or heads) if new else (1 if config["multi_query"] else heads)
    attention = usual_attention(
        {**config, "num_key_value_heads": kv_heads},
        fused="query_key_value", grouped=config.get("by_head", True), o_proj="dense", name="self_attention",
        qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    inner = config.get("ffn_hidden_size") or 4 * config["hidden_size"]
    feed = Plain(inner, config["activation"], bias, ("dense_h_to_4h", "dense_4h_to_h"))
    two = config.get("both_norms", new and config.get("num_ln_in_parallel_attn") != 1)
    both = ("ln_attn", "ln_mlp") if two else ("input_layernorm",)
    if new or config["parallel_attn"]:
        kind = LayerKind(attention, feed, "parallel", both)
    else:
        kind = LayerKind(attention, feed)
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        eps=float(config["layer_norm_epsilon"]),
        tied=bool(config.get("tie_word_embeddings", True)),
        norms="layer",
    )
    return Falcon(ctx, config_of_all, max_positions)
