"""Weights of a model's blocks in 8 bits, made of what the checkpoint has, and made 16 bits again layer by layer.

`int8`: a scale for each 32 inputs (8.5 bits a weight); `fp8` (e4m3): a scale for each output. Activations and what
stands outside the blocks (embeddings, the last projection) stay as they are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

KINDS = ("int8", "fp8")
GROUP = 32  # inputs that share a scale
FP8 = torch.float8_e4m3fn
_IN_BLOCKS = re.compile(r"\.\d+\.")


class QuantisedLinear(torch.nn.Linear):
    """A linear layer whose `weight` is made anew each time that it is asked for."""

    def __init__(self, linear: torch.nn.Linear, kind: str) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight_OI = linear.weight.detach()
        self._dtype = weight_OI.dtype
        self.register_buffer("codes", None)
        self.register_buffer("scales", None)
        self.codes, self.scales = (_int8 if kind == "int8" else _fp8)(weight_OI.float())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], in the type that the checkpoint had."""
        grouped = self.codes.float().view(self.out_features, self.scales.shape[1], -1) * self.scales[..., None]
        return grouped.view(self.out_features, self.in_features).to(self._dtype)

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight, self.bias)


def _int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [out, in], scales [out, groups])."""
    size = GROUP if weight_OI.shape[1] % GROUP == 0 else weight_OI.shape[1]
    grouped = weight_OI.view(weight_OI.shape[0], -1, size)
    scales = (grouped.abs().amax(-1) / 127).clamp_min(1e-12).to(torch.bfloat16)
    codes = (grouped / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return codes.view(weight_OI.shape), scales


def _fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight_OI.abs().amax(1, keepdim=True) / torch.finfo(FP8).max).clamp_min(1e-12)
    return (weight_OI / scales).to(FP8), scales


def quantise(pipe: Any, kind: str) -> str:
    """Make the linear layers in the blocks of a pipeline's denoisers smaller; gives what became of them.

    Raises:
        ConfigError: there is no such kind, or no such layer.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"quantization: models that draw have {' and '.join(KINDS)}, not {kind!r}", param="quantization"
        )
    parts: Sequence[Any] = [pipe.components.get(name) for name in ("transformer", "transformer_2", "unet")]
    before = after = count = 0
    for part in parts:
        if not isinstance(part, torch.nn.Module):
            continue
        before += _bytes(part)
        for name, layer in list(part.named_modules()):
            if type(layer) is torch.nn.Linear and _IN_BLOCKS.search(name):
                above, _, last = name.rpartition(".")
                setattr(part.get_submodule(above), last, QuantisedLinear(layer, kind))
                count += 1
        after += _bytes(part)
    if not count:
        raise ConfigError(f"quantization: {type(pipe).__name__} has no linear layers in blocks", param="quantization")
    return f"{count} layers, the denoiser has {after / 2**20:,.1f} MiB instead of {before / 2**20:,.1f}"


def _bytes(module: torch.nn.Module) -> int:
    return sum(one.nbytes for one in [*module.parameters(), *module.buffers()])
