"""Llama 4 in multimodal checkpoints, of which the language model is served; the image tower is left in the file."""

from __future__ import annotations

from phloem.models.llama4_text import DEFAULTS as DEFAULTS
from phloem.models.llama4_text import build as build

TINY = {
    "num_hidden_layers": 4,
    "num_local_experts": 5,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "around": {  # the text model
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
}
