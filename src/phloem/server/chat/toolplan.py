"""What a request's tool fields ask for: what the template shows, which parser reads the answer, what is enforced."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.grammar.llguidance import refusal
from phloem.grammar.schema.numbers import write_exact
from phloem.protocol.structured import EARLY_CHECK
from phloem.text.formats import TOOLS
from phloem.text.tools._base import Place, function_of, schema_of
from phloem.text.tools._grammar import Shape, Unspeakable
from phloem.text.tools.json_array import forced_schema

if TYPE_CHECKING:
    from phloem.text.tools._base import ToolParser

log = logging.getLogger("phloem.server")

MAX_TOOLS = 256
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


@dataclass(frozen=True)
class ToolPlan:
    """`constraint`: a field of `SamplingParams` and its value. `place`: where in an answer calls stand."""

    tools: list[dict[str, Any]]
    format: str | None
    parallel: bool = True
    constraint: tuple[str, str] | None = None
    place: Place = "anywhere"
    blamed: str = "tools"  # the field that a constraint is made from

    @property
    def at_once(self) -> bool:
        """Whether the constraint is of the whole answer, its reasoning included."""
        return self.constraint is not None and self.format is not None and TOOLS.get(self.format).whole

    def parser(self) -> ToolParser | None:
        """A fresh parser for one answer."""
        if self.format is None or not self.tools:
            return None
        parser = TOOLS.get(self.format)(self.tools)
        parser.place = self.place
        return parser


NO_TOOLS = ToolPlan([], None)


def plan(
    tools: list[dict[str, Any]] | None,
    choice: str | dict[str, Any] | None,
    parallel: bool | None,
    format_name: str | None,
    answer: Shape | None = None,
) -> ToolPlan:
    """Check and combine `tools`, `tool_choice` and `parallel_tool_calls` for a model that writes `format_name`.

    `answer` is what a text answer must be. The constraint is of the whole then: a call, or such a text.

    Raises:
        BadRequest: naming the field that is wrong.
    """
    checked = check_tools(tools or [])
    choice, checked = _allowed(choice, checked)
    mode, wanted = _read_choice(choice, checked)
    if mode == "none" or not checked:
        return NO_TOOLS
    several = parallel is not False and wanted is None
    if wanted is not None:
        checked = [tool for tool in checked if function_of(tool)["name"] == wanted]
    numbers = {function_of(tool).get("name"): number for number, tool in enumerate(tools or [])}
    places = [f"tools[{numbers[function_of(tool)['name']]}].function.parameters" for tool in checked]
    if mode == "auto":
        made = _auto(checked, places, format_name, several, answer)
    else:
        made = _forced(checked, places, format_name, several)
    alone = len(places) == 1 and (answer is None or mode != "auto")
    return replace(made, blamed=places[0]) if alone else made


def check_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools in OpenAI's nested shape; the bare one is taken too.

    Raises:
        BadRequest: naming the tool and field.
    """
    if len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools: {len(tools)} of them, at most {MAX_TOOLS}", param="tools")
    found: list[dict[str, Any]] = []
    names = set[str]()
    for number, tool in without_foreign(tools, ("function",)):
        where = f"tools[{number}]"
        if tool.get("type", "function") != "function":
            raise BadRequest(f"not supported: {where}.type {tool.get('type')!r:.100}", param=f"{where}.type")
        function = function_of(tool)
        name = function.get("name")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            what = "is missing" if name is None else f"{name!r:.100} is not of letters, digits, '_', '-' and '.'"
            raise BadRequest(f"{where}.function.name {what}", param=f"{where}.function.name")
        if name in names:
            raise BadRequest(f"{where}.function.name {name!r} stands twice", param=f"{where}.function.name")
        names.add(name)
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            message = f"{where}.function.parameters must be a JSON schema (an object)"
            raise BadRequest(message, param=f"{where}.function.parameters")
        clean = {key: value for key, value in function.items() if value is not None and key != "type"}
        found.append({"type": "function", "function": clean})
    return found


def without_foreign(tools: list[dict[str, Any]], known: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    """Tools with their numbers. Those of kinds that a server would run are left out beside functions; alone they stay,
    to be refused by name."""
    ours = [(at, tool) for at, tool in enumerate(tools) if tool.get("type", "function") in known]
    if not ours:
        return list(enumerate(tools))
    foreign = sorted({str(tool.get("type"))[:100] for tool in tools if tool.get("type", "function") not in known})
    if foreign:
        log.warning("tools of types that are not served are left out: %s", ", ".join(map(repr, foreign)))
    return ours


def _allowed(
    choice: str | dict[str, Any] | None, tools: list[dict[str, Any]]
) -> tuple[str | dict[str, Any] | None, list[dict[str, Any]]]:
    """OpenAI's `allowed_tools`, nested or flat: its mode, and the tools that it names."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return choice, tools
    inner = choice.get("allowed_tools", choice)
    listed = inner.get("tools") if isinstance(inner, dict) else None
    mode = inner.get("mode", "auto") if isinstance(inner, dict) else None
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        message = "tool_choice: allowed_tools needs a mode (auto or required) and a list of tools"
        raise BadRequest(message, param="tool_choice")
    # Tools that a server would run were left out of the request's list, too.
    ours = [tool for tool in listed if not isinstance(tool, dict) or tool.get("type", "function") == "function"]
    names = {function_of(tool).get("name") if isinstance(tool, dict) else None for tool in ours}
    unknown = names - {function_of(tool)["name"] for tool in tools}
    if unknown:
        message = f"tool_choice allows {unknown.pop()!r:.100}, which is not among the tools"
        raise BadRequest(message, param="tool_choice")
    return mode, [tool for tool in tools if function_of(tool)["name"] in names]


def _read_choice(choice: str | dict[str, Any] | None, tools: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Mode (none, auto or required) and the function that is asked for by name."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            message = f"tool_choice {choice!r:.100} is not none, auto, required or a function"
            raise BadRequest(message, param="tool_choice")
        if choice == "required" and not tools:
            raise BadRequest("tool_choice 'required' needs tools", param="tool_choice")
        return choice, None
    name = function_of(choice).get("name")
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        message = 'tool_choice: expected {"type": "function", "function": {"name": ...}}'
        raise BadRequest(message, param="tool_choice")
    if all(function_of(tool)["name"] != name for tool in tools):
        raise BadRequest(f"tool_choice names {name!r:.100}, which is not among the tools", param="tool_choice")
    return "required", name


def _auto(
    tools: list[dict[str, Any]], places: list[str], name: str | None, parallel: bool, answer: Shape | None
) -> ToolPlan:
    """A call may come: in free text, or in place of an answer of this shape. `places`: what a schema's client calls it.

    Raises:
        BadRequest: naming the strict tool whose schema the format cannot keep to.
    """
    strict = any(function_of(tool).get("strict") for tool in tools)
    if name is None and strict:
        raise BadRequest("strict tools need a tool-call format, and this server reads none", param="tools")
    if name is None or not (strict or answer is not None):
        return ToolPlan(tools, name, parallel)
    parser, names = _writer(tools, places, name)
    if not names:
        return ToolPlan(tools, name, parallel)
    if answer is None:
        return ToolPlan(tools, name, parallel, _constraint(parser.structure(names, False, parallel)))
    constraint = _constraint(parser.instead(answer, names, parallel))
    return ToolPlan(tools, name, parallel, constraint, "anywhere" if parser.whole else "instead")


def _writer(tools: list[dict[str, Any]], places: list[str], name: str) -> tuple[ToolParser, list[str]]:
    """The format, and the tools whose calls it can write. One that is not strict is framed and no more where its
    schema cannot be kept to; one that cannot even be framed is left out.
    """
    kind = TOOLS.get(name)
    parser, names = kind(tools), list[str]()
    loose = _loose(tools, places)
    for place, tool in zip(places, tools, strict=True):
        function = function_of(tool)
        which, alone = function["name"], kind([tool])
        alone.loose = loose & {which}
        try:
            alone.structure()
        except Unspeakable as error:
            if function.get("strict"):
                message = f"{place}: the calls of {which!r} cannot be enforced in the format {name!r}: {error}"
                raise BadRequest(message, param=place) from None
            alone.loose = frozenset({which})
            try:
                alone.structure()
            except Unspeakable:
                continue
        parser.loose |= alone.loose
        names.append(which)
    return parser, names


def _loose(tools: list[dict[str, Any]], places: list[str]) -> frozenset[str]:
    """The names of tools whose schemas no grammar keeps to.

    Raises:
        BadRequest: naming such a tool, and the place in its schema, if it is strict.
    """
    found = set[str]()
    for where, tool in zip(places, tools, strict=True):
        function = function_of(tool)
        reason = _refusal(write_exact(schema_of(function)))
        if reason is None:
            continue
        if function.get("strict"):
            raise BadRequest(f"{where} of {function['name']!r}: {reason}", param=where)
        log.warning("the calls of the tool %r keep to no schema: %s", function["name"], reason)
        found.add(function["name"])
    return frozenset(found)


@functools.lru_cache(maxsize=1024)
def _refusal(schema: str) -> str | None:
    """Why a grammar cannot keep to a schema, as far as that is seen at little cost."""
    return refusal(schema) if len(schema) <= EARLY_CHECK else None


def _forced(tools: list[dict[str, Any]], places: list[str], name: str | None, parallel: bool) -> ToolPlan:
    """A call must come: in the model's own format, or as a JSON array of calls where that cannot keep to a schema."""
    loose = _loose(tools, places)
    if name is not None:
        try:
            parser = TOOLS.get(name)(tools)
            parser.loose = loose
            structure = parser.structure(required=True, parallel=parallel)
        except Unspeakable:
            pass
        else:
            return ToolPlan(tools, name, parallel, _constraint(structure), "forced")
    schemas = {
        function["name"]: {"type": "object"} if function["name"] in loose else schema_of(function)
        for function in map(function_of, tools)
    }
    schema = write_exact(forced_schema(schemas, parallel))
    return ToolPlan(tools, "json_array", parallel, ("json_schema", schema), "forced")


def _constraint(structure: Shape) -> tuple[str, str]:
    """A structure in the notation of `SamplingParams.structural_tag`."""
    return "structural_tag", write_exact({"type": "structural_tag", "format": structure})
