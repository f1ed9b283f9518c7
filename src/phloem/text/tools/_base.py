"""What a tool-call parser is: text in as it arrives; plain text, started calls and pieces of their arguments out.

A parser is written as straight-line reading (generators that wait where the text ends), so how the text arrives in
chunks cannot matter. A call is announced when its arguments are complete, or already when they are longer than `HOLD`
characters and in order so far; what turns out to be no call before that comes back as the plain text it was. A forced
call is announced by its name, and one that the length limit cuts is as much of a call as there is. White space between
calls, and between text and a call, belongs to neither and is dropped.
"""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from phloem.grammar.schema.names import CONSTRAINING
from phloem.text.tools._grammar import Shape, Unspeakable, either, json_of, row, tag, triggered, without
from phloem.text.tools._parameters import kinds

HOLD = 256  # characters of arguments
MAX_NAME = 256

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields where more text is needed


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The `index`-th call of this answer begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments, which together are a JSON object as text."""

    index: int
    text: str


Event = Text | CallStart | Arguments
# Where calls stand: anywhere in the text; instead of it, so that the answer's beginning decides; or they are forced.
Place = Literal["anywhere", "instead", "forced"]


@dataclass(slots=True)
class ParsedCall:
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Parsed:
    """A whole answer: its plain text and its calls."""

    text: str = ""
    calls: list[ParsedCall] = field(default_factory=list[ParsedCall])


class Malformed(Exception):
    """What follows is no call."""


class Ended(Exception):
    """The text ends inside a call."""


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The function's name, description and parameters, in OpenAI's nested shape or bare."""
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def schema_of(function: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments. Without parameters, or with an empty list of properties and nothing
    else said, it takes none; an empty schema allows any.
    """
    found = function.get("parameters")
    if found is None or (isinstance(found, dict) and found.get("properties") == {} and not _asks(found)):
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return found if isinstance(found, dict) and found else {"type": "object"}


def _asks(schema: dict[str, Any]) -> bool:
    """Whether a schema says more than its type, and which properties there are."""
    empty = {"required"} if schema.get("required") == [] else set[str]()
    return bool((CONSTRAINING & set(schema)) - {"type", "properties"} - empty)


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolParser(ABC):
    """Base of the formats. A subclass names the markers that begin a call and reads what follows them."""

    begins: ClassVar[tuple[str, ...]]
    lead: ClassVar[str] = ""  # a character that begins a call when it is the first of the answer
    trigger: ClassVar[str] = ""  # what a model writes only to begin a call; "" where there is no such thing
    between: ClassVar[str] = "\n"  # what may part calls
    sections: ClassVar[bool] = False  # whether a frame holds all calls of the answer
    style: ClassVar[str] = "json"  # how arguments stand in the frame; else the name of a spelling as tags
    whole: ClassVar[bool] = False  # whether `structure` is of an answer with its reasoning

    def __init__(self, tools: Iterable[dict[str, Any]] = (), make_id: Callable[[], str] = new_call_id) -> None:
        self.tools = {str(function_of(tool).get("name", "")): function_of(tool) for tool in tools}
        self.calls = 0
        self.place: Place = "anywhere"
        self.loose: frozenset[str] = frozenset()  # tools whose calls are framed, but keep to no schema
        self._make_id = make_id
        self._ids = set[str]()
        self._buffer = ""
        self._at = 0  # how far the buffer is read
        self._safe = 0  # what lies before has become events
        self._closed = False
        self._cut = False
        self._said = False  # whether there was text
        self._only_text = False  # whether no call can come any longer
        self._events: list[Event] = []
        self._space = ""  # white space that may stand between text and a call
        self._after_call = False
        self._call: _Call | None = None
        longest_first = sorted(self.begins, key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._steps: Steps[None] | None = self._run()

    # The outside

    def push(self, text: str) -> list[Event]:
        """Take the next piece of the answer."""
        self._buffer += text
        return self._resume()

    def finish(self, cut: bool = False) -> list[Event]:
        """The answer has ended: nothing is held back any longer. `cut`: not by the model, maybe inside a call."""
        self._closed, self._cut = True, cut
        return self._resume()

    def parse(self, text: str) -> Parsed:
        """A whole answer at once (for a fresh parser)."""
        return collect([*self.push(text), *self.finish()])

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        """What an answer may be when calls of these tools (None: all) keep to their schemas, as a structural tag.

        `required`: there must be a call, and nothing but calls; not `parallel`: only one.

        Raises:
            Unspeakable: if the format cannot write a tool's calls so.
        """
        made: list[Shape] = []
        for name in self.chosen(names):
            frame = self.tag(name)
            if frame is None or not self.trigger:
                raise Unspeakable("this format of calls has no frame that could be enforced")
            made.append(tag(frame[0], self.written(name), frame[1]))
        return self.framed(made, required, parallel)

    def framed(self, tags: list[Shape], required: bool, parallel: bool) -> Shape:
        """These calls, in free text or (`required`) alone."""
        if required:
            return row(tags, parallel and not self.sections, self.between)
        return triggered((self.trigger,), tags, not parallel)

    def instead(self, answer: Shape, names: Iterable[str] | None = None, parallel: bool = True) -> Shape:
        """Calls of these tools, or an answer of this shape.

        Raises:
            Unspeakable: as `structure`.
        """
        return either([self.structure(names, True, parallel), without(answer, self.begins)])

    def chosen(self, names: Iterable[str] | None) -> list[str]:
        return list(self.tools) if names is None else list(names)

    def tag(self, name: str) -> tuple[str, str] | None:
        """The fixed text before and after a call's arguments; None where the format has no such frame."""
        return None

    def schema(self, name: str) -> dict[str, Any]:
        """The JSON schema of a tool's arguments."""
        return schema_of(self.tools.get(name, {}))

    def written(self, name: str) -> Shape:
        """A tool's arguments, where they are JSON."""
        return json_of(self.bound(name))

    def bound(self, name: str) -> dict[str, Any]:
        """The JSON schema that a tool's arguments are made to keep to."""
        return {"type": "object"} if name in self.loose else self.schema(name)

    @abstractmethod
    def section(self, marker: str) -> Steps[None]:
        """Read what follows a marker (or begins with `lead`; the marker is "" then)."""

    # The loop

    def _resume(self) -> list[Event]:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        events, self._events = _joined(self._events), []
        return events

    def _run(self) -> Steps[None]:
        leads = bool(self.lead) and (yield from self._leads())
        if leads:
            yield from self._attempt("")
        if self.place == "instead" and not self.calls:
            self._only_text = leads or not (yield from self._is_marked())
        while True:
            if self._at > 1 << 16:
                self._buffer, self._at = self._buffer[self._at :], 0
            marker = yield from self._read_text()
            if marker is None:
                break
            yield from self._attempt(marker)
        if self._is_nameless():
            self.begin_call(*self.tools)
        if not self._after_call:
            self._emit(self._space)

    def _is_nameless(self) -> bool:
        """Whether a forced call was cut before its name, which can only be one."""
        cut = self.place == "forced" and self._cut and not self.calls and not self._said
        return cut and len(self.tools) == 1 and bool(self._buffer.strip())

    def _is_marked(self) -> Steps[bool]:
        """Whether the answer begins with a marker."""
        while not self._closed:
            text = self._buffer.lstrip()
            if not any(marker.startswith(text[: len(marker)]) for marker in self.begins):
                return False
            if text.startswith(self.begins):
                return True
            yield
        return self._buffer.lstrip().startswith(self.begins)

    def _leads(self) -> Steps[bool]:
        try:
            yield from self.spaces()
        except Ended:
            self._at = 0
            return False
        if self._buffer[self._at] == self.lead:
            return True
        self._at = 0
        return False

    def _attempt(self, marker: str) -> Steps[None]:
        """Read a section; what it did not turn into events is text again, and reading goes on behind the marker."""
        begin = self._at - len(marker)
        calls = self.calls
        self._safe = begin
        try:
            yield from self.section(marker)
            self._safe = self._at
        except (Malformed, Ended) as error:
            if isinstance(error, Ended) and self._is_partial(marker):
                self._at = len(self._buffer)
                return
            self._call = None
            self._at = self._safe
            if self.calls == calls:
                if not marker:
                    self._at = 0
                    marker = self._buffer[: self._buffer.index(self.lead) + 1]
                self._text(marker)
                self._at += len(marker)

    @property
    def _only_calls(self) -> bool:
        """Whether nothing but calls can come from here on."""
        return self.place == "forced" or (self.place == "instead" and self.calls > 0)

    def _is_partial(self, marker: str) -> bool:
        """Whether what has ended early is a part of a call; one that is not yet announced is, then."""
        if not (self._only_calls or (self._cut and (marker or self._call is not None))):
            return False
        if self._call is not None:
            self._call.begin()
        return True

    def _read_text(self) -> Steps[str | None]:
        while True:
            found = None if self._only_text else self._marker.search(self._buffer, self._at)
            if found is not None:
                self._text(self._buffer[self._at : found.start()])
                self._at = found.end()
                return found.group()
            rest = self._buffer[self._at :]
            # A call that was cut inside its marker is no text where only calls can come.
            free = self._only_text or (self._closed and not self._only_calls)
            hold = 0 if free else partial_suffix(rest, self.begins)
            self._text(rest[: len(rest) - hold])
            self._at += len(rest) - hold
            if self._closed:
                return None
            yield

    def _text(self, text: str) -> None:
        whole = self._space + text
        body = whole.rstrip()
        self._space = whole[len(body) :]
        if body:
            self._emit(body)
            self._after_call = False

    def _emit(self, text: str) -> None:
        if text:
            self._said = True
            self._events.append(Text(text))

    # What sections are written with

    def more(self) -> Steps[None]:
        """Wait for more text; `Ended` if there will be none."""
        if self._closed:
            raise Ended
        yield

    def peek(self) -> Steps[str]:
        """The next character, not taken."""
        while self._at >= len(self._buffer):
            yield from self.more()
        return self._buffer[self._at]

    def spaces(self) -> Steps[str]:
        """Take white space. There must be something behind it, else `Ended`."""
        start = self._at
        while True:
            char = yield from self.peek()
            if not char.isspace():
                return self._buffer[start : self._at]
            self._at += 1

    def skip(self, text: str) -> Steps[None]:
        """Take exactly this text."""
        if not (yield from self.accept(text)):
            raise Malformed

    def accept(self, text: str) -> Steps[bool]:
        """Take this text if it comes next."""
        while True:
            have = self._buffer[self._at : self._at + len(text)]
            if have == text:
                self._at += len(text)
                return True
            if not text.startswith(have):
                return False
            yield from self.more()

    def optional(self, text: str) -> Steps[bool]:
        """As `accept`, but the answer may also end here or in the middle of it, and white space before it goes too."""
        start = self._at
        try:
            yield from self.spaces()
            if (yield from self.accept(text)):
                return True
        except Ended:
            rest = self._buffer[start:].strip()
            self._at = len(self._buffer) if text.startswith(rest) else start
            return False
        self._at = start
        return False

    def until(self, *ends: str, limit: int = 1 << 20) -> Steps[tuple[str, str]]:
        """The text up to the first of `ends`, and which it is; both are taken."""
        pattern = re.compile("|".join(re.escape(end) for end in ends))
        longest = max(map(len, ends))
        start = search = self._at
        while True:
            found = pattern.search(self._buffer, search)
            if found is not None and found.start() - start <= limit:
                self._at = found.end()
                return self._buffer[start : found.start()], found.group()
            if len(self._buffer) - start - longest > limit:
                raise Malformed
            search = max(start, len(self._buffer) - longest + 1)
            yield from self.more()

    def begin_call(self, name: str, call_id: str | None = None) -> _Call:
        """A call of this name; announced later. Names must be known where tools are; ids are used once."""
        if not name or len(name) > MAX_NAME or (self.tools and name not in self.tools):
            raise Malformed
        if not call_id or call_id in self._ids:
            call_id = self._make_id()
        self._ids.add(call_id)
        self._call = _Call(self, name, call_id)
        if self.place == "forced":
            self._call.begin()
        return self._call

    def kinds(self, name: str, parameter: str) -> set[str]:
        """The JSON types that a tool's parameter may have; empty where the schema does not say."""
        schema = self.schema(name)
        properties = schema.get("properties")
        return kinds(schema, properties.get(parameter)) if isinstance(properties, dict) else set()


class _Call:
    """A call being read: holds its arguments back until it is announced."""

    def __init__(self, parser: ToolParser, name: str, call_id: str) -> None:
        self.parser = parser
        self.name = name
        self.id = call_id
        self._held: list[str] = []
        self._size = 0
        self._index = -1

    def add(self, text: str) -> None:
        """More of the arguments; everything read so far is accounted for by it."""
        self._size += len(text)
        if self._index >= 0:
            if text:
                self.parser._events.append(Arguments(self._index, text))
            self.parser._safe = self.parser._at
            return
        self._held.append(text)
        if self._size > HOLD:
            self.begin()

    def end(self) -> None:
        """The call is complete."""
        self.begin()
        self.parser._safe = self.parser._at
        self.parser._call = None
        self.parser._after_call = True

    def begin(self) -> None:
        """Announce the call, if that has not been done."""
        if self._index >= 0:
            return
        parser = self.parser
        self._index = parser.calls
        parser.calls += 1
        parser._space = ""
        parser._after_call = True
        parser._events.append(CallStart(self._index, self.id, self.name))
        arguments = "".join(self._held)
        if arguments:
            parser._events.append(Arguments(self._index, arguments))
        parser._safe = parser._at


def partial_suffix(text: str, markers: Iterable[str]) -> int:
    """How many of the last characters are the beginning of a marker, and not all of it."""
    best = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), best, -1):
            if text.endswith(marker[:size]):
                best = size
                break
    return best


def _joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one kind as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
            out[-1] = Arguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out


def collect(events: Iterable[Event]) -> Parsed:
    """Events of a whole answer as one value."""
    found = Parsed()
    for event in events:
        if isinstance(event, Text):
            found.text += event.text
        elif isinstance(event, CallStart):
            found.calls.append(ParsedCall(event.id, event.name, ""))
        else:
            found.calls[event.index].arguments += event.text
    return found
