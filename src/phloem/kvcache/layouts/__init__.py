"""How the memory of a layer lies in tensors: a file for each kind of `core.memory.MemorySpec`.

Each file has `SPEC`, the spec's type, and `Layout`, made of such a spec and the type of the KV cache:

- `bytes`: what one unit takes, a token of pages or a slot of state;
- `make(count, page_size, device) -> Tensors`: zeroed storage for so many pages, or slots.

Storage starts as zeros, because a gathered page may be read where it is masked, and 0 times NaN is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from phloem.utils.registry import Registry

if TYPE_CHECKING:
    import torch

    from phloem.core.memory import MemorySpec
    from phloem.kvcache.layouts._storage import Tensors

LAYOUTS: Registry[Any] = Registry("phloem.kvcache.layouts", "memory layout", "Layout")


class Layout(Protocol):
    bytes: int

    def make(self, count: int, page_size: int, device: torch.device) -> Tensors: ...


def layout_of(spec: MemorySpec, dtype: torch.dtype) -> Layout:
    """The layout of a layer's memory, found by the type of its spec.

    Raises:
        TypeError: if no file has such a spec.
    """
    for name in LAYOUTS.names():
        module = LAYOUTS.module(name)
        if isinstance(spec, module.SPEC):
            return module.Layout(spec, dtype)
    raise TypeError(f"no layout for {type(spec).__name__}; there are: {', '.join(LAYOUTS.names())}")
