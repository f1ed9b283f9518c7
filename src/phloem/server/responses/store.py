"""Responses that can be asked for again, and gone on from: bounded in number and size, oldest out first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phloem.core.errors import NotFound, QueueFull
from phloem.server.responses.convert import size_of

if TYPE_CHECKING:
    import asyncio

    from phloem.server.chat.body import Message
    from phloem.server.responses.log import EventLog
    from phloem.server.responses.write import ResponseAnswer

MAX_RESPONSES = 4096
MAX_BYTES = 128 * 1024 * 1024  # of all conversations, written as JSON, and of the events that are kept


@dataclass(slots=True, eq=False)
class Stored:
    """`messages`: the conversation without instructions, the answer included once there is one."""

    answer: ResponseAnswer
    messages: list[Message]
    items: list[dict[str, Any]]  # the input, as `input_items` shows it
    size: int = 0
    log: EventLog | None = None  # of a background response that is streamed

    @property
    def running(self) -> bool:
        return self.answer.status in ("queued", "in_progress")


@dataclass(slots=True)
class ResponseStore:
    """Used in the event loop alone."""

    max_responses: int = MAX_RESPONSES
    max_bytes: int = MAX_BYTES
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # of background responses: nobody else holds them
    _stored: OrderedDict[str, Stored] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    def put(self, entry: Stored) -> None:
        """Keep a response, or keep it with what has changed; the oldest that have ended make room.

        Raises:
            QueueFull: everything in the store still runs.
        """
        key = entry.answer.id
        old = self._stored.pop(key, None)
        self._bytes -= old.size if old is not None else 0
        entry.size = size_of(entry.messages, entry.items, entry.answer.output)
        entry.size += entry.log.size if entry.log is not None else 0
        for other in [name for name, item in self._stored.items() if not item.running]:
            if len(self._stored) < self.max_responses and self._bytes + entry.size <= self.max_bytes:
                break
            self._drop(other)
        if len(self._stored) >= self.max_responses:
            raise QueueFull(f"{len(self._stored)} responses are in progress")
        self._stored[key] = entry
        self._bytes += entry.size

    def get(self, key: str) -> Stored:
        """Raises NotFound."""
        entry = self._stored.get(key)
        if entry is None:
            message = f"there is no response {key!r:.200}: it was never stored, or has made room for newer ones"
            raise NotFound(message, param="response_id", code="response_not_found")
        self._stored.move_to_end(key)
        return entry

    def delete(self, key: str) -> None:
        """Raises NotFound."""
        self.get(key)
        self._drop(key)

    def _drop(self, key: str) -> None:
        self._bytes -= self._stored.pop(key).size
