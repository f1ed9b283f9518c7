"""Constraints as a grammar in llguidance's dialect of Lark.

Its lexer is greedy: a lexeme ends where no longer one can be. So a text that only its closing text ends is one lazy
lexeme together with that; where the closing text holds a special token, which no lexeme matches, the lexeme ends there.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.grammar import _nodes
from phloem.grammar._nodes import open_ended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from phloem.grammar._base import Vocabulary
    from phloem.grammar._nodes import Constraint
    from phloem.grammar.schema.names import Schema

_ANY = r"/(.|\n)*/"


def unbounded(constraint: Constraint) -> str | None:
    """Why the lexer could not tell where a text inside this constraint ends; None if it can."""
    match constraint:
        case _nodes.Sequence(parts):
            if any(open_ended(part) for part in parts[:-1]):
                return "a text inside a sequence has no fixed end"
            return next((reason for part in parts if (reason := unbounded(part))), None)
        case _nodes.Union(parts):
            return next((reason for part in parts if (reason := unbounded(part))), None)
        case _nodes.Repeat(part) | _nodes.Optional(part):
            if isinstance(constraint, _nodes.Repeat) and open_ended(part):
                return "a repeated text has no fixed end"
            return unbounded(part)
        case _nodes.Members(parts):
            if any(open_ended(part) for part, _ in parts):
                return "a text inside a sequence has no fixed end"
            return next((reason for part, _ in parts if (reason := unbounded(part))), None)
        case _nodes.Tag(_, content, end):
            return _unbounded_content(content, end)
        case _nodes.StructuralTag(_, tags):
            return next((reason for tag in tags if (reason := unbounded(tag))), None)
        case _:
            return None


def _unbounded_content(content: Constraint, end: str) -> str | None:
    if isinstance(content, _nodes.Union):
        return next((reason for part in content.parts if (reason := _unbounded_content(part, end))), None)
    if isinstance(content, _nodes.Text | _nodes.Regex):
        return None
    return "a text inside a tag has no fixed end" if end and open_ended(content) else unbounded(content)


class Writer:
    """Collects rules; equal constraints share one. Grammars that stand on their own are referred to by name.

    `terminal` turns a pattern into a terminal, `schema` a constraint into a checked schema (or another constraint that
    says the same), `lark` GBNF into Lark.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        terminal: Callable[[str], str],
        schema: Callable[[_nodes.JsonSchema | _nodes.JsonObject], Schema | Constraint],
        lark: Callable[[_nodes.Ebnf], str],
    ) -> None:
        self.vocabulary = vocabulary
        self._terminal = terminal
        self._schema = schema
        self._lark_of = lark
        self._lines: list[str] = []
        self._parts: list[dict[str, Any]] = []
        self._names: dict[Constraint, str] = {}
        self._open: list[tuple[str, Constraint]] = []
        self._bodies: dict[str, str] = {}

    def whole(self, constraint: Constraint) -> str:
        """The grammar, as JSON text of llguidance's list of grammars."""
        self._lines = [f"start: {self._rule(constraint)}"]
        self._write_later()
        text = "%llguidance {}\n" + "\n".join(self._lines) + "\n"
        return json.dumps({"grammars": [{"name": "top", "lark_grammar": text}, *self._parts]}, ensure_ascii=False)

    def _write_later(self) -> None:
        while self._open:
            name, constraint = self._open.pop()
            self._lines.append(f"{name}: {self._body(name, constraint)}")

    def _rule(self, constraint: Constraint) -> str:
        name = self._names.get(constraint)
        if name is None:
            name = self._names[constraint] = f"r{len(self._names)}"
            self._open.append((name, constraint))
        return name

    def _shared(self, kind: str, body: str) -> str:
        """The name of a rule or terminal with this body: `kind` and a number."""
        name = self._bodies.get(kind + body)
        if name is None:
            name = self._bodies[kind + body] = f"{kind}{len(self._bodies)}"
            self._lines.append(f"{name}{body}")
        return name

    def _body(self, name: str, constraint: Constraint) -> str:
        match constraint:
            case _nodes.JsonSchema() | _nodes.JsonObject():
                schema = self._schema(constraint)
                if not isinstance(schema, dict):
                    return self._rule(schema)
                return f"%json {json.dumps(schema, ensure_ascii=False)}"
            case _nodes.Regex() | _nodes.Text():
                return self._lexeme(constraint)
            case _nodes.Choice(options):
                return " | ".join(_quote(option) for option in options)
            case _nodes.Literal(text):
                return self._literal(text) or '""'
            case _nodes.Union(parts):
                return " | ".join(self._rule(part) for part in parts)
            case _nodes.Sequence(parts):
                return " ".join(self._rule(part) for part in parts)
            case _nodes.Optional(part):
                return f"({self._rule(part)})?"
            case _nodes.Repeat(part, separator, empty):
                rule = self._rule(part)
                body = f"{rule} ({self._literal(separator)} {rule})*"
                return f"({body})?" if empty else body
            case _nodes.Members():
                return self._members(name, constraint)
            case _nodes.Tag(begin, content, end):
                return f"{self._literal(begin)} {self._closed(content, end)}"
            case _nodes.StructuralTag():
                return self._tags(constraint)
            case _nodes.Lark() | _nodes.Ebnf():
                text = constraint.grammar if isinstance(constraint, _nodes.Lark) else self._lark_of(constraint)
                self._parts.append({"name": name, "lark_grammar": text})
                return f"@{name}"
            case _:
                raise BadRequest(f"llguidance cannot take {type(constraint).__name__}")

    def _members(self, name: str, members: _nodes.Members) -> str:
        """Two rules a part: with nothing written before it, and with something."""
        first, later = '""', '""'
        for number, (part, required) in reversed(list(enumerate(members.parts))):
            rule = self._rule(part)
            alone, after = f"{name}_f{number}", f"{name}_l{number}"
            skip = ("", "") if required else (f" | {first}", f" | {later}")
            self._lines.append(f"{alone}: {rule} {later}{skip[0]}")
            self._lines.append(f"{after}: {self._literal(members.separator)} {rule} {later}{skip[1]}")
            first, later = alone, after
        return first

    # Free text

    def _lexeme(self, text: _nodes.Text | _nodes.Regex) -> str:
        """A terminal that is this text."""
        if isinstance(text, _nodes.Regex):
            return self._named(self._terminal(text.pattern))
        wanted = [self._terminal(pattern) for pattern in text.patterns]
        if text.shortest or text.longest is not None:
            longest = "" if text.longest is None else text.longest
            wanted.append(f"/(.|\\n){{{text.shortest},{longest}}}/")
        barred = f"~/(.|\\n)*({'|'.join(map(_pattern_of, text.excludes))})(.|\\n)*/"
        return self._named(" & ".join([*(wanted or [_ANY]), *([barred] if text.excludes else [])]))

    def _named(self, body: str) -> str:
        return self._shared("T", f": {body}")

    def _closed(self, content: Constraint, end: str) -> str:
        """The content and the text that ends it."""
        if isinstance(content, _nodes.Union):
            return "(" + " | ".join(self._closed(part, end) for part in content.parts) + ")"
        if end and isinstance(content, _nodes.Text | _nodes.Regex):
            return self._ended(self._lexeme(content), end)
        return f"{self._rule(content)} {self._literal(end)}"

    def _ended(self, terminal: str, end: str) -> str:
        """A terminal and what follows it: nothing but that ends it."""
        pieces = self._pieces(end)
        if pieces[0] in self.vocabulary.special_by_text:
            return f"{terminal} {self._literal(end)}"
        rest = "".join(pieces[1:])
        if rest:
            return f"{self._named(f'{terminal} {_quote(pieces[0])}')} {self._literal(rest)}"
        return self._shared("e", f"[lazy]: {terminal} {_quote(end)}")

    # Triggered tags

    def _tags(self, tags: _nodes.StructuralTag) -> str:
        """Free text up to a trigger is one lazy lexeme: it ends at the first trigger in it. A tag that must come, comes
        at once: free text before it could go on for ever.
        """
        if all(self._pieces(trigger)[0] in self.vocabulary.special_by_text for trigger in tags.triggers):
            return self._special_tags(tags)
        free = self._named(_ANY)
        others = self._others(tags.triggers)
        skip = [f"{free} {others}"] if others else []
        segments = [self._segment(free, tag, tags) for tag in tags.tags]
        either = f"({' | '.join([*segments, *skip])})"
        if tags.at_least_one:
            first = f"({' | '.join(self._rule(tag) for tag in tags.tags)})"
            return first if tags.stop_after_first else f"{first} {either}* {free}"
        if not tags.not_first:
            if tags.stop_after_first:
                return f"{''.join(f'({item})*' for item in skip)} ({' | '.join(segments)} | {free})"
            return f"{either}* {free}"
        lead = self._named(f"{_ANY} & {_not_first(tags.not_first)}")
        begin = [self._segment(lead, tag, tags) for tag in tags.tags]
        skips = [f"{lead} {others}"] if others else []
        if tags.stop_after_first:
            more = f"{skips[0]} ({skip[0]})* ({' | '.join(segments)} | {free})" if skips else ""
            return " | ".join([lead, *begin, *([more] if more else [])])
        return f"{lead} | ({' | '.join([*begin, *skips])}) {either}* {free}"

    def _segment(self, free: str, tag: _nodes.Tag, tags: _nodes.StructuralTag) -> str:
        """Free text, and the tag that begins with the trigger in it."""
        trigger = max((item for item in tags.triggers if tag.begin.startswith(item)), key=len)
        rest = self._literal(tag.begin[len(trigger) :])
        return self._shared("s", f": {self._ended(free, trigger)} {rest} {self._closed(tag.content, tag.end)}")

    def _special_tags(self, tags: _nodes.StructuralTag) -> str:
        """Every trigger begins with a special token: text is free between special tokens, and behind one of a trigger
        it is the trigger's tag or goes on in another way than the trigger.
        """
        either = f"({' | '.join(self._rule(tag) for tag in tags.tags)})"
        spelled = f"~/(.|\\n)*({'|'.join(map(_pattern_of, tags.triggers))})(.|\\n)*/"
        free = self._named(f"{_ANY} & {spelled}")
        others = self._others(tags.triggers)
        steps = [f"{others} {free}"] if others else []
        rests: dict[str, list[str]] = {}
        for trigger in tags.triggers:
            head = self._pieces(trigger)[0]
            rests.setdefault(head, []).append(trigger[len(head) :])
        for head, wanted in rests.items():
            if all(wanted):
                barred = "|".join(map(_pattern_of, wanted))
                other = self._named(f"{_ANY} & ~/({barred})(.|\\n)*/")
                steps.append(f"{self._literal(head)} {other}")
        again = f"({' | '.join([*steps, f'{either} {free}'])})*"
        if tags.at_least_one:
            return either if tags.stop_after_first else f"{either} {free} {again}"
        lead = self._named(f"{_ANY} & {spelled} & {_not_first(tags.not_first)}") if tags.not_first else free
        between = f"({' | '.join(steps)})*" if steps else ""
        return f"{lead} {between} {either}?" if tags.stop_after_first else f"{lead} {again}"

    def _others(self, triggers: Iterable[str]) -> str:
        """Special tokens that free text may hold: those that neither end it nor belong to a trigger."""
        special = self.vocabulary.special_by_text
        heads = {next((special[piece] for piece in self._pieces(item) if piece in special), -1) for item in triggers}
        ids = [i for i in sorted(self.vocabulary.special) if i not in heads and i not in self.vocabulary.eos_ids]
        return f"<[{','.join(map(str, ids))}]>" if ids else ""

    def _pieces(self, text: str) -> list[str]:
        """A text cut at the special tokens that it names."""
        inside = sorted((name for name in self.vocabulary.special_by_text if name and name in text), key=len)
        if not inside:
            return [text]
        pattern = "(" + "|".join(map(re.escape, reversed(inside))) + ")"
        return [piece for piece in re.split(pattern, text) if piece]

    def _literal(self, text: str) -> str:
        """A text in Lark; the names of special tokens in it mean those tokens.

        One that ends the whole text is left to the end of the text, which is never an ordinary token.
        """
        special = self.vocabulary.special_by_text
        made: list[str] = []
        for piece in self._pieces(text) if text else []:
            if piece not in special:
                made.append(_quote(piece))
            elif special[piece] not in self.vocabulary.eos_ids:
                made.append(f"<[{special[piece]}]>")
        return " ".join(made)


def _not_first(text: str) -> str:
    return rf"~/\s*{_pattern_of(text)}(.|\n)*/"


def _pattern_of(text: str) -> str:
    """A pattern for exactly this text, in a Lark regex."""
    return "".join(char if char.isalnum() or char in " _" else f"\\x{{{ord(char):x}}}" for char in text)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
