"""Fill-in-the-middle: the formats that models are trained with, found by their tokens.

Prefix and suffix are marked by special tokens of the vocabulary (Bavarian et al. 2022, "Efficient Training of Language
Models to Fill in the Middle"); a model whose tokenizer has none of the known sets cannot take a suffix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from phloem.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class InfillFormat:
    """Marks in front of prefix and suffix, and the one behind which the middle is written ("": none)."""

    prefix: str
    suffix: str
    middle: str
    suffix_first: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self.prefix, self.suffix, self.middle) if mark)


FORMATS = (
    InfillFormat("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite
    InfillFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    InfillFormat("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    InfillFormat("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    InfillFormat("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    InfillFormat("[PREFIX]", "[SUFFIX]", "", suffix_first=True),  # Codestral
)


def find(tokenizer: Tokenizer) -> tuple[InfillFormat, dict[str, int]] | None:
    """The format whose marks are all special tokens of this vocabulary, with their ids."""
    for form in FORMATS:
        ids: dict[str, int] = {}
        for mark in form.marks:
            found = tokenizer.encode(mark, add_special_tokens=False)
            if len(found) == 1 and tokenizer.is_special(found[0]):
                ids[mark] = found[0]
        if len(ids) == len(form.marks):
            return form, ids
    return None


def prompt(tokenizer: Tokenizer | None, before: str | list[int], after: str) -> list[int]:
    """Token ids that ask for what stands between two texts.

    Raises:
        BadRequest: the model has no tokens for that.
    """
    found = find(tokenizer) if tokenizer is not None else None
    if tokenizer is None or found is None:
        message = "suffix: this model's tokenizer has no fill-in-the-middle tokens"
        raise BadRequest(message, param="suffix", code="not_supported")
    form, ids = found
    try:
        prefix_ids = tokenizer.encode(before, add_special_tokens=False) if isinstance(before, str) else before
        suffix_ids = tokenizer.encode(after, add_special_tokens=False)
    except UnicodeError:
        raise BadRequest("suffix or prompt holds lone surrogates: no valid Unicode", param="suffix") from None
    begins = tokenizer.encode("", add_special_tokens=True)[:1]
    front = begins if begins and begins[0] == tokenizer.bos_id else []
    first, second = [ids[form.prefix], *prefix_ids], [ids[form.suffix], *suffix_ids]
    end = [ids[form.middle]] if form.middle else []
    return front + (second + first if form.suffix_first else first + second) + end
