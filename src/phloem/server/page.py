"""The files of the page at `/`, as they are sent."""

from __future__ import annotations

import functools
from pathlib import Path

FOLDER = Path(__file__).parent / "playground"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = ("index.html", "style.css", "app.js", "api.js", "draw.js", "live.js", "markdown.js", "icon.svg")
# Sent without an API key: they hold nothing but the page, which asks for the key itself.
PATHS = frozenset({"/", *(f"/playground/{name}" for name in FILES)})
HEADERS = {
    # The page loads nothing from elsewhere, runs no inline script and is framed by nobody.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@functools.cache
def read(name: str) -> bytes:
    """One of `FILES`."""
    return (FOLDER / name).read_bytes()


def media_type(name: str) -> str:
    return MEDIA_TYPES[Path(name).suffix]
