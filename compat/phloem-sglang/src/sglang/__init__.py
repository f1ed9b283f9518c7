"""The names that trainers import from sglang, over Phloem's engine (`docs/phloem-sglang.md` of Phloem)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang._missing import missing, stand_alone

stand_alone(Path(__file__).resolve().parent)

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

__version__ = "0.5.23"  # the one whose names these are
__all__ = ["Engine", "ServerArgs", "__version__"]
_missing = missing(__name__)


def __getattr__(name: str) -> Any:
    """Engine and ServerArgs on first use: a trainer that sends weights needs no engine."""
    if name == "Engine":
        from sglang.srt.entrypoints.engine import Engine

        return Engine
    if name == "ServerArgs":
        from sglang.srt.server_args import ServerArgs

        return ServerArgs
    return _missing(name)
