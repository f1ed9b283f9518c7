"""Numbers that a double cannot hold, and dates: exactly as the schema says, or refused with the path."""

from __future__ import annotations

import datetime
import json
import resource
from decimal import Decimal
from typing import Any

import pytest
from grammar_support import engine, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.core.errors import BadRequest
from phloem.grammar._base import JsonSchema, read_structural_tag
from phloem.grammar.schema import numbers as _numbers
from phloem.grammar.schema import oneof as _oneof
from phloem.grammar.schema.names import read_json, read_schema
from phloem.protocol.body import Parser
from phloem.protocol.structured import constraint_fields
from phloem.server.chat.body import ChatBody

TOP = 2**63
GRAMMAR = frozenset({"grammar"})
NAMES = ["llguidance", "xgrammar"]


def text_of(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def admits(schema: Any, name: str = "llguidance") -> Any:
    """A function from a text to whether the grammar takes it as a whole."""
    made = engine(name).compile(JsonSchema(text_of(schema)))

    def judge(value: Any) -> bool:
        ids = engine(name).vocabulary.encode(str(value))
        matcher = made.matcher()
        return matcher.accept(ids) == len(ids) and matcher.may_end

    return judge


def refused(schema: Any, name: str = "llguidance") -> str:
    with pytest.raises(BadRequest) as caught:
        engine(name).compile(JsonSchema(text_of(schema)))
    return caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [1234567890123456789, 2**53 + 1, TOP - 1, -TOP, -TOP + 1, -TOP - 1, 2**64 - 1, 10**30 + 1, TOP - 1024, 1 - 2**53],
)
def test_a_constant_is_its_digits(number: int) -> None:
    near = [number - 1, number + 1, int(float(number))]
    for schema in ({"const": number}, {"enum": [number]}, {"type": "integer", "enum": ["a", number]}):
        takes = admits(schema)
        assert takes(number) and not any(takes(other) for other in near if other != number), schema


@pytest.mark.slow
def test_constants_stand_exactly_inside_frames() -> None:
    big = 2**53 + 1
    takes = admits(
        {
            "type": "object",
            "properties": {
                "id": {"const": big},
                "tags": {"type": "array", "items": {"enum": [big, "x"]}, "minItems": 1, "maxItems": 2},
                "more": {"type": "array", "items": {"$ref": "#/$defs/n"}},
                "n": {"$ref": "#/$defs/n"},
                "o": {"anyOf": [{"const": {"k": [big]}}, {"type": "null"}]},
                "free": {"type": "integer", "minimum": 3},
            },
            "required": ["id", "o"],
            "$defs": {"n": {"enum": [big, None]}},
        }
    )
    whole = f'{{"id":{big},"tags":["x",{big}],"more":[{big},null],"n":null,"o":{{"k":[{big}]}},"free":7}}'
    assert takes(whole) and takes(f'{{"id":{big},"o":null}}') and takes(f'{{"id":{big},"more":[],"o":null,"free":3}}')
    for wrong in (whole.replace("7", "2"), whole.replace(f'"id":{big}', f'"id":{big - 1}'), f'{{"o":null,"id":{big}}}'):
        assert not takes(wrong)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"allOf": [{"const": 2**53 + 1}, {"minimum": 3}]}, "#/allOf/0/const"),
        ({"type": "object", "properties": {"a": {"const": TOP}}, "additionalProperties": True}, "#/properties/a/const"),
        ({"type": "array", "prefixItems": [{"enum": [1, {"a": TOP}]}]}, "#/prefixItems/0/enum/1/a"),
        ('{"items": {"const": 0.12345678901234567890123}}', "#/items/const"),
        ('{"properties": {"a": {"maximum": 0.12345678901234567890123}}}', "#/properties/a/maximum"),
        ('{"multipleOf": 0.1000000000000000000000000001}', "#/multipleOf"),
        ('{"enum": [1, [1e-500]]}', "#/enum/1/0"),
        ('{"const": 1e401}', "#/const"),
        ({"type": "integer", "multipleOf": 2**53 + 1}, "#/multipleOf"),
        ({"items": {"multipleOf": 4294967295}}, "#/items/multipleOf"),
        ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "#/allOf/"),
        ({"type": "integer", "minimum": 10**20}, "#/minimum"),
        ({"type": "number", "maximum": -(10**20)}, "#/maximum"),
        ({"type": "number", "minimum": 2**53 + 1, "maximum": 2**53 + 1}, "#/m"),
        ({"minLength": 2**64}, "#/minLength"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_path(schema: Any, place: str) -> None:
    assert refused(schema).startswith(place)


def test_annotations_may_say_any_number() -> None:
    takes = admits('{"type": "null", "default": 0.12345678901234567890123, "examples": [1e999, 1e-999]}')
    assert takes("null")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("low", "high"),
    [(-TOP, TOP - 1), (0, 2**64 - 1), (-(10**30), 10**30), (2**53 + 1, 2**60 + 1), (-(2**53) - 3, 2**53 + 3)],
)
def test_integers_of_wide_ranges_stay_within(name: str, low: int, high: int) -> None:
    takes = admits({"type": "integer", "minimum": low, "maximum": high}, name)
    ends = [_numbers._inward(low, "minimum", True), _numbers._inward(high, "maximum", True)]
    assert all(takes(int(end)) for end in ends) and takes(2**59 if low > 0 else 5)
    assert not any(takes(value) for value in (low - 1, high + 1, high * 10))


@pytest.mark.parametrize("bound", ["1e20", "3.4028235e38", "1.797e308", "9223372036854775807"])
def test_numbers_of_wide_ranges_stay_within(bound: str) -> None:
    takes = admits(f'{{"type": "number", "minimum": -{bound}, "maximum": {bound}}}')
    assert all(takes(value) for value in (0, 5, -5, 0.25, -0.25, 10**18))
    over = int(Decimal(bound)) + 1
    assert not takes(over) and not takes(-over)
    for half in (f'{{"type": "number", "maximum": {bound}}}', f'{{"minimum": -{bound}}}'):
        takes = admits(half)
        assert takes(5) and takes(-0.5)
    assert admits('{"type": "number", "exclusiveMinimum": 1e-300}')("0.5")
    assert not admits('{"type": "number", "exclusiveMinimum": 1e-300}')("0")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_bound_is_never_moved_outward(name: str) -> None:
    for kind in ("integer", "number"):
        takes = admits({"type": kind, "minimum": 2**53 + 1}, name)
        assert not takes(2**53) and takes(2**53 + 2)
        takes = admits({"type": kind, "maximum": 2**53 + 3}, name)
        assert not takes(2**53 + 4) and takes(2**53 - 5)


def test_few_integers_between_two_bounds_are_all_there() -> None:
    takes = admits({"type": "integer", "minimum": 2**53 + 1, "exclusiveMaximum": 2**53 + 2, "title": "one"})
    assert takes(2**53 + 1) and not takes(2**53) and not takes(2**53 + 2)


def test_counts_beyond_every_text_bound_nothing() -> None:
    assert admits({"type": "string", "maxLength": 2**64})('"ab"')
    assert admits('{"type": "array", "maxItems": 1e30, "items": {"type": "null"}}')("[null]")


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(-(2**66), 2**66) | st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.booleans())
def test_inward_is_inward_however_a_double_is_read(value: int | float, up: bool, whole: bool) -> None:
    try:
        moved = _numbers._inward(value, "minimum" if up else "maximum", whole)
    except _numbers._Beyond:
        return
    exact = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
    held = float(moved)
    for read in (Decimal(moved), Decimal(held), Decimal(repr(held))):
        assert read >= exact if up else read <= exact


def test_a_literal_that_means_an_integer_is_one() -> None:
    read = read_json("[1.0, 1e2, -0.0, 1e23, 9007199254740993.0, 0.5, 1.797e308]")
    assert read[:4] == [1, 100, 0, 10**23] and all(isinstance(item, int) for item in read[:5])
    assert read[4] == 2**53 + 1 and read[5:] == [0.5, 1797 * 10**305]


def test_branches_are_told_apart_exactly() -> None:
    for a, b, apart in (
        ("9007199254740993", "9007199254740992", True),
        ("1e23", "100000000000000000000000", False),
        ("9007199254740993.0", "9007199254740993", False),
    ):
        body = read_schema(f'{{"oneOf": [{{"const": {a}}}, {{"const": {b}}}]}}')
        assert _oneof.disjoint(body, *body["oneOf"]) is apart
    takes = admits({"oneOf": [{"const": 2**53 + 1}, {"const": 2**53}]})
    assert takes(2**53) and takes(2**53 + 1)
    body = read_schema(f'{{"oneOf": [{{"maximum": {2**53}, "type": "number"}}, {{"exclusiveMinimum": {2**53}}}]}}')
    assert _oneof.disjoint(body, body["oneOf"][0], {**body["oneOf"][1], "type": "number"})


def test_false_and_zero_stay_two_values_in_an_enumeration() -> None:
    takes = admits({"enum": [False, 1]})
    assert takes("false") and takes("1") and not takes("0") and not takes("true")


def test_numbers_inside_structural_tags_are_exact() -> None:
    shape = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": {"const": 2**53 + 1}}}
    made = engine("llguidance").compile(
        read_structural_tag(json.dumps({"type": "structural_tag", "format": {**shape, "end": "</a>"}}))
    )
    ids = engine("llguidance").vocabulary.encode(f"<a>{2**53 + 1}</a>")
    matcher = made.matcher()
    assert matcher.accept(ids) == len(ids) and matcher.may_end
    text = '{"format": {"type": "json_schema", "json_schema": {"const": 0.12345678901234567890123}}}'
    with pytest.raises(BadRequest, match="#/format/json_schema/const"):
        read_structural_tag(text)


def test_a_zero_in_a_foreign_field_of_a_tag_is_not_unset() -> None:
    inner = {"type": "const_string", "value": "a"}
    for field in ({"most": 0}, {"most": 0.0}):
        with pytest.raises(BadRequest):
            engine("llguidance").compile(
                read_structural_tag(json.dumps({"format": {"type": "star", "content": inner, **field}}))
            )


@pytest.mark.slow
def test_xgrammar_refuses_what_it_would_change() -> None:
    assert "#/enum/0" in str(engine("xgrammar").decline(JsonSchema(json.dumps({"enum": [2**63]}))))
    assert admits({"enum": [2**53 + 1]}, "xgrammar")(2**53 + 1)


def test_no_number_of_a_schema_takes_the_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in (2**31 - 1, 0.123457, 65537 * 7, 99_991.5):
        refused({"type": "number", "multipleOf": value})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


# Dates


def test_a_date_is_one_of_the_calendar() -> None:
    takes = admits({"type": "string", "format": "date"})
    for year in (1, 1900, 1999, 2000, 2023, 2024, 2100, 2400, 9996, 9999):
        for month in range(14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                text = f"{year:04}-{month:02}-{day:02}"
                try:
                    datetime.date.fromisoformat(text)
                    right = True
                except ValueError:
                    right = False
                assert takes(json.dumps(text)) is right, text


def test_leap_years_hold_inside_other_formats_and_beside_patterns() -> None:
    takes = admits({"type": "string", "format": "date-time"})
    assert takes('"2024-02-29T23:59:59.5+01:30"') and not takes('"2023-02-29T23:59:59Z"')
    assert not takes('"2024-02-28T24:00:00Z"') and not takes('"2024-02-28T23:60:00Z"')
    takes = admits({"type": "string", "format": "date", "pattern": "^2"})
    assert takes('"2024-02-29"') and not takes('"2023-02-29"') and not takes('"1999-01-01"')
    takes = admits({"type": "object", "additionalProperties": {"anyOf": [{"format": "date", "type": "string"}]}})
    assert takes('{"a":"2000-02-29"}') and not takes('{"a":"1900-02-29"}')


def test_walks_through_dates_end_in_dates() -> None:
    made = engine("llguidance").compile(JsonSchema('{"type": "string", "format": "date-time"}'))
    ended = [text for seed in range(30) if (text := walk(made.matcher(), seed)[1]) is not None]
    assert len(ended) > 10
    for text in ended:
        datetime.datetime.fromisoformat(json.loads(text))


def test_a_fraction_beyond_a_double_is_refused_also_inside_an_http_body() -> None:
    schema = '{"type":"object","properties":{"a":{"const":0.12345678901234567890123}}}'
    for field in (
        '"json_schema":%s',
        '"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":%s}}',
    ):
        body = Parser(ChatBody).parse(f'{{"messages":[],{field % schema}}}'.encode(), GRAMMAR)
        sent = constraint_fields(body)["json_schema"]
        assert "0.12345678901234567890123" in sent
        with pytest.raises(BadRequest, match=r"#/properties/a/const: 0\.12345678901234567890123 cannot be held"):
            engine("llguidance").compile(JsonSchema(sent))
    body = Parser(ChatBody).parse(
        b'{"messages":[],"json_schema":{"enum":[9007199254740993.0,0.1,1e2],"maximum":1e400}}', GRAMMAR
    )
    assert constraint_fields(body)["json_schema"] == '{"enum": [9007199254740993.0, 0.1, 100.0], "maximum": 1e400}'


def test_a_refusal_names_the_schema_as_it_was_sent() -> None:
    top = 2**53
    schema = {"type": "integer", "minimum": top, "maximum": top + 1, "not": {"const": top}}
    wrapped = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    with pytest.raises(BadRequest, match=r"^#/properties/a: ") as refused:
        engine("llguidance").compile(JsonSchema(json.dumps(wrapped)))
    assert "anyOf" not in refused.value.message


def test_a_refusal_shows_no_pattern_that_was_written_here() -> None:
    schema = {"allOf": [{"type": "string", "format": "date"}, {"type": "string", "pattern": "^2023-02-29$"}]}
    with pytest.raises(BadRequest, match="no text fits") as refused:
        engine("llguidance").compile(JsonSchema(json.dumps(schema)))
    assert len(refused.value.message) < 80


@pytest.mark.parametrize("form", ["uint", "int", "uint128", "int128"])
def test_integer_formats_of_code_generators_are_annotations(form: str) -> None:
    assert admits({"type": "integer", "format": form, "minimum": 0})("7")
