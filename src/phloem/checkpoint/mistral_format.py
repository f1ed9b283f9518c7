"""Folders in Mistral's own format: `params.json`, and tensors in `consolidated*.safetensors` by other names.

Read as the config.json of the family that it is: Mistral, Ministral 3, or Mistral Large 3. Their heads turn by
neighbours, whatever files of Hugging Face do. Towers are left out. What is not known is refused by name.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, cast

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PARAMS = "params.json"
TOWERS = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.", "mm_whisper_")
_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "activation": "hidden_act",
}
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_MOE = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
    "first_k_dense_replace": "first_k_dense_replace",
    "routed_scale": "routed_scaling_factor",
}
_ELSEWHERE = ("yarn", "llama_4_scaling", "moe", "quantization", "sliding_window", "max_seq_len")
# What changes nothing, and towers.
_HARMLESS = (
    "model_type", "causal", "model_parallel", "max_batch_size", "vision_encoder", "multimodal", "use_cache", "dtype",
)  # fmt: skip
_PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "gate": "mlp.gate",
}
_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_KINDS = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}
_BLOCKS = {"feed_forward": "mlp", "shared_experts": "mlp.shared_experts"}
_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"experts\.(\d+)")


def hugging_name(name: str) -> str | None:
    """The name that a file of Hugging Face gives to a tensor; None: it is a tower's. Unknown ones stay as they are."""
    if name.startswith(TOWERS):
        return None
    stem, _, kind = name.rpartition(".")
    kind = _KINDS.get(kind, kind)
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    match = _LAYER.fullmatch(stem)
    if match is None:
        return name
    number, inner = match.groups()
    block, _, matrix = inner.rpartition(".")
    expert = _EXPERT.fullmatch(block)
    if matrix in _MATRICES and (expert or block in _BLOCKS):
        block = f"mlp.experts.{expert[1]}" if expert else _BLOCKS[block]
        return f"model.layers.{number}.{block}.{_MATRICES[matrix]}.{kind}"
    return f"model.layers.{number}.{_PARTS[inner]}.{kind}" if inner in _PARTS else name


def as_config(params: dict[str, Any], path: Path) -> dict[str, Any]:
    """What `params.json` says, as a config.json would.

    Raises:
        ModelLoadError: naming the key that is absent, or that asks for what is not known.
    """
    said = {key: value for key, value in params.items() if value is not None}
    known = {*_KEYS, *_LATENT, *_ELSEWHERE, *_HARMLESS}
    odd = [f"{key} = {said[key]!r:.60}" for key in sorted(set(said) - known) if said[key] not in (False, 0, "")]
    if odd or said.get("causal", True) is not True or said.get("model_type", "transformer") not in ("transformer", ""):
        named = odd or [f"{key} = {said.get(key)!r}" for key in ("causal", "model_type")]
        raise ModelLoadError(f"{path}: asks for what is not supported: {', '.join(named)}")
    config = {ours: said[key] for key, ours in _KEYS.items() if key in said}
    if "kv_lora_rank" in said:
        _check_whole(said, _LATENT, _LATENT[1:], str(path), least=1)
    config |= {key: said[key] for key in _LATENT if key in said}
    config.setdefault("max_position_embeddings", said.get("max_seq_len", 128_000))
    config |= {"hidden_act": said.get("activation", "silu"), "rope_interleave": True, "bos_token_id": 1}
    config["eos_token_id"] = 2
    grown, rope = _object(said, "llama_4_scaling", path), _rope(said, path)
    if grown:
        length, beta = grown.get("original_max_position_embeddings"), grown.get("beta")
        if not isinstance(length, int) or not _above_zero(length) or not (beta == 0 or _above_zero(beta)):
            raise ModelLoadError(f"{path}: llama_4_scaling is {grown!r:.80}: expected a length and beta")
        if rope and rope["original_max_position_embeddings"] != length:
            raise ModelLoadError(f"{path}: llama_4_scaling and yarn name two original_max_position_embeddings")
        rope = {"rope_type": "default", "original_max_position_embeddings": length, **rope}
        rope["llama_4_scaling_beta"] = beta
    if rope:
        config["rope_parameters"] = {"rope_theta": said.get("rope_theta", 10000.0), **rope}
    moe = _object(said, "moe", path)
    if bool(moe) != ("kv_lora_rank" in said):
        raise ModelLoadError(f"{path}: moe and kv_lora_rank go together: one without the other is not known")
    config |= {**_experts(moe, path), "projections_apart": True} if moe else _windows(said, path)
    config["model_type"] = "mistral4" if moe else "ministral3" if grown else "mistral"
    named = {"mistral4": "Mistral4ForCausalLM", "ministral3": "Ministral3ForCausalLM", "mistral": "MistralForCausalLM"}
    config["architectures"] = [named[config["model_type"]]]
    quantised = _object(said, "quantization", path)
    if quantised:
        if quantised.get("qformat_weight") != "fp8_e4m3":
            raise ModelLoadError(f"{path}: quantization {quantised!r:.100}: weights are read as fp8_e4m3 alone")
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    return config


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _check_whole(said: dict[str, Any], keys: Iterable[str], needed: Iterable[str], where: str, least: int = 0) -> None:
    """That what is said by `keys` are sizes or counts, and that `needed` of them are said."""
    lost = [key for key in needed if said.get(key) is None]
    if lost:
        raise ModelLoadError(f"{where}: lacks {lost[0]}")
    for key in keys:
        value = said.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ModelLoadError(f"{where}: {key} is {value!r:.60}, expected a whole number from {least}")


def _object(said: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = said.get(key) or {}
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path}: {key} is {found!r:.60}, expected an object")
    return cast("dict[str, Any]", found)


def _rope(said: dict[str, Any], path: Path) -> dict[str, Any]:
    """YaRN. `apply_scale` says whether cos and sin, or with latents the logits, grow with the factor."""
    yarn = _object(said, "yarn", path)
    if not yarn:
        return {}
    names = {"factor": "factor", "beta": "beta_fast", "alpha": "beta_slow"}
    length = "original_max_position_embeddings"
    lost = [key for key in (*names, length) if not _above_zero(yarn.get(key))]
    if lost:
        said_so = f": it is {yarn[lost[0]]!r:.60}, expected more than 0" if lost[0] in yarn else ""
        raise ModelLoadError(f"{path}: yarn has no number {lost[0]}{said_so}")
    rope = {ours: float(yarn[key]) for key, ours in names.items()}
    rope |= {"rope_type": "yarn", length: int(yarn[length])}
    if not yarn.get("apply_scale", True):
        return {**rope, "attention_factor": 1.0}
    return {**rope, "mscale": 1.0, "mscale_all_dim": 1.0} if "kv_lora_rank" in said else rope


def _experts(moe: dict[str, Any], path: Path) -> dict[str, Any]:
    odd = sorted(key for key, value in moe.items() if key not in (*_MOE, "route_every_n") and value)
    if odd or moe.get("route_every_n", 1) != 1:
        raise ModelLoadError(f"{path}: moe asks for what is not supported: {', '.join(odd) or 'route_every_n'}")
    scale = moe.get("routed_scale")
    if scale is not None and not _above_zero(scale):
        raise ModelLoadError(f"{path}: moe: routed_scale is {scale!r:.60}, expected more than 0")
    needed = ("num_experts", "num_experts_per_tok", "expert_hidden_dim")
    _check_whole(moe, [key for key in _MOE if key != "routed_scale"], needed, f"{path}: moe")
    return {ours: moe[key] for key, ours in _MOE.items() if moe.get(key) is not None}


def _windows(said: dict[str, Any], path: Path) -> dict[str, Any]:
    """One window for all layers, or a list of them that repeats."""
    windows = said.get("sliding_window")
    if not isinstance(windows, list):
        if windows is not None and (not isinstance(windows, int) or isinstance(windows, bool) or windows < 0):
            raise ModelLoadError(f"{path}: sliding_window is {windows!r:.60}, expected a whole number or a list")
        return {} if windows is None else {"sliding_window": windows}
    listed, count = cast("list[Any]", windows), said.get("n_layers", 0)
    sizes = {size if isinstance(size, int) else -1 for size in listed if size}
    if len(sizes) != 1 or min(sizes) < 0 or not isinstance(count, int) or count % len(listed):
        where = f"{path}: sliding_window is {listed!r:.60}"
        raise ModelLoadError(f"{where}, expected one size that repeats over {count} layers")
    kinds = ["sliding_attention" if size else "full_attention" for size in listed] * (count // len(listed))
    return {"sliding_window": sizes.pop(), "layer_types": kinds}
