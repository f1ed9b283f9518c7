"""The frontend language: programs of many model calls, written in plain Python.

    from phloem import lang

    @lang.function
    def rate(s, review):
        s += lang.user("Is this review good or bad?\\n" + review)
        s += lang.assistant("It is " + lang.select("verdict", ["good", "bad"]))

    lang.set_default_backend(lang.Engine(model_path="demo"))
    rate.run(review="The soup was cold.")["verdict"]

Names and signatures are those of SGLang's frontend, so that its programs need no more than another import.
The idea is from "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023).
"""

from __future__ import annotations

from typing import Any

from phloem.lang.api import (
    assistant,
    assistant_begin,
    assistant_end,
    flush_cache,
    function,
    gen,
    gen_int,
    gen_string,
    get_server_info,
    image,
    select,
    separate_reasoning,
    set_default_backend,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)
from phloem.lang.backends import BACKENDS
from phloem.lang.choices import (
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from phloem.lang.interpreter import ProgramError
from phloem.lang.program import Function, cache_prompt
from phloem.lang.state import ProgramState, ProgramStateGroup

# Imported when they are asked for: (file in backends/, name there).
_LAZY = {
    "Anthropic": ("anthropic", "Anthropic"),
    "Engine": ("engine", "make"),
    "EngineBackend": ("engine", "EngineBackend"),
    "OpenAI": ("openai", "OpenAI"),
    "Runtime": ("http", "Runtime"),
    "RuntimeEndpoint": ("http", "RuntimeEndpoint"),
}

__all__ = [
    "Function",
    "ProgramError",
    "ProgramState",
    "ProgramStateGroup",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "cache_prompt",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        file, item = _LAZY[name]
        return getattr(BACKENDS.module(file), item)
    raise AttributeError(f"module 'phloem.lang' has no attribute {name!r}")
