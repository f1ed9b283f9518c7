"""LLaDA 8B: Llama's layers whose tokens see the whole text, masks to its end included; it writes by diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.denoising import WHOLE
from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"block_size": 32, "mask_token_id": 126336, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
SPELLING = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}
GGUF = {
    "architecture": "llada",
    "hf_class": "LLaDAModelLM",
    "keys": {"is_causal": ("attention.causal", True)},
    "config": {"block_size": 32, "mask_token_id": 126336},  # the second unless the vocabulary names it
    "turned": ("q_proj", "k_proj"),
}
DIFFUSION = {"block": "block_size", "mask": "mask_token_id", "sees": "whole"}
TINY = {
    "mask_token_id": 2,
    "block_size": 8,
    "head_dim": None,
    "num_key_value_heads": 4,
    "written": {
        "model.embed_tokens.": "model.transformer.wte.",
        "model.layers.": "model.transformer.blocks.",
        "model.norm.": "model.transformer.ln_f.",
        "lm_head.": "model.transformer.ff_out.",
        "self_attn.o_proj.": "attn_out.",
        "self_attn.": "",
        "mlp.gate_proj.": "ff_proj.",
        "mlp.up_proj.": "up_proj.",
        "mlp.down_proj.": "ff_out.",
        "post_attention_layernorm.": "ff_norm.",
        "input_layernorm.": "attn_norm.",
    },
}

_AROUND = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_INSIDE = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}


class LLaDA(Decoder):
    """A decoder whose files have other names."""

    def checkpoint_name(self, name: str) -> str | None:
        parts = name.removeprefix("model.transformer.").split(".")
        if parts[0] == "blocks" and len(parts) > 3:
            return ".".join(["model.layers", parts[1], _INSIDE.get(parts[2], parts[2]), *parts[3:]])
        return ".".join([_AROUND.get(parts[0], parts[0]), *parts[1:]])


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    odd = {"layer_norm_type": "rms", "activation_type": "silu", "block_type": "llama", "block_group_size": 1}
    for key, served in odd.items():
        if config.get(key, served) != served:
            raise ModelLoadError(f"{key}: {config[key]!r} is not served; known: {served}")
    if config.get("is_causal"):
        raise ModelLoadError("attention.causal is not false: tokens of the model see the whole text")
    layer = usual_layer(config, block=WHOLE)
    return LLaDA(ctx, usual(config, layers=(layer,) * config["num_hidden_layers"]), max_positions)
