"""What the gateway reads of a request: the model, how much work it will be, and what its prompt begins with.

Bodies are skimmed, not understood: what is deep inside stays bytes (`msgspec.Raw`), and a body that cannot be read is
passed on for a server to refuse.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

PIECE = 128  # bytes of a prompt that are compared at once
MOST_PIECES = 16_384
BYTES_A_TOKEN = 4.0
USUAL_OUTPUT = 256.0
SMALL = 64.0  # tokens of what is no prompt

Headers = list[tuple[bytes, bytes]]
# Where a prompt may be, in the order in which templates render it.
GENERATES = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses", "/v1/messages", "/v1/embeddings",
     "/v1/rerank", "/v2/rerank", "/v1/score", "/v1/classify", "/rerank", "/score", "/encode", "/classify")
)  # fmt: skip
_EMPTY = msgspec.Raw(b"")
_MOST_OUTPUT = 1 << 30  # tokens; a number of a hundred digits is no float
_FIELD = b'name="model"'
_VALUE = re.compile(rb"(?:\r\n[^\r\n]{1,200}){0,8}\r\n\r\n([^\r\n]{1,300})\r\n--")
_MOST_FIELDS = 8  # of this name that are looked at: a file may be full of them
_PRIORITY = re.compile(rb"-?[0-9]{1,9}")


class _Sampling(msgspec.Struct):
    max_new_tokens: Any = None


class _Body(msgspec.Struct):
    model: Any = None
    messages: msgspec.Raw = _EMPTY
    prompt: msgspec.Raw = _EMPTY
    text: msgspec.Raw = _EMPTY
    input_ids: msgspec.Raw = _EMPTY
    input: msgspec.Raw = _EMPTY
    system: msgspec.Raw = _EMPTY
    instructions: msgspec.Raw = _EMPTY
    tools: msgspec.Raw = _EMPTY
    query: msgspec.Raw = _EMPTY
    documents: msgspec.Raw = _EMPTY
    previous_response_id: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    sampling_params: msgspec.Raw = _EMPTY
    cache_salt: Any = None
    lora_path: Any = None
    priority: Any = None
    user: Any = None
    n: Any = None


_skim = msgspec.json.Decoder(_Body).decode
_ids = msgspec.json.Decoder(list[int]).decode
_sampling = msgspec.json.Decoder(_Sampling).decode


@dataclass(slots=True)
class Ask:
    """A request as policies see it. `tokens` and `output` are predictions."""

    path: str
    model: str = ""
    tokens: float = SMALL
    output: float = 0.0
    session: str = ""
    target: str = ""  # the worker that the client names
    priority: int = 0
    prompt: bytes = b""  # what is compared with other prompts
    salt: str = ""
    ids: list[int] | None = None  # the prompt itself, where it is known in tokens
    stored: bool = False  # it is about something that one server keeps: those that do not know it are passed over
    _pieces: list[int] | None = field(default=None, repr=False)

    @property
    def pieces(self) -> list[int]:
        """For each piece of the prompt a number that stands for everything up to its end; of this process alone."""
        if self._pieces is None:
            at, data, found = hash((self.model, self.salt)), self.prompt, list[int]()
            whole = min(len(data) // PIECE, MOST_PIECES)
            for start in range(0, whole * PIECE, PIECE):
                at = hash((at, data[start : start + PIECE]))
                found.append(at)
            self._pieces = found
        return self._pieces


def read(path: str, headers: Headers, body: bytes | bytearray, session_headers: Sequence[bytes]) -> Ask:
    """Never raises: what cannot be read counts as a small request for any model."""
    ask = Ask(path, stored=path.startswith("/v1/responses/") and path != "/v1/responses/input_tokens")
    form = False
    for name, value in headers:
        if name == b"content-type":
            form = value.lower().startswith(b"multipart/form-data")
        elif name in session_headers:
            ask.session = value.decode("latin-1")
        elif name == b"x-worker" or name == b"x-smg-target-worker":
            ask.target = value.decode("latin-1")
        elif name == b"x-priority" and _PRIORITY.fullmatch(value):
            ask.priority = _clipped(int(value))
    if not body:
        return ask
    if form:
        ask.model = _in_form(body)
        return ask
    try:
        found = _skim(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ask
    _fill(ask, found)
    return ask


def _in_form(body: bytes | bytearray) -> str:
    """The model that a form names, as those with files do: its field may stand behind them."""
    at = -1
    for _ in range(_MOST_FIELDS):
        at = body.find(_FIELD, at + 1)
        found = _VALUE.match(body, at + len(_FIELD)) if at >= 0 else None
        if at < 0 or found:
            return found[1].decode("utf-8", "replace") if found else ""
    return ""


def _fill(ask: Ask, body: _Body) -> None:
    ask.model = body.model if isinstance(body.model, str) else ""
    if ask.path not in GENERATES:
        return
    ask.prompt = b"".join(
        bytes(part)
        for part in (body.tools, body.system, body.instructions, body.messages, body.prompt, body.text, body.input_ids,
                     body.input, body.query, body.documents)
        if _head(part, 4) not in (b"", b"null")
    )  # fmt: skip
    ask.salt = "\0".join(part for part in (body.cache_salt, body.lora_path) if isinstance(part, str))
    ask.tokens = max(len(ask.prompt) / BYTES_A_TOKEN, 1.0)
    for part in (body.prompt, body.input_ids):
        if _head(part, 1) == b"[":
            _take_ids(ask, bytes(part))
    ask.output = _output(body)
    if isinstance(body.priority, int):
        ask.priority = _clipped(body.priority)
    if not ask.session and isinstance(body.user, str):
        ask.session = body.user
    ask.stored = isinstance(body.previous_response_id, str)


def _take_ids(ask: Ask, part: bytes) -> None:
    try:
        ask.ids = _ids(part)
    except msgspec.DecodeError:
        return  # several prompts, or texts
    ask.tokens = max(float(len(ask.ids)), 1.0)


def _output(body: _Body) -> float:
    """Predicted tokens of the answer: as many as are allowed, or as many as are usual."""
    asked = [body.max_tokens, body.max_completion_tokens, body.max_output_tokens]
    if _head(body.sampling_params, 1) == b"{":
        with contextlib.suppress(msgspec.DecodeError):
            asked.append(_sampling(bytes(body.sampling_params)).max_new_tokens)
    limits = [float(min(value, _MOST_OUTPUT)) for value in asked if isinstance(value, int) and value >= 0]
    count = body.n if isinstance(body.n, int) and 1 <= body.n <= 128 else 1
    return min([USUAL_OUTPUT, *limits]) * count


def _clipped(priority: int) -> int:
    return max(-100, min(100, priority))


def _head(part: msgspec.Raw, count: int) -> bytes:
    """Its first bytes, without a copy of the rest."""
    return bytes(memoryview(part)[:count])
