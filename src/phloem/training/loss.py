"""What the head learns: in each round the model's own distribution at the place that it tells (EAGLE-3).

Legend: T packed tokens, n places of a round, D draft vocabulary, N hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.training.head import Eagle3, Packed


@dataclass
class Lesson:
    """A batch, and what the model says at its places."""

    packed: Packed
    mask_T: Tensor  # bool: the assistant's
    last_TN: Tensor  # what the model's head reads
    best_T: Tensor  # int64: the model's most likely next token
    sum_T: Tensor  # log-sum-exp of the model's logits


@dataclass
class Told:
    """Of each round: its loss, how often its best token is the model's, and how much of the model's draws it would
    give (sum of min(p, q)). `places`: how many were counted."""

    loss: Tensor  # of all rounds, weighted
    losses: list[float]
    accuracies: list[float]
    acceptances: list[float]
    places: int

    @property
    def value(self) -> float:
        return float(self.loss.detach())


def rounds(lesson: Lesson, t2d_V: Tensor, length: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """(places that each round computes; of those, bool, which it learns from; how many it would have with every token
    in its vocabulary).

    A place t of round i learns where t + i was the assistant's, what it tells (t + i + 2) is told by the model within
    the text, and the model's most likely token is one that the head can say. A round also computes places that a later
    round needs.
    """
    packed, ends = lesson.packed, lesson.mask_T
    inside_T = packed.later(torch.ones_like(ends), 1) & ends
    learns_T = packed.later(t2d_V[lesson.best_T], 1) & inside_T
    shifted = [packed.later(learns_T, number) for number in range(length)]
    counted = [int(packed.later(inside_T, number).sum()) for number in range(length)]
    needed_T, rows, learned = torch.zeros_like(ends), list[Tensor](), list[Tensor]()
    for mask_T in reversed(shifted):
        needed_T = needed_T | mask_T
        at_n = needed_T.nonzero().squeeze(1)
        rows.append(at_n)
        learned.append(mask_T[at_n])
    return rows[::-1], learned[::-1], counted


def tell(
    head: Eagle3,
    lesson: Lesson,
    embed: Callable[[Tensor], Tensor],
    says: Callable[[Tensor], Tensor],
    vocabulary: tuple[Tensor, Tensor],
    length: int,
    decay: float,
) -> Told:
    """The loss of `length` rounds; each round's is the mean over all T places of -sum p log q.

    Args:
        says: the model's logits of the draft vocabulary, [n, N] -> float32 [n, D].
        vocabulary: (the model's token of each draft id [D] int64, t2d [V] bool).
        decay: weight of a round, beside the one before.
    """
    packed, (ids_D, t2d_V) = lesson.packed, vocabulary
    rows, learned, counted = rounds(lesson, t2d_V, length)
    total, losses, right, given = torch.zeros(()), list[Tensor](), list[Tensor](), list[Tensor]()
    total = total.to(packed.ids_T.device)
    # The model's logits once for each place that any round tells of.
    asked_T = torch.zeros_like(lesson.mask_T)
    for number, (at_n, takes_n) in enumerate(zip(rows, learned, strict=True)):
        asked_T[at_n[takes_n] + number + 1] = True
    with torch.no_grad():
        told_T = asked_T.cumsum(0) - 1
        logits_mD = says(lesson.last_TN[asked_T])
        p_mD, full_mD = logits_mD.softmax(-1), (logits_mD - lesson.sum_T[asked_T][:, None]).exp()

    def ids(number: int, at_n: Tensor) -> Tensor:
        return packed.ids_T[(at_n + number + 1).clamp(max=len(packed.ids_T) - 1)]

    for number, out_nN in enumerate(head.unroll(packed, embed, rows, ids)):
        at_n, takes_n = rows[number], learned[number]
        next_n = at_n[takes_n] + number + 1
        logits_nD = head.logits(out_nN[takes_n])
        p_nD = p_mD[told_T[next_n]]
        loss = -(p_nD * F.log_softmax(logits_nD, -1)).sum() / len(packed.ids_T)
        total = total + decay**number * loss
        with torch.no_grad():
            losses.append(loss.detach())
            right.append((ids_D[logits_nD.argmax(-1)] == lesson.best_T[next_n]).sum())
            given.append(torch.minimum(full_mD[told_T[next_n]], logits_nD.softmax(-1)).sum())
    return Told(
        total,
        [float(one) for one in losses],
        [float(one) / max(1, count) for one, count in zip(right, counted, strict=True)],
        [float(one) / max(1, count) for one, count in zip(given, counted, strict=True)],
        counted[0],
    )
