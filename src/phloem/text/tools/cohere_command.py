"""Command R7B and A: `<|START_ACTION|>[{"tool_call_id": .., "tool_name": .., "parameters": ..}]<|END_ACTION|>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools._array import ArrayReader
from phloem.text.tools._grammar import Shape, sequence, tag

NAMES = ("cohere", "cohere_command3", "cohere_command4")
SHOWN_BY = (Shown("<|START_ACTION|>"),)


class Parser(ArrayReader):
    begins = ("<|START_ACTION|>",)
    trigger = "<|START_ACTION|>"
    close = enforced_close = "<|END_ACTION|>"
    name_key = "tool_name"

    def item(self, name: str) -> tuple[str, str]:
        return f'{{"tool_call_id": "0", "tool_name": "{name}", "parameters": ', "}"

    def shape(self, name: str) -> Shape:
        number = {"type": "regex", "pattern": "[0-9]{1,4}"}
        begin = tag('{"tool_call_id": "', number, '"')
        return sequence(begin, tag(f', "tool_name": "{name}", "parameters": ', self.written(name), "}"))
