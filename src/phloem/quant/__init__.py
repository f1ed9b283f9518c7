"""Weight formats: the file name is the method of `--quantization`.

A method's file has `wrap(source) -> WeightSource`: the source as the op table shall see it.
"""

from __future__ import annotations

from phloem.utils.registry import Registry

METHODS = Registry("phloem.quant", "quantisation method")
