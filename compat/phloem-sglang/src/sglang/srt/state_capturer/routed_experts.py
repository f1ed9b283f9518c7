"""Which experts made an answer, where later versions of SGLang have it."""

from __future__ import annotations

from sglang._missing import missing
from sglang.srt.layers.moe.routed_experts_capturer import extract_routed_experts_from_meta_info

__all__ = ["extract_routed_experts_from_meta_info"]
__getattr__ = missing(__name__)
