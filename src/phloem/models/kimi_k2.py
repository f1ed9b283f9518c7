"""Kimi K2: DeepSeek V3 with more experts, fewer heads and one dense layer; all of it is said by config.json."""

from __future__ import annotations

from phloem.models.deepseek_v3 import DEFAULTS as DEFAULTS
from phloem.models.deepseek_v3 import build

__all__ = ["DEFAULTS", "build"]
