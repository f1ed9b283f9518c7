"""LFM2: `<|tool_call_start|>[f(a=1, b="x"), g()]<|tool_call_end|>`, the arguments Python literals."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools._marked import Marked

SHOWN_BY = (Shown("<|tool_call_start|>"), Shown("<|tool_list_start|>"))
BEFORE = ("hermes", "pythonic", "llama3")

BEGIN, END = "<|tool_call_start|>", "<|tool_call_end|>"


class Parser(Marked):
    begins = (BEGIN,)
    end = END
    trigger = BEGIN
    around = ("[", "]")
