"""Reasoning in a model's text, by Phloem's formats."""

from __future__ import annotations

from typing import Any

from phloem.text import formats
from sglang._missing import missing


class ReasoningParser:
    """As SGLang's; `model_type` is the name of a format. `force_reasoning`: the text begins inside a block.

    Raises:
        phloem.core.errors.ConfigError: an unknown format; the known ones are listed.
    """

    DetectorMap: dict[str, Any] = {name: name for name in formats.THINKING.names()}

    def __init__(
        self, model_type: str | None = None, stream_reasoning: bool = True, force_reasoning: bool | None = None
    ) -> None:
        if not model_type:
            raise ValueError("model_type must be specified")
        del stream_reasoning  # reasoning is given as it comes
        self._form = formats.THINKING.module(formats.thinking_format(model_type)).Parser
        self._opened = True if force_reasoning else None
        self._stream = self._form(self._opened)

    def parse_non_stream(self, full_text: str) -> tuple[str, str]:
        """Reasoning, and the rest."""
        return self._form(self._opened).parse(full_text)

    def parse_stream_chunk(self, chunk_text: str) -> tuple[str, str]:
        return self._stream.push(chunk_text)


__getattr__ = missing(__name__)
