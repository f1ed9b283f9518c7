"""NVIDIA ModelOpt checkpoints: float8 with one scale, one per output or per block, and NVFP4, mixed or alone.

NVFP4 is a 4-bit float (e2m1) times the float8 scale of its 16 inputs times the matrix's `weight_scale_2`. Activations
stay in 16 bits: `input_scale` is not used. GPUs keep the float8; NVFP4 is unpacked: no op table here keeps such groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.quant import Method, Report, beside
from phloem.quant._stored import check_shape, float_matrix, fp4_matrix, need, plain, read

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.quant._source import Source

QUANT_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
READS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MIXED_PRECISION")
_PARTS = {"scale": "weight_scale", "scale_2": "weight_scale_2", "input_scale": "input_scale"}


def configure(config: Mapping[str, Any], report: Report) -> Method:
    algorithm = str(config.get("quant_algo") or ("NVFP4" if config.get("quant_method") == "modelopt_fp4" else "FP8"))
    if algorithm not in READS:
        raise ModelLoadError(f"ModelOpt {algorithm!r} is not read; known: {', '.join(READS)}")
    report.method = f"modelopt {algorithm}"

    def join(name: str, found: Mapping[str, Source], shape: tuple[int, ...]) -> Source:
        return plain(name, found) or _matrix(name, found, (shape[0], shape[1]), report)

    return Method("modelopt", companions=lambda name: beside(name, _PARTS, weight=True), join=join, report=report)


def _matrix(name: str, found: Mapping[str, Source], shape: tuple[int, int], report: Report) -> Source:
    weight, scale = need(name, found, "weight", "scale")
    if weight.dtype != torch.uint8:
        return float_matrix(name, found, scale, shape, report=report)
    (factor,) = need(name, found, "scale_2")
    check_shape(factor, (), (1,), of=name)
    return fp4_matrix(name, weight, scale, shape, read(factor), report)


METHOD = Method("modelopt", configure=configure)
