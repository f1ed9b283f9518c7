"""What a checkpoint's quantisation config says of the KV cache, as compressed-tensors and ModelOpt write it."""

from __future__ import annotations

from typing import Any, cast

FP8 = "fp8_e4m3"


def kv_scheme(quantization: dict[str, Any] | None) -> str | None:
    """The type of KV cache that the checkpoint brings scales for: FP8, or another in its own words; None: none.

    Args:
        quantization: `quantization_config` of config.json, or `quantization` of ModelOpt's hf_quant_config.json.
    """
    if not quantization:
        return None
    named = quantization.get("kv_cache_quant_algo")  # ModelOpt
    if named:
        return FP8 if str(named).upper() == "FP8" else str(named)
    scheme: Any = quantization.get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        return FP8 if str(scheme).lower() in ("fp8", FP8) else None
    parts = cast("dict[str, Any]", scheme)
    kind, bits = parts.get("type", "float"), parts.get("num_bits", 8)
    if kind == "float" and bits == 8 and not parts.get("dynamic"):
        return FP8
    return f"{'dynamic ' if parts.get('dynamic') else ''}{kind}{bits}"


def only_kv(quantization: dict[str, Any]) -> bool:
    """Whether nothing but the KV cache is quantised: the weights are as the model was trained."""
    if kv_scheme(quantization) is None:
        return False
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return not quantization.get("config_groups")
    return method == "modelopt" and not quantization.get("quant_algo")
