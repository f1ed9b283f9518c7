"""Which tool-call and reasoning formats a model writes: named by the user, or read off its chat template.

Pure functions of texts: a choice and its reason, as for every automatic choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from phloem.text.thinking._base import ThinkingParser
    from phloem.text.tools._base import ToolParser

TOOLS: Registry[type[ToolParser]] = Registry("phloem.text.tools", "tool-call parser", "Parser")
THINKING: Registry[type[ThinkingParser]] = Registry("phloem.text.thinking", "reasoning parser", "Parser")
OFF = "none"

# Other names that are in use for the same formats; `-` and `_` are the same in all names.
_TOOL_ALIASES = {
    **dict.fromkeys(("qwen", "qwen2", "qwen25", "qwen3"), "hermes"),
    **dict.fromkeys(("glm", "glm47"), "glm45"),
    **dict.fromkeys(("llama", "llama3_json", "llama32"), "llama3"),
    **dict.fromkeys(("llama4", "llama4_pythonic"), "pythonic"),
    **dict.fromkeys(("step3p5", "qwen3coder"), "qwen3_coder"),
    "deepseek_v3": "deepseekv3",
    "deepseek_v31": "deepseekv31",
    "deepseek_v32": "deepseekv32",
    "gptoss": "gpt_oss",
    "openai": "gpt_oss",
    "kimi": "kimi_k2",
    "minimax": "minimax_m2",
    "ernie": "ernie45",
}
_THINKING_ALIASES = {
    **dict.fromkeys(("glm", "glm47"), "glm45"),
    **dict.fromkeys(("interns1", "qwen"), "qwen3"),
    **dict.fromkeys(("deepseek_v31", "deepseek_v32", "deepseekv3", "deepseekv31", "deepseekv32"), "deepseek_v3"),
    "deepseekr1": "deepseek_r1",
    "step3p5": "deepseek_r1",
    "gptoss": "gpt_oss",
    "openai_gptoss": "gpt_oss",
    "minimax_m2": "minimax",
    "minimax_m2_append_think": "minimax_append_think",
    "magistral": "mistral",
    "ernie": "ernie45",
}

# (format, texts of which every one stands in the template, texts of which none does); the first that fits is taken,
# so the more particular stand first.
_Rule = tuple[str, tuple[str, ...], tuple[str, ...]]
_TOOL_RULES: tuple[_Rule, ...] = (
    ("deepseekv32", ("｜DSML｜",), ()),
    ("deepseekv3", ("<｜tool▁calls▁begin｜>", "```json"), ()),
    ("deepseekv31", ("<｜tool▁calls▁begin｜>",), ()),
    ("minimax_m2", ("<minimax:tool_call>",), ()),
    ("kimi_k2", ("<|tool_calls_section_begin|>",), ()),
    ("gpt_oss", ("<|channel|>commentary",), ()),
    ("gpt_oss", ("<|channel|>", "to=functions."), ()),
    ("step3", ("<steptml:invoke",), ()),
    ("glm45", ("<tool_call>", "<arg_key>"), ()),
    ("qwen3_coder", ("<function=", "<parameter="), ()),
    ("ernie45", ("<tool_call>", "<response>"), ()),
    ("mistral", ("[TOOL_CALLS]",), ()),
    ("hermes", ("<tool_call>", "arguments"), ()),
    ("pythonic", ("[func_name1(params_name1=params_value1",), ()),
    ("llama3", ("<|start_header_id|>", '"parameters": '), ()),
    ("llama3", ("<|python_tag|>",), ()),
)
_THINKING_RULES: tuple[_Rule, ...] = (
    ("gpt_oss", ("<|channel|>analysis",), ()),
    ("gpt_oss", ("<|channel|>", "analysis"), ()),
    ("kimi", ("◁think▷",), ()),
    ("mistral", ("[THINK]",), ()),
    ("minimax", ("<minimax:tool_call>", "<think>"), ()),
    ("kimi_k2", ("<|tool_calls_section_begin|>", "think>"), ()),
    ("step3", ("<steptml:invoke", "<think>"), ()),
    ("step3", ("<｜tool_calls_begin｜>", "<think>"), ()),
    ("glm45", ("[gMASK]", "think>"), ()),
    ("ernie45", ("<response>", "think>"), ()),
    ("deepseek_v3", ("<｜Assistant｜>", "think>", "thinking"), ()),
    ("deepseek_r1", ("<｜Assistant｜>", "think>"), ()),
    ("qwen3", ("<|im_start|>", "think>", "enable_thinking"), ()),
    ("qwen3_thinking", ("<|im_start|>", "<think>\\n' }}"), ("enable_thinking",)),
    ("qwen3", ("think>",), ()),
)


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
        return Choice(canonical(TOOLS, _TOOL_ALIASES, asked, "tool_call_parser"), "as asked", *flags)
    found = _match(_TOOL_RULES, template)
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
        return Choice(canonical(THINKING, _THINKING_ALIASES, asked, "reasoning_parser"), "as asked")
    found = _match(_THINKING_RULES, template)
    return Choice(*found) if found is not None else Choice(None, "the chat template shows no reasoning block")


def canonical(registry: Registry[Any], aliases: dict[str, str], name: str, param: str) -> str:
    """The file that serves a name."""
    key = name.strip().lower().replace("-", "_")
    key = aliases.get(key, key)
    names = registry.names()
    if key not in names:
        try:
            registry.module(key)
        except ConfigError as error:
            raise ConfigError(f"{param}: {error.message}", param=param) from None
    return key


def tool_format(name: str) -> str:
    """A tool-call format by any of its names. Raises ConfigError."""
    return canonical(TOOLS, _TOOL_ALIASES, name, "tool_call_parser")


def thinking_format(name: str) -> str:
    """A reasoning format by any of its names. Raises ConfigError."""
    return canonical(THINKING, _THINKING_ALIASES, name, "reasoning_parser")


def _match(rules: tuple[_Rule, ...], template: str | None) -> tuple[str, str] | None:
    if template is None:
        return None
    for name, present, absent in rules:
        if all(text in template for text in present) and not any(text in template for text in absent):
            shown = " and ".join(repr(text) for text in present)
            return name, f"the chat template has {shown}"
    return None
