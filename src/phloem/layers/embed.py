"""Token embedding and the head that turns hidden states into logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.core.errors import ModelLoadError
from phloem.layers.weight import Layer, Part, Weight, cut_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.layers.context import BuildContext


class Embedding(Layer):
    """Rows of `<ctx.name>.weight`, times `scale`. Its output decides the activations' type.

    Ranks share the vocabulary out: this one keeps the ids `[first, first + len(weight))` (`span`).
    """

    def __init__(self, ctx: BuildContext, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        self.ops = ctx.ops
        self.scale = scale
        ctx, self.rows = ctx.everywhere(), ctx.rows
        self.span, self.comm = ctx.mesh.tp.span(vocab_size), ctx.comm
        self.weight = vocabulary(ctx, vocab_size, hidden_size)

    def __call__(self, ids_T: Tensor) -> Tensor:
        """[T] -> [T, hidden_size]."""
        if self.comm is None:
            return self.ops.embedding(ids_T, self.weight.value, self.scale)
        if self.rows is not None and self.rows.begun:
            return self.rows.own(self._shared(self.rows.gather(ids_T), self.comm))
        return self._shared(ids_T, self.comm)

    def _shared(self, ids_T: Tensor, comm: Comm) -> Tensor:
        first, last = self.span
        here_T = (ids_T >= first) & (ids_T < last)
        rows_TN = self.ops.embedding((ids_T - first).clamp(0, last - first - 1), self.weight.value, self.scale)
        return comm.all_reduce(rows_TN.masked_fill(~here_T.unsqueeze(1), 0.0))


class Positions(Layer):
    """A learned embedding of each position: of the `rows` of `<ctx.name>.weight` those from `first` on."""

    def __init__(self, ctx: BuildContext, hidden_size: int, rows: int, first: int) -> None:
        self.ops = ctx.ops
        self.weight = Weight((f"{ctx.name}.weight",), ((rows - first, hidden_size),), "matrix")
        self.weight.parts = (Part(first),)

    def add(self, x_TN: Tensor, positions_T: Tensor) -> Tensor:
        return self.ops.add(x_TN, self.ops.embedding(positions_T, self.weight.value, 1.0))


class Head(Layer):
    """Logits, from its own matrix or from the embedding's (`tied`); times `scale`, then softly capped.

    Ranks share the vocabulary out, as in `Embedding`. With a `comm` all of them are called together, and what comes
    back is whole on rank 0 alone: tokens are chosen there.
    """

    def __init__(
        self,
        ctx: BuildContext,
        vocab_size: int,
        hidden_size: int,
        tied: Embedding | None,
        softcap: float = 0.0,
        scale: float = 1.0,
        *,
        bias: bool = False,
    ) -> None:
        self.ops = ctx.ops
        self.softcap, self.scale = softcap, scale
        ctx = ctx.everywhere()
        self.span, self.comm, self.vocab_size = ctx.mesh.tp.span(vocab_size), ctx.comm, vocab_size
        self.weight = vocabulary(ctx, vocab_size, hidden_size) if tied is None else tied.weight
        self.bias = Weight((f"{ctx.name}.bias",), ((vocab_size,),), "bias") if bias else None
        if self.bias is not None:
            self.bias.cuts = self.weight.cuts

    @property
    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.value

    def __call__(self, hidden_LD: Tensor) -> Tensor:
        """[L, hidden_size] -> float32 logits [L, vocab_size]."""
        logits_LV = self._own(hidden_LD)
        if self.comm is None:
            return logits_LV
        # The last ranks' share may be shorter.
        width = -(-self.vocab_size // self.comm.size)
        parts = self.comm.gather(torch.nn.functional.pad(logits_LV, (0, width - logits_LV.shape[1])))
        return logits_LV if parts is None else torch.cat(parts, 1)[:, : self.vocab_size].contiguous()

    def _own(self, hidden_LD: Tensor) -> Tensor:
        logits_LV, _ = self.ops.linear(hidden_LD, self.weight.value, self._bias)
        if logits_LV.dtype != torch.float32:
            logits_LV = logits_LV.float()
        if self.scale != 1.0:
            logits_LV = self.ops.scale(logits_LV, self.scale)
        return self.ops.softcap(logits_LV, self.softcap) if self.softcap else logits_LV

    def argmax(self, hidden_LD: Tensor) -> Tensor:
        """The most likely token of each row, integer [L]. Scale and soft cap keep the order: they are left out."""
        if self.comm is not None:
            return self._shared_argmax(self.comm, hidden_LD)
        if self.ops.linear_argmax is not None and self.bias is None:
            return self.ops.linear_argmax(hidden_LD, self.weight.value)
        return self.ops.argmax(self.ops.linear(hidden_LD, self.weight.value, self._bias)[0])

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of each row the k largest logits, their ids, and log-sum-exps of the logits times each scale, without the
        rows (`Ops.linear_topk`). None where the table cannot."""
        if self.comm is not None or self.ops.linear_topk is None or self.scale != 1.0 or self.bias is not None:
            return None
        return self.ops.linear_topk(hidden_LD, self.weight.value, k, scale_LJ, norms, self.softcap)

    def _shared_argmax(self, comm: Comm, hidden_LD: Tensor) -> Tensor:
        """Each rank's best token and its logit, of which rank 0 takes the larger, and of equals the first."""
        logits_LV, _ = self.ops.linear(hidden_LD, self.weight.value, self._bias)
        ids_L = self.ops.argmax(logits_LV).long()
        best_L = logits_LV.gather(1, ids_L.unsqueeze(1)).squeeze(1)
        parts = comm.gather(torch.stack((best_L.double(), (ids_L + self.span[0]).double())))
        if parts is None:
            return ids_L
        found_n2L = torch.stack(parts)
        return found_n2L[:, 1].gather(0, found_n2L[:, 0].argmax(0, keepdim=True)).squeeze(0).long()


def vocabulary(ctx: BuildContext, vocab_size: int, hidden_size: int) -> Weight:
    """A matrix with a row for each token, of which a rank keeps a run; the last ranks' may be shorter."""
    if vocab_size <= -(-vocab_size // ctx.mesh.tp.size) * (ctx.mesh.tp.size - 1):
        raise ModelLoadError(f"tp_size {ctx.mesh.tp.size}: a vocabulary of {vocab_size} has no part for the last ranks")
    cut = cut_of(ctx.mesh.tp, 0)
    slot = Weight((f"{ctx.name}.weight",), ((vocab_size, hidden_size),), "matrix")
    slot.cuts = () if cut is None else ((cut,),)
    return slot
