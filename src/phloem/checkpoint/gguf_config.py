"""From a GGUF file's metadata to config.json's keys, for the families that Phloem serves.

Source: the key names of the GGUF specification and the tensors that llama.cpp's converter writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.gguf_reader import GGUFFile

# general.architecture -> (model_type, architectures entry)
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
# config.json key -> metadata key under the architecture's prefix
_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "final_logit_softcapping": "final_logit_softcapping",
    "attn_logit_softcapping": "attn_logit_softcapping",
}
# The same, of sparse families; all are needed.
_EXPERT_KEYS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_NEEDED = ("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads")


def translate_metadata(gguf: GGUFFile, path: Path) -> dict[str, Any]:
    """A config.json's worth of keys.

    Raises:
        ModelLoadError: if the architecture is unknown or a needed key or tensor is absent.
    """
    arch = gguf.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelLoadError(f"{path}: unknown GGUF architecture {arch!r}; known: {', '.join(sorted(ARCHITECTURES))}")
    model_type, architecture = ARCHITECTURES[arch]
    config: dict[str, Any] = {"model_type": model_type, "architectures": [architecture], "hidden_act": "silu"}
    for key, source in _KEYS.items():
        value = gguf.metadata.get(f"{arch}.{source}")
        if value is not None:
            config[key] = _plain(value, f"{path}: {arch}.{source}")
        elif key in _NEEDED:
            raise ModelLoadError(f"{path}: its metadata has no {arch}.{source}")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{path}: has no tensor token_embd.weight")
    config["vocab_size"] = int(embedding.shape[0])
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    config["attention_out_bias"] = "blk.0.attn_output.bias" in gguf.tensors
    for key in ("bos", "eos", "padding"):
        token = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{key.replace('padding', 'pad')}_token_id"] = int(token)
    rope = _rope(gguf, arch)
    if rope:
        config["rope_scaling"] = rope
    if arch == "gemma3":
        _gemma3(config, gguf)
    if arch == "qwen3moe":
        _experts(config, gguf, arch, path)
    return config


def _experts(config: dict[str, Any], gguf: GGUFFile, arch: str, path: Path) -> None:
    for key, source in _EXPERT_KEYS.items():
        value = gguf.metadata.get(f"{arch}.{source}")
        if value is None:
            raise ModelLoadError(f"{path}: its metadata has no {arch}.{source}")
        config[key] = int(_plain(value, f"{path}: {arch}.{source}"))
    # Files say it only where they differ from what the family's checkpoints do.
    config["norm_topk_prob"] = bool(gguf.metadata.get(f"{arch}.expert_weights_norm", True))
    layers = range(config["num_hidden_layers"])
    config["mlp_only_layers"] = [n for n in layers if f"blk.{n}.ffn_gate.weight" in gguf.tensors]


def _plain(value: Any, where: str) -> Any:
    """A number out of a scalar, or out of an array that has one value for every layer."""
    if hasattr(value, "__len__") and not isinstance(value, str):
        values = {float(item) for item in value}
        if len(values) != 1:
            raise ModelLoadError(f"{where} differs from layer to layer, which is not supported")
        value = values.pop()
        return int(value) if value.is_integer() else value
    return value


def _rope(gguf: GGUFFile, arch: str) -> dict[str, Any]:
    """Scaling of rotary positions. Llama 3's is stored as a tensor of divisors, one per frequency."""
    get = gguf.metadata.get
    divisors = gguf.tensors.get("rope_freqs.weight")
    if divisors is not None:
        return {"rope_type": "divisors", "divisors": [float(item) for item in divisors.raw().view("<f4").reshape(-1)]}
    kind = get(f"{arch}.rope.scaling.type")
    if kind in (None, "none"):
        return {}
    rope = {
        "rope_type": kind,
        "factor": get(f"{arch}.rope.scaling.factor"),
        "original_max_position_embeddings": get(f"{arch}.rope.scaling.original_context_length"),
        "attention_factor": get(f"{arch}.rope.scaling.attn_factor"),
        "beta_fast": get(f"{arch}.rope.scaling.yarn_beta_fast"),
        "beta_slow": get(f"{arch}.rope.scaling.yarn_beta_slow"),
    }
    return {key: value for key, value in rope.items() if value is not None}


def _gemma3(config: dict[str, Any], gguf: GGUFFile) -> None:
    config["hidden_act"] = "gelu_pytorch_tanh"
    head_dim = config.setdefault("head_dim", 256)
    config.setdefault("num_key_value_heads", 4)
    config["rope_local_base_freq"] = gguf.metadata.get("gemma3.rope.freq_base_swa", 10000.0)
    # The file does not say it: 27B alone scales by the width per head, the others by the head size.
    wide = config["num_hidden_layers"] == 62
    config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if wide else head_dim
