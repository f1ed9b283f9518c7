"""Matrix products by the kind of the weight: a dense tensor, or one of the narrow forms below.

`narrow.py` makes the forms of what a checkpoint stores, or `--quantization` rounds; the table's `linear` then takes
them as it takes a tensor. `dtype` is the model's, in which rows of a form are read. Stacks of experts are forms too,
one expert behind the other. Legend: N input features, M output features, G groups of input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels.triton import vendor
from phloem.kernels.triton.gemm_fp8 import FEW_ROWS, GROUP, block_scaled_gemm, few_rows_gemm
from phloem.kernels.triton.gemm_gguf import Run, chosen_rows, grouped_gemm
from phloem.kernels.triton.gemm_int import int4_gemm
from phloem.kernels.triton.gemm_mxfp4 import mxfp4_gemm
from phloem.kernels.triton.nibbles import scales_of, unpack_mxfp4
from phloem.kernels.triton.quantise import per_group_fp8, per_token_fp8


class Form:
    """What all forms have. Subclasses list the tensors that they are made of."""

    __slots__ = ()
    dtype: torch.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [T, N]: some rows of the matrix, dequantised."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        first = self.tensors()[0]
        return first.shape[0], first.shape[1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tells it from another of the same class and tensors."""
        return ()

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight(Form):
    """Weights of 4 bits with a scale, and perhaps a zero point, per output and group."""

    packed: Tensor  # uint8 [M, N / 2], in the order of `gemm_int.pack_int4`
    scale: Tensor  # [M, G]
    zero: Tensor | None = None  # [M, G]; None: 8
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.packed, self.scale) if self.zero is None else (self.packed, self.scale, self.zero)

    def rows(self, ids: Tensor) -> Tensor:
        halves = self.packed[ids].unflatten(1, (self.scale.shape[1], -1))
        codes = torch.cat((halves & 15, halves >> 4), -1).float()
        zero = 8.0 if self.zero is None else self.zero[ids].float()[..., None]
        return ((codes - zero) * self.scale[ids].float()[..., None]).flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Int4Experts(Form):
    """`Int4Weight` of E experts of R rows each, one behind the other."""

    packed: Tensor  # uint8 [E * R, N / 2]
    scale: Tensor  # float16 [E, G, R]
    zero: Tensor | None = None  # [E, G, R]; None: 8
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.packed, self.scale) if self.zero is None else (self.packed, self.scale, self.zero)

    def rows(self, ids: Tensor) -> Tensor:
        zero = None if self.zero is None else scales_of(self.zero, ids)
        every = torch.arange(len(ids), device=ids.device)
        return Int4Weight(self.packed[ids], scales_of(self.scale, ids), zero).rows(every)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Weight(Form):
    """4-bit floats (e2m1) with a power of two per output and 32 inputs, of E experts of R rows each, or of one matrix;
    activations keep their type."""

    packed: Tensor  # uint8 [E * R, N / 2], in the order of `gemm_int.pack_int4`
    scale: Tensor  # uint8 [E, N / 32, R]: exponents of two, 127 for 1
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed, self.scale

    def rows(self, ids: Tensor) -> Tensor:
        return unpack_mxfp4(self.packed[ids], scales_of(self.scale, ids))

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Float8Rows(Form):
    """float8 weights with a scale per output; activations become float8 with one per token, for the vendor's product;
    those of up to `gemm_fp8.FEW_ROWS` tokens keep their type."""

    values: Tensor  # float8 [M, N]
    scale: Tensor  # float32 [M]
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.scale

    def rows(self, ids: Tensor) -> Tensor:
        return _floats(self.values, ids) * self.scale[ids][:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Float8Blocks(Form):
    """float8 weights with a scale per 128 x 128 block; activations get one per token and 128 features, but for those of
    up to `gemm_fp8.FEW_ROWS` tokens, which keep their type."""

    values: Tensor  # float8 [M, N]
    scale: Tensor  # float32 [M / 128, N / 128], rounded up
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.scale

    def rows(self, ids: Tensor) -> Tensor:
        scale = self.scale[ids // GROUP].repeat_interleave(GROUP, 1)[:, : self.values.shape[1]]
        return _floats(self.values, ids) * scale


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight(Form):
    """Integers of 4 to 8 bits in groups, as GGUF files have them; activations keep their type. Matrices that are
    multiplied together may be of several kinds."""

    runs: tuple[Run, ...]
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for run in self.runs for tensor in run.tensors())

    def rows(self, ids: Tensor) -> Tensor:
        return chosen_rows(self.runs, ids, torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(run.codes) for run in self.runs), self.runs[0].features

    @property
    def kind(self) -> tuple[Any, ...]:
        return tuple((len(run.codes), run.bits, run.offset, run.zeros) for run in self.runs)


def _floats(values: Tensor, ids: Tensor) -> Tensor:
    """Rows of float8, whose bytes alone every device picks."""
    return values.view(torch.uint8)[ids].view(values.dtype).float()


Weight = Tensor | Int4Weight | Mxfp4Weight | Float8Rows | Float8Blocks | GroupedWeight


def widened(weight: Tensor | Form) -> Tensor:
    """The whole matrix in the model's type."""
    if isinstance(weight, Tensor):
        return weight
    return weight.rows(torch.arange(weight.shape[0], device=weight.device)).to(weight.dtype)


def product(x_TN: Tensor, weight: Weight, bias_M: Tensor | None) -> Tensor:
    """x wT + bias, [T, M] in the type of x."""
    match weight:
        case Int4Weight():
            return int4_gemm(x_TN, weight.packed, weight.scale, weight.zero, bias_M)
        case GroupedWeight():
            return grouped_gemm(x_TN, weight.runs, bias_M)
        case Mxfp4Weight():
            return mxfp4_gemm(x_TN, weight.packed, weight.scale, bias_M)
        case Float8Rows() | Float8Blocks():
            if x_TN.shape[0] <= FEW_ROWS:
                return few_rows_gemm(x_TN, weight.values, weight.scale, bias_M)
            quantise = per_token_fp8 if isinstance(weight, Float8Rows) else per_group_fp8
            return scaled(*quantise(x_TN, weight.values.dtype), weight, bias_M, x_TN.dtype)
        case _:
            return F.linear(x_TN, weight, bias_M)


def takes_float8(weight: Any, x_TN: Tensor) -> TypeGuard[Float8Rows | Float8Blocks]:
    """Whether the product of this weight with so many tokens is `scaled`, of activations in float8."""
    return isinstance(weight, Float8Rows | Float8Blocks) and x_TN.shape[0] > FEW_ROWS


def scaled(
    values: Tensor, scale: Tensor, weight: Float8Rows | Float8Blocks, bias_M: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[T, M] of float8 activations [T, N] with their scales: [T], or [T, N / 128] for blocks."""
    if isinstance(weight, Float8Blocks):
        device = values.device
        if dtype == torch.bfloat16 and vendor.fits(len(values), weight.values):  # noqa: SIM102 - the second asks the GPU
            if vendor.serves_blocks(device, weight.values.dtype):
                return vendor.block_product(values, scale, weight.values, weight.scale, bias_M)
        return block_scaled_gemm(values, scale, weight.values, weight.scale, bias_M, dtype)
    if values.device.type == "cpu":  # where only tests run, and there is no scaled product
        wide = values.float() @ weight.values.float().T * scale[:, None] * weight.scale
        return wide.to(dtype) if bias_M is None else wide.to(dtype) + bias_M
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        values, weight.values.t(), scale[:, None], weight.scale[None, :], bias=bias_M, out_dtype=dtype
    )
