"""What a program appends to its state: text, calls of the model, roles, media. Values without behaviour."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from phloem.lang.choices import ChoicesMethod

# What a value of a Python type looks like in text. Blanks behind it let the model end a number.
DTYPE_REGEX: dict[str, str] = {
    "int": r"[-+]?[0-9]{1,19}",
    "float": r"[-+]?[0-9]{1,19}(\.[0-9]{1,19})?([eE][-+]?[0-9]{1,3})?",
    "str": r'"[^"\\\n]*"',
    "bool": r"(True|False)",
}
REASONING = "_reasoning_content"  # behind the name of a variable: its reasoning
# Fields of a `/generate` request that stand beside `sampling_params`.
REQUEST_FIELDS = (
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "return_text_in_logprobs",
    "lora_path",
    "priority",
    "cache_salt",
    "extra_key",
)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters by the names of `/generate`; None is unset and takes the run's value, then the server's."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | None = None
    structural_tag: str | None = None
    custom_params: dict[str, Any] | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    token_ids_logprob: list[int] | None = None
    return_text_in_logprobs: bool | None = None
    lora_path: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None

    def over(self, base: Sampling) -> Sampling:
        """These values, with those of `base` where unset."""
        return dataclasses.replace(base, **self.given())

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name in SAMPLING_NAMES if (value := getattr(self, name)) is not None}

    def native(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(`sampling_params`, fields beside it) of a `/generate` body."""
        given = self.given()
        beside = {name: given.pop(name) for name in REQUEST_FIELDS if name in given}
        return given, beside

    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


SAMPLING_NAMES = tuple(spec.name for spec in dataclasses.fields(Sampling))
# Spellings that programs use for the same parameter.
SAMPLING_ALIASES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
RUN_DEFAULTS = Sampling(max_new_tokens=128, temperature=1.0)


def make_sampling(values: dict[str, Any]) -> Sampling:
    """From keywords, aliases included.

    Raises:
        BadRequest: a keyword is unknown, or a schema is no schema.
    """
    named: dict[str, Any] = {}
    dtype = None
    for name, value in values.items():
        if value is None:
            continue
        if name == "dtype":
            dtype = value
            continue
        real = SAMPLING_ALIASES.get(name, name)
        if real not in SAMPLING_NAMES:
            raise BadRequest(f"unknown sampling parameter {name!r}", param=name)
        named[real] = value
    if "json_schema" in named:
        named["json_schema"] = schema_text(named["json_schema"])
    if dtype is not None:
        named["regex"] = dtype_regex(dtype, named.get("regex"))
    return Sampling(**named)


def schema_text(schema: Any) -> str:
    """A JSON schema as text, from text, a dict, or a pydantic model class."""
    if isinstance(schema, str):
        return schema
    if hasattr(schema, "model_json_schema"):
        return json.dumps(schema.model_json_schema())
    if isinstance(schema, dict):
        return json.dumps(schema)
    raise BadRequest(
        f"json_schema must be JSON text, a dict or a pydantic model, not {type(schema).__name__}", param="json_schema"
    )


def dtype_regex(dtype: Any, regex: str | None) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in DTYPE_REGEX:
        raise BadRequest(f"dtype must be one of {', '.join(DTYPE_REGEX)}, got {name!r}", param="dtype")
    if regex is not None:
        raise BadRequest("dtype and regex exclude each other", param="dtype")
    return DTYPE_REGEX[name]


class Expr:
    """Base of what `s += ...` takes. Expressions are joined by `+`, with strings too."""

    def __add__(self, other: Any) -> Concat:
        return Concat([*parts_of(self), *parts_of(other)])

    def __radd__(self, other: Any) -> Concat:
        return Concat([*parts_of(other), *parts_of(self)])


@dataclass(eq=False)
class Concat(Expr):
    """Several expressions, one behind the other."""

    items: list[Expr]


@dataclass(eq=False)
class Text(Expr):
    value: str


@dataclass(eq=False)
class Gen(Expr):
    """The model goes on from here; the text is kept under `name`."""

    name: str | None
    sampling: Sampling


@dataclass(eq=False)
class Select(Expr):
    """The model's preferred choice is appended, and kept under `name`."""

    name: str | None
    choices: list[str]
    method: ChoicesMethod | None = None


@dataclass(eq=False)
class RoleBegin(Expr):
    role: str


@dataclass(eq=False)
class RoleEnd(Expr):
    role: str


@dataclass(eq=False)
class Media(Expr):
    """An image or a video: a path, URL, base64 data, bytes, or an object with `save` (an image of Pillow)."""

    kind: str
    source: Any
    frames: int | None = None


@dataclass(eq=False)
class ScopeBegin(Expr):
    name: str


@dataclass(eq=False)
class ScopeEnd(Expr):
    name: str


@dataclass(eq=False)
class Thinking(Expr):
    """Around calls of a model that reasons: its reasoning is taken out of the text, and kept by itself."""

    items: list[Expr]
    parser: str


@dataclass(eq=False)
class Variable(Expr):
    """In a trace: a value that is known only when the program runs."""

    name: str
    source: Expr | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return "{" + self.name + "}"

    def __format__(self, spec: str) -> str:
        return str(self)


def parts_of(item: Any) -> list[Expr]:
    """An appended value as expressions.

    Raises:
        BadRequest: it can not be appended.
    """
    if isinstance(item, Concat):
        return list(item.items)
    if isinstance(item, Expr):
        return [item]
    if isinstance(item, str):
        return [Text(item)] if item else []
    raise BadRequest(f"only text and expressions can be appended, not {type(item).__name__}: {item!r:.100}")


def names_in(items: Sequence[Expr]) -> Iterator[str]:
    """Variables that these expressions will set."""
    for item in items:
        if isinstance(item, Gen | Select | ScopeEnd) and item.name is not None:
            yield item.name
        if isinstance(item, Thinking):
            for name in names_in(item.items):
                yield from (name, name + REASONING)
