"""8 bits per weight and a scale per 32 inputs, made of dense weights while they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.quant import Method
from phloem.quant._groups import quantised

if TYPE_CHECKING:
    from phloem.kernels.ops import WeightSource


def wrap(source: WeightSource) -> WeightSource:
    return quantised(source, 8)


METHOD = Method("int8", wrap=wrap, exact=True)
