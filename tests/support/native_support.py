"""Whether the native library is there."""

from __future__ import annotations

from phloem.kernels import native


def built() -> bool:
    try:
        native.runtime()
    except native.Unavailable:
        return False
    return True
