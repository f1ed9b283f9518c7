"""Chat templates: messages to the prompt text that a model was trained on.

Templates are Jinja programs that come with a model. They run in a sandbox that cannot reach Python objects, and within
limits of steps, time and size, so that neither a hostile template nor a hostile request can hold the server. The
environment is the one that Hugging Face's templates expect (`apply_chat_template` of `transformers`).
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from phloem.core.errors import BadRequest, ConfigError
from phloem.text.template_roles import shapes, shows_instructions
from phloem.text.template_sources import find_sources

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jinja2.parser import Parser

    from phloem.checkpoint.describe import Checkpoint
    from phloem.text.tokenizer import Tokenizer

MAX_STEPS = 20_000_000  # loop rounds
MAX_SECONDS = 5.0
MAX_CHARACTERS = 64 << 20
MAX_REPEAT = 1 << 20  # longest string or list that `*` may make
# Names that a request may not set through `chat_template_kwargs`.
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now")
_WIDE_FIELD = re.compile(r"\d{5}|\*")
TAIL_MARK = "\ue000final\ue001"  # private-use characters: no template cuts or changes them


class _Refused(Exception):
    """The template called raise_exception."""


class _TooMuch(Exception):
    """A limit was reached."""


class _Meter:
    """Counts a rendering's loop rounds; every thousandth looks at the clock."""

    def __init__(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> str:
        self.steps += 1
        if self.steps % 1024 == 0:
            self.check()
        return ""

    def check(self) -> None:
        if self.steps > MAX_STEPS or time.monotonic() > self.deadline:
            raise _TooMuch("rendering takes too long")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with every loop round and macro call counted and no operator that makes huge values."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], cache_size=0
        )
        self.filters["tojson"] = to_json
        helpers: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals.update(helpers)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro)):
            call = jinja2.nodes.Call(jinja2.nodes.Name("_step", "load"), [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(call).set_lineno(loop.lineno))  # pyright: ignore[reportAttributeAccessIssue]
        tree.set_environment(self)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and isinstance(times, int) and len(items) * times > MAX_REPEAT:
                    raise _TooMuch("it repeats a value too often")
        if operator == "**" and not (abs(left) <= 1 << 32 and abs(right) <= 64):
            raise _TooMuch("it raises a number to a large power")
        if operator == "%" and isinstance(left, str) and _WIDE_FIELD.search(left):
            raise _TooMuch("it formats a value very wide")
        return super().call_binop(context, operator, left, right)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: unlike Jinja's own filter it leaves `<`, `>`, `&` and non-ASCII characters alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(str(pattern)[:200])


@dataclass
class _Program:
    """One compiled template: its text, and whether it walks through content parts by itself."""

    source: str
    template: jinja2.Template
    takes_parts: bool


@dataclass
class ChatTemplate:
    """A model's chat templates by name (`default`, `tool_use`, ...); possibly none."""

    programs: dict[str, _Program] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)
    broken: str | None = None

    @property
    def source(self) -> str | None:
        """The text of the default template."""
        return self._pick(None).source if self.programs else None

    def shows(self, kind: str) -> bool:
        """Whether the default template writes places for media of this kind (`image`, `video`, `audio`) by itself."""
        return bool(self.programs) and self._pick(None).takes_parts and kind in self._pick(None).source

    def _pick(self, tools: list[dict[str, Any]] | None) -> _Program:
        if tools and "tool_use" in self.programs:
            return self.programs["tool_use"]
        return self.programs.get("default") or next(iter(self.programs.values()))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for these messages (OpenAI's shape; `kwargs` are the request's `chat_template_kwargs`).

        `continue_final_message` leaves the last message open, so that the model goes on with it.

        Raises:
            BadRequest: if there is no template, if it refuses the messages (with its own words), or at a limit.
        """
        if not self.programs:
            raise BadRequest(self.broken or "the model has no chat template; use /v1/completions or name a template")
        for name in kwargs:
            if name in RESERVED or not name.isidentifier() or name.startswith("_"):
                raise BadRequest(f"chat_template_kwargs: {name!r} cannot be set", param="chat_template_kwargs")
        tried: list[str] = []
        refused: BadRequest | None = None
        for shaped in shapes(messages, self._pick(tools).source):
            try:
                text = self._render(shaped, tools, add_generation_prompt, continue_final_message, kwargs)
            except BadRequest as error:
                refused = refused or error
                continue
            if shows_instructions(shaped, text):
                return text
            tried.append(text)
        if not tried and refused is not None:
            raise refused
        return tried[0]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: dict[str, Any],
    ) -> str:
        program = self._pick(tools)
        if continue_final_message:
            messages = _mark_tail(messages)
        values = {
            **self.special,
            **kwargs,
            "tools": tools or None,
            "documents": kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        text = self._run(program, messages, values)
        return _cut_tail(text) if continue_final_message else text

    def _run(self, program: _Program, messages: list[dict[str, Any]], values: dict[str, Any]) -> str:
        """Tool arguments go in as objects first, as most templates want them; some add them to a text as they are."""
        try:
            return _render(program.template, {**values, "messages": _prepare(messages, program.takes_parts, True)})
        except TypeError as error:
            if not any(message.get("tool_calls") for message in messages):
                raise BadRequest(f"the chat template does not accept these messages: {error}") from None
        try:
            return _render(program.template, {**values, "messages": _prepare(messages, program.takes_parts, False)})
        except TypeError as error:
            raise BadRequest(f"the chat template does not accept these messages: {error}") from None


def _render(template: jinja2.Template, values: dict[str, Any]) -> str:
    meter = _Meter()
    pieces: list[str] = []
    size = 0
    try:
        for piece in _pieces(template, {**values, "_step": meter.step}):
            size += len(piece)
            meter.step()
            if size > MAX_CHARACTERS:
                raise _TooMuch(f"the prompt grows over {MAX_CHARACTERS} characters")
            pieces.append(piece)
    except _Refused as error:
        raise BadRequest(str(error), param="messages") from None
    except _TooMuch as error:
        raise BadRequest(f"the chat template was stopped: {error}") from None
    except jinja2.TemplateError as error:
        raise BadRequest(f"the chat template does not accept these messages: {error}") from None
    except TypeError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise BadRequest(f"the chat template does not accept these messages: {reason}") from None
    return "".join(pieces)


def _pieces(template: jinja2.Template, values: dict[str, Any]) -> Iterator[str]:
    """As `template.generate`, without its rewriting of tracebacks (which costs milliseconds)."""
    return template.root_render_func(template.new_context(values))


def _mark_tail(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy whose last message's text ends in the mark."""
    if not messages:
        raise BadRequest("continue_final_message needs a message to continue", param="continue_final_message")
    last = dict(messages[-1])
    content = last.get("content")
    if isinstance(content, list) and content and isinstance(content[-1], dict) and content[-1].get("type") == "text":
        last["content"] = [*content[:-1], {**content[-1], "text": str(content[-1].get("text", "")) + TAIL_MARK}]
    elif isinstance(content, str):
        last["content"] = content + TAIL_MARK
    else:
        raise BadRequest("continue_final_message needs a last message that ends in text", param="messages")
    return [*messages[:-1], last]


def _cut_tail(text: str) -> str:
    at = text.rfind(TAIL_MARK)
    if at < 0:
        message = "continue_final_message: the chat template leaves out the last message's text"
        raise BadRequest(message, param="continue_final_message")
    return text[:at]


def _prepare(messages: list[dict[str, Any]], takes_parts: bool, objects: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in messages:
        copy = dict(message)
        content = copy.get("content")
        if isinstance(content, list) and not takes_parts:
            copy["content"] = flatten(content)
        elif content is None:
            copy["content"] = ""
        if objects and isinstance(copy.get("tool_calls"), list):
            copy["tool_calls"] = [_with_object(call) for call in copy["tool_calls"]]
        found.append(copy)
    return found


def flatten(parts: list[Any]) -> str:
    """The text of a list of content parts (`{"type": "text", "text": ...}` or plain strings).

    Raises:
        BadRequest: naming a part that is not text.
    """
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRequest(f"content parts of type {kind!r} are not supported by this model", param="messages")
    return "\n".join(texts)


def _with_object(call: Any) -> Any:
    """A tool call whose arguments, a JSON text in OpenAI's shape, are an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def load_template(checkpoint: Checkpoint, override: Path | None, tokenizer: Tokenizer | None) -> ChatTemplate:
    """A checkpoint's chat templates, or the one in the file `override`.

    Raises:
        ConfigError: if the override cannot be read or is not a template. A broken template of the model's own is
            reported when a chat is asked for, so that completions can still be served.
    """
    special = dict(tokenizer.special) if tokenizer is not None else {}
    if override is not None:
        try:
            source = override.read_text(encoding="utf-8")
            return ChatTemplate({"default": _compile(source)}, special)
        except (OSError, ValueError, RecursionError, jinja2.TemplateError) as error:
            raise ConfigError(f"chat_template: {override}: {_describe(error)}", param="chat_template") from None
    found = ChatTemplate({}, special)
    for name, source in find_sources(checkpoint).items():
        try:
            found.programs[name] = _compile(source)
        except (jinja2.TemplateError, RecursionError) as error:
            found.broken = f"the model's chat template {name!r} is broken: {_describe(error)}"
    return found


def from_source(source: str, special: dict[str, str] | None = None) -> ChatTemplate:
    """A chat template from its text. Raises `jinja2.TemplateError` if it is none."""
    return ChatTemplate({"default": _compile(source)}, dict(special or {}))


def _describe(error: Exception) -> str:
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{error}{line}"


def _compile(source: str) -> _Program:
    environment = _Environment()
    return _Program(source, environment.from_string(source), _walks_content(environment.parse(source)))


def _walks_content(tree: jinja2.nodes.Template) -> bool:
    """Whether some loop runs over a message's content, which says that lists of parts are understood."""
    names = {"content"}
    for assign in tree.find_all(jinja2.nodes.Assign):
        if isinstance(assign.target, jinja2.nodes.Name) and _mentions_content(assign.node, set()):
            names.add(assign.target.name)
    return any(_mentions_content(loop.iter, names) for loop in tree.find_all(jinja2.nodes.For))


def _mentions_content(node: jinja2.nodes.Node, names: set[str]) -> bool:
    while isinstance(node, jinja2.nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return isinstance(node, jinja2.nodes.Name) and node.name in names
