"""How many tokens a step gives with this head, counted on answers that the model gave by itself at temperature 0.

At every place of an answer the head drafts, as the server lets it: what it reads and attends to is the same. The answer
is then walked through: a step gives the drafts that agree with it, and one token more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.training.block import BlockDrafter
    from phloem.training.head import Eagle3, Packed


@dataclass
class Accepted:
    """`steps` that gave `tokens`; `drafts`: how many steps had 0, 1, 2, ... drafts accepted."""

    steps: int = 0
    tokens: int = 0
    drafts: Counter[int] = field(default_factory=Counter[int])

    @property
    def length(self) -> float:
        """Tokens a step; the prompt's own step, which gives one token, is not among them."""
        return self.tokens / self.steps if self.steps else 0.0

    def survival(self, most: int) -> list[float]:
        """Share of the steps whose first, second, ... draft was accepted."""
        return [sum(n for a, n in self.drafts.items() if a > at) / max(1, self.steps) for at in range(most)]


@torch.no_grad()
def accepted(
    head: Eagle3,
    packed: Packed,
    prompts: Sequence[int],
    embed: Callable[[Tensor], Tensor],
    ids_D: Tensor,
    most: int,
) -> Accepted:
    """Of texts that are a prompt and the model's answer. `prompts`: tokens of each prompt, at least one.

    `most`: drafts of a step. Near an answer's end a step has no more drafts than tokens are left behind its own.
    """
    start_T = packed.end_T - torch.tensor(packed.lengths, device=packed.end_T.device)[packed.text_T]
    prompt_T = torch.tensor(list(prompts), device=packed.end_T.device)[packed.text_T]
    at_T = torch.arange(len(packed.ids_T), device=packed.end_T.device)
    # A step at place t reads the model's states up to t and knows token t + 1, which the step before gave.
    at_n = ((at_T >= start_T + prompt_T - 1) & (at_T + 1 < packed.end_T)).nonzero().squeeze(1)
    drafts: list[Tensor] = []

    def ids(number: int, rows: Tensor) -> Tensor:
        return drafts[-1] if number else packed.ids_T[(rows + 1).clamp(max=len(packed.ids_T) - 1)]

    for out_nN in head.unroll(packed, embed, [at_n] * most, ids):
        drafts.append(ids_D[head.logits(out_nN).argmax(-1)])
    agrees_T = torch.zeros(len(packed.ids_T), dtype=torch.int64, device=at_n.device)
    alive_n = torch.ones_like(at_n, dtype=torch.bool)
    for number, draft_n in enumerate(drafts):
        told_n = at_n + number + 2
        inside_n = told_n < packed.end_T[at_n]
        alive_n = alive_n & inside_n & (draft_n == packed.ids_T[told_n.clamp(max=len(packed.ids_T) - 1)])
        agrees_T[at_n[alive_n]] += 1
    return _walked(agrees_T.tolist(), packed.lengths, prompts)


@torch.no_grad()
def accepted_blocks(
    drafter: BlockDrafter,
    packed: Packed,
    bounds: tuple[int, int],
    model: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    width: int,
) -> Accepted:
    """Of one text, a prompt and the model's answer, by blocks.

    Args:
        bounds: (tokens of the prompt, at least one; tokens at which the server would have ended the text).
        model: (token ids to embeddings; states that the model's head reads to its logits).
        width: places of a block, where that many tokens may still come.
    """
    prompt, limit = bounds
    length, (embed, says) = len(packed.ids_T), model
    agrees = [0] * length
    anchors_A = torch.arange(prompt, length - 1, device=packed.ids_T.device)
    # As the server has it: no mask stands where no token may come.
    widths_A = (limit - 1 - anchors_A).clamp(max=width)
    for size in sorted(set(widths_A.tolist())):
        some_A = anchors_A[widths_A == size]
        if size < 2:
            continue
        drafts = says(drafter(packed, some_A, size, embed)[:, 1:].flatten(0, 1)).argmax(-1).view(-1, size - 1)
        at = some_A[:, None] + torch.arange(1, size, device=some_A.device)
        right = (at < length) & (drafts == packed.ids_T[at.clamp(max=length - 1)])
        for anchor, count in zip(some_A.tolist(), right.cumprod(1).sum(1).tolist(), strict=True):
            agrees[anchor - 1] = int(count)
    return _walked(agrees, packed.lengths, [prompt])


def _walked(agrees: list[int], lengths: Sequence[int], prompts: Sequence[int]) -> Accepted:
    found, start = Accepted(), 0
    for length, prompt in zip(lengths, prompts, strict=True):
        known = start + prompt  # the token that the prompt's own step gave
        end = start + length
        while known + 1 < end:  # something is left to be told
            right = min(agrees[known - 1], end - known - 2)  # the last token is the step's own
            found.steps, found.tokens = found.steps + 1, found.tokens + right + 1
            found.drafts[right] += 1
            known += right + 1
        start = end
    return found
