"""Writes the table of `docs/phloem-sglang.md`: what becomes of each setting of SGLang."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "compat" / "phloem-sglang" / "src"))

from sglang.srt._settings import table  # noqa: E402

if __name__ == "__main__":
    page = ROOT / "docs" / "phloem-sglang.md"
    text = page.read_text()
    start, end = text.index("| setting |"), re.search(r"\n\n(?!\|)", text[text.index("| setting |") :])
    rest = "" if end is None else text[start + end.start() :]
    page.write_text(text[:start] + table() + (rest or "\n"))
