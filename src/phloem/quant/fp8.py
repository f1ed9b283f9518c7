"""float8 weights: one scale for a matrix, one per output, or one per block; or made so of dense weights.

Read: `quantization_config` "fp8" (DeepSeek, Qwen: blocks of 128 x 128; `activation_scheme` static or dynamic) and
"fbgemm_fp8". Scales are multipliers, `weight_scale_inv` too. Scales of activations are not used. GPUs keep all of it.
Made (`--quantization fp8`): e4m3 with a scale per output; on a real model the weights are off by about 2.5 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.quant import Method, Report, beside
from phloem.quant._online import float8_rows
from phloem.quant._stored import check_shape, float_matrix, need, plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.quant._source import Source

QUANT_METHODS = ("fp8", "fbgemm_fp8")
_PARTS = {
    "scale_inv": "weight_scale_inv",
    "scale": "weight_scale",
    "input_scale": "input_scale",
    "input_scale_ub": "input_scale_ub",
}


def configure(config: Mapping[str, Any], report: Report) -> Method:
    size: Any = config.get("weight_block_size") or (128, 128)
    if len(size) != 2 or not all(isinstance(number, int) and number > 0 for number in size):
        raise ModelLoadError(f"weight_block_size is {size!r}, expected two whole numbers above 0")
    block = (size[0], size[1])

    def join(name: str, found: Mapping[str, Source], shape: tuple[int, ...]) -> Source:
        whole = plain(name, found)
        if whole is not None:
            return whole
        scale = found["scale_inv"] if "scale_inv" in found else need(name, found, "scale")[0]
        if "scale_inv" in found and config.get("weight_block_size"):
            tiles = -(-shape[0] // block[0]), -(-shape[1] // block[1])
            check_shape(scale, tiles, of=f"{name} {list(shape)} in blocks of {block[0]} x {block[1]}")
        return float_matrix(name, found, scale, (shape[0], shape[1]), block, report)

    return Method("fp8", companions=lambda name: beside(name, _PARTS, weight=True), join=join, report=report)


METHOD = Method("fp8", wrap=float8_rows, configure=configure, exact=True)
