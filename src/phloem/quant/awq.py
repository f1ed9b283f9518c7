"""AWQ checkpoints (`version: gemm`): 4 bits, a scale and a zero point per group of inputs, eight outputs a word.

Kept packed: a group of 32 n inputs becomes n blocks of GGUF's Q4_1 with the same scale, and minimum -zero scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.quant import Method, Report, beside
from phloem.quant._ints import Ints
from phloem.quant._stored import check_shape, need, plain, read, width_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from phloem.quant._source import Source

QUANT_METHODS = ("awq",)
_PARTS = {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"}
_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of a word's eight outputs stands, counted from its lowest bits
_WORD = 8


def configure(config: Mapping[str, Any], report: Report) -> Method:
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise ModelLoadError(f"AWQ version {version!r} is not read: convert it to version 'gemm'")
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise ModelLoadError(f"AWQ with {bits} bits: only 4 are known")

    def join(name: str, found: Mapping[str, Source], shape: tuple[int, ...]) -> Source:
        return plain(name, found) or matrix(name, found, (shape[0], shape[1]), report)

    return Method("awq", companions=lambda name: beside(name, _PARTS, weight=True), join=join, report=report)


def matrix(name: str, found: Mapping[str, Source], shape: tuple[int, int], report: Report) -> Source:
    """The matrix [M, N] in `qweight` [N, M / 8], `qzeros` [G, M / 8] and `scales` [G, M]."""
    qweight, qzeros, scales = need(name, found, "qweight", "qzeros", "scales")
    rows, columns = shape
    check_shape(qweight, (columns, rows // _WORD), of=f"{name} {list(shape)} in 4 bits")
    groups = scales.shape[0]
    width = width_of(name, columns, groups)
    check_shape(scales, (groups, rows), of=f"{name} {list(shape)}")
    check_shape(qzeros, (groups, rows // _WORD), of=f"{name} {list(shape)} in {groups} groups")

    def codes(rows: slice, cols: slice) -> Callable[[slice], Tensor]:
        words_CW = read(qweight, cols, _words(rows))
        skip = rows.start % _WORD

        def some(piece: slice) -> Tensor:
            first = skip + piece.start
            last = min(skip + piece.stop, skip + rows.stop - rows.start)
            span = slice(first // _WORD, -(-last // _WORD))
            return _outputs(words_CW[:, span])[first - span.start * _WORD : last - span.start * _WORD]

        return some

    def zeros(rows: slice, groups: slice) -> Tensor:
        first = rows.start // _WORD * _WORD
        found_RG = _outputs(read(qzeros, groups, _words(rows)))
        return found_RG[rows.start - first : rows.stop - first].float()

    def scale(rows: slice, groups: slice) -> Tensor:
        return read(scales, groups, rows).T.float()

    return Ints(4, codes, scale, zeros, 0, width).matrix(name, shape, report)


def _words(rows: slice) -> slice:
    return slice(rows.start // _WORD, -(-rows.stop // _WORD), 1)


def _outputs(words_CW: Tensor) -> Tensor:
    """uint8 [8 W, C], in the order of outputs."""
    words_WC = words_CW.T.contiguous()
    return torch.stack([(words_WC >> 4 * at & 15).to(torch.uint8) for at in _COLUMNS], 1).flatten(0, 1)


METHOD = Method("awq", configure=configure)
