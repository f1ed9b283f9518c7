"""What bodies say of how soon they are to be answered, and for whom: targets, a class, a user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from phloem.core.errors import BadRequest
from phloem.core.targets import in_range

if TYPE_CHECKING:
    from phloem.client.request import Item

MOST_NAME = 256  # characters of a class or a user that count


class Promised(Protocol):
    slo_ttft_ms: float | None
    slo_itl_ms: float | None
    service_tier: str | None
    user: str | None


def promise(items: list[Item], body: Promised) -> None:
    """Tell each item. Raises BadRequest for a time that is none."""
    ttft, itl = _seconds(body.slo_ttft_ms, "slo_ttft_ms"), _seconds(body.slo_itl_ms, "slo_itl_ms")
    tier, user = (body.service_tier or "")[:MOST_NAME], (body.user or "")[:MOST_NAME]
    for item in items:
        item.ttft, item.itl, item.tier, item.user = ttft, itl, tier, user


def _seconds(milliseconds: float | None, name: str) -> float:
    if milliseconds is None:
        return 0.0
    if not in_range(milliseconds):
        raise BadRequest(f"{name} must be above 0 and at most a day, got {milliseconds}", param=name)
    return milliseconds / 1000
