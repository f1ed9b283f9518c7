"""Where tokens attend in what a request hears: a second pass over finished text, by plain torch, for requests that ask.

Steps never form attention's weights. So the text runs once more, all of it at a time and beside the pages, with the
keys and values of its audio as they lie in its slot, and the weights of few heads are kept (Radford et al., 2022, and
the published code of Whisper, `timing.py`: heads that follow the sound, normalised over tokens, smoothed over time).

Legend: T tokens, H query heads, K kv heads, D head size, S states that are heard, h heads that count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from phloem.attention._packed import PackedMemory
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.request import Align
    from phloem.kernels.ops import Ops
    from phloem.layers.context import AttentionSpec, Heads
    from phloem.models import HearingModel

    Crossed = Callable[[int], tuple[Tensor, Tensor]]  # keys and values [S, K, D] of a layer, by pool index


class Watched(PackedMemory):
    """One text (`layers.context.StepMemory`) that attends to itself and to what it hears.

    `seen`: weights [T, S] of each head that counts, float32, in the order of the layers.
    """

    def __init__(self, ops: Ops, length: int, wanted: dict[int, list[int]], crossed: Crossed) -> None:
        super().__init__(ops, [length])
        self._wanted, self._crossed = wanted, crossed
        self.seen: list[Tensor] = []

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        if spec.writes:
            return super().attend(spec, heads)
        k_SKD, v_SKD = self._crossed(spec.pool)
        group = spec.heads // spec.kv_heads
        k_HSD, v_HSD = (x.float().transpose(0, 1).repeat_interleave(group, 0) for x in (k_SKD, v_SKD))
        scores_HTS = heads.q.float().transpose(0, 1) @ k_HSD.transpose(1, 2) * spec.scale
        weights_HTS = scores_HTS.softmax(-1)
        self.seen += [weights_HTS[head] for head in self._wanted.get(spec.pool, ())]
        return (weights_HTS @ v_HSD).transpose(0, 1).to(heads.q.dtype).contiguous()


def alignment(
    model: HearingModel,
    ops: Ops,
    device: torch.device,
    pools: tuple[int, ...],
    crossed: Crossed,
    tokens: NDArray[np.int32],
    align: Align,
) -> NDArray[np.float32]:
    """[tokens from `align.start` on but the last, states]: how much each is drawn to each, mean over the heads.

    Args:
        pools: of the layers that attend to what is heard, in their order.
    """
    wanted: dict[int, list[int]] = {}
    for layer, head in align.heads:
        wanted.setdefault(pools[layer], []).append(head)
    with torch.inference_mode():
        ids_T = torch.from_numpy(tokens.astype("int64")).to(device)
        memory = Watched(ops, len(ids_T), wanted, crossed)
        model.forward(ForwardBatch(ids_T, torch.arange(len(ids_T), device=ids_T.device), memory, None))
        weights_hTS = torch.stack(memory.seen)[:, align.start : -1, : align.states]
        spread = weights_hTS.std(1, keepdim=True, unbiased=False)
        even = (weights_hTS - weights_hTS.mean(1, keepdim=True)) / spread
        return smoothed(even.nan_to_num(0.0, 0.0, 0.0), align.width).mean(0).cpu().numpy()


def smoothed(x_hTS: Tensor, width: int) -> Tensor:
    """The median of `width` (odd) neighbours over the last dimension, mirrored at its ends."""
    half = width // 2
    if x_hTS.shape[-1] <= half or not x_hTS.shape[1]:
        return x_hTS
    return F.pad(x_hTS, (half, half), mode="reflect").unfold(-1, width, 1).median(-1).values
