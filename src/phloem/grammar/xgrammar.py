"""Grammars by xgrammar: EBNF (GBNF) and structural tags of every format; JSON schemas only where asked by name.

Its compiler cannot be interrupted and has no memory limit, so it runs in a child process with both (`_worker.py`);
the compiled grammar comes back serialised. On JSON schemas it silently admits what several keywords forbid: `KEYWORDS`
lists those it was seen to enforce, and every other keyword is declined.
"""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest
from phloem.grammar import _base, _nodes
from phloem.grammar._worker import CompilerProcess
from phloem.grammar.schema import names as _schema
from phloem.grammar.schema import numbers as _numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.grammar._base import Constraint, EngineOptions, Vocabulary

KEYWORDS = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "enum", "anyOf", "$ref", "minItems"}
    | {"maxItems", "minimum", "maximum", "prefixItems"}  # with maxLength it lets control characters into strings
)
_RECENT = 8  # tokens before a forced text that decide how its beginning is split


class Engine:
    """See `_base.Engine`."""

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary, options: EngineOptions) -> None:
        if not vocabulary.eos_ids:
            raise BadRequest("constrained generation needs a tokenizer with an end-of-text token")
        self.vocabulary = vocabulary
        self.options = options
        self._library: Any = importlib.import_module("xgrammar")
        plain = [b"" if i in vocabulary.special else text for i, text in enumerate(vocabulary.tokens)]
        self._info = self._library.TokenizerInfo(
            plain,
            self._library.VocabType.RAW,
            vocab_size=vocabulary.size,
            stop_token_ids=list(vocabulary.eos_ids),
        )
        self._process = CompilerProcess(plain, vocabulary.size, list(vocabulary.eos_ids), options.memory_limit)

    def decline(self, constraint: Constraint) -> str | None:
        match constraint:
            case _base.Lark():
                return "has another dialect of Lark"
            case _base.JsonSchema(schema):
                return _not_exact(schema, self.name)
            case _base.Tag(begin, _, end) if any(name in begin + end for name in self.vocabulary.special_by_text):
                return "a tag is made of special tokens"
            case _base.StructuralTag(not_first=not_first) if not_first:
                return "has no text that must not begin in some way"
            case _base.StructuralTag(triggers) if any(
                name in text for name in self.vocabulary.special_by_text for text in triggers
            ):
                return "a tag is made of special tokens"
            case _nodes.Members():
                return "has no members in order with a separator"
            case _nodes.Text(patterns, _, shortest, longest) if patterns or shortest or longest is not None:
                return "has no text that several patterns or lengths bound"
            case _nodes.Literal(text) if any(name in text for name in self.vocabulary.special_by_text):
                return "a text is made of special tokens"
            case _:
                return next((reason for part in _inside(constraint) if (reason := self.decline(part))), None)

    def compile(self, constraint: Constraint) -> Compiled:
        if isinstance(constraint, _base.TagFormat):
            _settle_tags(read := _schema.read_json(constraint.source), "#", self.name)
            job = ("structural_tag", json.dumps(read, ensure_ascii=False))
        elif isinstance(constraint, _base.Ebnf):
            job = ("ebnf", constraint.grammar)
        elif isinstance(constraint, _base.Regex):
            job = ("regex", constraint.pattern)
        else:
            body = {"type": "structural_tag", "format": self._format(constraint)}
            job = ("structural_tag", json.dumps(body, ensure_ascii=False))
        text = self._process.compile(*job, whitespace=self.options.whitespace, timeout=self.options.timeout)
        inner = self._library.CompiledGrammar.deserialize_json(text, self._info)
        compiled = Compiled(self.vocabulary, self._library, inner, len(text))
        compiled.check_first()
        return compiled

    def close(self) -> None:
        self._process.close()

    def _format(self, constraint: Constraint) -> dict[str, Any]:
        """The constraint as xgrammar's structural tag format."""
        match constraint:
            case _base.JsonObject():
                return self._json({"type": "object"})
            case _base.JsonSchema(schema):
                return self._json(_exact(schema, self.name))
            case _base.Regex(pattern):
                return {"type": "regex", "pattern": pattern}
            case _base.Ebnf(grammar):
                return {"type": "grammar", "grammar": grammar}
            case _base.Choice(options):
                return {"type": "or", "elements": [{"type": "const_string", "value": item} for item in options]}
            case _base.Union(parts):
                return {"type": "or", "elements": [self._format(part) for part in parts]}
            case _nodes.Literal(text):
                return {"type": "const_string", "value": text}
            case _nodes.Text(_, excludes):
                return {"type": "any_text", "excludes": list(excludes)}
            case _nodes.Sequence(parts):
                return {"type": "sequence", "elements": [self._format(part) for part in parts]}
            case _nodes.Optional(part):
                return {"type": "optional", "content": self._format(part)}
            case _nodes.Repeat(part, separator, empty):
                again = _nodes.Sequence((_nodes.Literal(separator), part)) if separator else part
                more = {"type": "star", "content": self._format(again)}
                body = {"type": "sequence", "elements": [self._format(part), more]}
                return {"type": "optional", "content": body} if empty else body
            case _base.Tag(begin, content, end):
                return {"type": "tag", "begin": begin, "content": self._format(content), "end": end}
            case _base.StructuralTag():
                return {
                    "type": "triggered_tags",
                    "triggers": list(constraint.triggers),
                    "tags": [self._format(tag) for tag in constraint.tags],
                    "at_least_one": constraint.at_least_one,
                    "stop_after_first": constraint.stop_after_first,
                }
            case _:
                raise BadRequest(f"{self.name} cannot take {type(constraint).__name__}")

    def _json(self, schema: dict[str, Any]) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": schema}


def _inside(constraint: Constraint) -> Sequence[Constraint]:
    match constraint:
        case _base.Union(parts) | _nodes.Sequence(parts):
            return parts
        case _nodes.Optional(part) | _nodes.Repeat(part):
            return (part,)
        case _base.Tag(_, content):
            return (content,)
        case _base.StructuralTag(_, tags):
            return tags
        case _:
            return ()


def _not_exact(schema: str, name: str) -> str | None:
    try:
        _exact(schema, name)
    except BadRequest as error:
        return error.message
    return None


def _exact(schema: str, name: str) -> _schema.Schema:
    """The schema as the library is to read it. Raises BadRequest: what it does not enforce, or would change."""
    body = _schema.read_schema(schema)
    _schema.refuse_unsupported(body, KEYWORDS, frozenset(), name)
    nodes = list(_schema.reachable(body))
    for path, node in nodes:
        found = _numbers.big_in(node, path, _numbers.is_64_bits) if isinstance(node, dict) else None
        if found is not None:
            _schema.fail(found[0], f"{found[1][:60]} cannot be held exactly")
    _numbers.narrow(nodes)
    return body


def _settle_tags(node: Any, path: str, name: str) -> None:
    """Schemas inside a format that only this engine reads must use what it enforces; they are settled in place."""
    if isinstance(node, dict):
        if node.get("type") == "json_schema" and isinstance(node.get("json_schema"), dict):
            try:
                node["json_schema"] = _exact(_schema.write_json(node["json_schema"], f"{path}/json_schema"), name)
            except BadRequest as error:
                raise BadRequest(f"{path}/json_schema: {error.message}") from None
            return
        for key, value in node.items():
            _settle_tags(value, f"{path}/{_schema.escape(key)}", name)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _settle_tags(value, f"{path}/{index}", name)


class Compiled:
    """See `_base.Compiled`."""

    engine = "xgrammar"

    def __init__(self, vocabulary: Vocabulary, library: Any, inner: Any, num_bytes: int) -> None:
        self.vocabulary = vocabulary
        self.num_bytes = num_bytes
        self._library = library
        self._inner = inner

    def matcher(self) -> Matcher:
        return Matcher(self.vocabulary, self._library.GrammarMatcher(self._inner))

    def check_first(self) -> None:
        """Refuse a grammar that admits no text at all."""
        mask = self.vocabulary.new_mask()
        self.matcher().fill(mask)
        if not mask.any():
            raise BadRequest("the grammar admits no text")


class Matcher:
    """See `_base.Matcher`."""

    def __init__(self, vocabulary: Vocabulary, inner: Any) -> None:
        self.vocabulary = vocabulary
        self._inner = inner
        self._recent: list[int] = []

    def accept(self, ids: Sequence[int]) -> int:
        for count, token in enumerate(ids):
            if self._inner.is_terminated() or not self._inner.accept_token(int(token)):
                return count
            self._recent.append(int(token))
        return len(ids)

    def rollback(self, count: int) -> None:
        if count:
            self._inner.rollback(count)
            del self._recent[-count:]

    def fill(self, mask: NDArray[np.int32]) -> None:
        if self._inner.is_terminated():
            self.vocabulary.only_ends(mask)
            return
        self._inner.fill_next_token_bitmask(mask[None], 0)
        np.bitwise_and(mask, self.vocabulary.existing, out=mask)  # the library allows what pads the logits

    def jump(self) -> list[int]:
        if self._inner.is_terminated():
            return []
        try:
            text: str = self._inner.find_jump_forward_string()
        except UnicodeDecodeError:  # a forced text that ends inside a character
            return []
        if not text:
            return []
        for length in range(min(_RECENT, len(self._recent)), -1, -1):
            recent = self._recent[len(self._recent) - length :]
            ids = self.vocabulary.split_forced(recent, text.encode(), ends=False)
            if ids:
                return self._fitting(ids)
            if self.vocabulary.text_of(recent).decode("utf-8", "replace").isascii():
                break
        return []

    def _fitting(self, ids: list[int]) -> list[int]:
        """The forced text is what the grammar says, so its tokens fit; a library that errs must not end a request."""
        count = self.accept(ids)
        self.rollback(count)
        return ids[:count]

    @property
    def may_end(self) -> bool:
        return bool(self._inner.is_completed()) or bool(self._inner.is_terminated())

    @property
    def done(self) -> bool:
        """True at the end of text, or where a complete text cannot go on."""
        if self._inner.is_terminated():
            return True
        if not self._inner.is_completed():
            return False
        mask = self.vocabulary.new_mask()
        self.fill(mask)
        bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return set(bits.tolist()) <= set(self.vocabulary.eos_ids)
