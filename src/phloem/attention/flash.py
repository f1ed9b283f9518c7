"""FlashAttention-3 (Shah et al. 2024) over pages, where `flash_attn_interface` is installed; Hopper only."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.attention._store import store, unserved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.attention import AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, Heads

LARGEST_HEAD = 256
HOPPER = (9, 0)


class Backend:
    name = "flash"
    page_size = 64
    recordable = True

    def __init__(self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype) -> None:
        self.ops = ops

    def decline(self, need: AttentionNeed) -> str | None:
        if need.device.type != "cuda" or torch.version.hip is not None:
            return f"runs on NVIDIA GPUs, not on {need.device.type}"
        if importlib.util.find_spec("flash_attn_interface") is None:
            return "the package flash_attn_interface (FlashAttention-3) is not installed"
        capability = torch.cuda.get_device_capability(need.device)
        if capability != HOPPER:
            return f"is made for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
        if need.kv_dtype not in (torch.bfloat16, torch.float16):
            return f"keeps no KV cache of type {need.kv_dtype}"
        too_large = max((spec.head_size for spec in need.specs), default=0)
        if too_large > LARGEST_HEAD:
            return f"heads of {too_large} are larger than {LARGEST_HEAD}"
        if need.sinks:
            return "has no attention sinks"
        return unserved(need.specs)

    def begin(self, batch: PagedBatch, pool: KVPool) -> Step:
        attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
        return Step(self.ops, batch, pool, attend)


@dataclass(slots=True)
class Step:
    """One step's attention."""

    ops: Ops
    batch: PagedBatch
    pool: KVPool
    attend: Any

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        assert heads.sinks is None, "a layer whose spec says no sinks hands some over"
        keys, values = self.pool.keys[spec.pool], self.pool.values[spec.pool]
        q_THD = store(self.ops, spec, heads, (keys, values), self.batch.token_slots)
        return self.attend(
            q_THD,
            # Its pages are [S, K, D]; a view with other strides is all it takes.
            keys.transpose(1, 2),
            values.transpose(1, 2),
            cache_seqlens=self.batch.seq_lens,
            page_table=self.batch.page_table,
            cu_seqlens_q=self.batch.query_start,
            max_seqlen_q=self.batch.max_query_len,
            softmax_scale=spec.scale,
            causal=True,
            window_size=(spec.window - 1, 0) if spec.window else (-1, -1),
            softcap=spec.softcap,
        )
