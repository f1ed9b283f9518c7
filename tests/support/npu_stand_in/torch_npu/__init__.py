"""A stand-in for torch_npu: a device `npu` of torch, in Python alone, whose memory is the host's.

Each op of torch is computed by torch's own for processors, over views of the same memory. What real devices refuse is
refused: an op of tensors of both machines, and NumPy over a tensor of the device. Importing this makes the device, once
a process. The names are those that torch_npu documents; fused ops compute what its documentation says of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from npu_fused import CALLS, npu_add_rms_norm, npu_rms_norm, npu_rotary_mul, npu_swiglu
from torch.utils import backend_registration

from torch_npu import npu

__all__ = ["CALLS", "npu", "npu_add_rms_norm", "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]

__version__ = "0.stand-in"
EVERYWHERE = "CompositeExplicitAutograd"
_C: Any = torch._C
_HOST = _C.DispatchKeySet(_C.DispatchKey.CPU)
_SET = torch.ops.aten.set_.source_Storage_storage_offset


def on_device(host: torch.Tensor) -> torch.Tensor:
    """A tensor of the device over the memory of one of the host."""
    with torch.inference_mode(host.is_inference()):
        made = _C._acc.create_empty_tensor([0], host.dtype)
        _lay(made, host)
    npu.keep(made, host)
    return made


def on_host(x: torch.Tensor) -> torch.Tensor:
    return npu.host_of(x) if x.device.type == "npu" else x


def _lay(device: torch.Tensor, host: torch.Tensor) -> None:
    """Have a tensor of the device be where the one of the host is, as it is."""
    memory = host.untyped_storage()
    there = _C._construct_storage_from_data_pointer(memory.data_ptr(), npu.DEVICE, memory.nbytes())
    _SET.redispatch(_HOST, device, there, host.storage_offset(), list(host.shape), list(host.stride()))


def _tensor_of(argument: Any, given: Any) -> Any:
    """Numbers that torch has wrapped as tensors come here as numbers."""
    wanted = isinstance(argument.type, torch.TensorType) and isinstance(given, int | float | bool | complex)
    return torch.tensor(given) if wanted else given


def _convolution(*args: Any) -> torch.Tensor:
    return _compute(torch.ops.aten.convolution.default, *args)


def _down(x: Any, given: dict[int, Any]) -> Any:
    """What stands for it on the host; `given`: tensors of the device by those of the host."""
    if isinstance(x, torch.Tensor):
        if x.device.type == "npu":
            host = on_host(x)
            given[id(host)] = x
            return host
        if x.dim():
            raise RuntimeError("a tensor of the host among those of the device")
    if isinstance(x, list | tuple):
        return [_down(one, given) for one in x]
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "npu" else x


def _up(x: Any, given: dict[int, Any]) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(_up(one, given) for one in x)
    return (given[id(x)] if id(x) in given else on_device(x)) if isinstance(x, torch.Tensor) else x


def _compute(op: Any, *args: Any, **options: Any) -> Any:
    """Any op without a form of its own below: by the host's."""
    given: dict[int, torch.Tensor] = {}
    on = [_down(_tensor_of(argument, one), given) for argument, one in zip(op._schema.arguments, args, strict=False)]
    named = {name: _down(one, given) for name, one in options.items() if name != "pin_memory"}
    out = _up(op(*on, **named), given)
    for device in given.values():
        if device.shape != on_host(device).shape:  # ops resize what they are given for their results
            _lay(device, on_host(device))
    return out


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    on_host(target).copy_(on_host(source))
    return target


def _value(x: torch.Tensor) -> Any:
    return on_host(x).item()


def _views() -> Iterator[tuple[str, Any]]:
    """Ops for which torch has one form for every device, which may give another tensor over the same memory that
    nobody knows here: those whose result lies in what they are given."""
    for qualified in _C._dispatch_get_all_op_names():
        space, _, name = qualified.partition("::")
        if space != "aten" or not _C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd"):
            continue
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aliased = [out.alias_info for out in op._schema.returns]
        if packet == "_unsafe_view" or any(info is not None and not info.is_write for info in aliased):
            yield name, op


def _make_device() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=npu)
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_compute, "PrivateUse1")
    own.impl("_copy_from", _copy_from, "PrivateUse1")
    own.impl("_local_scalar_dense", _value, "PrivateUse1")
    own.impl("convolution_overrideable", _convolution, "PrivateUse1")
    for name, op in _views():
        own.impl(name, partial(_compute, op), "PrivateUse1")
    own.impl("record_stream", npu.record_stream, "PrivateUse1")
    return [every, own]


def _without_pinning() -> None:
    """Pinned memory of the host needs an allocator of the device's own, which Python cannot give."""
    plain = torch.empty

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        npu.USED["pinned"] += pin_memory
        return plain(*size, **options)

    torch.empty = empty


def npu_fusion_attention(*args: Any, **options: Any) -> Any:
    """What transformers imports where it finds this package."""
    raise NotImplementedError("the stand-in has no attention of its own")


class _Generator(torch.Generator):
    """One of the device is one of the host, where all is drawn; torch makes none for a device in Python."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        kind = torch.device(device).type
        return super().__new__(cls, "cpu" if kind == "npu" else device)


_LIBRARIES = _make_device()
_without_pinning()
torch.Generator = _Generator  # type: ignore[misc]
