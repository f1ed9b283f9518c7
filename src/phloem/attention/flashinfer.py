"""FlashInfer's paged attention (Ye et al. 2025), where the package is installed. Compiles its kernels at first use.

Each step is planned on the host from the rows' lengths, once for each distinct (heads, window, soft cap) of the model;
reading the lengths back waits for the device, so a step with this backend is not recorded into a graph.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from phloem.attention._store import store, unserved
from phloem.attention.reference import scaled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.attention import AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, Heads

WORKSPACE_BYTES = 128 * 2**20
HEAD_SIZES = (64, 128, 256)
KV_TYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Backend:
    name = "flashinfer"
    page_size = 16
    recordable = False

    def __init__(self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype) -> None:
        self.ops = ops
        self.device = device
        self._workspace: Tensor | None = None
        self._scaled: dict[int, Ops] = {}
        self._wrappers: dict[tuple[Any, ...], Any] = {}

    def decline(self, need: AttentionNeed) -> str | None:
        if need.device.type != "cuda" or torch.version.hip is not None:
            return f"runs on NVIDIA GPUs, not on {need.device.type}"
        if importlib.util.find_spec("flashinfer") is None:
            return "the package flashinfer is not installed"
        if need.kv_dtype not in KV_TYPES:
            return f"keeps no KV cache of type {need.kv_dtype}"
        if need.kv_scales > 1:
            return "takes one scale of the KV cache per layer, not one per head"
        odd = sorted({spec.head_size for spec in need.specs} - set(HEAD_SIZES))
        if odd:
            return f"has no kernels for heads of {odd[0]}"
        return unserved(need.specs)

    def begin(self, batch: PagedBatch, pool: KVPool) -> Step:
        return Step(self, batch, pool)

    def writing(self, pool: KVPool, layer: int) -> Ops:
        """The op table as it writes this layer's keys and values."""
        if layer not in pool.scales:
            return self.ops
        if layer not in self._scaled:
            self._scaled[layer] = scaled(self.ops, pool.scales[layer], pool.dtype)
        return self._scaled[layer]

    def wrapper(self, decode: bool, key: tuple[Any, ...], grouped: bool) -> Any:
        """One wrapper for each kind of layer: it holds that kind's plan of the step."""
        found = self._wrappers.get((decode, *key))
        if found is None:
            flashinfer = importlib.import_module("flashinfer")
            if self._workspace is None:
                self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
            if decode:
                found = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "HND", use_tensor_cores=grouped)
            else:
                found = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
            self._wrappers[(decode, *key)] = found
        return found


@dataclass(slots=True)
class Pages:
    """The step's pages as FlashInfer wants them: all rows' pages in one list."""

    query_start: Tensor  # [R + 1] host
    bounds: Tensor  # [R + 1] host: row r's pages are indices[bounds[r]:bounds[r + 1]]
    indices: Tensor  # [pages] device
    last_page_len: Tensor  # [R] host: tokens in a row's last page


def list_pages(batch: PagedBatch, page_size: int) -> Pages:
    """Flatten the page table. Waits for the device."""
    lengths = batch.seq_lens.cpu()
    used = (lengths + page_size - 1) // page_size
    bounds = torch.zeros(len(used) + 1, dtype=torch.int32)
    bounds[1:] = used.cumsum(0)
    table = batch.page_table
    mine = torch.arange(table.shape[1], device=table.device) < used.to(table.device)[:, None]
    return Pages(batch.query_start.cpu(), bounds, table[mine], (lengths - (used - 1) * page_size).to(torch.int32))


@dataclass(slots=True)
class Step:
    """One step's attention; kinds of layers are planned when the first layer of the kind comes."""

    backend: Backend
    batch: PagedBatch
    pool: KVPool
    pages: Pages | None = None
    planned: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        keys, values = self.pool.keys[spec.pool], self.pool.values[spec.pool]
        ops = self.backend.writing(self.pool, spec.pool)
        q_THD = store(ops, spec, heads, (keys, values), self.batch.token_slots)
        key = (spec.heads, spec.kv_heads, spec.head_size, spec.window, spec.softcap, spec.scale)
        wrapper = self.planned.get(key)
        if wrapper is None:
            wrapper = self.planned[key] = self._plan(spec, key, q_THD.dtype)
        extra: dict[str, Any] = {} if heads.sinks is None else {"sinks": heads.sinks.float()}
        scales = self.pool.scales.get(spec.pool)
        if scales is not None:
            extra |= {"k_scale": scales.k_values[0], "v_scale": scales.v_values[0]}
        return wrapper.run(q_THD.contiguous(), (keys, values), **extra)

    def _plan(self, spec: AttentionSpec, key: tuple[Any, ...], dtype: torch.dtype) -> Any:
        if self.pages is None:
            self.pages = list_pages(self.batch, self.pool.page_size)
        pages, decode = self.pages, self.batch.max_query_len == 1
        wrapper = self.backend.wrapper(decode, key, spec.heads // spec.kv_heads >= 4)
        common = {
            "sm_scale": spec.scale,
            # Theirs counts the tokens before this one, ours counts this one as well.
            "window_left": spec.window - 1 if spec.window else -1,
            "logits_soft_cap": spec.softcap,
            "q_data_type": dtype,
            "kv_data_type": self.pool.dtype,
        }
        sizes = (spec.heads, spec.kv_heads, spec.head_size, self.pool.page_size)
        rows = (pages.bounds, pages.indices, pages.last_page_len)
        if decode:
            wrapper.plan(*rows, *sizes, **common)
        else:
            wrapper.plan(pages.query_start, *rows, *sizes, causal=True, **common)
        return wrapper
