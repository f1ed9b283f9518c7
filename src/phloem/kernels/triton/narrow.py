"""Weights that stay as narrow as they come: matrices of float8 and 4 bits in the forms of `weights.py`.

What a form or its kernel does not take is unpacked to the model's type, and the source is told why. On a device without
data (`meta`) nothing is read: what sources say of themselves is enough to choose the form, and with it the kernels.
Legend: M outputs, N inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phloem.kernels import reference as ref
from phloem.kernels import reference_formats as formats
from phloem.kernels.narrow import FLOAT8_BLOCK, Codes, GivesCodes, Narrow, narrow_of
from phloem.kernels.triton import narrow_gguf, pages
from phloem.kernels.triton._device import capability
from phloem.kernels.triton.gemm_int import pack_int4
from phloem.kernels.triton.nibbles import pack_mxfp4, put_scales
from phloem.kernels.triton.weights import Float8Blocks, Float8Rows, Form, Int4Experts, Int4Weight, Mxfp4Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.kernels.calls import WeightSource

EIGHT = torch.float8_e4m3fn
FLOAT8_CAPABLE = 89  # compute capability from which on there are products of float8
_MULTIPLE = 16  # of sizes, for the vendor's product with scales of rows
_ROWS_AT_ONCE = 64 * FLOAT8_BLOCK
_GROUPED = ("int8", "gguf")  # kinds of `narrow_gguf.py`
_INVARIANT = "the batch-invariant kernels multiply plain weights alone"
_ODD = "experts with biases, without gates or of other activations are not multiplied in float8"


def prepare_linear(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> Tensor | Form:
    """One matrix of all parts, stacked: narrow where they all are alike, and a kernel takes them."""
    why = _common(parts)
    why = _unfit_product(parts, dtype, device) if why is None else why
    return _made(parts, dtype, device) if why is None else _unpacked(parts, dtype, device, why)


def prepare_experts(
    parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int
) -> Tensor | Form:
    """A stack of experts' matrices, one behind the other."""
    why = _common(parts)
    why = _unfit_experts(parts, device) if why is None else why
    return _made(parts, dtype, device, experts) if why is None else _unpacked(parts, dtype, device, why)


def stack_experts(
    parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int
) -> Tensor | Form:
    """The same of experts of any kind, which stay in 4 bits alone."""
    if isinstance(found := narrow_of(parts[0]), Narrow) and found.kind == "float8":
        return _unpacked(parts, dtype, device, _ODD)
    return prepare_experts(parts, dtype, device, experts)


def prepare_plain(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For the batch-invariant table."""
    return _unpacked(parts, dtype, device, _INVARIANT)


def plain_experts(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int) -> Tensor:
    """The same of experts."""
    del experts
    return prepare_plain(parts, dtype, device)


def embedding(ids_T: Tensor, weight: Tensor | Form, scale: float) -> Tensor:
    """Rows of any weight, times `scale` rounded to its type."""
    if isinstance(weight, Tensor):
        return pages.embedding(ids_T, weight, scale)
    rows = weight.rows(ids_T).to(weight.dtype)
    return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype, device=rows.device)


def rewriting(old: Any, parts: Sequence[WeightSource], dtype: torch.dtype) -> Callable[[], None] | None:
    """What puts new values into a form's memory (`Ops.rewriting`): of the same form, or plain ones that are rounded to
    its float8. None: they have another."""
    if not isinstance(old, Form):
        return None
    new = prepare_linear(parts, dtype, old.device)
    new = _rounded(old, new) if isinstance(new, Tensor) else new
    return (lambda: _copy(old, new)) if new is not None and _alike(old, new) else None


def refill(old: Any, new: Any) -> bool:
    """Put a weight prepared anew into the memory of a form: see `rewriting`. False, and nothing done: it has another
    form."""
    if not isinstance(old, Form):
        return False
    new = _rounded(old, new) if isinstance(new, Tensor) else new
    if new is None or not _alike(old, new):
        return False
    _copy(old, new)
    return True


def memory(weight: Tensor | Form) -> list[Tensor]:
    """The bytes of a weight."""
    tensors = (weight,) if isinstance(weight, Tensor) else weight.tensors()
    return [tensor.view(-1).view(torch.uint8) for tensor in tensors]


def _common(parts: Sequence[WeightSource]) -> str | None:
    """Why parts have no form in common; "": none is narrow; None: they have."""
    found = [narrow_of(part) for part in parts]
    refused = [each for each in found if isinstance(each, str)]
    if refused:
        why = next((each for each in refused if each), "")
        return why or ("a plain matrix is multiplied with it" if len(refused) < len(found) else "")
    kinds = {(each.kind, each.high) for each in found if isinstance(each, Narrow)}
    return None if len(kinds) == 1 else "matrices that are multiplied together have scales of other kinds"


def _first(parts: Sequence[WeightSource]) -> Narrow:
    found = narrow_of(parts[0])
    assert isinstance(found, Narrow)
    return found


def _unfit_float8(parts: Sequence[WeightSource], device: torch.device) -> str | None:
    if device.type != "cpu" and capability(device) < FLOAT8_CAPABLE:
        return "this device has no products of this float8"
    inside = _first(parts).high > 1 and any(part.shape[0] % FLOAT8_BLOCK for part in parts[:-1])
    return "matrices that are multiplied together do not end with their blocks" if inside else None


def _unfit_product(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel multiplies such a matrix; None: one does."""
    form = _first(parts)
    if form.kind in _GROUPED:
        found = [each for part in parts if isinstance(each := narrow_of(part), Narrow)]
        return next((why for each in found if (why := narrow_gguf.unfit(each, parts[0].shape[1]))), None)
    if form.kind != "float8":
        return None
    why = _unfit_float8(parts, device)
    if why is not None or form.high > 1:
        return why
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if rows % _MULTIPLE or columns % _MULTIPLE:
        return f"{rows} x {columns} are no multiples of {_MULTIPLE}"
    if device.type != "cpu" and dtype != torch.bfloat16:
        return "float8 with scales of rows is multiplied for models in bfloat16 alone"
    return None


def _unfit_experts(parts: Sequence[WeightSource], device: torch.device) -> str | None:
    form = _first(parts)
    if form.kind in _GROUPED:
        return "experts in groups of integers have no kernel"
    if form.kind != "float8":
        return None
    # Both ways round, so that all of an expert's matrices stay narrow, or none does.
    if form.high > 1 and any(size % FLOAT8_BLOCK for size in parts[0].shape):
        return f"experts of {' x '.join(map(str, parts[0].shape))} do not end with their blocks"
    return _unfit_float8(parts, device)


def _unpacked(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, why: str) -> Tensor:
    if device.type == "meta":
        rows = sum(part.shape[0] for part in parts)
        return torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=device)
    for part in parts if why else ():
        if isinstance(part, GivesCodes) and (own := part.narrow()) != "":
            part.refused(own if isinstance(own, str) else why)
    return ref.prepare_linear(parts, dtype, device)


def _made(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int = 0) -> Form:
    """The form of parts that have one in common, 0 experts: of a plain matrix. It is filled part by part: of none is
    there more than one copy."""
    forms = [form for part in parts if isinstance(form := narrow_of(part), Narrow)]
    if forms[0].kind in _GROUPED:
        return narrow_gguf.made(parts, dtype, device)
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    high, wide = forms[0].high, min(form.wide for form in forms)
    groups = -(-rows // high), -(-columns // wide)
    stacked = max(experts, 1), groups[1], rows // max(experts, 1)  # sizes of scales
    made: Form
    if forms[0].kind == "int4":
        packed = torch.empty((rows, columns // 2), dtype=torch.uint8, device=device)
        scale = torch.empty(stacked if experts else groups, dtype=torch.float16, device=device)
        zero = torch.empty_like(scale) if any(form.zeros for form in forms) else None
        made = (Int4Experts if experts else Int4Weight)(packed, scale, zero, dtype)
    elif forms[0].kind == "mxfp4":
        packed = torch.empty((rows, columns // 2), dtype=torch.uint8, device=device)
        made = Mxfp4Weight(packed, torch.empty(stacked, dtype=torch.uint8, device=device), dtype)
    else:
        values = torch.empty((rows, columns), dtype=EIGHT, device=device)
        scale = torch.empty(groups if high > 1 else rows, dtype=torch.float32, device=device)
        made = (Float8Blocks if high > 1 else Float8Rows)(values, scale, dtype)
    if device.type != "meta":
        start = 0
        for part, form in zip(parts, forms, strict=True):
            given: Any = part
            _fill(made, start, given.codes(), form.wide // wide)
            start += part.shape[0]
    return made


def _fill(made: Form, start: int, codes: Codes, repeat: int) -> None:
    """Rows from `start` on; each of the scales stands for `repeat` of the form's groups."""
    stop = start + codes.values.shape[0]
    match made:
        case Int4Weight():
            columns = 2 * made.packed.shape[1]
            made.packed[start:stop] = pack_int4(codes.values, columns // made.scale.shape[1])
            made.scale[start:stop] = codes.scale.repeat_interleave(repeat, 1)
            if made.zero is not None:
                made.zero[start:stop] = 8 if codes.zero is None else codes.zero.repeat_interleave(repeat, 1)
        case Int4Experts():
            columns = 2 * made.packed.shape[1]
            made.packed[start:stop] = pack_int4(codes.values, columns // made.scale.shape[1])
            put_scales(made.scale, start, codes.scale.repeat_interleave(repeat, 1).half())
            if made.zero is not None:
                zero = torch.full_like(codes.scale, 8) if codes.zero is None else codes.zero
                put_scales(made.zero, start, zero.repeat_interleave(repeat, 1).half())
        case Mxfp4Weight():
            made.packed[start:stop] = pack_mxfp4(codes.values)
            exponents = codes.scale.contiguous().view(torch.int32) >> 23  # of powers of two
            put_scales(made.scale, start, exponents.to(torch.uint8))
        case Float8Rows():
            _bytes(made.values)[start:stop] = _bytes(codes.values)
            made.scale[start:stop] = codes.scale[:, 0]
        case Float8Blocks():
            _bytes(made.values)[start:stop] = _bytes(codes.values)
            made.scale[start // FLOAT8_BLOCK : -(-stop // FLOAT8_BLOCK)] = codes.scale
        case _:
            raise TypeError(type(made).__name__)


def _bytes(values: Tensor) -> Tensor:
    """Float8 as what every device copies."""
    return values.view(torch.uint8)


def _rounded(old: Form, new: Tensor) -> Form | None:
    """Plain values as an old form of float8 has them; None: it is none, or another matrix. Some rows at a time: the
    intermediates are four times their size."""
    if tuple(new.shape) != old.shape or not isinstance(old, Float8Rows | Float8Blocks):
        return None
    quantise = formats.quantise_fp8 if isinstance(old, Float8Rows) else formats.quantise_blocks
    found = [quantise(some, old.values.dtype) for some in new.split(_ROWS_AT_ONCE)]
    values = torch.cat([_bytes(some) for some, _ in found]).view(old.values.dtype)
    return type(old)(values, torch.cat([scale for _, scale in found]), old.dtype)


def _alike(old: Form, new: Form) -> bool:
    pairs = [(tuple(t.shape), t.dtype) for t in old.tensors()], [(tuple(t.shape), t.dtype) for t in new.tensors()]
    return type(old) is type(new) and old.kind == new.kind and pairs[0] == pairs[1]


def _copy(old: Form, new: Form) -> None:
    for target, source in zip(old.tensors(), new.tensors(), strict=True):
        target.view(torch.uint8).copy_(source.view(torch.uint8))
