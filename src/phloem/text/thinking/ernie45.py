"""ERNIE 4.5 (thinking): an answer begins inside the block; the content may be wrapped in `<response>` tags."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._wrapped import Wrapped

NAMES = ("ernie",)
SHOWN_BY = (Shown("<response>", "think>"),)
BEFORE = ("qwen3",)


class Parser(Wrapped):
    always = True
    jumps = ("<tool_call>",)
    wraps = ("<response>", "</response>")
