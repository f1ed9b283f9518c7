"""The stand-in for DeepEP over the stand-in for cards: tensors of the device are taken by the memory under them."""

from __future__ import annotations

from typing import Any

import deep_ep_stand_in
import torch
from torch_npu import on_device, on_host


def _mapped(x: Any, turn: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return turn(x)
    if isinstance(x, list | tuple):
        return type(x)(_mapped(one, turn) for one in x)
    return x


def _down(x: torch.Tensor) -> torch.Tensor:
    assert x.device.type == "npu", "rows are moved between cards"
    return on_host(x)


def _over(name: str) -> Any:
    plain = getattr(deep_ep_stand_in.Buffer, name)

    def call(self: Any, *given: Any, **more: Any) -> Any:
        handle = given[-1] if isinstance(given[-1], _Handle) else None
        given = given if handle is None else (*given[:-1], handle.value)
        down = tuple(one if one is getattr(handle, "value", self) else _mapped(one, _down) for one in given)
        found = plain(self, *down, **{key: _mapped(one, _down) for key, one in more.items()})
        places = {"dispatch": 4, "low_latency_dispatch": 2}
        return type(found)(
            _Handle(one) if at == places.get(name) else _mapped(one, on_device) for at, one in enumerate(found)
        )

    return call


class _Handle:
    """What belongs to one call and comes back with another, as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Buffer(deep_ep_stand_in.Buffer):
    get_dispatch_layout = _over("get_dispatch_layout")
    dispatch = _over("dispatch")
    combine = _over("combine")
    low_latency_dispatch = _over("low_latency_dispatch")
    low_latency_combine = _over("low_latency_combine")
