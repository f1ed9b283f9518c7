"""GLM 4.5 and later: `<think>...</think>`; a tool call may begin inside it."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

NAMES = ("glm", "glm47")
SHOWN_BY = (Shown("[gMASK]", "think>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    jumps = ("<tool_call>",)
