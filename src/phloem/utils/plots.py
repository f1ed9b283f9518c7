"""Where pictures of figures are drawn: matplotlib, without a screen."""

from __future__ import annotations

from typing import Any

from phloem.core.errors import PhloemError


def pyplot() -> Any:
    """`matplotlib.pyplot`. Raises PhloemError: it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise PhloemError("the plot needs matplotlib: pip install 'phloem[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found
