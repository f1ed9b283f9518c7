"""4-bit floats (e2m1) with a power of two per 32 inputs: gpt-oss's stacked experts, or made so of dense weights.

Values are exact in bfloat16, and in the 5 bits of GGUF's Q5_0, which keep the made ones on a CPU; GPUs keep all as they
are, other tables unpack stacked experts.
Made (`--quantization mxfp4`), weights are off by 10 to 12 %: `int4` takes less memory and is nearer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.kernels.narrow import FLOAT4_GROUP, Narrow
from phloem.quant import Method, Report
from phloem.quant._bits import twice_e2m1
from phloem.quant._grid import Grid, Opened, groups_of
from phloem.quant._online import mxfp4_blocks
from phloem.quant._stored import as_scale, check_shape, need, plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.quant._source import Source

QUANT_METHODS = ("mxfp4",)
_GROUP = 32
_WHY = "experts in one stack with biases have no packed form in this op table"


def configure(config: Mapping[str, Any], report: Report) -> Method:
    del config

    def companions(name: str) -> dict[str, str]:
        if name.endswith(".weight"):
            return {}
        return {"weight": name, "blocks": f"{name}_blocks", "scales": f"{name}_scales"}

    def join(name: str, found: Mapping[str, Source], shape: tuple[int, ...]) -> Source:
        return plain(name, found) or stack(name, found, shape, report)

    return Method("mxfp4", companions=companions, join=join, report=report)


def stack(name: str, found: Mapping[str, Source], shape: tuple[int, ...], report: Report) -> Grid:
    """Experts [E, N, M], as dense ones are stored, in `_blocks` uint8 [E, M, N / 32, 16] and `_scales` [E, M, N / 32].

    Raises:
        ModelLoadError: for other shapes, and matrices that are no stack.
    """
    blocks, scales = need(name, found, "blocks", "scales")
    if len(shape) != 3:
        raise ModelLoadError(f"{name}: {list(shape)} is no stack of experts, which alone are read from {blocks.name}")
    experts, columns, rows = shape
    check_shape(blocks, (experts, rows, columns // _GROUP, _GROUP // 2), of=f"{name} {list(shape)} in 4 bits")
    check_shape(scales, (experts, rows, columns // _GROUP), of=f"{name} {list(shape)} in groups of {_GROUP}")

    def open_(entry: int, rows: slice, cols: slice) -> Opened:
        group, span = groups_of(cols, _GROUP, columns)
        octets = blocks.take((entry, rows, span, slice(0, _GROUP // 2, 1)), torch.uint8)
        first = span.start * _GROUP
        return Opened(
            lambda piece: twice_e2m1(octets[piece].flatten(1))[:, cols.start - first : cols.stop - first],
            as_scale(scales.take((entry, rows, span), torch.uint8)) / 2,
            group,
        )

    form = Narrow("mxfp4", 1, FLOAT4_GROUP)
    return Grid(name, shape, open=open_, report=report, why=_WHY, form=form, turned=True)


METHOD = Method("mxfp4", wrap=mxfp4_blocks, configure=configure)
