"""Idefics3: as SmolVLM."""

from __future__ import annotations

from phloem.models.smolvlm import DEFAULTS as DEFAULTS
from phloem.models.smolvlm import TINY as TINY
from phloem.models.smolvlm import VISION as VISION
from phloem.models.smolvlm import build as build
