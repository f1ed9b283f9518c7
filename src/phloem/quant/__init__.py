"""Weight formats: the file name is the method of `--quantization`.

A method's file has `METHOD`. Some methods make their format of dense weights while these are loaded (`wrap`). Others
read a format that checkpoints store, in several tensors for each matrix: their file names the `quant_method`s that it
reads (`QUANT_METHODS`, a literal that `checkpoint/quant_config.py` takes from the source text), and `configure` makes
of what config.json says a method with `companions` and `join`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError, ModelLoadError
from phloem.quant._report import Report
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from phloem.checkpoint.quant_config import StoredFormat
    from phloem.kernels.ops import WeightSource
    from phloem.quant._source import Source

__all__ = ["METHODS", "Method", "Report", "beside", "method", "method_for"]


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
        join: (matrix's name, {what it is: tensor}, its shape) -> the matrix as one source, in its own rows and columns.
            It reads what is asked of it, so a share of the matrix costs a share of each companion.
        configure: (a checkpoint's own words on its format, where to report) -> the method that reads it. Raises
            ModelLoadError for what it cannot read, with the remedy.
        report: what became of the matrices.
        exact: `wrap` gives the same bits on every device: there is no sum in it, whose order devices choose, and no
            function that they approximate.
    """

    name: str
    wrap: Callable[[WeightSource], WeightSource] | None = None
    companions: Callable[[str], dict[str, str]] = _nothing
    join: Callable[[str, Mapping[str, Source], tuple[int, ...]], Source] | None = None
    configure: Callable[[Mapping[str, Any], Report], Method] | None = None
    report: Report | None = None
    exact: bool = False


METHODS: Registry[Method] = Registry("phloem.quant", "quantisation method", "METHOD")


def method(name: str | None) -> Method | None:
    """The method of that name; None for none.

    Raises:
        ConfigError: for an unknown name, with the known ones.
    """
    return None if name is None else METHODS.get(name.replace("-", "_"))


def method_for(name: str | None, stored: StoredFormat | None) -> Method | None:
    """How a checkpoint's weights are read, and what is made of them.

    Args:
        name: of `--quantization`.
        stored: the format that the checkpoint is in; None: plain.

    Raises:
        ConfigError: for an unknown name, or one of a format that is only read, of a checkpoint that is in another.
        ModelLoadError: for a format that is not read, with the remedy.
    """
    asked = method(name)
    if asked is not None and asked.wrap is None and (stored is None or stored.file != asked.name):
        makers = [each for each in METHODS.names() if METHODS.get(each).wrap is not None]
        found = "plain" if stored is None else stored.method
        raise ConfigError(
            f"quantization: {name} is read from checkpoints, and this one is {found}; made of 16-bit weights are "
            f"{', '.join(makers)}",
            param="quantization",
        )
    if stored is None:
        return asked
    reader = METHODS.get(stored.file)
    assert reader.configure is not None
    report = Report(stored.method)
    try:
        found = reader.configure(stored.config, report)
    except ModelLoadError as error:
        raise ModelLoadError(f"{stored.where}: {error.message}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a list for an object, a word for a number
        raise ModelLoadError(f"{stored.where}: not as {stored.method} writes it: {error}") from None
    if asked is None or asked.wrap is None or asked.name == stored.file:
        return found
    report.anew = asked.name
    return replace(found, wrap=asked.wrap, exact=asked.exact)


def beside(name: str, parts: Mapping[str, str], *, weight: bool = False) -> dict[str, str]:
    """Companions of `x.weight` by what they are: `parts` has their names behind `x.`. `weight`: itself among them."""
    stem = name.removesuffix(".weight")
    if stem == name:
        return {}
    return {**({"weight": name} if weight else {}), **{what: f"{stem}.{part}" for what, part in parts.items()}}
