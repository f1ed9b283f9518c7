"""Attention by the native CPU kernels, decode and prefill in one call; a bfloat16 or int8 KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.attention import reference
from phloem.kernels import reference as ref

if TYPE_CHECKING:
    from phloem.attention import AttentionNeed


class Backend(reference.Backend):
    name = "native"
    page_size = 16

    def decline(self, need: AttentionNeed) -> str | None:
        if self.ops.paged_attention is ref.paged_attention:
            return f"the op table {self.ops.name!r} has no attention of its own"
        if need.kv_dtype not in (torch.bfloat16, torch.int8):
            return f"it keeps keys and values in bfloat16 or int8, not in {need.kv_dtype}"
        return None
