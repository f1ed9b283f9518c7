"""Sessions: prompts that go on from an earlier request of the same session, as trees of token ids.

A session holds what was asked and answered; the computed KV is found again by its tokens, as for every prompt. A
streaming session is one line instead of a tree: each request goes on from the last that ended well, one at a time. Used
in the event loop alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phloem.client.request import SessionStep, new_id
from phloem.core.errors import BadRequest, NotFound
from phloem.core.messages import pack_ids, unpack_ids

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SESSIONS = 4096
MAX_BYTES = 256 * 1024 * 1024  # of all token ids, 4 bytes each
MAX_ID = 256  # characters


@dataclass(slots=True)
class _Node:
    prompt: bytes
    output: bytes | None = None  # None while the request runs
    children: set[str] = field(default_factory=set[str])

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.output or b"")


@dataclass(slots=True)
class _Session:
    timeout: float | None
    used: float
    streaming: bool = False
    nodes: dict[str, _Node] = field(default_factory=dict[str, _Node])


class Sessions:
    """All open sessions. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, session_id: str | None = None, timeout: float | None = None, streaming: bool = False) -> str:
        """A new session's id. With `timeout` it closes by itself after so many seconds without a request.

        Raises:
            BadRequest: the id is taken, or there are too many sessions.
        """
        self._expire()
        key = session_id or new_id()
        if len(key) > MAX_ID:
            raise BadRequest(f"session_id has {len(key)} characters, at most {MAX_ID}", param="session_id")
        if key in self._sessions:
            raise BadRequest(f"session {key!r} is open already", param="session_id")
        if len(self._sessions) >= MAX_SESSIONS:
            raise BadRequest(f"{MAX_SESSIONS} sessions are open: close some", param="session_id")
        self._sessions[key] = _Session(timeout, self._clock(), streaming)
        return key

    def close(self, session_id: str) -> None:
        """Forget a session; its requests in flight go on. Raises NotFound."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            raise NotFound(f"there is no session {session_id!r:.300}", param="session_id", code="session_not_found")
        self._bytes -= sum(node.size for node in session.nodes.values())

    def extend(self, step: SessionStep, ids: list[int], bos: int | None) -> list[int]:
        """The whole prompt of a request whose own tokens are `ids`; a BOS in front of a continuation is left out.

        Raises:
            BadRequest: the session or request is unknown, still runs, or the store is full; or a streaming session is
                asked for anything but going on.
        """
        session = self._get(step.id)
        if self._bytes > MAX_BYTES:
            raise BadRequest("the sessions hold too many tokens: close some", param="session_params.id")
        node = self._last(session, step) if session.streaming else self._named(session, step)
        if node is None:
            return ids
        known = node.prompt if step.drop_previous_output else node.prompt + (node.output or b"")
        before: list[int] = unpack_ids(known).tolist()
        if step.offset:
            if not -len(before) <= step.offset <= len(before):
                message = f"offset {step.offset} is beyond the {len(before)} tokens of request {step.rid!r}"
                raise BadRequest(message, param="session_params.offset")
            before = before[: step.offset]
        return before + (ids[1:] if ids and ids[0] == bos else ids)

    def check_several(self, steps: list[SessionStep]) -> None:
        """Continuations that are to run together. Raises BadRequest: more than one of a streaming session."""
        names = [step.id for step in steps if self._get(step.id).streaming]
        if len(set(names)) < len(names):
            message = "a streaming session takes one request, with one continuation (n 1), at a time"
            raise BadRequest(message, param="session_params")

    def _named(self, session: _Session, step: SessionStep) -> _Node | None:
        if step.rid is None:
            return None
        node = session.nodes.get(step.rid)
        if node is None:
            raise BadRequest(f"session {step.id!r} has no request {step.rid!r:.300}", param="session_params.rid")
        if node.output is None:
            raise BadRequest(f"request {step.rid!r} of session {step.id!r} still runs", param="session_params.rid")
        return node

    def _last(self, session: _Session, step: SessionStep) -> _Node | None:
        for name in ("replace", "drop_previous_output", "offset"):
            if getattr(step, name):
                raise BadRequest(f"a streaming session takes no {name}", param=f"session_params.{name}")
        nodes = list(session.nodes.values())
        if any(node.output is None for node in nodes):
            raise BadRequest(f"a request of the streaming session {step.id!r} still runs", param="session_params.id")
        return nodes[-1] if nodes else None

    def begin(self, step: SessionStep, rid: str, prompt: list[int], choice: int = 0) -> None:
        """A request of the session has been submitted; each continuation (`choice`) is one of its own."""
        session = self._get(step.id)
        if step.replace and choice == 0:
            gone = list(session.nodes) if step.rid is None else self._below(session, step.rid)
            for key in gone:
                self._bytes -= session.nodes.pop(key).size
        session.used = self._clock()
        self._put(session, rid, _Node(pack_ids(prompt)))
        parent = session.nodes.get(step.rid) if step.rid is not None else None
        if parent is not None:
            parent.children.add(rid)

    def end(self, step: SessionStep, rid: str, output: list[int] | None) -> None:
        """It has ended with this output; None: it failed or was aborted, and nothing can go on from it."""
        session = self._sessions.get(step.id)
        node = session.nodes.get(rid) if session is not None else None
        if session is None or node is None or node.output is not None:
            return
        if output is None:
            self._bytes -= session.nodes.pop(rid).size
            return
        session.used = self._clock()
        node.output = pack_ids(output)
        self._bytes += len(node.output)
        if session.streaming:
            self._bytes -= sum(old.size for old in session.nodes.values() if old is not node)
            session.nodes = {"": node}  # under no request's name: one may come again, and fail

    def _get(self, key: str) -> _Session:
        self._expire()
        session = self._sessions.get(key)
        if session is None:
            raise BadRequest(f"there is no session {key!r:.300}: open it first", param="session_params.id")
        return session

    def _put(self, session: _Session, rid: str, node: _Node) -> None:
        old = session.nodes.get(rid)
        self._bytes += node.size - (old.size if old is not None else 0)
        session.nodes[rid] = node

    def _below(self, session: _Session, rid: str) -> list[str]:
        """Every request that went on from this one, however far."""
        found: list[str] = []
        start = session.nodes.get(rid)
        todo = list(start.children) if start is not None else []
        while todo:
            key = todo.pop()
            node = session.nodes.get(key)
            if node is not None and key not in found:
                found.append(key)
                todo += node.children
        return found

    def _expire(self) -> None:
        now = self._clock()
        late = [
            key
            for key, session in self._sessions.items()
            if session.timeout is not None and now - session.used > session.timeout
        ]
        for key in late:
            self.close(key)
