"""Custom logit processors: one file each, the file's name is the name that requests ask for.

A client names a processor and sends parameters; nothing that it sends is executed. Each file has one class
`LogitProcessor`, made once per request and called before each of its tokens is chosen, after penalties, bias and masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest, ConfigError
from phloem.engine.processors._base import Processor
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

PROCESSORS: Registry[type[Processor]] = Registry("phloem.engine.processors", "logit processor", "LogitProcessor")


def make(wanted: Mapping[str, dict[str, Any]], vocab_size: int) -> list[Processor]:
    """The processors that a request names, with their parameters.

    Raises:
        BadRequest: a name that is not registered, or parameters that a processor does not take.
    """
    made: list[Processor] = []
    for name, params in wanted.items():
        try:
            kind = PROCESSORS.get(name)
        except ConfigError as error:
            raise BadRequest(error.message, param="custom_logit_processor") from None
        made.append(kind(params, vocab_size))
    return made


__all__ = ["PROCESSORS", "Processor", "make"]
