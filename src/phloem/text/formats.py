"""Which tool-call and reasoning formats a model writes: named by the user, or read off its chat template.

Pure functions of texts: a choice and its reason, as for every automatic choice. A format's file says all that is
needed: `NAMES`, by which others know it (`-` and `_` are the same in all names); `SHOWN_BY`, what its models' templates
have; `BEFORE`, the formats whose marks stand in its templates too, so that it must be looked for first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from phloem.text.thinking._base import ThinkingParser
    from phloem.text.tools._base import ToolParser

TOOLS: Registry[type[ToolParser]] = Registry("phloem.text.tools", "tool-call parser", "Parser")
THINKING: Registry[type[ThinkingParser]] = Registry("phloem.text.thinking", "reasoning parser", "Parser")
OFF = "none"


@dataclass(frozen=True)
class Choice:
    """A format's name (None: none) and why.

    `explained`: the template shows no tools, so the prompt must. `spelled`: it knows no calls and results either.
    """

    name: str | None
    reason: str
    explained: bool = False
    spelled: bool = False


def tool_choice(template: str | None, asked: str | None = None) -> Choice:
    """The tool-call format.

    Raises:
        ConfigError: if the name that was asked for is unknown; the right names are listed.
    """
    flags = not re.search(r"\btools\b", template or ""), "tool_calls" not in (template or "")
    if asked is not None:
        if asked == OFF:
            return Choice(None, "as asked")
        return Choice(canonical(TOOLS, asked, "tool_call_parser"), "as asked", *flags)
    found = _match(TOOLS, template)
    if found is not None:
        return Choice(*found, *flags)
    if flags[0]:
        return Choice(
            "hermes", "the chat template shows no tools: they are explained to the model in the prompt", *flags
        )
    return Choice("hermes", "the chat template shows no known format: the most common one", *flags)


def thinking_choice(template: str | None, asked: str | None = None) -> Choice:
    """The reasoning format; none where the template says nothing of one.

    Raises:
        ConfigError: as `tool_choice`.
    """
    if asked is not None:
        if asked == OFF:
            return Choice(None, "as asked")
        return Choice(canonical(THINKING, asked, "reasoning_parser"), "as asked")
    found = _match(THINKING, template)
    return Choice(*found) if found is not None else Choice(None, "the chat template shows no reasoning block")


def canonical(registry: Registry[Any], name: str, param: str) -> str:
    """The file that serves a name."""
    key = name.strip().lower().replace("-", "_")
    names = registry.names()
    if key not in names:
        key = _other_names(registry).get(key, key)
    if key not in names:
        try:
            registry.module(key)
        except ConfigError as error:
            raise ConfigError(f"{param}: {error.message}", param=param) from None
    return key


def tool_format(name: str) -> str:
    """A tool-call format by any of its names. Raises ConfigError."""
    return canonical(TOOLS, name, "tool_call_parser")


def thinking_format(name: str) -> str:
    """A reasoning format by any of its names. Raises ConfigError."""
    return canonical(THINKING, name, "reasoning_parser")


@cache
def _files(registry: Registry[Any]) -> dict[str, dict[str, Any]]:
    """What each format's file says of itself (and not of the one that its class is made from)."""
    return {name: vars(registry.module(name)) for name in registry.names()}


@cache
def _other_names(registry: Registry[Any]) -> dict[str, str]:
    return {other: name for name, said in _files(registry).items() for other in said.get("NAMES", ())}


@cache
def _in_order(registry: Registry[Any]) -> list[str]:
    """Formats, each before those that its file names in `BEFORE`."""
    order = TopologicalSorter[str]({name: () for name in _files(registry)})
    for name, said in _files(registry).items():
        for later in said.get("BEFORE", ()):
            order.add(later, name)
    return list(order.static_order())


def _match(registry: Registry[Any], template: str | None) -> tuple[str, str] | None:
    if template is None:
        return None
    for name in _in_order(registry):
        for shown in _files(registry)[name].get("SHOWN_BY", ()):
            if shown.stands_in(template):
                return name, f"the chat template has {shown}"
    return None
