"""GPT-NeoX and Pythia: attention and MLP read norms of their own of the same input; q, k and v lie by head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, renamed, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
}
GGUF = {
    "architecture": "gptneox",
    "hf_class": "GPTNeoXForCausalLM",
    "keys": {
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "use_parallel_residual": ("use_parallel_residual", True),
    },
    "config": {"hidden_act": "gelu", "by_head": False},
    "flags": {"attention_bias": "attn_qkv.bias"},
    "names": {
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
}
TINY = {"head_dim": None, "hidden_size": 64, "num_key_value_heads": None}
VARIANTS = {"serial": {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}}

_RENAMED = {
    "gpt_neox.embed_in.": "model.embed_tokens.",
    "gpt_neox.final_layer_norm.": "model.norm.",
    "embed_out.": "lm_head.",
}


class GPTNeoX(Decoder):
    """A decoder whose files have other names for what stands around the layers."""

    def checkpoint_name(self, name: str) -> str | None:
        if name.endswith((".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")):
            return None  # buffers that old files keep
        return renamed(name, _RENAMED) or name.replace("gpt_neox.", "model.", 1)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    old = {"partial_rotary_factor": config.get("rotary_pct"), "rope_theta": config.get("rotary_emb_base")}
    config = {**config, **{key: value for key, value in old.items() if value is not None}, "num_key_value_heads": None}
    bias = bool(config.get("attention_bias", True))
    attention = usual_attention(
        config, fused="query_key_value", grouped=config.get("by_head", True), o_proj="dense", name="attention",
        qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    names = ("dense_h_to_4h", "dense_4h_to_h")
    feed = Plain(config["intermediate_size"], config["hidden_act"], True, names)
    norms = "parallel" if config["use_parallel_residual"] else "pre"
    kind = LayerKind(attention, feed, norms, ("input_layernorm", "post_attention_layernorm"))
    config_of_all = usual(
        config, layers=each_layer(config, lambda n: kind), eps=float(config["layer_norm_eps"]), norms="layer"
    )
    return GPTNeoX(ctx, config_of_all, max_positions)
