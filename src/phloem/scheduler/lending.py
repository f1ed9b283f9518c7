"""Adapters of requests: which they are lent, and when they are lent another one of the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.adapters import Lender
    from phloem.core.late import Late
    from phloem.scheduler.state import Request


class Lending:
    """`place`: where a request's prefixes are looked for, whose adapter is another one; `wait_for`: as the scheduler's,
    by the request's id."""

    def __init__(self, lender: Lender, place: Callable[[Request], None], wait_for: Callable[[str, Late], None]) -> None:
        self._lender, self._place, self._wait_for = lender, place, wait_for

    def renew(self, request: Request) -> None:
        """It will compute everything again: with its adapter as of the base's weights that there are by now."""
        old = request.adapter
        if old is None:
            return
        request.adapter = adapter = self._lender.renewed(old)
        if adapter is old:
            return
        self._place(request)
        if old in request.waits:
            request.waits = tuple(adapter if late is old else late for late in request.waits)
        else:
            self._wait_for(request.id, adapter)


def lend(lender: Lender | None, request: Request) -> None:
    """The adapter that it asks for, which it has until it ends. Raises BadRequest: there is none of this name."""
    if lender is None:
        raise BadRequest("adapters are served with --enable-lora", param="lora_path", code="not_supported")
    request.adapter = adapter = lender.lend(request.submit.adapter)
    if not adapter.ready() or adapter.error is not None:
        request.waits += (adapter,)
