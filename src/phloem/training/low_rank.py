"""Low-rank additions to a trained head (LoRA, Hu et al. 2021): they alone are trained, and files have their sum.

Legend: n rows, r rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from phloem.training.head import Eagle3

PARTS = ("lora_A", "lora_B")  # of parameters that no file of a head has


class Added(nn.Module):
    """A linear layer that stays as it is, and scale * B A beside it. B begins with zeros: nothing is changed yet."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        self.weight, self.scale = linear.weight, scale
        self.lora_A = nn.Parameter(torch.empty(rank, columns, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    @property
    def total(self) -> Tensor:
        return self.weight + self.scale * self.lora_B @ self.lora_A


def add_low_rank(head: Eagle3, rank: int, alpha: float) -> None:
    """Give every matrix of the head an addition; nothing else of it is trained from now on."""
    head.requires_grad_(False)
    linears = [(name, one) for name, one in head.named_modules() if isinstance(one, nn.Linear)]
    for name, linear in linears:
        parent, _, own = name.rpartition(".")
        least = min(rank, *linear.weight.shape)
        setattr(head.get_submodule(parent), own, Added(linear, least, (alpha or 2 * rank) / rank))


@torch.no_grad()
def whole_weights(head: nn.Module) -> dict[str, Tensor]:
    """The head's tensors as files have them, additions included."""
    found = {name: one.detach() for name, one in head.state_dict().items() if not name.endswith(PARTS)}
    sums = {f"{name}.weight": one.total for name, one in head.named_modules() if isinstance(one, Added)}
    return {**found, **sums}
