"""What the engine's grammars need of a model's texts: its vocabulary, and what stands around its reasoning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.grammar._base import Vocabulary
from phloem.grammar._thinking import Channel, ThinkingMarkers
from phloem.text.formats import THINKING, thinking_choice
from phloem.text.template_sources import find_sources

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.describe import Checkpoint
    from phloem.text.tokenizer import Tokenizer


def vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Every token's bytes, and the ids that end an answer."""
    return Vocabulary.of(_tokenizer(checkpoint), checkpoint.vocab_size, checkpoint.eos_ids)


def thinking_markers(checkpoint: Checkpoint, override: Path | None, asked: str | None) -> ThinkingMarkers | None:
    """What stands around a reasoning block; None for a model that writes none.

    Args:
        checkpoint: whose chat templates are looked through.
        override: a chat template that stands for them.
        asked: the reasoning format's name; None: read off the template.

    Raises:
        ConfigError: there is no format of that name.
    """
    if override is None and all(
        thinking_choice(source, asked).name is None for source in [None, *find_sources(checkpoint).values()]
    ):
        return None
    # Most models end above: the engine process then has neither Jinja nor a tokenizer in its memory.
    from phloem.text.template import load_template

    name = thinking_choice(load_template(checkpoint, override, None).source, asked).name
    return _markers(name, _tokenizer(checkpoint)) if name is not None else None


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    from phloem.text.tokenizer import load_tokenizer

    return load_tokenizer(checkpoint)


def _markers(name: str, tokenizer: Tokenizer) -> ThinkingMarkers:
    kind = THINKING.get(name)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    start, end = ids(kind.start), ids(kind.end)
    channel = None
    if kind.channel is not None:
        opens, closes = ids(kind.channel[0]), ids(kind.channel[2])
        if len(opens) == len(closes) == 1:
            between = frozenset(found[0] for text in kind.between if len(found := ids(text)) == 1)
            channel = Channel(opens[0], kind.channel[1], closes[0], between)
    whole = len(end) == 1 or any(tokenizer.is_special(token) for token in end)
    jumps = tuple(ids(text) for text in kind.jumps)
    return ThinkingMarkers(start, end, kind.always, "" if whole else kind.end, jumps, channel)
