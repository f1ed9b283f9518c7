"""GGUF files: metadata and tensor table, with the data left in the file (memory map).

Format: the ggml project's GGUF specification, versions 2 and 3, little-endian. Every count in the header is checked
against the bytes that are really there before anything is allocated, so a hostile file costs no more than its size.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from phloem.checkpoint.gguf_parts import first_part, parts_of
from phloem.core.errors import ModelLoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NESTING = 4

# GGUF tensor type id -> (name, elements per block, bytes per block).
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
BLOCKS = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}

# GGUF value type id -> struct format of one scalar.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table. `shape` is in torch order ([out, in]); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int
    _map: mmap.mmap

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes, uint8 [rows, bytes per row], memory-mapped and read-only; a scalar or vector is one row."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        flat = np.frombuffer(self._map, dtype=np.uint8, count=self.nbytes, offset=self.offset)
        return flat.reshape(rows, self.nbytes // rows if rows else 0)

    def part(self, index: int) -> GGUFTensor:
        """Entry `index` along the first axis, without reading it: one expert of a stacked tensor."""
        if len(self.shape) < 2 or not 0 <= index < self.shape[0]:
            raise IndexError(f"tensor {self.name!r} {list(self.shape)} has no part {index}")
        size = self.nbytes // self.shape[0]
        return GGUFTensor(self.name, self.shape[1:], self.kind, self.offset + index * size, size, self._map)

    def half(self, second: bool) -> GGUFTensor:
        """The first or the second half of the rows of a matrix [2 M, N], without reading it."""
        if len(self.shape) != 2 or self.shape[0] % 2:
            raise IndexError(f"tensor {self.name!r} {list(self.shape)} has no halves")
        return self.cut(second * (self.shape[0] // 2), self.shape[0] // 2)

    def cut(self, start: int, count: int) -> GGUFTensor:
        """`count` entries along the first axis from `start` on, without reading them: rows of a matrix, or numbers of a
        vector of a type without blocks."""
        axes = len(self.shape)
        whole = axes > 1 or BLOCKS[self.kind][0] == 1
        if not whole or start < 0 or count < 1 or start + count > self.shape[0]:
            raise IndexError(f"tensor {self.name!r} {list(self.shape)} has no part of {count} from {start} on")
        size = self.nbytes // self.shape[0]
        shape = (count, *self.shape[1:])
        return GGUFTensor(self.name, shape, self.kind, self.offset + start * size, count * size, self._map)


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        # Some writers cut a token's bytes in the middle of a character.
        return raw.decode("utf-8", "surrogateescape")


class Texts(Sequence[str]):
    """An array of strings, left in the file until it is read: a vocabulary is needed to build a tokenizer alone. Each
    pass over it makes the strings anew; who wants some of them in no order takes a list of it first."""

    def __init__(self, data: mmap.mmap, at: int, number: int) -> None:
        self._data, self._at, self._number = data, at, number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[str]:
        data, at, read = self._data, self._at, _U64.unpack_from
        for _ in range(self._number):
            start = at + 8
            at = start + read(data, at)[0]
            yield _text(data[start:at])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return list(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType] - equal to lists, which have none

    def __repr__(self) -> str:
        return f"<{self._number} texts>"


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file, or all the parts of one: `path` and `metadata` are the first's, `tensors` those of all.

    Arrays in `metadata` are `Texts` (strings), lists (nested) or numpy arrays (numbers).
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    _maps: tuple[mmap.mmap, ...] = ()

    @staticmethod
    def open(path: str | Path) -> GGUFFile:
        """Map the file, and the others where it is one of several parts, and read their headers.

        Raises:
            ModelLoadError: naming the file and what is wrong with it, or the part that is not there.
        """
        first = GGUFFile._open_one(first_part(Path(path)))
        count = first.metadata.get("split.count", 0)
        return first._joined(int(count)) if isinstance(count, int) and count > 1 else first

    def _joined(self, count: int) -> GGUFFile:
        """With the tensors of the other parts, of which this is the first."""
        names = parts_of(self.path, count)
        if not names:
            raise ModelLoadError(
                f"{self.path}: one of {count} parts, whose names must end in -00001-of-{count:05d}.gguf and so on"
            )
        lost = [str(name) for name in names if not name.exists()]
        if lost:
            raise ModelLoadError(f"{', '.join(lost)}: missing ({count} parts make up this model)")
        parts = [self, *(GGUFFile._open_one(name) for name in names[1:])]
        tensors: dict[str, GGUFTensor] = {}
        for number, part in enumerate(parts):
            place = part.metadata.get("split.no"), part.metadata.get("split.count")
            if place != (number, count):
                raise ModelLoadError(
                    f"{part.path}: says that it is part {place[0]} of {place[1]}, not {number} of {count}"
                )
            twice = sorted(tensors.keys() & part.tensors.keys())
            if twice:
                raise ModelLoadError(f"{part.path}: tensor {twice[0]!r} stands in another part too")
            tensors |= part.tensors
        total = self.metadata.get("split.tensors.count")
        if total is not None and total != len(tensors):
            raise ModelLoadError(f"{self.path}: its parts have {len(tensors)} tensors, not {total}")
        maps = tuple(data for part in parts for data in part._maps)
        return GGUFFile(self.path, self.version, self.metadata, tensors, maps)

    @staticmethod
    def _open_one(path: Path) -> GGUFFile:
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: cannot be read as a GGUF file: {error}") from None
        reader = _Reader(data)
        try:
            version, tensor_count, value_count = reader.header()
            metadata = reader.values(value_count)
            tensors = reader.tensor_table(tensor_count, metadata)
        except _Damaged as error:
            raise ModelLoadError(f"{path}: damaged GGUF file at byte {reader.at}: {error}") from None
        except (struct.error, OverflowError):
            message = f"{path}: truncated GGUF file: its header goes on past the end ({len(data)} bytes)"
            raise ModelLoadError(message) from None
        return GGUFFile(path, version, metadata, tensors, (data,))

    def release(self) -> None:
        """Let the system take back the pages that were read: they no longer count as this process's memory. What is
        read again comes from the file again."""
        for data in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                data.madvise(mmap.MADV_DONTNEED)

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value, or `default`."""
        return self.metadata.get(key, default)


class _Damaged(Exception):
    """What is wrong; the caller adds the file's name and the position."""


class _Reader:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0

    def scalar(self, fmt: str) -> Any:
        (value,) = struct.unpack_from(fmt, self.data, self.at)
        self.at += struct.calcsize(fmt)
        return value

    def count(self, what: str, smallest: int) -> int:
        """A number of items that take at least `smallest` bytes each: more than fit in the file is an error."""
        number = self.scalar("<Q")
        if number * smallest > self.size - self.at:
            raise _Damaged(f"{number} {what} do not fit in the {self.size - self.at} bytes that are left")
        return number

    def string(self) -> str:
        length = self.count("bytes of text", 1)
        raw = self.data[self.at : self.at + length]
        self.at += length
        return _text(raw)

    def header(self) -> tuple[int, int, int]:
        if self.data[:4] != MAGIC:
            raise _Damaged(f"it begins with {self.data[:4]!r}, not {MAGIC!r}")
        self.at = 4
        version = self.scalar("<I")
        if version not in VERSIONS:
            big = version >= 1 << 16 and version & 0xFFFF == 0
            raise _Damaged("it is big-endian, which is not supported" if big else f"version {version} is not 2 or 3")
        tensor_count = self.count("tensors", 24)
        return version, tensor_count, self.count("metadata values", 12)

    def values(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(number):
            key = self.string()
            if key in found:
                raise _Damaged(f"metadata key {key!r} stands twice")
            kind = self.scalar("<I")
            try:
                found[key] = self.value(kind, 0)
            except _Damaged as error:
                raise _Damaged(f"metadata {key!r}: {error}") from None
        return found

    def value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth)
        raise _Damaged(f"unknown value type {kind}")

    def array(self, depth: int) -> Any:
        if depth >= MAX_NESTING:
            raise _Damaged(f"arrays nested deeper than {MAX_NESTING}")
        kind = self.scalar("<I")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            number = self.count("values", dtype.itemsize)
            found = np.frombuffer(self.data, dtype=dtype, count=number, offset=self.at)
            self.at += found.nbytes
            return found.copy()
        if kind == _STRING:
            return self.strings(self.count("texts", 8))
        number = self.count("arrays", 12)
        return [self.value(kind, depth + 1) for _ in range(number)]

    def strings(self, number: int) -> Texts:
        """The hot loop: vocabulary and merges are some hundred thousand texts."""
        data, at, read = self.data, self.at, _U64.unpack_from
        for _ in range(number):
            at += 8 + read(data, at)[0]
        if at > self.size:
            raise _Damaged("a text goes on past the end of the file")
        found = Texts(data, self.at, number)
        self.at = at
        return found

    def tensor_table(self, number: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        align = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(align, int) or align <= 0 or align & (align - 1):
            raise _Damaged(f"general.alignment {align!r} is not a power of two")
        entries = [self.tensor_entry() for _ in range(number)]
        base = -(-self.at // align) * align
        found: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset, nbytes in entries:
            if name in found:
                raise _Damaged(f"tensor {name!r} stands twice")
            if offset % align:
                raise _Damaged(f"tensor {name!r}: offset {offset} is no multiple of the alignment {align}")
            if base + offset + nbytes > self.size:
                end = base + offset + nbytes
                raise _Damaged(f"tensor {name!r} ends at byte {end}, the file at {self.size}: is it all there?")
            found[name] = GGUFTensor(name, shape, kind, base + offset, nbytes, self.data)
        order = sorted(found.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(order):
            if before.offset + before.nbytes > after.offset:
                raise _Damaged(f"tensors {before.name!r} and {after.name!r} lie over each other")
        return found

    def tensor_entry(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self.string()
        dims = self.scalar("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise _Damaged(f"tensor {name!r} has {dims} dimensions, not 1 to {MAX_DIMS}")
        sizes = [self.scalar("<Q") for _ in range(dims)]
        if 0 in sizes:
            raise _Damaged(f"tensor {name!r} has a dimension of 0")
        type_id, offset = self.scalar("<I"), self.scalar("<Q")
        if type_id not in TENSOR_TYPES:
            raise _Damaged(f"tensor {name!r} has the unknown type {type_id}")
        kind, block, block_bytes = TENSOR_TYPES[type_id]
        if sizes[0] % block:
            raise _Damaged(f"tensor {name!r}: rows of {sizes[0]} values are no whole blocks of {kind} ({block})")
        nbytes = sizes[0] // block * block_bytes
        for size in sizes[1:]:
            nbytes *= size
        return name, tuple(reversed(sizes)), kind, offset, nbytes
