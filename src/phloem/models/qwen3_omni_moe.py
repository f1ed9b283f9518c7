"""Qwen3-Omni: its thinker; what makes speech is left out."""

from phloem.models.qwen3_omni_moe_thinker import DEFAULTS as DEFAULTS
from phloem.models.qwen3_omni_moe_thinker import VISION as VISION
from phloem.models.qwen3_omni_moe_thinker import build as build
