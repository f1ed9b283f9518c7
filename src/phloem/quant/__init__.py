"""Weight formats: the file name is the method of `--quantization`.

A method's file has `METHOD`. Some methods make their format of dense weights while these are loaded (`wrap`); others
read a format that checkpoints store, in several tensors for each matrix (`companions`, `join`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from phloem.kernels.ops import WeightSource
    from phloem.quant._source import Source

METHODS: Registry[Method] = Registry("phloem.quant", "quantisation method", "METHOD")


def _nothing(name: str) -> dict[str, str]:
    del name
    return {}


@dataclass(frozen=True)
class Method:
    """One weight format.

    Attributes:
        wrap: the source of a matrix as the op table shall see it.
        companions: for a matrix called `x.weight`, the tensors that hold it: {what each is: its name in the
            checkpoint}, {"scales": "x.scales", ...}. {}: only ever stored plainly. A checkpoint may leave some matrices
            plain: what the file holds decides.
        join: (matrix's name, {what it is: tensor}) -> the matrix as one source, in its own rows and columns. It reads
            what is asked of it, so a share of the matrix costs a share of each companion.
    """

    name: str
    wrap: Callable[[WeightSource], WeightSource] | None = None
    companions: Callable[[str], dict[str, str]] = _nothing
    join: Callable[[str, Mapping[str, Source]], Source] | None = None


def method(name: str | None) -> Method | None:
    """The method of that name; None for none.

    Raises:
        ConfigError: for an unknown name, with the known ones.
    """
    if name is None:
        return None
    found: Method = METHODS.get(name)
    return found
