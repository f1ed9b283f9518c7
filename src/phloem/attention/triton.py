"""Our own Triton kernels: every feature (windows, soft caps, sinks, float8 caches), on any GPU Triton serves.

A float8 cache holds values divided by a scale, per tensor or per kv head (`KVPool.scales`); a layer without any is
stored as it is (the write saturates).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from phloem.attention._cascade import Sharing
from phloem.attention._store import call_of, store, unserved
from phloem.kernels.specs import SHARED_SPLITS, shared_tile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from torch import Tensor

    from phloem.attention import AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool, KVScales
    from phloem.layers.context import AttentionSpec, Heads

DEVICES = ("cuda", "xpu")
LARGE = 132  # multiprocessors
LARGEST_HEAD = 256  # beyond it a tile does not fit the shared memory
KV_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


class Backend:
    name = "triton"
    page_size = 16
    recordable = True  # a decode step waits for nothing on the host, so a step graph can hold it

    def __init__(self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype) -> None:
        self.ops = ops
        self.invariant = ops.name == "invariant"
        # Who else is in the batch may not change an invariant result.
        self.sharing = None if self.invariant or not specs else sharing_of(specs[0], device, dtype)
        self._stored: dict[int, Ops] = {}  # by layer; -1: without scales

    def decline(self, need: AttentionNeed) -> str | None:
        if need.device.type not in DEVICES:
            return f"runs on GPUs, not on {need.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if self.invariant and need.kv_scales:
            return "its batch-invariant kernels know no scales of the KV cache"
        if need.kv_dtype not in KV_TYPES:
            return f"keeps no KV cache of type {need.kv_dtype}"
        too_large = max((spec.head_size for spec in need.specs), default=0)
        if too_large > LARGEST_HEAD:
            return f"heads of {too_large} are larger than {LARGEST_HEAD}"
        return unserved(need.specs)

    def begin(self, batch: PagedBatch, pool: KVPool) -> Step:
        from phloem.kernels.triton import attention, invariant, rope

        return Step(self, batch, pool, invariant if self.invariant else attention, rope)

    def writing(self, rope: ModuleType, layer: int, scales: KVScales | None) -> Ops:
        """The op table as it writes this layer's keys and values."""
        place = layer if scales is not None else -1
        if place not in self._stored:
            self._stored[place] = stored_by(rope, self.ops, (scales.k, scales.v) if scales is not None else None)
        return self._stored[place]


def sharing_of(spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> Sharing:
    """What attending to shared pages once costs, in a layer of this kind."""
    wide = dtype == torch.float32
    return Sharing(
        tile=shared_tile(spec.heads // spec.kv_heads, wide)[0],
        programs=max(1, 2 * processors(device) // spec.kv_heads),
        splits=SHARED_SPLITS,
        token_bytes=spec.kv_heads * (spec.head_size + spec.values) * dtype.itemsize,
        part_bytes=spec.heads * (spec.values + 1) * 4,
    )


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of a large one where there is none to ask."""
    if device.type != "cuda":
        return LARGE
    return torch.cuda.get_device_properties(device).multi_processor_count


def stored_by(rope: ModuleType, ops: Ops, scales: tuple[Tensor, Tensor] | None) -> Ops:
    """The table with KV written by the kernels in `rope`, divided by `scales`; fused with the rotation if it was."""
    fused = None if ops.rope_write_kv is None else partial(rope.rope_write_kv, scales=scales)
    return replace(ops, write_kv=partial(rope.write_kv, scales=scales), rope_write_kv=fused)


@dataclass(slots=True)
class Step:
    """One step's attention."""

    backend: Backend
    batch: PagedBatch
    pool: KVPool
    kernels: ModuleType
    rope: ModuleType

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        keys, values = self.pool.keys[spec.pool], self.pool.values[spec.pool]
        scales = self.pool.scales.get(spec.pool)
        ops = self.backend.writing(self.rope, spec.pool, scales)
        cache = keys, values
        q_THD = store(ops, spec, heads, cache, self.batch.token_slots)
        call = call_of(spec, heads.sinks)
        if scales is None:
            return self.kernels.paged_attention(q_THD, cache, self.batch, call)
        run = self.kernels.decode_attention if self.batch.max_query_len == 1 else self.kernels.extend_attention
        return run(q_THD, cache, self.batch, call, scales=(scales.k, scales.v))
