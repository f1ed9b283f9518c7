"""Command A of 2026: as `cohere_command`, the content in `<|START_TEXT|>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking import cohere_command

SHOWN_BY = (Shown("<|START_THINKING|>", "<|START_TEXT|>"),)
BEFORE = ("cohere_command",)


class Parser(cohere_command.Parser):
    wraps = ("<|START_TEXT|>", "<|END_TEXT|>")
