"""The tensors of an adapter's file: read once, known by their hash, and looked at as one row of numbers where they are
of one type, since hundreds of small tensors one by one take longer than all that is done with them.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.checkpoint.fingerprint import of_files
from phloem.quant._source import out_of_range

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SMALL = 64 << 20  # bytes of a file that is read at once
_KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file has, by name in order; `digest`: by what it is known, which is on its way; `sound`: all numbers were
    looked at, and none is out of range."""

    tensors: list[tuple[str, Tensor]]
    digest: Future[str]
    sound: bool = False


def stored(file: Path) -> Stored:
    """Raises OSError, SafetensorError, and KeyError for types that torch has not."""
    from safetensors import safe_open
    from safetensors.torch import load

    if file.stat().st_size > SMALL:
        with safe_open(str(file), framework="pt", device="cpu") as found:
            tensors = [(key, found.get_tensor(key)) for key in found.keys()]  # noqa: SIM118 - not a dict
        return Stored(tensors, _aside(partial(digest, file)))
    values = np.fromfile(file, np.uint8)
    known = _aside(lambda: hashlib.sha256(values.data).hexdigest())  # as long as all else takes
    row, places = _row_of(values)
    if row is None:
        return Stored(sorted(load(values.tobytes()).items()), known)
    parts = row.split([count for _, _, count in places])
    tensors = [(name, part.view(shape)) for (name, shape, _), part in zip(places, parts, strict=True)]
    return Stored(sorted(tensors, key=lambda pair: pair[0]), known, not out_of_range(row))


def digest(file: Path) -> str:
    """By what a file is known, as `Stored.digest`. Raises OSError."""
    if file.is_file() and file.stat().st_size <= SMALL:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return of_files([file])


def _aside(work: Callable[[], str]) -> Future[str]:
    worker = ThreadPoolExecutor(1, "phloem-adapters-known")
    found = worker.submit(work)
    worker.shutdown(wait=False)
    return found


def _row_of(values: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[Tensor | None, list[tuple[str, list[int], int]]]:
    """All numbers of a file of safetensors one behind the other, and (name, shape, how many) of each tensor in their
    order. None: they are of several types, or it is for the format's own library to say what is wrong."""
    size = int.from_bytes(values[:8].tobytes(), "little")
    begin = 8 + size
    if not 8 < begin < len(values):
        return None, []
    try:
        header = json.loads(values[8:begin].tobytes())
        header.pop("__metadata__", None)
        said = [(*entry["data_offsets"], name, entry["shape"], entry["dtype"]) for name, entry in header.items()]
        said.sort(key=lambda one: one[:2])
        kind = _KINDS.get(said[0][4])
        if kind is None or begin % kind.itemsize or any(one[4] != said[0][4] for one in said):
            return None, []
        places, behind = list[tuple[str, list[int], int]](), 0
        for start, end, name, shape, _ in said:
            count = 1
            for axis in shape:
                count *= axis if type(axis) is int and axis > 0 else 0
            if type(start) is not int or start != behind or end - start != count * kind.itemsize or count < 1:
                return None, []
            places.append((name, shape, count))
            behind = end
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None, []
    if begin + behind != len(values):
        return None, []
    return torch.from_numpy(values[begin:]).view(kind), places
