"""`LinearOp` out of separate ops: what a table does that fuses none of the options, or not this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.kernels import reference as ref

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.kernels.calls import Adapters, LinearOp, Norm


def check_options(norm: Norm | None, residual: Tensor | None, add: Tensor | None) -> None:
    """Raises `ValueError` for options of a linear layer that exclude each other."""
    if residual is not None and norm is None:
        raise ValueError("a linear layer adds a residual to its input only with a norm")
    if add is not None and norm is not None:
        raise ValueError("a linear layer has a norm before it or an addition after it, not both")


def linear_of(
    product: Callable[[Tensor, Any, Tensor | None], Tensor],
    *,
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = ref.rms_norm,
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = ref.add_rms_norm,
    silu_and_mul: Callable[[Tensor], Tensor] = ref.silu_and_mul,
    gelu_tanh_and_mul: Callable[[Tensor], Tensor] = ref.gelu_tanh_and_mul,
    add_adapters: Callable[[Tensor, Tensor, Adapters], Tensor] = ref.add_adapters,
) -> LinearOp:
    """The op over `product`, x[T, N], weight, bias -> x W^T + bias [T, M], and over these ops, one after another.

    `add` is left to the norm that follows.
    """
    gates = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}

    def linear(
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        gate: str = "",
        add: Tensor | None = None,
        adapter: Adapters | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        check_options(norm, residual, add)
        total = add
        if norm is not None and residual is not None:
            x, total = add_rms_norm(x, residual, norm.weight, norm.eps)
        elif norm is not None:
            x, total = rms_norm(x, norm.weight, norm.eps), x
        out = product(x, weight, bias)
        if adapter is not None:
            out = add_adapters(out, x, adapter)
        return gates[gate](out) if gate else out, total

    return linear


reference_linear = linear_of(ref.product)
