"""4 bits per weight, a scale and a minimum per 32 inputs, made of dense weights while they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.quant import Method
from phloem.quant._groups import quantised

if TYPE_CHECKING:
    from phloem.kernels.ops import WeightSource


def wrap(source: WeightSource) -> WeightSource:
    return quantised(source, 4)


METHOD = Method("int4", wrap=wrap)
