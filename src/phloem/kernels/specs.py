"""Constants of ops that families differ in, as data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# chosen_*: the logits decide who is chosen, and the score is computed among the chosen alone.
# sparse_mixer: the best one's share among those near it, then without it the same of the next (Liu et al., 2024).
Score = Literal["softmax", "sigmoid", "chosen_softmax", "chosen_sigmoid", "sparse_mixer"]
Activation = Literal["silu", "gelu_tanh", "swiglu_clamp", "relu2"]


# Attention to pages that rows share, in Triton: most parts that a group's pages are cut into, in a decode step and in
# others. A step with long rows has more tokens, and keeps fewer parts of each.
SHARED_SPLITS = (16, 8)


def shared_tile(group: int, wide: bool) -> tuple[int, int]:
    """(Tokens of a tile, rows that they fill): `group` query heads of a kv head, rounded up to a power of two, stand
    beside each other. `wide`: float32 tensors."""
    heads = 1 << max(group - 1, 0).bit_length()
    rows = max(16 if wide else 64, heads)
    return rows // heads, rows


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a sparse layer chooses experts. Legend: E experts, k chosen.

    score(logits) in float32; a correction bias is added to decide who is chosen, never to the weights. With `groups`,
    E is cut into so many, of which the `keep` with the largest sum of their `group_best` best scores take part.
    """

    top_k: int
    score: Score = "softmax"
    renormalise: bool = False  # weights / (their sum + eps), the sum at least `floor`
    eps: float = 0.0
    floor: float = 0.0
    scale: float = 1.0  # of the weights, in the end
    groups: int = 1
    keep: int = 1
    group_best: int = 2
    jitter: float = 0.0  # sparse_mixer: logits are near the best one up to twice this share of the larger of both

    @property
    def plain(self) -> bool:
        """Softmax over all, then the best k: what `Ops.moe` does."""
        same = self.score == "softmax" and self.groups == 1 and self.scale == 1.0
        return same and not self.eps and not self.floor


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """What each expert computes: down(act(gate(x)) * up(x)), or without gate down(act(up(x))).

    swiglu_clamp: g = min(gate, limit), u = clamp(up, -limit, limit), (u + 1) g sigmoid(alpha g).
    `scale_input`: a token's weight multiplies what the expert reads, not what it gives.
    """

    experts: int  # whose weights are here
    activation: Activation = "silu"
    gated: bool = True
    limit: float = 7.0
    alpha: float = 1.702
    scale_input: bool = False
    first: int = 0  # the id of the first of them; ids of others add nothing (they are other ranks')

    @property
    def plain(self) -> bool:
        """What `Ops.moe` does."""
        return self.activation == "silu" and self.gated and not self.scale_input and not self.first
