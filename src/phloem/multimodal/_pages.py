"""Pages of a PDF as pictures, by PDFium (pypdfium2, an optional package). Work for a process of its own (`_aside.py`).

PDFium is not thread-safe, and a page of a few kilobytes may take it hours and gigabytes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from phloem.core.errors import BadRequest

POINTS = 72  # of an inch, in which a page's size is given
DPI = 144
LONGEST = 2048  # pixels of a page's longer side


def available() -> bool:
    """Whether documents can be read here."""
    return importlib.util.find_spec("pypdfium2") is not None


class Document:
    """A PDF that was opened. `count`: its pages.

    Raises:
        BadRequest: it is no PDF, is broken, encrypted or empty, or has more than `most` pages.
    """

    def __init__(self, data: bytes, where: str, most: int) -> None:
        if b"%PDF-" not in data[:1024]:
            raise _bad(where, "no PDF document")
        import pypdfium2 as pdfium  # optional: extra `media`

        self.where, self._broken = where, pdfium.PdfiumError
        try:
            self._document = pdfium.PdfDocument(data)
        except pdfium.PdfiumError as error:
            locked = "password" in str(error).lower()
            raise _bad(where, "the document is encrypted" if locked else "the document is broken") from None
        self.count = len(self._document)
        if self.count < 1:
            raise _bad(where, "the document has no pages")
        if self.count > most:
            reason = f"{self.count} pages, {most} are the most (--limit-mm-data-per-request)"
            raise _bad(where, reason, "too_many_pages")

    def drawn(self, number: int) -> Any:
        """A page as a Pillow image in RGB. Raises BadRequest."""
        try:
            return _drawn(self._document[number])
        except self._broken:
            raise _bad(self.where, f"page {number + 1} is broken") from None


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
