"""Memory that senders lend by handles in torch's spelling, checked before any of it is opened: shared memory of this
machine, and memory of the device that the engine computes on.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.platforms import _lent
from phloem.rl._records import DTYPES, Made, Named, count_in, shape_in

if TYPE_CHECKING:
    from torch import Tensor

SHARED = "/dev/shm"
HEADER = 64  # bytes in front of the data in torch's shared memory
ON_DEVICE = ("rebuild_cuda_tensor", "_rebuild_cuda_tensor_modified")
MOST_HANDLE = 1024  # bytes; drivers' own are 64 to 300
_NAME = re.compile(r"/torch_\d{1,10}_\d{1,10}_\d{1,10}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `offset` and `stride` in elements of `dtype`; `size` in bytes, of the whole piece `name`."""

    name: str  # "": the tensor is empty, and lies nowhere
    size: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def last(self) -> int:
        """Elements up to the last one that is read; the shape has no zero."""
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1


def place_of(record: Any) -> Place:
    """Of a tensor in shared memory. Raises BadRequest, with the remedy where there is one."""
    if not isinstance(record, Made):
        raise BadRequest("the payload has something else where a tensor should be")
    if record.name in ON_DEVICE:
        raise BadRequest("the tensors are on a GPU: this engine reads those of the host; send tensor.cpu()")
    if record.name != "rebuild_tensor" or len(record.args) != 3:
        raise BadRequest(f"the payload has {record.name} where a tensor should be")
    _, storage, meta = record.args
    if not isinstance(meta, tuple) or len(meta) != 4:
        raise BadRequest("the payload has a tensor without offset, shape and stride")
    offset, shape, stride = count_in(meta[0]), shape_in(meta[1]), shape_in(meta[2])
    if len(shape) != len(stride):
        raise BadRequest(f"a tensor of shape {list(shape)} has {len(stride)} strides")
    return Place(*_storage(storage), offset, shape, stride)


def _storage(record: Any) -> tuple[str, int, str]:
    """Name, bytes and type of numbers."""
    typed = record.args if isinstance(record, Made) and record.name == "rebuild_typed_storage" else ()
    if len(typed) != 2 or not isinstance(typed[0], Made):
        raise BadRequest("the payload has a tensor without memory")
    if not isinstance(typed[1], Named) or typed[1].name not in DTYPES:
        raise BadRequest("the payload has a tensor of no known type")
    dtype, untyped = typed[1].name, typed[0]
    if untyped.name == "rebuild_storage_fd":
        raise BadRequest(
            "the tensors are shared by file descriptors, which only the sender's own children can open: call "
            "torch.multiprocessing.set_sharing_strategy('file_system'), or send load_format 'safetensors'"
        )
    if untyped.name == "rebuild_storage_empty":
        return "", 0, dtype
    if untyped.name != "rebuild_storage_filename" or len(untyped.args) not in (4, 5):
        raise BadRequest(f"the payload has {untyped.name} where shared memory should be")
    return _shared_name(untyped.args[2]), count_in(untyped.args[3]), dtype


def _shared_name(handle: Any) -> str:
    if not isinstance(handle, bytes) or not _NAME.fullmatch(handle.decode("latin-1")):
        raise BadRequest("the payload names shared memory that is not torch's")
    return handle.decode("latin-1")


class Shared:
    """A piece of shared memory, open to be read. Never mapped: a sender that cuts it short would end the engine.

    Raises:
        BadRequest: it is not there, or has another size.
    """

    def __init__(self, place: Place) -> None:
        self._name, self.size = place.name, place.size
        try:
            self._descriptor = os.open(SHARED + place.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise BadRequest(
                f"shared memory {place.name}: {error.strerror}: the sender must keep its tensors until the answer "
                "comes, on this machine"
            ) from None
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != place.size + HEADER:
            os.close(self._descriptor)
            raise BadRequest(f"shared memory {place.name} has {found.st_size} bytes, expected {place.size + HEADER}")

    def read(self, start: int, size: int) -> Tensor:
        """A copy of these bytes."""
        values = torch.empty(size, dtype=torch.uint8)
        view, done = values.numpy().data, 0
        while done < size:
            count = os.preadv(self._descriptor, [view[done:]], HEADER + start + done)
            if not count:
                raise BadRequest(f"shared memory {self._name} has shrunk")
            done += count
        return values

    def settle(self) -> None:
        """Nothing: what was read is there."""

    def close(self) -> None:
        os.close(self._descriptor)


def device_handle(record: Made) -> _lent.Handle:
    """What a handle of a device's memory says. Raises BadRequest.

    That the memory is as long as it says is believed: no driver tells. Who may change weights may do this.
    """
    if len(record.args) != 15:
        raise BadRequest(f"a handle of a device's memory has {len(record.args)} parts, expected 15")
    _, shape, stride, offset, _, dtype, device, handle, size, start, _, counter, count_at, event, wait = record.args
    if not isinstance(dtype, Named) or dtype.name not in DTYPES:
        raise BadRequest("the payload has a tensor of no known type")
    if not isinstance(handle, bytes) or not isinstance(event, bytes) or max(len(handle), len(event)) > MOST_HANDLE:
        raise BadRequest("a handle of a device's memory that is none")
    found = _lent.Handle(
        shape=shape_in(shape), stride=shape_in(stride), offset=count_in(offset), dtype=dtype.name,
        device=device if isinstance(device, str) else "", memory=handle, size=count_in(size), start=count_in(start),
        counter=_shared_name(counter).encode(), counter_at=count_in(count_at), event=event, wait=bool(wait),
    )  # fmt: skip
    place = Place("", found.size, found.dtype, found.offset, found.shape, found.stride)
    if len(place.shape) != len(place.stride):
        raise BadRequest(f"a tensor of shape {list(place.shape)} has {len(place.stride)} strides")
    if 0 not in place.shape and place.last * found.itemsize > found.size:
        raise BadRequest(f"a tensor of shape {list(place.shape)} lies outside of its memory")
    return found
