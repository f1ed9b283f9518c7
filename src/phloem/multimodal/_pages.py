"""Pages of a PDF as pictures, by PDFium (pypdfium2, an optional package).

PDFium is not thread-safe: one thread alone calls what is here (`_reader.py`).
"""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

POINTS = 72  # of an inch, in which a page's size is given
DPI = 144
LONGEST = 2048  # pixels of a page's longer side
WHOLE_SECONDS = 20.0  # of work for one document; a page that was begun is finished


def available() -> bool:
    """Whether documents can be read here."""
    return importlib.util.find_spec("pypdfium2") is not None


def pages(data: bytes, where: str, most: int) -> Iterator[Any]:
    """Pillow images in RGB, one after the other.

    Raises:
        BadRequest: it is no PDF, is broken, encrypted or empty, or has more than `most` pages; nothing was drawn then.
    """
    if b"%PDF-" not in data[:1024]:
        raise _bad(where, "no PDF document")
    import pypdfium2 as pdfium  # optional: extra `media`

    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        locked = "password" in str(error).lower()
        raise _bad(where, "the document is encrypted" if locked else "the document is broken") from None
    deadline = time.monotonic() + WHOLE_SECONDS
    try:
        count = len(document)
        if count < 1:
            raise _bad(where, "the document has no pages")
        if count > most:
            reason = f"{count} pages, {most} are the most (--limit-mm-data-per-request)"
            raise _bad(where, reason, "too_many_pages")
        for number in range(count):
            if time.monotonic() > deadline:
                raise _bad(where, f"drawing the document takes more than {WHOLE_SECONDS:g} s", "too_large")
            try:
                yield _drawn(document[number])
            except pdfium.PdfiumError:
                raise _bad(where, f"page {number + 1} is broken") from None
    finally:
        document.close()


def _drawn(page: Any) -> Any:
    width, height = page.get_size()
    longest = max(width, height)
    scale = min(DPI / POINTS, LONGEST / longest) if longest > 0 else 1.0
    bitmap = page.render(scale=scale)
    image = bitmap.to_pil().convert("RGB")
    bitmap.close()
    page.close()
    return image


def _bad(where: str, why: str, code: str = "bad_document") -> BadRequest:
    return BadRequest(f"{where}: {why}", param=where, code=code)
