"""Tensors out of what a client sends: safetensors, or handles to shared memory in torch's and SGLang's spelling.

A handle is checked before anything of it is opened: its name, its size, and that shape, offset and strides lie inside.
Its memory is opened to be read, copied, and closed.
"""

from __future__ import annotations

from contextlib import closing
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from phloem.core.errors import BadRequest
from phloem.rl._records import DTYPES, Made, Named, count_in, records, shape_in
from phloem.rl._shared import ON_DEVICE, Place, Shared, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

Tensors = list[tuple[str, "Tensor"]]

FORMATS = (None, "auto", "direct", "flattened_bucket", "safetensors")
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


def named_tensors(
    blobs: Sequence[bytes], load_format: str | None, limit: int, lent: Callable[[Made], Tensor] | None = None
) -> Tensors:
    """Names and tensors of a payload: pickles have one blob for each rank, safetensors as many as there are.

    Args:
        limit: bytes that all tensors together may take.
        lent: gives the tensor behind a handle of the device's memory; None: such handles are refused.

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
    found, reader = records(blobs[0]), _Reader(limit, lent)
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
        name, shape, dtype = place["name"], shape_in(place["shape"]), place["dtype"]
        start, end = count_in(place["start_idx"]), count_in(place["end_idx"])
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
    return {**state, "dtype": dtype_in(state["dtype"])}


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list | tuple):
        raise BadRequest("the payload is no list of names with tensors", param="serialized_named_tensors")
    return list(found)


def dtype_in(found: Any) -> torch.dtype:
    if not isinstance(found, Named) or found.name not in _TYPES:
        raise BadRequest("the payload has a tensor of no known type")
    return _TYPES[found.name]


class _Reader:
    """Reads the memory behind handles, each piece once, while there is room.

    `lent`: what gives the tensor behind a handle of the device's memory; None: such handles are refused.
    """

    def __init__(self, limit: int, lent: Callable[[Made], Tensor] | None = None) -> None:
        self._left, self._limit, self._lent = limit, limit, lent
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
        if self._lent is not None and isinstance(record, Made) and record.name in ON_DEVICE:
            found = self._lent(record)
            self._spend(found.nbytes)
            return found
        place = place_of(record)
        untyped, dtype = self._memory(place), dtype_of(place.dtype)
        if 0 in place.shape:
            return torch.empty(place.shape, dtype=dtype)
        if place.last * dtype.itemsize > place.size:
            raise BadRequest(f"a tensor of shape {list(place.shape)} lies outside of its memory")
        whole = untyped[: len(untyped) // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.as_strided(place.shape, place.stride, place.offset)

    def _memory(self, place: Place) -> Tensor:
        if not place.name:
            return torch.empty(0, dtype=torch.uint8)
        if place.name not in self._known:
            self._spend(place.size)
            with closing(Shared(place)) as memory:
                self._known[place.name] = memory.read(0, place.size)
        if len(self._known[place.name]) != place.size:
            raise BadRequest("the payload gives one piece of shared memory two sizes")
        return self._known[place.name]

    def _spend(self, size: int) -> None:
        if size > self._left:
            raise BadRequest(f"the tensors take more than the {self._limit} bytes that this model's weights may take")
        self._left -= size
