"""Reading the tensors that hold one matrix: whole runs in the type that they are stored in, and checks of shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.core.errors import ModelLoadError
from phloem.kernels.narrow import FLOAT4_GROUP, FLOAT8_BLOCK, Narrow
from phloem.quant._bits import twice_e2m1
from phloem.quant._grid import Grid, Opened, groups_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from phloem.quant._report import Report
    from phloem.quant._source import Source

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NO_FLOAT8 = "this op table keeps no float8 that a file brings (--quantization int8 keeps 8 bits)"


def read(source: Source, *span: slice) -> Tensor:
    """A stored tensor, or the run of it along its first axes, in its own type."""
    if not span:
        return source.take(None, source.dtype)
    rest = [slice(0, size, 1) for size in source.shape[len(span) :]]
    return source.take((*span, *rest), source.dtype)


def need(name: str, found: Mapping[str, Source], *wanted: str) -> list[Source]:
    """Those tensors of a matrix. Raises ModelLoadError naming the ones that are missing."""
    lacking = [what for what in wanted if what not in found]
    if lacking:
        have = ", ".join(source.name for source in found.values())
        raise ModelLoadError(f"{name}: its {' and '.join(lacking)} missing beside {have}")
    return [found[what] for what in wanted]


def check_shape(source: Source, *shapes: Sequence[int], of: str) -> None:
    """Raises ModelLoadError unless the tensor has one of these shapes."""
    if all(tuple(shape) != tuple(source.shape) for shape in shapes):
        known = " or ".join(str(list(shape)) for shape in dict.fromkeys(map(tuple, shapes)))
        raise ModelLoadError(f"{source.name} is {list(source.shape)}, expected {known} for {of}")


def plain(name: str, found: Mapping[str, Source]) -> Source | None:
    """The matrix where it is stored plainly, with no more than scales of activations beside it.

    Raises:
        ModelLoadError: where scales of weights lie beside plain values.
    """
    weight = found.get("weight")
    if weight is None or weight.dtype not in WHOLE:
        return None
    beside = [source.name for what, source in found.items() if what != "weight" and not what.startswith("input")]
    if beside:
        raise ModelLoadError(f"{name} is plain ({weight.dtype}), but there is {beside[0]}: which of the two holds?")
    return weight


def width_of(name: str, columns: int, groups: int) -> int:
    """Columns of a group. Raises ModelLoadError if groups are not alike."""
    if groups < 1 or columns % groups:
        raise ModelLoadError(f"{name}: {groups} scales a row do not divide its {columns} columns")
    return columns // groups


def float_matrix(
    name: str,
    found: Mapping[str, Source],
    scale: Source,
    shape: tuple[int, int],
    block: tuple[int, int] = (128, 128),
    report: Report | None = None,
) -> Grid:
    """float8 values [M, N] with one scale, one per row, per block, or (bytes: powers of two) per group of columns.

    Raises:
        ModelLoadError: for shapes and types that are none of these.
    """
    weight = need(name, found, "weight")[0]
    rows, columns = shape
    check_shape(weight, shape, of=name)
    if weight.dtype not in FLOAT8:
        raise ModelLoadError(f"{weight.name} is {weight.dtype}: float8 was expected beside {scale.name}")
    sizes = tuple(size for size in scale.shape if size != 1)
    tiles = (-(-rows // block[0]), -(-columns // block[1]))
    high, wide = rows, columns  # of a tile
    if scale.shape in ((rows, 1), (rows,)):
        high = 1
    elif len(scale.shape) == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0:
        high, wide = 1, columns // scale.shape[1]
    elif sizes and tuple(size for size in tiles if size != 1) == sizes:
        high, wide = block
    elif sizes:
        known = f"[1], [{rows}, 1], {list(tiles)} (blocks of {block[0]} x {block[1]})"
        raise ModelLoadError(f"{scale.name} is {list(scale.shape)}, expected {known} for {name} {list(shape)}")
    grid = (-(-rows // high), -(-columns // wide))

    def open_(entry: int, rows: slice, cols: slice) -> Opened:
        del entry
        values, scales = read(weight, rows, cols), as_scale(read(scale)).reshape(grid)
        group, span = groups_of(cols, wide, columns)
        return Opened(lambda piece: values[piece], scales[torch.arange(rows.start, rows.stop) // high, span], group)

    form: Narrow | None = None
    if weight.dtype == torch.float8_e4m3fn and wide == columns and high in (1, rows):
        form = Narrow("float8", 1, columns)
    elif weight.dtype == torch.float8_e4m3fn and (high, wide) == (FLOAT8_BLOCK, FLOAT8_BLOCK):
        form = Narrow("float8", FLOAT8_BLOCK, FLOAT8_BLOCK)
    return Grid(name, shape, open=open_, report=report, why=NO_FLOAT8, form=form)


def as_scale(stored: Tensor) -> Tensor:
    """float32; bytes are exponents of two."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponent = stored.view(torch.uint8).to(torch.int32) - 127
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent).float()
    return stored.float()


def fp4_matrix(
    name: str,
    packed: Source,
    scale: Source,
    shape: tuple[int, int],
    whole: Tensor | None = None,
    report: Report | None = None,
    *,
    divides: bool = False,
) -> Grid:
    """4-bit floats [M, N / 2] with a scale for each 16 or 32 columns, [M, N / group]; `whole`: a factor
    of all, or what all scales are divided by."""
    rows, columns = shape
    check_shape(packed, (rows, columns // 2), of=f"{name} {list(shape)} in 4 bits")
    group = 32 if whole is None else 16
    check_shape(scale, (rows, columns // group), of=f"{name} {list(shape)} in groups of {group}")
    factor = torch.tensor(1.0) if whole is None else whole.float().reshape(())
    combine = torch.div if divides else torch.mul

    def open_(entry: int, rows: slice, cols: slice) -> Opened:
        del entry
        first = cols.start // 2
        octets = read(packed, rows, slice(first, -(-cols.stop // 2), 1)).view(torch.uint8)
        group_C, span = groups_of(cols, group, columns)
        scales = combine(as_scale(read(scale, rows, span)), factor)

        def codes(piece: slice) -> Tensor:
            return twice_e2m1(octets[piece])[:, cols.start - 2 * first : cols.stop - 2 * first]

        return Opened(codes, scales / 2, group_C)

    kind, why = "dense", "groups of 16 with float8 scales have no packed rows (--quantization int4 makes some)"
    form: Narrow | None = None
    if whole is None:
        kind, why = fitting_powers(read(scale), columns)
        form = Narrow("mxfp4", 1, FLOAT4_GROUP)
    return Grid(name, shape, kind, open=open_, report=report, why=why, form=form)


def fitting_powers(exponents: Tensor, columns: int) -> tuple[str, str]:
    """(Q5_0, "") where float16 holds half of each power of two; it holds all values of 4-bit floats."""
    whole = exponents.view(torch.uint8).to(torch.int32) - 127
    fits = bool(((whole >= -23) & (whole <= 15)).all()) and columns % 32 == 0
    return ("Q5_0", "") if fits else ("dense", "its powers of two do not fit into float16")
