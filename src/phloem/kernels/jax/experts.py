"""Routers and mixtures of experts in jax. Legend as in `reference_models.py`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from phloem.kernels.specs import ExpertSpec, RouterSpec

if TYPE_CHECKING:
    from collections.abc import Callable

HIGHEST = jax.lax.Precision.HIGHEST


def route(logits_TE: Any, bias_E: Any, spec: RouterSpec) -> tuple[Any, Any]:
    """As `reference_models.route`."""
    logits = logits_TE.astype(jnp.float32)
    if spec.score == "sparse_mixer":
        return _sparse_mixer(logits, spec)
    late = spec.score.startswith("chosen_")
    score = logits if late else _score(logits, spec.score)
    rank = score if bias_E is None else score + bias_E.astype(jnp.float32)
    if spec.groups > 1:
        rank = _within_groups(rank, spec)
    ids = jnp.argsort(-rank, axis=-1, stable=True)[:, : spec.top_k]
    weights = jnp.take_along_axis(score, ids, 1)
    if late:
        weights = _score(weights, spec.score.removeprefix("chosen_"))
    if spec.renormalise:
        total = weights.sum(-1, keepdims=True) + spec.eps
        weights = weights / (jnp.maximum(total, spec.floor) if spec.floor else total)
    return ids.astype(jnp.int32), weights * spec.scale


def _score(logits: Any, kind: str) -> Any:
    return jax.nn.softmax(logits, -1) if kind == "softmax" else jax.nn.sigmoid(logits)


def _within_groups(rank_TE: Any, spec: RouterSpec) -> Any:
    rank = rank_TE.reshape(rank_TE.shape[0], spec.groups, -1)
    value = jax.lax.top_k(rank, spec.group_best)[0].sum(-1)
    kept = jnp.argsort(-value, axis=-1, stable=True)[:, : spec.keep]
    inside = jnp.zeros(value.shape, bool).at[jnp.arange(len(value))[:, None], kept].set(True)
    return jnp.where(inside[..., None], rank, -jnp.inf).reshape(rank_TE.shape)


def _sparse_mixer(logits_TE: Any, spec: RouterSpec) -> tuple[Any, Any]:
    ids, weights, left = list[Any](), list[Any](), logits_TE
    rows = jnp.arange(logits_TE.shape[0])
    for _ in range(spec.top_k):
        best, chosen = left.max(-1, keepdims=True), left.argmax(-1)
        far = (best - logits_TE) / jnp.maximum(jnp.abs(logits_TE), best) > 2 * spec.jitter
        share = jax.nn.softmax(jnp.where(far, -jnp.inf, left), -1)
        weights.append(share[rows, chosen])
        ids.append(chosen)
        left = left.at[rows, chosen].set(-jnp.inf)
    return jnp.stack(ids, 1).astype(jnp.int32), jnp.stack(weights, 1)


def activate(x: Any, spec: ExpertSpec) -> Any:
    """As `reference_models.activate`."""
    if spec.activation == "swiglu_clamp":
        gate, up = jnp.split(x, 2, -1)
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
        return (up + 1) * (gate * jax.nn.sigmoid(gate * spec.alpha))
    acts: dict[str, Callable[[Any], Any]] = {
        "silu": jax.nn.silu,
        "gelu_tanh": lambda v: jax.nn.gelu(v, approximate=True),
        "relu2": lambda v: jnp.square(jax.nn.relu(v)),
    }
    act = acts[spec.activation]
    if not spec.gated:
        return act(x)
    gate, up = jnp.split(x, 2, -1)
    return act(gate) * up


def experts(
    x_TN: Any, ids_Tk: Any, weights_Tk: Any, gate_up: Any, down: Any, spec: ExpertSpec, biases: Any = None
) -> Any:
    """As `reference_models.experts`. Few choices gather their experts' matrices; many go through all experts, one after
    another, each over all tokens."""
    count = spec.experts
    up_EMN, down_ENF = gate_up.reshape(count, -1, gate_up.shape[-1]), down.reshape(count, -1, down.shape[-1])
    bias = [None if b is None else b.astype(gate_up.dtype).reshape(count, -1) for b in biases or (None, None)]
    x, weights = x_TN.astype(gate_up.dtype), weights_Tk.astype(jnp.float32)
    local = ids_Tk - spec.first
    weights = jnp.where((local >= 0) & (local < count), weights, 0.0)
    tokens, k = ids_Tk.shape

    def one(x_nN: Any, weight_n: Any, matrices: Any) -> Any:
        up, out, up_bias, out_bias = matrices
        read = x_nN * weight_n[:, None].astype(x_nN.dtype) if spec.scale_input else x_nN
        inner = _product(read, up) if up_bias is None else _product(read, up) + up_bias
        made = _product(activate(inner, spec), out)
        made = (made if out_bias is None else made + out_bias).astype(jnp.float32)
        return made if spec.scale_input else made * weight_n[:, None]

    if tokens * k <= count // 2:
        at = jnp.clip(local, 0, count - 1).reshape(-1)
        picked = (up_EMN[at], down_ENF[at], *(None if b is None else b[at] for b in bias))
        axes = tuple(None if part is None else 0 for part in picked)
        made = jax.vmap(lambda x, w, m: one(x[None], w[None], m)[0], in_axes=(0, 0, axes))(
            jnp.repeat(x, k, 0), weights.reshape(-1), picked
        )
        inside = (weights != 0).reshape(-1, 1)  # what scales its input may have biases
        return jnp.where(inside, made, 0.0).reshape(tokens, k, -1).sum(1).astype(x_TN.dtype)

    def through(total: Any, part: Any) -> tuple[Any, None]:
        expert, matrices = part
        mine = local == expert
        weight = jnp.where(mine, weights, 0.0).sum(1)
        made = jnp.where(mine.any(1)[:, None], one(x, weight, matrices), 0.0)
        return total + made, None

    start = jnp.zeros(x_TN.shape, jnp.float32)
    total, _ = jax.lax.scan(through, start, (jnp.arange(count), (up_EMN, down_ENF, *bias)))
    return total.astype(x_TN.dtype)


def _product(x: Any, weight: Any) -> Any:
    made = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=HIGHEST, preferred_element_type=jnp.float32
    )
    return made.astype(x.dtype)


def chosen_experts(x_TN: Any, ids_Tk: Any, weights_Tk: Any, gate_up: Any, down: Any) -> Any:
    return experts(x_TN, ids_Tk, weights_Tk, gate_up, down, ExpertSpec(math.prod(down.shape[:-1]) // x_TN.shape[1]))


def moe(x_TN: Any, logits_TE: Any, gate_up: Any, down: Any, top_k: int, renormalise: bool) -> Any:
    ids, weights = route(logits_TE, None, RouterSpec(top_k, renormalise=renormalise))
    return experts(x_TN, ids, weights, gate_up, down, ExpertSpec(logits_TE.shape[1]))


def weights_from(ids_Tk: Any, weights_Tk: Any, first: int) -> Any:
    return jnp.where(ids_Tk < first, 0.0, weights_Tk.astype(jnp.float32)).sum(-1)
