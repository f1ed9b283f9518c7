"""The names that programs are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from phloem.core.errors import BadRequest
from phloem.lang.backends import as_backend, default
from phloem.lang.choices import ChoicesMethod
from phloem.lang.ir import Concat, Expr, Gen, Media, RoleBegin, RoleEnd, Select, Thinking, make_sampling, parts_of
from phloem.lang.program import Function


@overload
def function(func: Callable[..., Any]) -> Function: ...


@overload
def function(func: None = None, num_api_spec_tokens: int | None = None) -> Callable[[Callable[..., Any]], Function]: ...


def function(func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None) -> Any:
    """Make a program of a function whose first parameter is the state `s`.

    Args:
        num_api_spec_tokens: let a call of an API write this many tokens, past its stop, and answer the calls behind it
            from that text where the program's own text in between agrees.
    """
    if func is not None:
        return Function(func, num_api_spec_tokens)
    return lambda found: Function(found, num_api_spec_tokens)


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | list[str] | None = None,
    stop_token_ids: list[int] | None = None,
    stop_regex: str | list[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: list[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    regex: str | None = None,
    json_schema: Any = None,
    **more: Any,
) -> Expr:
    """Let the model go on from here, and keep what it writes under `name`.

    Args:
        choices: pick one of these texts instead (see `select`).
        dtype: int, float, str or bool: text that reads as a value of that type. The variable stays text.
        json_schema: JSON text, a dict, or a pydantic model.
        more: the other sampling parameters of `/generate` (`repetition_penalty`, `ebnf`, `logit_bias`, ...).
    """
    if choices:
        return select(name, choices, choices_method=choices_method)
    fields = {key: value for key, value in locals().items() if key not in ("name", "choices", "choices_method", "more")}
    return Gen(name, make_sampling({**fields, **more}))


def gen_int(name: str | None = None, **options: Any) -> Expr:
    """`gen` of an integer, as text."""
    return gen(name, dtype=int, **options)


def gen_string(name: str | None = None, **options: Any) -> Expr:
    """`gen` of text in double quotes."""
    return gen(name, dtype=str, **options)


def select(
    name: str | None = None,
    choices: list[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod | None = None,
) -> Expr:
    """Append the choice that the model prefers, by `choices_method` (default: `token_length_normalized`)."""
    if not choices:
        raise BadRequest("select needs choices", param="choices")
    if temperature > 1e-5:
        raise BadRequest("select takes the best choice: its temperature is 0", param="temperature")
    return Select(name, list(choices), choices_method)


def image(expr: Any) -> Expr:
    """An image: a path, a URL, base64 data, bytes, or a Pillow image. For backends whose model takes images."""
    return Media("image", expr)


def video(path: Any, num_frames: int | None = None) -> Expr:
    """A video: a path, a URL, base64 data or bytes."""
    return Media("video", path, num_frames)


def separate_reasoning(expr: Any = None, model_type: str = "deepseek_r1") -> Expr:
    """Take the reasoning out of what `gen` inside writes; it is kept as `<name>_reasoning_content`.

    Args:
        model_type: a reasoning format of the server (`--reasoning-parser`).
    """
    return Thinking(parts_of(expr) if expr is not None else [], model_type)


def _role(role: str, expr: Any) -> Expr:
    if expr is None:
        return RoleBegin(role)
    items: Sequence[Any] = expr if isinstance(expr, list | tuple) else [expr]
    return Concat([RoleBegin(role), *(part for item in items for part in parts_of(item)), RoleEnd(role)])


def system(expr: Any = None) -> Expr:
    """A system turn; without content, its beginning."""
    return _role("system", expr)


def user(expr: Any = None) -> Expr:
    """A user's turn; without content, its beginning."""
    return _role("user", expr)


def assistant(expr: Any = None) -> Expr:
    """The assistant's turn; without content, its beginning."""
    return _role("assistant", expr)


def system_begin() -> Expr:
    return RoleBegin("system")


def system_end() -> Expr:
    return RoleEnd("system")


def user_begin() -> Expr:
    return RoleBegin("user")


def user_end() -> Expr:
    return RoleEnd("user")


def assistant_begin() -> Expr:
    return RoleBegin("assistant")


def assistant_end() -> Expr:
    return RoleEnd("assistant")


def set_default_backend(backend: Any) -> None:
    """Run programs here unless they say otherwise: a backend, a `phloem.Engine`, or a server's address."""
    default.backend = None if backend is None else as_backend(backend)


def flush_cache(backend: Any = None) -> bool:
    """Forget the backend's cached prefixes; False while requests run."""
    return as_backend(backend).flush_cache()


def get_server_info(backend: Any = None) -> dict[str, Any]:
    """The backend's own account of its server."""
    return as_backend(backend).get_server_info()
