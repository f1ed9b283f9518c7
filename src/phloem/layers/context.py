"""What a layer is given beside its sizes, and the one face of attention that models know.

A model's `forward(step)` receives a `ForwardBatch`; its attention layers hand q, k and v to `step.attention`, which an
attention backend made for this step. Models never see pages; backends never see models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from phloem.kernels.ops import Ops, Rotation


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's constants. `window` 0 is full attention; `softcap` 0 is none."""

    layer: int  # index into the KV pool
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int = 0
    softcap: float = 0.0


class AttentionStep(Protocol):
    """Attention of one step: rotates q and k, writes the new tokens' KV, then attends over each row's pages.

    `rotation` None: q and k are ready as they are. Otherwise they are used up: the step may change them in place.
    """

    def __call__(
        self,
        spec: AttentionSpec,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        sinks_H: Tensor | None,
        rotation: Rotation | None = None,
    ) -> Tensor: ...


@dataclass(slots=True)
class ForwardBatch:
    """A step as a model sees it. T packed new tokens, L rows whose next token is wanted."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    attention: AttentionStep
    logit_index: Tensor | None  # [L] int64: which of the T tokens need logits; None: all, in order


@dataclass(frozen=True)
class BuildContext:
    """Passed down while a model is built: `ctx.child("q_proj")` names the layer below."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device
    name: str = ""
    quant: Any = None  # the quantisation method, or None: weights as the checkpoint has them

    def child(self, name: str | int) -> BuildContext:
        return replace(self, name=f"{self.name}.{name}" if self.name else str(name))
