"""Stored tensors of safetensors and GGUF files, tensors handed over by live updates, and random ones."""

from __future__ import annotations

import json
import math
import warnings
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.checkpoint.gguf_reader import BLOCKS
from phloem.core.errors import ModelLoadError
from phloem.kernels.narrow import Codes, Narrow
from phloem.quant._source import Index, Source, Stager, everything, indexed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from phloem.checkpoint.gguf_reader import GGUFTensor
    from phloem.quant._report import Report

_DENSE_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_STORED_KINDS = {
    **_DENSE_KINDS,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_ELEMENTS_AT_ONCE = 1 << 18  # dequantised at a time by one worker: the intermediates stay in its cache
DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a file, and its type there."""

    path: Path
    offset: int
    dtype: torch.dtype


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data begins, and what it says of each tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header


def stored_kinds(path: Path) -> dict[str, str]:
    """The file's name of each tensor's type."""
    return {name: str(entry["dtype"]) for name, entry in _header(path)[1].items()}


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each of the file's tensors."""
    return {name: tuple(entry["shape"]) for name, entry in _header(path)[1].items()}


def stored_in(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file whose type torch has; the file's header says where (`safetensors` format)."""
    begin, header = _header(path)
    return {
        name: Stored(path, begin + entry["data_offsets"][0], _STORED_KINDS[entry["dtype"]])
        for name, entry in header.items()
        if entry["dtype"] in _STORED_KINDS
    }


@dataclass
class SafetensorsSource(Source):
    """A tensor of an open safetensors file, memory-mapped, or read by a stager where it has one."""

    file: Any = None  # of safetensors.safe_open
    key: str = ""
    stored: str = ""  # the file's name of its type
    place: Stored | None = None
    stager: Stager | None = None
    _kept: tuple[Index, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        if self.stored not in _STORED_KINDS:
            raise ModelLoadError(f"{self.key} is {self.stored}: a type that nothing here reads")
        return _STORED_KINDS[self.stored]

    def stored_values(self) -> Tensor | None:
        return self.file.get_tensor(self.key) if self.stored in _DENSE_KINDS else None

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        if self.stager is not None and self.place is not None:
            return self._staged(self.stager, self.place, index, dtype)
        values = self.file.get_tensor(self.key) if index is None else self._slice(index)
        if index is None:
            self.bytes_read += values.nbytes
        return values.to(dtype).contiguous()

    def _staged(self, stager: Stager, place: Stored, index: Index | None, dtype: torch.dtype) -> Tensor:
        try:
            values = stager.load(place.path, place.offset, self.shape, place.dtype, index, dtype)
        except OSError as error:
            raise ModelLoadError(f"{place.path}: {self.key}: {error}") from None
        self.bytes_read += values.numel() * place.dtype.itemsize
        return values

    def _slice(self, index: Index) -> Tensor:
        """The file gives runs; of rows that alternate, the run of both is read once and kept for the other."""
        run = tuple(slice(at, at + 1, 1) if isinstance(at, int) else _run(at) for at in index)
        if self._kept is not None and self._kept[0] == run:
            values = self._kept[1]
        else:
            values = self.file.get_slice(self.key)[tuple(slice(at.start, at.stop) for at in run)]
            self.bytes_read += values.nbytes
            self._kept = (run, values) if any(isinstance(at, slice) and at.step > 1 for at in index) else None
        pairs = zip(index, run, strict=True)
        return values[tuple(0 if isinstance(at, int) else slice(at.start - r.start, None, at.step) for at, r in pairs)]

    def done(self) -> None:
        self._kept = None


def _run(at: slice) -> slice:
    """The contiguous run of whole strides that a slice lies in."""
    first = at.start // at.step * at.step
    return slice(first, first + -(-(at.stop - first) // at.step) * at.step, 1)


@dataclass(frozen=True, slots=True)
class Read:
    """A matrix that has been read (`kernels.ops.WeightSource`)."""

    name: str
    shape: tuple[int, ...]
    values: Tensor
    kind: str = "dense"

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        raise TypeError(f"{self.name} is dense: it has no quantised bytes")


@dataclass
class TensorSource(Source):
    """A tensor that somebody handed over."""

    tensor: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        assert self.tensor is not None
        return self.tensor.dtype

    def stored_values(self) -> Tensor | None:
        return self.tensor

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        assert self.tensor is not None
        return indexed(self.tensor.detach(), index).to("cpu", dtype).contiguous()


@dataclass
class DummySource(Source):
    """Random values that depend on the name and the kind of device alone, so that they are the same in any order.

    They are drawn where they are used: a GPU takes a fifth of a second for what takes a processor a minute.
    """

    role: str = "matrix"
    device: torch.device = torch.device("cpu")

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        if self.role != "matrix":
            value = 1.0 if self.role == "norm" else 0.0
            return indexed(torch.full(self.shape, value, dtype=dtype, device=self.device), index)
        if self.device == torch.device("meta"):
            return indexed(torch.empty(self.shape, dtype=dtype, device=self.device), index).contiguous()
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        # In float32 only on the host, whose values were always drawn so; elsewhere memory may be short.
        kind = torch.float32 if self.device == torch.device("cpu") else dtype
        values = torch.empty(self.shape, dtype=kind, device=self.device).normal_(0.0, DUMMY_STD, generator=generator)
        return indexed(values, index).to(dtype).contiguous()


@dataclass
class GGUFSource(Source):
    """A tensor of a GGUF file. `heads` > 0: its rows are stored for a rotation of neighbours; they are put back."""

    tensor: GGUFTensor | None = None
    heads: int = 0
    report: Report | None = None
    _why: str = field(default="", init=False)  # why it is unpacked

    def narrow(self, rows: slice, cols: slice) -> Narrow | str:
        if self.kind in ("dense", *_DENSE_KINDS):
            return ""
        if self.has_raw(cols):
            return Narrow("gguf", 1, 32, stored=self.kind)
        self.refused(f"a rank's share of {self.kind} begins or ends inside a block")
        return self._why

    def codes(self, rows: slice, cols: slice, entry: int = 0) -> Codes:
        del entry  # a stack's are sources of their own
        if self.report is not None:
            self.report.kept(self.name, self.kind)
        with warnings.catch_warnings():  # a mapping that is only read
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return Codes(torch.from_numpy(self.take_raw(rows, cols)), torch.empty(0))

    def refused(self, why: str) -> None:
        self._why = why
        if self.report is not None:
            self.report.unpacked(self.name, why)

    def has_raw(self, cols: slice) -> bool:
        block = BLOCKS[self.kind][0]
        whole = cols.start == 0 and cols.stop == self.shape[-1]
        return cols.step == 1 and (whole or (cols.start % block == 0 and cols.stop % block == 0))

    def take_raw(self, rows: slice, cols: slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        stored = self._rows(rows)
        if cols.start > 0 or cols.stop < self.shape[-1]:
            block, size = BLOCKS[self.kind]
            stored = stored[:, cols.start // block * size : cols.stop // block * size]
        self.bytes_read += stored.nbytes
        return stored

    def _rows(self, rows: slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Stored rows, as our rows are counted."""
        assert self.tensor is not None
        stored = self.tensor.raw()
        if not self.heads:
            return stored if rows == slice(0, len(stored), 1) else stored[rows]
        return stored[halves_from_neighbours(self.shape[0], self.heads)[rows]]

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        slices = everything(self.shape) if index is None else index
        if len(slices) == 1 and isinstance(slices[0], slice):
            return self._vector(slices[0], dtype)
        if len(slices) == 2 and isinstance(slices[0], int) and isinstance(slices[1], slice):  # one expert's bias
            return self._values(self._rows(slice(slices[0], slices[0] + 1, 1)), slices[1], dtype)[0].contiguous()
        if len(slices) != 2 or not isinstance(slices[0], slice) or not isinstance(slices[1], slice):
            raise ModelLoadError(f"{self.name}: {list(self.shape)} in a GGUF file has no parts")
        return self._values(self._rows(slices[0]), slices[1], dtype).contiguous()

    def _vector(self, span: slice, dtype: torch.dtype) -> Tensor:
        assert self.tensor is not None
        if not self.heads:
            return self._values(self.tensor.raw(), span, dtype)[0].contiguous()
        # A bias of q or k: its one row is all its elements, turned like the rows of the matrix.
        values = self._values(self.tensor.raw(), slice(0, self.shape[0], 1), dtype)[0]
        return values[torch.from_numpy(halves_from_neighbours(self.shape[0], self.heads)[span])]

    def _values(self, stored: np.ndarray[Any, np.dtype[np.uint8]], cols: slice, dtype: torch.dtype) -> Tensor:
        """Some columns of stored rows."""
        dense = self.tensor is not None and self.tensor.kind in _DENSE_KINDS
        return self._floats(stored, cols, dtype) if dense else self._dequantise(stored, cols, dtype)

    def _floats(self, stored: np.ndarray[Any, np.dtype[np.uint8]], cols: slice, dtype: torch.dtype) -> Tensor:
        # A copy, because torch wants memory that may be written.
        kind = _DENSE_KINDS[self.tensor.kind] if self.tensor is not None else dtype
        wanted = stored[:, cols.start * kind.itemsize : cols.stop * kind.itemsize].copy()
        self.bytes_read += wanted.nbytes
        return torch.from_numpy(wanted).view(kind)[:, :: cols.step].to(dtype)

    def _dequantise(self, rows: np.ndarray[Any, np.dtype[np.uint8]], cols: slice, dtype: torch.dtype) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        block, size = BLOCKS[self.kind]
        first, last = cols.start // block, -(-cols.stop // block)
        rows = rows[:, first * size : last * size]
        self.bytes_read += rows.nbytes
        width = (last - first) * block
        out = torch.empty((len(rows), width), dtype=dtype)
        step = max(1, _ELEMENTS_AT_ONCE // width)

        def fill(start: int) -> None:
            values = dequantize(rows[start : start + step], GGMLQuantizationType[self.kind])
            out[start : start + step] = torch.from_numpy(np.ascontiguousarray(values))

        try:
            list((self.workers.map if self.workers else map)(fill, range(0, len(out), step)))
        except (KeyError, NotImplementedError):
            raise ModelLoadError(f"{self.name}: no way to dequantise GGUF type {self.kind}") from None
        return out[:, cols.start - first * block : cols.stop - first * block : cols.step]


@dataclass
class FormedSource(GGUFSource):
    """Numbers that the file has in another form: in other axes, or as the decay -exp(x) in place of its logarithm x."""

    decay: bool = False

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        assert self.tensor is not None
        stored = self.tensor.shape
        flat = GGUFSource(self.name, (math.prod(stored[:-1]), stored[-1]), self.tensor.kind, tensor=self.tensor)
        values = flat.take(None, torch.float32).reshape(self.shape)
        if self.decay:
            if not bool((values <= 0).all()):
                raise ModelLoadError(f"{self.tensor.name} holds a decay that is not negative ({self.name})")
            values = values.neg().log()
        self.bytes_read += flat.bytes_read
        return indexed(values, index).to(dtype).contiguous()


@dataclass
class SplitLatentSource(Source):
    """The keys' and values' half of every head of `kv_b_proj`, which today's converters store apart, keys turned.

    `keys` are [heads * latent, key], `values` [heads * value, latent].
    """

    keys: GGUFSource | None = None
    values: GGUFSource | None = None
    heads: int = 0

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        assert self.keys is not None and self.values is not None
        keys, values = self.keys.take(None, dtype), self.values.take(None, dtype)
        self.bytes_read = self.keys.bytes_read + self.values.bytes_read
        turned = keys.unflatten(0, (self.heads, -1)).transpose(1, 2)
        whole = torch.cat([turned, values.unflatten(0, (self.heads, -1))], 1).flatten(0, 1)
        return indexed(whole, index).contiguous()


def halves_from_neighbours(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each row of a q or k projection lies in a GGUF file whose converter pairs neighbours.

    The file pairs neighbours (row 2j with 2j + 1 of a head) where the checkpoint pairs halves (j with j + size / 2).
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)
