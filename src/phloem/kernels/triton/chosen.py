"""Experts that were chosen elsewhere: by a router that is no plain softmax, such as DeepSeek's."""

from __future__ import annotations

from torch import Tensor

from phloem.kernels.triton.moe import experts


def chosen_experts(x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `reference_experts.chosen_experts`: weights [T, k] and ids [T, k] over dense experts, stacked as gate_up
    [E * 2F, N] and down [E * N, F]. Nothing waits for the device.
    """
    count = down.shape[0] // x_TN.shape[1]
    here_Tk = (ids_Tk >= 0) & (ids_Tk < count)
    # An id that no expert here has is computed by the first one, and counts nothing.
    weights_Tk, ids_Tk = weights_Tk.float().where(here_Tk, 0.0), ids_Tk.where(here_Tk, 0)
    stacks = gate_up.unflatten(0, (count, -1)), down.unflatten(0, (count, -1))
    return experts(x_TN, weights_Tk.contiguous(), ids_Tk.int().contiguous(), *stacks)
