"""compressed-tensors checkpoints (LLM Compressor and others): integers, float8, 4-bit floats; mixed as they come.

What lies beside a matrix says which of the formats it is in: `weight_packed` words are integers of 2 to 8 bits, bytes
are 4-bit floats; `weight` is int8 or float8. Integers are kept packed as Q4_0, Q4_1 or Q8_0 rows, mxfp4 as Q5_0, the
rest is unpacked; GPUs keep float8, and integers. Scales of activations are not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from phloem.core.errors import ModelLoadError
from phloem.quant import Method, Report, beside
from phloem.quant._bits import fitting_bits, unpack, words_for
from phloem.quant._ints import Ints
from phloem.quant._stored import check_shape, float_matrix, fp4_matrix, need, plain, read, width_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from phloem.quant._source import Source

QUANT_METHODS = ("compressed-tensors",)
_PARTS = {
    "packed": "weight_packed",
    "shape": "weight_shape",
    "scale": "weight_scale",
    "zero": "weight_zero_point",
    "order": "weight_g_idx",
    "global": "weight_global_scale",
    "input_scale": "input_scale",
    "input_zero_point": "input_zero_point",
    "input_global_scale": "input_global_scale",
}


def configure(config: Mapping[str, Any], report: Report) -> Method:
    sparsity = config.get("sparsity_config") or {}
    if str(sparsity.get("format") or "dense") != "dense":
        raise ModelLoadError(f"sparse weights ({sparsity['format']}) are not read: save the model without sparsity")
    if config.get("transform_config"):
        raise ModelLoadError("transform_config: rotations of activations are not served; save the model without them")
    if config.get("quantization_status") == "frozen" and config.get("format") == "dense":
        raise ModelLoadError("weights were saved before they were compressed: save them with save_compressed=True")
    schemes = [scheme for scheme in _weights(config)]
    bits = tuple(scheme["num_bits"] for scheme in schemes if isinstance(scheme.get("num_bits"), int))
    blocks = [scheme["block_structure"] for scheme in schemes if scheme.get("block_structure")]
    high, wide = blocks[0] if blocks else (128, 128)
    report.method = f"compressed-tensors {config.get('format') or ''}".rstrip()

    def join(name: str, found: Mapping[str, Source], shape: tuple[int, ...]) -> Source:
        size = shape[0], shape[1]
        if "packed" in found:
            return _packed(name, found, size, bits, report)
        whole = plain(name, found)
        if whole is not None:
            return whole
        weight, scale = need(name, found, "weight", "scale")
        if weight.dtype == torch.int8:
            return _int8(name, found, size, report)
        return float_matrix(name, found, scale, size, (int(high), int(wide)), report)

    return Method(
        "compressed_tensors", companions=lambda name: beside(name, _PARTS, weight=True), join=join, report=report
    )


def _weights(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each group says of its weights."""
    groups: Any = config.get("config_groups")
    for group in (groups or {}).values():
        if isinstance(group, dict) and isinstance(weights := cast("dict[str, Any]", group).get("weights"), dict):
            yield cast("dict[str, Any]", weights)


def _packed(
    name: str, found: Mapping[str, Source], shape: tuple[int, int], bits: tuple[int, ...], report: Report
) -> Source:
    packed, scale = need(name, found, "packed", "scale")
    if packed.dtype == torch.uint8:
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            return fp4_matrix(name, packed, scale, shape, None, report)
        (factor,) = need(name, found, "global")
        check_shape(factor, (), (1,), of=name)
        return fp4_matrix(name, packed, scale, shape, read(factor), report, divides=True)
    rows, columns = shape
    _check_stated(name, found, shape)
    number = fitting_bits(packed.shape[1] if len(packed.shape) == 2 else 0, columns, bits, packed.name)
    check_shape(packed, (rows, words_for(columns, number)), of=f"{name} {list(shape)} in {number} bits")
    zero = found.get("zero")
    groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    check_shape(scale, (rows, groups), *([(rows,)] if groups == 1 else []), of=f"{name} {list(shape)}")
    if zero is not None:
        check_shape(zero, (words_for(rows, number), groups), of=f"{name} {list(shape)} in {groups} groups")

    def codes(rows: slice, cols: slice) -> Callable[[slice], Tensor]:
        words = read(packed, rows)
        return lambda piece: unpack(words[piece], number, cols.stop)[:, cols]

    def zeros(rows: slice, groups: slice) -> Tensor:
        assert zero is not None
        return unpack(read(zero).T, number, shape[0]).T[rows, groups].float()

    order = read(found["order"]).long() if "order" in found else None
    width = width_of(name, columns, groups)
    if order is not None and torch.equal(order, torch.arange(columns) // width):
        order = None
    ints = Ints(number, codes, _scales(scale), None if zero is None else zeros, 1 << number - 1, width, order)
    return ints.matrix(name, shape, report)


def _check_stated(name: str, found: Mapping[str, Source], shape: tuple[int, int]) -> None:
    if "shape" in found:
        stated = tuple(int(size) for size in read(found["shape"]).tolist())
        if stated != shape:
            raise ModelLoadError(f"{found['shape'].name} says {list(stated)}, expected {list(shape)} for {name}")


def _int8(name: str, found: Mapping[str, Source], shape: tuple[int, int], report: Report) -> Source:
    """`weight` int8 [M, N], scales [1], [M, 1] or [M, G], zero points alike."""
    weight, scale = need(name, found, "weight", "scale")
    check_shape(weight, shape, of=name)
    rows, columns = shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    check_shape(scale, (), (1,), (rows,), (rows, groups), of=f"{name} {list(shape)}")
    zero = found.get("zero")
    if zero is not None and not bool(read(zero).any()):
        zero = None
    if zero is not None:
        check_shape(zero, scale.shape, of=f"{name}, as its scales")

    def codes(rows: slice, cols: slice) -> Callable[[slice], Tensor]:
        values = read(weight, rows, cols)
        return lambda piece: values[piece]

    scales, width = _scales(scale), width_of(name, columns, groups)
    return Ints(8, codes, scales, None if zero is None else _scales(zero), 0, width).matrix(name, shape, report)


def _scales(scale: Source) -> Callable[[slice, slice], Tensor]:
    """Of some rows and groups, [R, G]; R is 1 where one stands for all."""

    def some(rows: slice, groups: slice) -> Tensor:
        if len(scale.shape) == 2:
            return read(scale, rows, groups).float()
        return (read(scale) if scale.shape in ((), (1,)) else read(scale, rows)).float().reshape(-1, 1)

    return some


METHOD = Method("compressed_tensors", configure=configure)
