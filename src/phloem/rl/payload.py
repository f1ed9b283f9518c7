"""Tensors out of what a client sends: safetensors, or handles to shared memory in torch's and SGLang's spelling.

A handle is checked before anything of it is opened: its name, its size, and that shape, offset and strides lie inside.
Its memory is opened to be read, copied, and closed.
"""

from __future__ import annotations

import os
import re
import stat
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from phloem.core.errors import BadRequest
from phloem.rl._records import DTYPES, Made, Named, records

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

Tensors = list[tuple[str, "Tensor"]]

SHARED = "/dev/shm"
HEADER = 64  # bytes in front of the data in torch's shared memory
MOST_DIMENSIONS = 8
FORMATS = (None, "auto", "direct", "flattened_bucket", "safetensors")
_NAME = re.compile(r"/torch_\d{1,10}_\d{1,10}_\d{1,10}")
_TYPES = {name: vars(torch)[name] for name in DTYPES}


def dtype_of(name: str) -> torch.dtype:
    """By its name, with `torch.` or without. Raises BadRequest."""
    found = _TYPES.get(name.removeprefix("torch."))
    if found is None:
        raise BadRequest(f"unknown type {name!r:.100}; known: {', '.join(_TYPES)}", param="dtypes")
    return found


def check_format(load_format: str | None) -> None:
    """Raises BadRequest."""
    if load_format not in FORMATS:
        known = ", ".join(str(one) for one in FORMATS[1:])
        raise BadRequest(
            f"load_format {load_format!r:.200} is not one of {known}: no code of a caller's is run", param="load_format"
        )


def named_tensors(blobs: Sequence[bytes], load_format: str | None, limit: int) -> Tensors:
    """Names and tensors of a payload: pickles have one blob for each rank, safetensors as many as there are.

    Args:
        limit: bytes that all tensors together may take.

    Raises:
        BadRequest: naming what is wrong. Nothing of a payload is ever executed.
    """
    check_format(load_format)
    if load_format == "safetensors":
        if sum(map(len, blobs)) > limit:
            raise BadRequest(f"the payload is larger than the {limit} bytes that this model's weights may take")
        return [item for blob in blobs for item in _safetensors(blob)]
    if len(blobs) != 1:
        raise BadRequest(f"{len(blobs)} payloads for one rank", param="serialized_named_tensors")
    found, reader = records(blobs[0]), _Reader(limit)
    if isinstance(found, dict) and "flattened_tensor" in found:
        return flattened(
            reader.tensor(found["flattened_tensor"]), [_place(one) for one in _listed(found.get("metadata"))]
        )
    if load_format == "flattened_bucket":
        raise BadRequest("the payload is no flattened bucket", param="load_format")
    pairs = list(found.items()) if isinstance(found, dict) else _listed(found)
    tensors: Tensors = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise BadRequest("the payload is no list of names with tensors", param="serialized_named_tensors")
        tensors.append((pair[0], reader.either(pair[1])))
    return tensors


def rebuilt(data: bytes, limit: int = 1 << 40) -> Any:
    """Copies of the tensors that a pickle has, in the lists, tuples and dicts that they were in.

    Raises:
        BadRequest: it has something else than these, numbers and texts. Nothing of it is ever executed.
    """
    reader = _Reader(limit)

    def made(one: Any) -> Any:
        if isinstance(one, list):
            return [made(item) for item in one]
        if isinstance(one, tuple):
            return tuple(made(item) for item in one)
        if isinstance(one, dict):
            return {key: made(item) for key, item in one.items()}
        return reader.either(one) if isinstance(one, Made) else one

    return made(records(data))


def _safetensors(blob: bytes) -> Iterable[tuple[str, Tensor]]:
    try:
        return load(blob).items()
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadRequest(f"the payload is not safetensors: {str(error)[:200]}") from None


def flattened(flat: Tensor, places: Sequence[Mapping[str, Any]]) -> Tensors:
    """The tensors of a bucket: bytes one behind the other, and where each lies (`start_idx`, `end_idx`, in bytes)."""
    if flat.dtype != torch.uint8 or flat.ndim != 1:
        raise BadRequest(f"a flattened bucket is one row of bytes, not {flat.dtype} {list(flat.shape)}")
    if not flat.is_contiguous():
        raise BadRequest("a flattened bucket whose bytes do not lie one behind the other")
    found: Tensors = []
    left = len(flat)
    for place in places:
        name, shape, dtype = place["name"], _shape(place["shape"]), place["dtype"]
        start, end = _count(place["start_idx"]), _count(place["end_idx"])
        if not isinstance(name, str) or not start <= end <= len(flat):
            raise BadRequest("a tensor of the flattened bucket lies outside of it")
        if end - start != prod(shape) * dtype.itemsize:
            raise BadRequest(f"{name:.200}: {end - start} bytes do not hold {list(shape)} of {dtype}")
        left -= end - start
        if left < 0:
            raise BadRequest("tensors of the flattened bucket lie in the same place")
        found.append((name, flat[start:end].clone().view(dtype).reshape(shape)))  # a copy: it may begin anywhere
    return found


def _place(record: Any) -> dict[str, Any]:
    if not isinstance(record, Made) or record.name != "FlattenedTensorMetadata" or record.state is None:
        raise BadRequest("the bucket's metadata does not say where its tensors are")
    state = record.state
    missing = [name for name in ("name", "shape", "dtype", "start_idx", "end_idx") if name not in state]
    if missing:
        raise BadRequest(f"the bucket's metadata lacks {', '.join(missing)}")
    return {**state, "dtype": _dtype(state["dtype"])}


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list | tuple):
        raise BadRequest("the payload is no list of names with tensors", param="serialized_named_tensors")
    return list(found)


def _dtype(found: Any) -> torch.dtype:
    if not isinstance(found, Named) or found.name not in _TYPES:
        raise BadRequest("the payload has a tensor of no known type")
    return _TYPES[found.name]


def _count(found: Any) -> int:
    if type(found) is not int or not 0 <= found < 1 << 48:
        raise BadRequest("the payload has a size that is no number from 0 on")
    return found


def _shape(found: Any) -> tuple[int, ...]:
    sizes = found.args[0] if isinstance(found, Made) and found.name == "Size" and len(found.args) == 1 else found
    if not isinstance(sizes, tuple | list) or len(sizes) > MOST_DIMENSIONS:
        raise BadRequest("the payload has a tensor without a shape")
    return tuple(_count(size) for size in sizes)


class _Reader:
    """Reads the memory behind handles, each once, while there is room."""

    def __init__(self, limit: int) -> None:
        self._left, self._limit = limit, limit
        self._known: dict[str, Tensor] = {}

    def either(self, record: Any) -> Tensor:
        """A tensor, or one that was pickled for each rank apart."""
        if isinstance(record, Made) and record.name == "LocalSerializedTensor":
            values = (record.state or {}).get("values")
            if not isinstance(values, list) or len(values) != 1 or not isinstance(values[0], bytes):
                raise BadRequest("a tensor was serialised for several ranks, and this is the only one")
            record = records(values[0])
        return self.tensor(record)

    def tensor(self, record: Any) -> Tensor:
        if not isinstance(record, Made):
            raise BadRequest("the payload has something else where a tensor should be")
        if record.name in ("rebuild_cuda_tensor", "_rebuild_cuda_tensor_modified"):
            raise BadRequest("the tensors are on a GPU: this engine reads those of the host; send tensor.cpu()")
        if record.name != "rebuild_tensor" or len(record.args) != 3:
            raise BadRequest(f"the payload has {record.name} where a tensor should be")
        _, storage, meta = record.args
        if not isinstance(meta, tuple) or len(meta) != 4:
            raise BadRequest("the payload has a tensor without offset, shape and stride")
        offset, shape, stride = _count(meta[0]), _shape(meta[1]), _shape(meta[2])
        if len(shape) != len(stride):
            raise BadRequest(f"a tensor of shape {list(shape)} has {len(stride)} strides")
        untyped, dtype = self._storage(storage)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        if 0 not in shape and last * dtype.itemsize > len(untyped):
            raise BadRequest(f"a tensor of shape {list(shape)} lies outside of its memory")
        whole = untyped[: len(untyped) // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.new_empty(shape) if 0 in shape else whole.as_strided(shape, stride, offset)

    def _storage(self, record: Any) -> tuple[Tensor, torch.dtype]:
        typed = record.args if isinstance(record, Made) and record.name == "rebuild_typed_storage" else ()
        if len(typed) != 2 or not isinstance(typed[0], Made):
            raise BadRequest("the payload has a tensor without memory")
        dtype, untyped = _dtype(typed[1]), typed[0]
        if untyped.name == "rebuild_storage_fd":
            raise BadRequest(
                "the tensors are shared by file descriptors, which only the sender's own children can open: call "
                "torch.multiprocessing.set_sharing_strategy('file_system'), or send load_format 'safetensors'"
            )
        if untyped.name == "rebuild_storage_empty":
            return torch.empty(0, dtype=torch.uint8), dtype
        if untyped.name != "rebuild_storage_filename" or len(untyped.args) not in (4, 5):
            raise BadRequest(f"the payload has {untyped.name} where shared memory should be")
        handle, size = untyped.args[2], _count(untyped.args[3])
        if not isinstance(handle, bytes) or not _NAME.fullmatch(handle.decode("latin-1")):
            raise BadRequest("the payload names shared memory that is not torch's")
        name = handle.decode("latin-1")
        if name not in self._known:
            self._known[name] = self._copied(name, size)
        if len(self._known[name]) != size:
            raise BadRequest("the payload gives one piece of shared memory two sizes")
        return self._known[name], dtype

    def _copied(self, name: str, size: int) -> Tensor:
        if size > self._left:
            raise BadRequest(f"the tensors take more than the {self._limit} bytes that this model's weights may take")
        self._left -= size
        try:
            descriptor = os.open(SHARED + name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise BadRequest(
                f"shared memory {name}: {error.strerror}: the sender must keep its tensors until the answer comes, on "
                "this machine"
            ) from None
        with open(descriptor, "rb", buffering=0) as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size + HEADER:
                raise BadRequest(f"shared memory {name} has {found.st_size} bytes, expected {size + HEADER}")
            values = torch.empty(size, dtype=torch.uint8)
            view, done = values.numpy().data, 0
            file.seek(HEADER)
            while done < size:
                count = file.readinto(view[done:])
                if not count:
                    raise BadRequest(f"shared memory {name} has shrunk")
                done += count
        return values
