"""Recurrent mixers in the native table: `reference_scan` says what they mean, csrc/cpu/each/recurrent.cpp how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels import reference_scan as reference
from phloem.kernels._native_basic import heads_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime


@dataclass(frozen=True)
class _Kind:
    """One op: its tensors in the order of its arguments, each with a letter for every axis.

    `strided`: those of activations, whose tokens may lie apart in memory. Letters of `sizes` are numbers that the
    kernel is told, under these names; `limit`: a letter, and the constant that it may not exceed. The product of the
    letters of `work` is how much there is to do.
    """

    tensors: dict[str, str]
    strided: tuple[str, ...]
    sizes: dict[str, str]
    out: str
    work: str
    limit: tuple[str, str] | None = None
    last: str = ""  # the name of a number behind query_start
    cost: int = 1  # nanoseconds of a unit of work, about
    # A tensor that may have more axes, the letters it then has, and the number that says so.
    wider: tuple[str, str, str] = ("", "", "")

    @property
    def fields(self) -> frozenset[str]:
        """The names that the library has for the call's arguments."""
        own = {"out", "after", "query_start", "rows"} | {self.last, self.wider[2]} - {""}
        return frozenset(own | {*self.tensors, *self.sizes.values()} | {f"{name}_stride" for name in self.strided})


_STATES = {"x": "THD", "dt": "TH", "decay": "H", "b": "TGS", "c": "TGS", "skip": "H", "state": "RHDS"}
_KINDS = {
    "causal_conv": _Kind(
        {"x": "TC", "weight": "CW", "bias": "C", "state": "RCw"}, ("x",), {"C": "channels", "W": "taps"},
        "TC", "TCW", ("W", "recurrent.kMaxTaps"), "silu",
    ),
    "mamba2_scan": _Kind(
        _STATES, ("x", "b", "c"), {"H": "heads", "D": "size", "G": "groups", "S": "n"}, "THD", "THDS"
    ),
    "selective_scan": _Kind(
        {"x": "TC", "dt": "TC", "decay": "CS", "b": "TS", "c": "TS", "skip": "C", "state": "RCS"}, ("x", "b", "c"),
        {"C": "channels", "S": "n"}, "TC", "TCS",
    ),
    "gated_delta": _Kind(
        {"q": "THS", "k": "THS", "v": "THD", "decay": "TH", "beta": "TH", "state": "RHSD"}, ("q", "k", "v"),
        {"H": "heads", "S": "n", "D": "size"}, "THD", "THDS", ("S", "recurrent.kMaxKey"), "scale", 2,
        ("decay", "THS", "by_entry"),
    ),
}  # fmt: skip


def ops(rt: Runtime) -> dict[str, Any]:
    # A library of other sources, which serves with a warning, may lack one: then it is torch's.
    return {name: _bound(rt, name, kind) for name, kind in _KINDS.items() if rt.has(name)}


def _bound(rt: Runtime, name: str, kind: _Kind) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op as `Ops` has it: what it gives, and the rows' states after the step."""
    call, empty, handle = rt.call, rt.empty, rt.op(name)
    plain: Callable[..., tuple[Tensor, Tensor]] = getattr(reference, name)
    most = None if kind.limit is None else rt.constant(kind.limit[1])
    # The state's sizes are known first, and x's: what does not fit is named by the others.
    order = sorted(kind.tensors.items(), key=lambda item: item[0] not in ("x", "q", "weight"))

    def op(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = dict(zip((*kind.tensors, "query_start", kind.last), arguments, strict=False)) | named
        sizes: dict[str, int] = {}
        for key, letters in order:
            if given[key] is not None:
                wide = key == kind.wider[0] and given[key].dim() == len(kind.wider[1])
                _fit(key, given[key], kind.wider[1] if wide else letters, sizes)
        if kind.limit is not None and most is not None and sizes[kind.limit[0]] > most:
            return plain(*arguments, **named)
        ready = {key: _ready(given[key], key in kind.strided) for key in kind.tensors}
        starts = _starts(given["query_start"], sizes["R"])
        out, after = empty([sizes[letter] for letter in kind.out]), empty(given["state"].shape)
        strides = {f"{key}_stride": one.stride(0) for key in kind.strided if (one := ready[key]) is not None}
        numbers = {said: sizes[letter] for letter, said in kind.sizes.items()}
        work = kind.cost
        for letter in kind.work:
            work *= sizes[letter]
        last = {kind.last: given[kind.last]} if kind.last else {}
        if kind.wider[0]:
            last[kind.wider[2]] = int(given[kind.wider[0]].dim() == len(kind.wider[1]))
        pointers = {key: 0 if one is None else one.data_ptr() for key, one in ready.items()}
        call(
            handle, work, **pointers, out=out.data_ptr(), after=after.data_ptr(), query_start=starts.data_ptr(),
            rows=sizes["R"], **numbers, **strides, **last,
        )  # fmt: skip
        return out, after

    return op


def _fit(name: str, tensor: Tensor, letters: str, sizes: dict[str, int]) -> None:
    """Note what the letters stand for. Raises ValueError where they stand for something else already."""
    shape = tensor.shape
    if "w" in letters:
        sizes["w"] = sizes["W"] - 1
    for letter, size in zip(letters, shape, strict=False):
        sizes.setdefault(letter, size)
    wanted = [sizes.get(letter, 0) for letter in letters]
    if list(shape) != wanted:
        raise ValueError(f"{name} must be {wanted}, not {list(shape)}")


def _ready(tensor: Tensor | None, strided: bool) -> Tensor | None:
    """Float32 as the kernel reads it: contiguous, or tokens at any distance from each other."""
    if tensor is None:
        return None
    if not strided:
        return tensor.to(torch.float32).contiguous()
    if tensor.dim() != 3:
        return rows_of(tensor)
    inner = heads_of(tensor)[1]
    return tensor if inner == tensor.shape[-1] or tensor.shape[1] == 1 else tensor.contiguous()


def _starts(query_start: Tensor, rows: int) -> Tensor:
    if query_start.shape != (rows + 1,):
        raise ValueError(f"query_start must have {rows + 1} entries, not {list(query_start.shape)}")
    return query_start.to(torch.int32).contiguous()
