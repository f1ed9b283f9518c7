"""Formats of texts as patterns, where a grammar engine's own admit what the format does not."""

from __future__ import annotations

from typing import Any

_LEAP = "(0[48]|[2468][048]|[13579][26])"  # the last two digits of a year, or its century's
_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # not 0000, which most readers refuse
_DAYS = (
    f"{_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
DATE = f"({_DAYS}|([0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)"
TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
PATTERNS = {"date": DATE, "time": TIME, "date-time": f"{DATE}T{TIME}"}


def spell_out(nodes: list[tuple[str, Any]]) -> None:
    """Formats that have a pattern here become it, in place."""
    for _, node in nodes:
        pattern = PATTERNS.get(node["format"]) if isinstance(node, dict) and "format" in node else None
        if pattern is None:
            continue
        del node["format"]
        if "pattern" in node:
            node["allOf"] = [*node.get("allOf", []), {"pattern": f"^{pattern}$"}]
        else:
            node["pattern"] = f"^{pattern}$"
