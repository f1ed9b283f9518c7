"""`torch_npu.npu`, also as `torch.npu`: one device of 4 GiB, its memory counted, its streams in order at once."""

from __future__ import annotations

import contextlib
import threading
import types
from collections import Counter
from collections.abc import Generator
from typing import Any

import torch

TOTAL = 4 << 30
DEVICE = torch.device("privateuseone", 0)  # its name before the backend has one
USED: Counter[str] = Counter()  # how often which part of the face was called
# By the address of a tensor of the device: it, weakly, and the tensor of the host over the same memory. Attributes of a
# tensor do not last: where Python's part of one is in a cycle of garbage, torch makes it anew.
_kept: dict[int, tuple[Any, torch.Tensor]] = {}
_C: Any = torch._C
_memory = {"reserved": 0, "peak": 0}
_here = threading.local()


def keep(device: torch.Tensor, host: torch.Tensor) -> None:
    """Know the host's tensor for as long as there is the device's."""
    _kept[device._cdata] = _C._WeakTensorRef(device), host
    if len(_kept) % 512 == 0 or host.nbytes >= 1 << 16:  # small ones are counted when somebody asks
        memory_allocated()


def host_of(device: torch.Tensor) -> torch.Tensor:
    return _kept[device._cdata][1]


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:  # pyright: ignore[reportUnusedFunction]
    return False


def manual_seed_all(seed: int) -> None: ...


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    USED["set_device"] += 1


def get_device_name(device: Any = None) -> str:
    return "Ascend stand-in"


def get_device_properties(device: Any = None) -> Any:
    return types.SimpleNamespace(name=get_device_name(device), total_memory=TOTAL)


def is_bf16_supported() -> bool:
    return True


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return TOTAL - memory_reserved(), TOTAL


def memory_allocated(device: Any = None) -> int:
    """Bytes in which tensors lie now. Forgets those that are gone."""
    for address, (one, _) in list(_kept.items()):
        if one.expired():
            _kept.pop(address, None)
    memory = [host.untyped_storage() for _, host in list(_kept.values())]
    taken = sum({one.data_ptr(): one.nbytes() for one in memory}.values())
    _memory["reserved"] = max(_memory["reserved"], taken)
    _memory["peak"] = max(_memory["peak"], _memory["reserved"])
    return taken


def memory_reserved(device: Any = None) -> int:
    memory_allocated()
    return _memory["reserved"]


def max_memory_reserved(device: Any = None) -> int:
    memory_allocated()
    return _memory["peak"]


def reset_peak_memory_stats(device: Any = None) -> None:
    _memory["peak"] = _memory["reserved"]


def empty_cache() -> None:
    USED["empty_cache"] += 1
    _memory["reserved"] = 0
    memory_allocated()


def synchronize(device: Any = None) -> None:
    USED["synchronize"] += 1


class Event:
    """What it waits for has happened: every op is computed when it is given."""

    recorded = False

    def record(self, stream: Any = None) -> None:
        USED["record"] += 1
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        return True

    def synchronize(self) -> None:
        assert self.recorded


class Stream(torch.Stream):
    made = 0

    def __new__(cls, device: Any = None) -> Stream:
        cls.made += 1
        kind = int(_C._autograd.DeviceType.PrivateUse1)
        return super().__new__(cls, stream_id=cls.made, device_index=0, device_type=kind)

    def __init__(self, device: Any = None) -> None: ...

    def wait_event(self, event: Any) -> None:
        assert event.recorded

    def wait_stream(self, other: Any) -> None:
        USED["wait_stream"] += 1

    def synchronize(self) -> None: ...


def current_stream(device: Any = None) -> Stream:
    if not hasattr(_here, "stream"):
        _here.stream = Stream()
    return _here.stream


def set_stream(chosen: Stream) -> None:
    _here.stream = chosen


@contextlib.contextmanager
def stream(chosen: Stream) -> Generator[None]:
    before, _here.stream = current_stream(), chosen
    try:
        yield
    finally:
        _here.stream = before


def record_stream(tensor: torch.Tensor, stream: Any) -> None:
    USED["record_stream"] += 1
