"""A head's attention by torch's flex attention: block masks in place of dense ones, for a GPU.

In round i a query attends to round 0 up to its own place in its own text, and to rounds 1 to i at its place alone
(`head.py`). All keys of a batch stand in one row, round after round, and the mask is a function of two numbers; whole
blocks that nobody sees are left out, so that memory grows with what is seen and not with the square of a text.

Flex attention has no backward pass on a CPU: there it is compared with the dense form, and trainings use that.

Legend: T packed tokens, n queries, H heads, K kv heads, D head size, i rounds before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phloem.core.errors import ConfigError
from phloem.platforms._facts import in_host_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.training.head import Packed

BLOCK = 128


def sees(batch: Packed, at_n: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether query q sees key k, of keys [T + i n]: those of round 0, then of each round those of the n queries."""
    tokens, count = len(batch.ids_T), len(at_n)
    text_T, place_T = batch.text_T, batch.place_T
    text_n, place_n = text_T[at_n], place_T[at_n]

    def mask(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del row, head
        first = k.clamp(max=tokens - 1)
        before = (text_T[first] == text_n[q]) & (place_T[first] <= place_n[q])
        return torch.where(k < tokens, before, (k - tokens) % count == q)

    return mask


class FlexAttention:
    """In the place of `Eagle3.attend`. `compiled`: by torch.compile, which a GPU needs to gain anything."""

    def __init__(self, *, compiled: bool) -> None:
        """Raises ConfigError where torch has no flex attention."""
        try:
            from torch.nn.attention import flex_attention as flex
        except ImportError:
            raise ConfigError("attention: this torch has no flex attention", param="attention") from None
        self._make: Any = flex.create_block_mask
        self._compiled = compiled
        self._attend: Any = torch.compile(flex.flex_attention, dynamic=True) if compiled else flex.flex_attention

    def __call__(
        self,
        batch: Packed,
        at_n: Tensor,
        q_nHD: Tensor,
        first: tuple[Tensor, Tensor],
        later: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """[n, H * D]; `first`: keys and values of round 0 [T, K, D], `later`: of each further round [n, K, D]."""
        count = len(at_n)
        if not count:
            return q_nHD.flatten(1)
        keys, values = (torch.cat([first[part], *(one[part] for one in later)]) for part in (0, 1))
        blocks = self._make(
            sees(batch, at_n), None, None, count, len(keys), device=str(q_nHD.device), BLOCK_SIZE=BLOCK,
            _compile=self._compiled,
        )  # fmt: skip
        q_1HnD, k_1KtD, v_1KtD = (one.transpose(0, 1)[None] for one in (q_nHD, keys, values))
        out_1HnD = self._attend(
            q_1HnD, k_1KtD, v_1KtD, block_mask=blocks, scale=q_nHD.shape[-1] ** -0.5,
            enable_gqa=q_nHD.shape[1] != keys.shape[1],
        )  # fmt: skip
        return out_1HnD[0].transpose(0, 1).flatten(1)


def chosen(asked: str, device: torch.device) -> FlexAttention | None:
    """None: dense masks, as asked.

    Raises:
        ConfigError: flex attention was asked for where it has no backward pass.
    """
    if asked != "flex":
        return None
    if in_host_memory(device):
        raise ConfigError("attention: flex attention has no backward pass on a CPU; use dense", param="attention")
    return FlexAttention(compiled=True)
