"""ERNIE 4.5 (thinking): calls as in Hermes' format, after the reasoning."""

from __future__ import annotations

from phloem.text.tools.hermes import Parser

__all__ = ["Parser"]
