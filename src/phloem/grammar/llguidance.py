"""Grammars by llguidance: JSON schemas it enforces exactly, regexes, Lark, choices, triggered tags.

Its lexer is built lazily from regex derivatives, so compiling takes milliseconds whatever the pattern; the work of
each mask is bounded by the limits below (fuel, states, items), past which the request fails with the reason.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest, PhloemError
from phloem.grammar import _base, _nodes
from phloem.grammar.schema import formats as _formats
from phloem.grammar.schema import frames as _frames
from phloem.grammar.schema import keywords as _keywords
from phloem.grammar.schema import lark as _lark
from phloem.grammar.schema import names as _schema
from phloem.grammar.schema import numbers as _numbers
from phloem.grammar.schema import oneof as _oneof

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.grammar._base import Constraint, EngineOptions, Vocabulary

KEYWORDS = (
    _schema.CONSTRAINING
    - {"$dynamicRef", "$recursiveRef", "not", "if", "then", "else", "uniqueItems", "contains", "minContains"}
    - {"maxContains", "propertyNames", "unevaluatedItems", "unevaluatedProperties", "dependentRequired"}
    - {"dependentSchemas", "dependencies", "disallow", "extends", "divisibleBy"}
)
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))

_FLEXIBLE = r"[\x20\x0A\x0D\x09]{1,24}"  # bounded: a small model fills an answer with blanks where it may
_LIMITS: dict[str, Any] = {
    "max_lexer_states": 32_000,  # 1 to 2 kB each
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 14 ms
    "step_max_items": 20_000,
    "max_items_in_row": 1_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


def prepared(text: str) -> _schema.Schema | Constraint:
    """A schema as the library takes it, or another constraint that says the same.

    Raises:
        BadRequest: with the path of what is not enforced.
    """
    try:
        return _prepared(text)
    except BadRequest as error:
        raise BadRequest(_schema.as_sent(text, error.message)) from None


def _prepared(text: str) -> _schema.Schema | Constraint:
    schema = _schema.read_schema(text)
    _keywords.rewrite(schema, narrow=_oneof.settle(schema))
    _schema.refuse_unsupported(schema, KEYWORDS, FORMATS, Engine.name)
    _oneof.close(schema)
    _strip_annotations(schema)
    _formats.spell_out(list(_schema.reachable(schema)))
    _numbers.narrow(list(_schema.reachable(schema)))
    return _frames.spelled_out(schema) or schema


@functools.cache
def limits() -> Any:
    return importlib.import_module("llguidance").LLParserLimits(**_LIMITS)


def complaint(schema: _schema.Schema) -> str | None:
    """What the library has against a schema that is prepared."""
    matcher = importlib.import_module("llguidance").LLMatcher
    grammar = matcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False))
    error = matcher.validate_grammar(grammar, limits=limits())
    return _plain(error) if error else None


def refusal(text: str) -> str | None:
    """Why a schema cannot be enforced, with the place in it, as far as is seen at once, without a vocabulary."""
    try:
        schema = prepared(text)
        if not isinstance(schema, dict) or '"multipleOf"' in text:
            return None
        said = complaint(schema)
        return None if said is None else _schema.as_sent(text, _placed(schema, said))
    except BadRequest as error:
        return error.message
    except ImportError:
        return None


def _placed(schema: _schema.Schema, message: str) -> str:
    path = _schema.locate(schema, complaint, message)
    if "oneOf" in message:
        message = "the branches of oneOf are not provably exclusive; use anyOf, or tell them apart by a constant"
    return f"{path}: {message}"


class _Wrapper:
    """The tokenizer in the shape that llguidance reads."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        # The library counts the tokens it is given: a padded model's logits have more.
        self.tokens = vocabulary.tokens + [b""] * (vocabulary.size - len(vocabulary.tokens))
        self.special_token_ids = sorted(vocabulary.special)
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class Engine:
    """See `_base.Engine`."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary, options: EngineOptions) -> None:
        if not vocabulary.eos_ids:
            raise BadRequest("constrained generation needs a tokenizer with an end-of-text token")
        self.vocabulary = vocabulary
        self.options = options
        self._library: Any = importlib.import_module("llguidance")
        wrapper = importlib.import_module("llguidance._tokenizer").TokenizerWrapper
        self._tokenizer = self._library.LLTokenizer(
            wrapper(_Wrapper(vocabulary)),
            n_vocab=vocabulary.size,
            eos_token=list(vocabulary.eos_ids),
        )
        self._limits = limits()

    def decline(self, constraint: Constraint) -> str | None:
        match constraint:
            case _base.TagFormat():
                return "reads no structural tag of this shape"
            case _:
                return _lark.unbounded(constraint)

    def compile(self, constraint: Constraint) -> Compiled:
        schema = self._of_schema(constraint) if isinstance(constraint, _base.JsonSchema | _base.JsonObject) else None
        if isinstance(schema, dict):
            grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False))
            matcher = self._build(grammar, schema, constraint)
        else:
            matcher = self._whole(schema or constraint)
        compiled = Compiled(self.vocabulary, matcher, len(repr(constraint)))
        compiled.check_first()
        return compiled

    def close(self) -> None:
        return None

    def _build(self, grammar: str, schema: _schema.Schema | None, sent: Constraint | None = None) -> Any:
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            return matcher
        if schema is None:
            raise BadRequest(f"the grammar is not valid: {_plain(matcher.get_error())}")
        message = _placed(schema, _plain(matcher.get_error()))
        raise BadRequest(_schema.as_sent(sent.schema, message) if isinstance(sent, _base.JsonSchema) else message)

    def _whole(self, constraint: Constraint) -> Any:
        """A matcher of what is no schema alone. What the library says of a grammar written here shows nothing of it."""
        grammar = self._grammar(constraint)
        try:
            return self._build(grammar, None)
        except BadRequest as error:
            if isinstance(constraint, _base.Lark):
                raise
            for part in _nodes.schemas_in(constraint):
                schema = self._of_schema(part)
                if isinstance(schema, dict) and (said := complaint(schema)) is not None:
                    message = _placed(schema, said)
                    sent = part.schema if isinstance(part, _base.JsonSchema) else None
                    raise BadRequest(_schema.as_sent(sent, message) if sent else message) from None
            raise BadRequest(_without_source(error.message)) from None

    def _of_schema(self, constraint: _base.JsonSchema | _base.JsonObject) -> _schema.Schema | Constraint:
        """The schema as the library is to read it; where it cannot, what says the same."""
        if isinstance(constraint, _base.JsonObject):
            schema: _schema.Schema = {"type": "object"}
        else:
            found = prepared(constraint.schema)
            if not isinstance(found, dict):
                return found
            schema = found
        flexible = self.options.whitespace == "flexible"
        style: dict[str, Any] = {"whitespace_flexible": flexible}
        if flexible:
            style["whitespace_pattern"] = _FLEXIBLE
        return {**schema, "x-guidance": style}

    def _grammar(self, constraint: Constraint) -> str:
        if isinstance(constraint, _base.Lark):
            return self._library.LLMatcher.grammar_from_lark(constraint.grammar)
        if isinstance(constraint, _base.Regex):
            return self._library.LLMatcher.grammar_from_regex(_whole(constraint.pattern))
        if isinstance(constraint, _base.Ebnf):
            return self._library.LLMatcher.grammar_from_lark(self._lark_of(constraint))
        return _lark.Writer(self.vocabulary, self._terminal, self._of_schema, self._lark_of).whole(constraint)

    def _lark_of(self, constraint: _base.Ebnf) -> str:
        gbnf_to_lark = importlib.import_module("llguidance.gbnf_to_lark").gbnf_to_lark
        if constraint.root != "root":
            raise BadRequest("the root rule of a grammar is called root")
        try:
            return str(gbnf_to_lark(constraint.grammar))
        except Exception as error:
            raise BadRequest(f"the grammar is not valid: {error}") from None

    def _terminal(self, pattern: str) -> str:
        return "/" + self._library.regex_to_lark(_whole(pattern), use_ascii="") + "/"


def _whole(pattern: str) -> str:
    """Anchors at both ends say what holds anyway; the library refuses them."""
    start = pattern.startswith("^")
    body = pattern.removesuffix("$")
    escaped = (len(body) - len(body.rstrip("\\"))) % 2
    end = len(body) < len(pattern) and not escaped
    return f"({pattern[start : len(pattern) - end]})" if start or end else pattern


def _plain(message: str) -> str:
    """The library's message without its dump of the parser."""
    head = message.split("<state>")[0].split("while processing json-schema:")[0]
    head = re.sub(r"Regex is empty:\s*\(.*", "no text fits", head, flags=re.DOTALL)
    return " ".join(head.replace("<non-verbose/>", "").split()) or "unknown reason"


def _without_source(message: str) -> str:
    """A message, already in one line, without the place in a grammar that the client never wrote."""
    said = re.split(r"\s\d+ \| ", message, maxsplit=1)[0]
    return re.sub(r"\bat \d+\(\d+\): ", "", said).strip()


def _strip_annotations(schema: _schema.Schema) -> None:
    for _, node in list(_schema.reachable(schema)):
        if isinstance(node, dict):
            if node.get("format") in _schema.ANNOTATION_FORMATS:
                del node["format"]
            if node.get("uniqueItems") is False:
                del node["uniqueItems"]
            for key in ("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"):
                if isinstance(node.get(key), float):
                    node[key] = int(node[key])


class Compiled:
    """A matcher at its start, to copy: a copy takes a microsecond."""

    engine = "llguidance"

    def __init__(self, vocabulary: Vocabulary, prototype: Any, num_bytes: int) -> None:
        self.vocabulary = vocabulary
        self.num_bytes = num_bytes
        self._prototype = prototype

    def matcher(self) -> Matcher:
        return Matcher(self.vocabulary, self._prototype.deep_copy())

    def check_first(self) -> None:
        """Refuse a grammar that admits no text at all, and warm what the first mask needs."""
        mask = self.vocabulary.new_mask()
        self.matcher().fill(mask)
        if not mask.any():
            raise BadRequest("the grammar admits no text")


class Matcher:
    """See `_base.Matcher`."""

    def __init__(self, vocabulary: Vocabulary, inner: Any) -> None:
        self.vocabulary = vocabulary
        self._inner = inner
        self._ended = False  # the library's own notion of the end does not survive a rollback

    def accept(self, ids: Sequence[int]) -> int:
        ids = list(ids)
        eos_ids = self.vocabulary.eos_ids
        place = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
        taken = int(self._inner.try_consume_tokens(ids[:place])) if place and not self._ended else 0
        if taken < place and self._inner.is_error():
            raise BadRequest(f"the grammar went over a limit: {_plain(self._inner.get_error())}")
        if taken == place < len(ids) and not self._ended and self._inner.is_accepting():
            self._ended = True
            taken += 1
        return taken

    def rollback(self, count: int) -> None:
        if count and self._ended:
            self._ended = False
            count -= 1
        if count and not self._inner.rollback(count):
            raise PhloemError(f"the grammar could not be rolled back: {_plain(self._inner.get_error())}")

    def fill(self, mask: NDArray[np.int32]) -> None:
        if self._ended:
            self.vocabulary.only_ends(mask)
            return
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._inner.is_error():
            if "NoExtension" in self._inner.get_error():
                raise BadRequest("the grammar admits no text, or none that goes on from here")
            raise BadRequest(f"the grammar went over a limit: {_plain(self._inner.get_error())}")

    def jump(self) -> list[int]:
        if self._ended:
            return []
        ids = list(self._inner.compute_ff_tokens())
        return ids if not self._inner.is_error() else []

    @property
    def may_end(self) -> bool:
        return bool(self._inner.is_accepting())

    @property
    def done(self) -> bool:
        return self._ended or bool(self._inner.is_stopped())
