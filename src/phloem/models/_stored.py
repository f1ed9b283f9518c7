"""What a checkpoint's tensors are stored as, and under which names: numbers that no layer here understands are refused.

A matrix of 8 or 4 bits is wrong without its scales, and a scale that nobody uses belongs to such a matrix: neither may
be taken for a dense weight, or left out with a warning.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING

from phloem.checkpoint.families import FAMILIES, family
from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import dtype

    from phloem.checkpoint.describe import Checkpoint

WHOLE = ("F64", "F32", "F16", "BF16")  # stored types whose values are the weights
_SCALE = re.compile(
    r".*[._](scales?|scale_inv|scale_2|scb|absmax|quant_map|quant_state\..+|qzeros|zero_point|g_idx|qweight|packed|"
    r"weight_shape|blocks|qscale_weight|qscale_act|weight_format)",
    re.IGNORECASE,
)
# Scales of queries and probabilities, for attention that computes in 8 bits: ours does not.
_ATTENTION = re.compile(r".*self_attn\.(attn\.)?(q|prob|prob_output)_scale|.*self_attn\.q_proj\.(q_scale|output_scale)")
_PREFIXES = ("model.", "transformer.", "gpt_neox.", "backbone.")
_BESIDE = ("lm_head.", "embed_out.")  # heads
# What files carry beside weights, and what is computed anew from config.json.
_LEFTOVERS = re.compile(r"(.*\.)?(rotary_emb\..+|position_ids|masked_bias|attn_rot_embd\.weight)|rope_freqs\.weight")
# Heads of masked language models beside their bodies, and all heads, where a text becomes a vector.
MASKED_HEADS = r"(\w+\.)?(cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector|mlm_head)\..+"
ALL_HEADS = MASKED_HEADS + r"|(\w+\.)?(pooler|classifier|score|qa_outputs|head|decoder|v_head)\..+"
_GGUF_LAYER = re.compile(r"blk\.\d+\..+\.(scale|bias)|rope_factors_(long|short)\.weight|.*\.scale")


def unused_scales(names: Iterable[str]) -> list[str]:
    """Of a safetensors checkpoint's unused tensors, those without which others cannot be read."""
    return [name for name in names if _SCALE.fullmatch(name) and not _ATTENTION.fullmatch(name)]


def unused_parts(names: Iterable[str]) -> list[str]:
    """Of a GGUF file's unused tensors, those that would be multiplied with, or added to, what is used."""
    return [name for name in names if _GGUF_LAYER.fullmatch(name)]


def check_surplus(checkpoint: Checkpoint, unused: Iterable[str], *known: str) -> None:
    """Refuse tensors that nothing reads: an answer without them is not the model's.

    Args:
        checkpoint: whose family's file may declare some (`IGNORED`).
        unused: their names in the files.
        known: patterns of more that are known to change nothing.

    Raises:
        ModelLoadError: with the first names, how many there are, and what may be done.
    """
    declared = family(checkpoint.model_type).ignored if checkpoint.model_type in FAMILIES.names() else ()
    patterns = [_LEFTOVERS, _ATTENTION, *(re.compile(pattern) for pattern in (*declared, *known))]
    surplus = [name for name in unused if not any(pattern.fullmatch(name) for pattern in patterns)]
    if surplus:
        raise ModelLoadError(
            f"{checkpoint.path}: {len(surplus)} tensors are read by no layer of {checkpoint.model_type}: "
            f"{some(surplus)} (config.json describes another model than the files hold: correct model_type, the number "
            "of layers or what switches these on, or take the tensors out of the files)"
        )


def some(items: list[str], limit: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def check_pushed(name: str, kind: dtype) -> None:
    """Refuse a live update whose numbers are not weights yet. Raises ModelLoadError."""
    if not kind.is_floating_point or kind.itemsize < 2:
        raise ModelLoadError(f"{name} is {str(kind).removeprefix('torch.')}: push its values in 16 or 32 bits")


def may_stand_for(seen: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape is read as one of another, as some families store theirs: a number without an axis,
    a vector or a matrix with axes of one in front (a vector: behind it too), and the matrix that patches of pictures
    are multiplied with as a kernel of a convolution."""
    kernel = len(seen) > len(expected) == 2 and seen[0] == expected[0] and prod(seen) == prod(expected)
    more = len(seen) - len(expected)
    lone = more > 0 and seen[more:] == expected and set(seen[:more]) == {1} and len(expected) < 3
    vector = more > 0 and tuple(size for size in seen if size != 1) == expected and len(expected) == 1
    return kernel or lone or vector or (seen, expected) == ((), (1,)) or seen == expected


def as_base(rename: Callable[[str], str | None], keys: Iterable[str], embedding: str) -> Callable[[str], str | None]:
    """`rename` for files whose names may lack what stands before a base model's in one with a head: `model.`, mostly.

    Args:
        rename: a family's own, of names in a file with the prefix.
        keys: all names in the files.
        embedding: our name of a tensor that every model has, from which the two are told apart.
    """
    names = list(keys)
    if any(rename(name) == embedding for name in names):
        return rename
    for prefix in _PREFIXES:
        if any(rename(prefix + name) == embedding for name in names):
            # What stands beside the base model has its own name in both.
            return lambda name: rename(name if name.startswith(_BESIDE) else prefix + name)
    return rename
