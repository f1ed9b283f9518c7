"""Command R7B and A: `<|START_THINKING|>...<|END_THINKING|>`, the content in `<|START_RESPONSE|>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._wrapped import Wrapped

NAMES = ("cohere", "cohere_command3")
SHOWN_BY = (Shown("<|START_THINKING|>", "<|START_RESPONSE|>"),)


class Parser(Wrapped):
    start = "<|START_THINKING|>"
    end = "<|END_THINKING|>"
    wraps = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")
    jumps = ("<|START_ACTION|>",)
