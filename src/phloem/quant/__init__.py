"""Weight formats: the file name is the method of `--quantization`.

A method's file has `wrap(source) -> WeightSource`: the source as the op table shall see it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.ops import WeightSource

METHODS: Registry[Callable[[WeightSource], WeightSource]] = Registry("phloem.quant", "quantisation method", "wrap")
