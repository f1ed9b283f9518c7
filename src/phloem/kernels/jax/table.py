"""The op table in jax. Each op is the reference's, of the same name, as a function of jax arrays.

What runs on the host from logits (`top_k`, `logsumexp`, masks, sampling) stays the reference's. Legend as in `ops.py`.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from phloem.kernels import compose
from phloem.kernels import reference as ref
from phloem.kernels.jax import attention, experts, pallas, scan
from phloem.kernels.jax.graph import Compiler
from phloem.kernels.jax.mesh import Devices
from phloem.kernels.jax.tensor import Array, Copies, is_tracing, lift, to_host, to_jax, to_torch, wrap
from phloem.kernels.ops import Ops

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.kernels.calls import WeightSource


def op(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of jax arrays as an op."""

    @wraps(function)
    def called(*arguments: Any) -> Any:
        return wrap(function(*(lift(argument) for argument in arguments)))

    return called


def prepare_linear(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> Array:
    """[out_features, in_features], as it is stored: the compiler lays it out."""
    del device
    if len(parts) == 1:
        return Array(to_jax(parts[0].dense(dtype)))
    return Array(jnp.concatenate([to_jax(part.dense(dtype)) for part in parts]))


def prepare_experts(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int) -> Array:
    del experts
    return prepare_linear(parts, dtype, device)


def on_host(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int = 0) -> Array:
    """As `prepare_linear`, left on the host: no device need have room for what several share out."""
    del device, experts
    found = [to_host(part.dense(dtype)) for part in parts]
    return Array(found[0] if len(found) == 1 else np.concatenate(found))


def refill(old: Array, made: Array) -> bool:
    """Compiled functions ask the wrapper for its array at each call."""
    old.a = made.a if not isinstance(old.a, jax.Array) else jax.device_put(made.a.reshape(old.a.shape), old.a.sharding)
    return True


def product(x_TN: Any, weight_MN: Any, bias_M: Any) -> Any:
    made = jax.lax.dot_general(
        x_TN, weight_MN, (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return (made if bias_M is None else made + bias_M.astype(jnp.float32)).astype(x_TN.dtype)


def embedding(ids_T: Any, weight_VN: Any, scale: float) -> Any:
    rows = lift(weight_VN)[lift(ids_T)]
    # The scale is rounded to the weights' type first, as the models that have one were trained.
    rows = rows if scale == 1.0 else rows * jnp.asarray(scale, rows.dtype)
    # Asked for outside of a step, it is torch's code that wants the rows.
    return Array(rows) if is_tracing() or isinstance(ids_T, Array) else to_torch(rows)


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32)


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    wide = _wide(x)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (wide * _wide(weight)).astype(x.dtype)


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
    total = (x + residual).astype(x.dtype)
    return rms_norm(total, weight, eps), total


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    wide = _wide(x)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps) * _wide(weight)
    return (wide if bias is None else wide + _wide(bias)).astype(x.dtype)


def gated_rms_norm(x: Any, gate: Any, weight: Any, eps: float, group: int = 0, norm_first: bool = False) -> Any:
    wide, opened = _wide(x), jax.nn.silu(_wide(gate))
    wide = wide if norm_first else wide * opened
    groups = wide.reshape(*wide.shape[:-1], -1, group or x.shape[-1])
    groups = groups * jax.lax.rsqrt(jnp.square(groups).mean(-1, keepdims=True) + eps)
    wide = groups.reshape(wide.shape) * _wide(weight)
    return (wide * opened if norm_first else wide).astype(x.dtype)


def gelu_tanh(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=True)


def gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


def silu_and_mul(x: Any) -> Any:
    gate, up = jnp.split(x, 2, -1)
    return jax.nn.silu(gate) * up


def gelu_tanh_and_mul(x: Any) -> Any:
    gate, up = jnp.split(x, 2, -1)
    return gelu_tanh(gate) * up


def softcap(x: Any, cap: float) -> Any:
    return jnp.tanh(x / cap) * cap


def xielu(x: Any, alpha_p: Any, alpha_n: Any, beta: Any, eps: Any) -> Any:
    wide = _wide(x)
    left = jnp.expm1(jnp.minimum(wide, eps)) - wide
    plus, minus = jax.nn.softplus(alpha_p), jax.nn.softplus(alpha_n)
    return (jnp.where(wide > 0, plus * jnp.square(wide), (beta + minus) * left) + beta * wide).astype(x.dtype)


def scale_rows(x: Any, scale_T: Any) -> Any:
    return (_wide(x) * _wide(scale_T).reshape(-1, *[1] * (x.ndim - 1))).astype(x.dtype)


def rope_(q_THD: Array, k_TKD: Array, positions_T: Array, cos_sin: Any, interleaved: bool) -> None:
    table = lift(cos_sin)[lift(positions_T)]
    cos, sin = table[:, None, 0], table[:, None, 1]  # [T, 1, rotary / 2]
    half = cos.shape[-1]
    for x in (q_THD, k_TKD):
        whole = lift(x)
        if not whole.shape[1]:
            continue
        turned = _wide(whole[..., : 2 * half])
        if interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned[..., :half], turned[..., half:]
        pair = first * cos - second * sin, second * cos + first * sin
        out = jnp.stack(pair, -1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, -1)
        x.a = jnp.concatenate((out.astype(whole.dtype), whole[..., 2 * half :]), -1)


def mrope_table(positions_3T: Any, cos_sin: Any, sections: tuple[int, ...], interleaved: bool) -> tuple[Any, Any]:
    half = cos_sin.shape[-1]
    if interleaved:
        axis = np.zeros(half, np.int32)
        for number in (1, 2):
            axis[number : 3 * sections[number] : 3] = number
    else:
        axis = np.repeat(np.arange(3), sections)
    rows = cos_sin[positions_3T]  # [3, T, 2, half]
    return jnp.arange(positions_3T.shape[1]), jnp.moveaxis(rows[axis, :, :, np.arange(half)], 0, -1)


def argmax(logits_LV: Any) -> Any:
    return Array(lift(logits_LV).argmax(-1).astype(jnp.int32)) if is_tracing() else ref.argmax(logits_LV)


def mix_streams(x_TSN: Any, mix_TSS: Any) -> Any:
    mixed = jnp.einsum("tsr,trn->tsn", _wide(mix_TSS), _wide(x_TSN), precision=jax.lax.Precision.HIGHEST)
    return (_wide(x_TSN) + mixed).astype(x_TSN.dtype)


def spread_streams(x_TSN: Any, y_TN: Any, scale_TS: Any, more: float) -> Any:
    return (_wide(x_TSN) + (_wide(scale_TS) + more)[..., None] * _wide(y_TN)[:, None]).astype(x_TSN.dtype)


def match_rms(x_TN: Any, like_TN: Any) -> Any:
    wanted = jnp.sqrt(jnp.square(_wide(like_TN)).mean(-1, keepdims=True))
    own = jnp.sqrt(jnp.maximum(jnp.square(_wide(x_TN)).mean(-1, keepdims=True), 1e-5))
    return (_wide(x_TN) * wanted / own).astype(x_TN.dtype)


def sparsify(x_TN: Any, deviations: float) -> Any:
    wide = _wide(x_TN)
    cut = wide.mean(-1, keepdims=True) + deviations * wide.std(-1, keepdims=True)
    return jax.nn.relu(wide - cut).astype(x_TN.dtype)


def index_scores(q_THD: Any, k_LD: Any, weights_TH: Any) -> Any:
    dots = jax.nn.relu(jnp.einsum("thd,ld->thl", _wide(q_THD), _wide(k_LD), precision=jax.lax.Precision.HIGHEST))
    return jnp.einsum("thl,th->tl", dots, _wide(weights_TH), precision=jax.lax.Precision.HIGHEST)


_PLAIN: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "gated_rms_norm": gated_rms_norm,
    "add": lambda x, y: (x + y).astype(x.dtype),
    "mul": lambda x, y: (x * y).astype(x.dtype),
    "sigmoid_mul": lambda x, gate: (x * jax.nn.sigmoid(gate)).astype(x.dtype),
    "scale": lambda x, factor: x * factor,
    "scale_rows": scale_rows,
    "join": lambda x, y: jnp.concatenate((x, y), -1),
    "silu_and_mul": silu_and_mul,
    "gelu_tanh_and_mul": gelu_tanh_and_mul,
    "softcap": softcap,
    "clip": lambda x, limit: jnp.clip(x, -limit, limit),
    "select_rows": lambda x, index: x[index],
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "xielu": xielu,
    "mrope_table": mrope_table,
    "route": experts.route,
    "moe": experts.moe,
    "experts": experts.experts,
    "chosen_experts": experts.chosen_experts,
    "weights_from": experts.weights_from,
    "mix_streams": mix_streams,
    "spread_streams": spread_streams,
    "match_rms": match_rms,
    "sparsify": sparsify,
    "index_scores": index_scores,
    "topk_indices": attention.topk_indices,
    "causal_conv": scan.causal_conv,
    "decays": scan.decays,
    "step_sizes": scan.step_sizes,
    "delta_gates": scan.delta_gates,
    "mamba2_scan": scan.mamba2_scan,
    "selective_scan": scan.selective_scan,
    "gated_delta": scan.gated_delta,
}


def table(target: str = "cpu", devices: Devices | None = None) -> Ops:
    """A table, with the compiler of steps over it. Several may stand side by side: each knows its own weights.

    `target`: what its kernels are compiled for ("tpu"; for "cpu" jax interprets them). `devices`: among which weights
    and caches are shared out.
    """
    copies: Copies = {}
    mesh = devices or Devices()
    plain: dict[str, Any] = {name: op(function) for name, function in _PLAIN.items()}
    linear = compose.linear_of(
        op(product),
        rms_norm=plain["rms_norm"],
        add_rms_norm=plain["add_rms_norm"],
        silu_and_mul=plain["silu_and_mul"],
        gelu_tanh_and_mul=plain["gelu_tanh_and_mul"],
    )
    own: dict[str, Any] = {
        "prepare_linear": on_host if mesh.size > 1 else prepare_linear,
        "prepare_experts": on_host if mesh.size > 1 else prepare_experts,
        "stack_experts": on_host if mesh.size > 1 else prepare_experts,
        "embedding": embedding,
        "rope_": rope_,
        "argmax": argmax,
        "write_kv": attention.write_kv,
        "paged_attention": attention.paged_attention,
        "page_kernel": pallas.paged_attention(target != "tpu", mesh.mesh),
        "page_kernel_heads": 128 if target == "tpu" else 1,
        "write_latent": attention.write_latent,
        "latent_attention": attention.latent_attention,
        "chosen_latent_attention": attention.latent_attention,
        "choose_keys": attention.choose_keys,
        "compiler": lambda: Compiler(copies, mesh),
        "share": lambda count: table(target, Devices.first(count)),
        "place": (lambda weight, axis, experts: Array(mesh.place(weight.a, axis, experts))) if mesh.size > 1 else None,
        "refill": refill,
        "renew": lambda _: copies.clear(),
    }
    return Ops(name="jax", linear=linear, every_attention=True, **plain, **own)
