"""Qwen2.5-Omni: its thinker; what makes speech is left out."""

from phloem.models.qwen2_5_omni_thinker import DEFAULTS as DEFAULTS
from phloem.models.qwen2_5_omni_thinker import SPELLING as SPELLING
from phloem.models.qwen2_5_omni_thinker import VISION as VISION
from phloem.models.qwen2_5_omni_thinker import build as build
