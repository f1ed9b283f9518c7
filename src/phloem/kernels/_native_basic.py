"""Elementwise ops, norms, rotary embedding and KV writing of the native table, each as its namesake in `reference.py`.

Handles are looked up once, when the table is made. The second argument of `call` estimates nanoseconds on one thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import Rotation


# Types of KV cache, as the names of the ops over them end.
CACHES = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float32: "f32"}


def rows_of(x: Tensor) -> Tensor:
    """`x` as float32 `[rows, N]` with a contiguous last axis; what is already so is returned as it is."""
    if x.dtype != torch.float32:
        raise TypeError(f"native ops take float32 activations, not {x.dtype}")
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[1] <= 1 else x.contiguous()


def heads_of(x_THD: Tensor) -> tuple[int, int]:
    """Strides of tokens and heads of a float32 `[T, H, D]` view whose last axis is contiguous."""
    if x_THD.dtype != torch.float32 or x_THD.dim() != 3:
        raise TypeError(f"expected float32 [tokens, heads, head size], not {x_THD.dtype} {list(x_THD.shape)}")
    token, head, last = x_THD.stride()
    if last != 1 and x_THD.shape[2] > 1:
        raise ValueError("the last axis must be contiguous")
    return token, head


def is_index64(index: Tensor) -> bool:
    if index.dtype not in (torch.int64, torch.int32) or not index.is_contiguous():
        raise TypeError(f"indices must be contiguous int32 or int64, not {index.dtype}")
    return index.dtype == torch.int64


def ops(rt: Runtime) -> dict[str, Any]:
    return {**_elementwise(rt), **_activations(rt), **_norms(rt), **_positions(rt), **_fused_positions(rt)}


def _elementwise(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    ADD, SILU, GELU = rt.op("add"), rt.op("silu_and_mul"), rt.op("gelu_tanh_and_mul")
    SOFTCAP, SELECT = rt.op("softcap"), rt.op("select_rows")

    def add(x: Tensor, y: Tensor) -> Tensor:
        x_TN, y_TN = rows_of(x), rows_of(y)
        rows, n = x_TN.shape
        if y_TN.shape != x_TN.shape:
            raise ValueError(f"cannot add {list(y.shape)} to {list(x.shape)}")
        out = empty(x.shape)
        call(
            ADD, rows * n // 8, x=x_TN.data_ptr(), y=y_TN.data_ptr(), out=out.data_ptr(), rows=rows, n=n,
            x_stride=x_TN.stride(0), y_stride=y_TN.stride(0), out_stride=n,
        )  # fmt: skip
        return out

    def gated(handle: int, x: Tensor) -> Tensor:
        x_TN = rows_of(x)
        rows, double = x_TN.shape
        if double % 2:
            raise ValueError("gate and up must have the same number of features")
        n = double // 2
        out = empty((*x.shape[:-1], n))
        work, stride = rows * n // 2, x_TN.stride(0)
        call(handle, work, x=x_TN.data_ptr(), out=out.data_ptr(), rows=rows, n=n, x_stride=stride, out_stride=n)
        return out

    def silu_and_mul(x: Tensor) -> Tensor:
        return gated(SILU, x)

    def gelu_tanh_and_mul(x: Tensor) -> Tensor:
        return gated(GELU, x)

    def softcap(x: Tensor, cap: float) -> Tensor:
        x_TN = rows_of(x)
        rows, n = x_TN.shape
        out = empty(x.shape)
        work, x_at, stride = rows * n // 2, x_TN.data_ptr(), x_TN.stride(0)
        call(SOFTCAP, work, x=x_at, out=out.data_ptr(), rows=rows, n=n, x_stride=stride, out_stride=n, cap=cap)
        return out

    def select_rows(x: Tensor, index: Tensor) -> Tensor:
        x_TN = rows_of(x)
        n, rows = x_TN.shape[1], index.shape[0]
        wide, out = is_index64(index), empty((rows, *x.shape[1:]))
        call(
            SELECT, rows * n // 8, x=x_TN.data_ptr(), index=index.data_ptr(), out=out.data_ptr(), index64=wide,
            rows=rows, n=n, x_stride=x_TN.stride(0),
        )  # fmt: skip
        return out

    names = (add, silu_and_mul, gelu_tanh_and_mul, softcap, select_rows)
    return {function.__name__: function for function in names}


def _activations(rt: Runtime) -> dict[str, Any]:
    call, empty, GELU = rt.call, rt.empty, rt.op("gelu")

    def gelu(x: Tensor) -> Tensor:
        x_TN = rows_of(x)
        rows, n = x_TN.shape
        out, work, stride = empty(x.shape), rows * n // 2, x_TN.stride(0)
        call(GELU, work, x=x_TN.data_ptr(), out=out.data_ptr(), rows=rows, n=n, x_stride=stride, out_stride=n)
        return out

    return {"gelu": gelu}


def _norms(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    RMS, ADD_RMS, LAYER = rt.op("rms_norm"), rt.op("add_rms_norm"), rt.op("layer_norm")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dim() == 3:
            outer_stride, inner_stride = heads_of(x)
            outer, inner, n = x.shape
        else:
            x = rows_of(x)
            (outer, n), inner, outer_stride, inner_stride = x.shape, 1, x.stride(0), 0
        out, work = empty(x.shape), outer * inner * n // 4
        call(
            RMS, work, x=x.data_ptr(), weight=norm_weight(weight, n), out=out.data_ptr(), outer=outer, inner=inner, n=n,
            outer_stride=outer_stride, inner_stride=inner_stride, eps=eps,
        )  # fmt: skip
        return out

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x_TN, y_TN = rows_of(x), rows_of(residual)
        rows, n = x_TN.shape
        if y_TN.shape != x_TN.shape:
            raise ValueError(f"cannot add residual {list(residual.shape)} to {list(x.shape)}")
        out, total = empty(x.shape), empty(x.shape)
        call(
            ADD_RMS, rows * n // 3, x=x_TN.data_ptr(), residual=y_TN.data_ptr(), weight=norm_weight(weight, n),
            out=out.data_ptr(), total=total.data_ptr(), rows=rows, n=n,
            x_stride=x_TN.stride(0), residual_stride=y_TN.stride(0), eps=eps,
        )  # fmt: skip
        return out, total

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x_TN = rows_of(x.flatten(0, -2))
        rows, n = x_TN.shape
        out = empty(x.shape)
        call(
            LAYER, rows * n // 3, x=x_TN.data_ptr(), weight=norm_weight(weight, n),
            bias=0 if bias is None else norm_weight(bias, n), out=out.data_ptr(), rows=rows, n=n,
            x_stride=x_TN.stride(0), eps=eps,
        )  # fmt: skip
        return out

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "layer_norm": layer_norm}


def norm_weight(weight: Tensor, n: int) -> int:
    """Its address."""
    if weight.dtype != torch.float32 or weight.shape != (n,) or not weight.is_contiguous():
        raise TypeError(f"norm weight must be contiguous float32 [{n}], not {weight.dtype} {list(weight.shape)}")
    return weight.data_ptr()


def rotated_half(cos_sin: Tensor, size: int) -> int:
    """How many pairs of a head of `size` turn."""
    half = cos_sin.shape[2]
    if 2 * half > size or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin {cos_sin.dtype} {list(cos_sin.shape)} does not fit heads of {size}")
    return half


def check_fours(size: int, page_size: int) -> None:
    """An int8 cache keeps four values, or four tokens, beside each other."""
    if size % 4 or page_size % 4:
        raise ValueError(f"int8 caches take head sizes and page sizes that are multiples of 4, not {size}, {page_size}")


def writer(handles: dict[torch.dtype, int], k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, slots_T: Tensor) -> int:
    """The op that writes such keys and values into such a cache."""
    handle, size = handles.get(k_cache.dtype), k_TKD.shape[2]
    if k_cache.dtype == torch.int8:
        check_fours(size, k_cache.shape[2])
    fits = k_cache.shape[3] == size + 4 * (k_cache.dtype == torch.int8) and slots_T.dtype == torch.int32
    if handle is None or not fits or v_TKD.shape != k_TKD.shape:
        raise ValueError(
            f"cache {k_cache.dtype} {list(k_cache.shape)}, slots {slots_T.dtype} or values {list(v_TKD.shape)} "
            f"do not fit the keys {list(k_TKD.shape)}"
        )
    return handle


def _positions(rt: Runtime) -> dict[str, Any]:
    call = rt.call
    ROPE = rt.op("rope")
    WRITE = {kind: rt.op(f"write_kv_{name}") for kind, name in CACHES.items()}

    def rope_(q_THD: Tensor, k_TKD: Tensor, positions_T: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
        tokens, heads, size = q_THD.shape
        kv_heads, half = k_TKD.shape[1], rotated_half(cos_sin, size)
        (q_token, q_head), (k_token, k_head) = heads_of(q_THD), heads_of(k_TKD)
        call(
            ROPE, tokens * (heads + kv_heads) * half // 4, q=q_THD.data_ptr(), k=k_TKD.data_ptr(),
            positions=positions_T.data_ptr(), position64=is_index64(positions_T), cos_sin=cos_sin.data_ptr(),
            tokens=tokens, heads=heads, kv_heads=kv_heads, half=half, interleaved=interleaved,
            q_token=q_token, q_head=q_head, k_token=k_token, k_head=k_head,
        )  # fmt: skip

    def write_kv(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
        tokens, kv_heads, size = k_TKD.shape
        handle = writer(WRITE, k_TKD, v_TKD, k_cache, slots_T)
        (k_token, k_head), (v_token, v_head) = heads_of(k_TKD), heads_of(v_TKD)
        call(
            handle, tokens * kv_heads * size // 2, k=k_TKD.data_ptr(), v=v_TKD.data_ptr(),
            k_cache=k_cache.data_ptr(), v_cache=v_cache.data_ptr(), slots=slots_T.data_ptr(),
            tokens=tokens, kv_heads=kv_heads, head_size=size, page_size=k_cache.shape[2],
            k_token=k_token, k_head=k_head, v_token=v_token, v_head=v_head, page_stride=cache_stride(k_cache, v_cache),
        )  # fmt: skip

    return {"rope_": rope_, "write_kv": write_kv}


def _fused_positions(rt: Runtime) -> dict[str, Any]:
    call = rt.call
    BOTH = {kind: rt.op(f"rope_write_kv_{name}") for kind, name in CACHES.items()}

    def rope_write_kv(
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rotation: Rotation,
        k_cache: Tensor,
        v_cache: Tensor,
        slots_T: Tensor,
    ) -> Tensor:
        tokens, heads, size = q_THD.shape
        kv_heads, cos_sin, positions_T = k_TKD.shape[1], rotation.cos_sin, rotation.positions
        half, handle = rotated_half(cos_sin, size), writer(BOTH, k_TKD, v_TKD, k_cache, slots_T)
        q_norm = k_norm = None
        if rotation.q_norm is not None and rotation.k_norm is not None:
            q_norm, k_norm = norm_weight(rotation.q_norm, size), norm_weight(rotation.k_norm, size)
        rows, stored = tokens * (heads + kv_heads) * size, tokens * kv_heads * size
        (q_token, q_head), (k_token, k_head), (v_token, v_head) = heads_of(q_THD), heads_of(k_TKD), heads_of(v_TKD)
        call(
            handle, rows // 8 + stored // 2 + (0 if q_norm is None else rows // 4),
            q=q_THD.data_ptr(), k=k_TKD.data_ptr(), v=v_TKD.data_ptr(), q_norm=q_norm, k_norm=k_norm, eps=rotation.eps,
            positions=positions_T.data_ptr(), position64=is_index64(positions_T), cos_sin=cos_sin.data_ptr(),
            interleaved=rotation.interleaved, half=half,
            k_cache=k_cache.data_ptr(), v_cache=v_cache.data_ptr(), slots=slots_T.data_ptr(),
            page_size=k_cache.shape[2], page_stride=cache_stride(k_cache, v_cache),
            tokens=tokens, heads=heads, kv_heads=kv_heads, head_size=size,
            q_token=q_token, q_head=q_head, k_token=k_token, k_head=k_head, v_token=v_token, v_head=v_head,
        )  # fmt: skip
        return q_THD

    return {"rope_write_kv": rope_write_kv}


def cache_stride(k_cache: Tensor, v_cache: Tensor) -> int:
    """Elements between pages of a cache pair; within a page the cache is contiguous `[K, S, width]`."""
    _, _, page_size, width = k_cache.shape
    for cache in (k_cache, v_cache):
        if cache.stride()[1:] != (page_size * width, width, 1) or cache.shape != k_cache.shape:
            raise ValueError("a page of the KV cache must be contiguous, and both caches alike")
    if k_cache.stride(0) != v_cache.stride(0) or k_cache.dtype != v_cache.dtype:
        raise ValueError("key and value caches must have one type and one page stride")
    return k_cache.stride(0)
