"""Token embedding and the head that turns hidden states into logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.layers.weight import Layer, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext


class Embedding(Layer):
    """Rows of `<ctx.name>.weight`, times `scale`. Its output decides the activations' type."""

    def __init__(self, ctx: BuildContext, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        self.ops = ctx.ops
        self.scale = scale
        self.weight = Weight((f"{ctx.name}.weight",), ((vocab_size, hidden_size),), "matrix")

    def __call__(self, ids_T: Tensor) -> Tensor:
        """[T] -> [T, hidden_size]."""
        return self.ops.embedding(ids_T, self.weight.value, self.scale)


class Head(Layer):
    """Logits, from its own matrix or from the embedding's (`tied`)."""

    def __init__(
        self, ctx: BuildContext, vocab_size: int, hidden_size: int, tied: Embedding | None, softcap: float = 0.0
    ) -> None:
        self.ops = ctx.ops
        self.softcap = softcap
        own = Weight((f"{ctx.name}.weight",), ((vocab_size, hidden_size),), "matrix")
        self.weight = own if tied is None else tied.weight

    def __call__(self, hidden_LD: Tensor) -> Tensor:
        """[L, hidden_size] -> float32 logits [L, vocab_size]."""
        logits_LV, _ = self.ops.linear(hidden_LD, self.weight.value)
        if logits_LV.dtype != torch.float32:
            logits_LV = logits_LV.float()
        return self.ops.softcap(logits_LV, self.softcap) if self.softcap else logits_LV

    def argmax(self, hidden_LD: Tensor) -> Tensor:
        """The most likely token of each row, integer [L]. A soft cap keeps the order, so it is left out."""
        if self.ops.linear_argmax is not None:
            return self.ops.linear_argmax(hidden_LD, self.weight.value)
        return self.ops.argmax(self.ops.linear(hidden_LD, self.weight.value)[0])

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of each row the k largest logits, their ids, and log-sum-exps of the logits times each scale, without the
        rows (`Ops.linear_topk`). None where the table cannot."""
        if self.ops.linear_topk is None:
            return None
        return self.ops.linear_topk(hidden_LD, self.weight.value, k, scale_LJ, norms, self.softcap)
