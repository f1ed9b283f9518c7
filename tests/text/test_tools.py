"""Tool-call parsers: for every format, however the text arrives in chunks, and whatever it holds."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.text.tools._base import Arguments, CallStart, Event, Parsed, Text, ToolParser, collect
from phloem.utils.registry import Registry

FORMATS = Registry("phloem.text.tools", "tool-call parser")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "metric": {"type": "boolean"},
                    "where": {"type": "object"},
                    "list": {"type": "array"},
                    "ratio": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    {
        "type": "function",
        "function": {
            "name": "write-file",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
        },
    },
]
Call = tuple[str, dict[str, Any]]
CALLS: dict[str, list[Call]] = {
    "one": [("get_weather", {"city": "Paris", "days": 3})],
    "empty": [("now", {})],
    "nested": [("get_weather", {"where": {"a": [1, {"b": "}"}], "c": None}, "list": [[], {}, "]"], "metric": True})],
    "unicode": [("get_weather", {"city": 'Zürich 世界 🙂 "quoted" back\\slash', "ratio": -1.5e-3})],
    "two": [("get_weather", {"city": "Rome"}), ("now", {})],
    "three": [("now", {}), ("get_weather", {"city": "a", "days": 1}), ("get_weather", {"city": "b", "ratio": None})],
    "long": [("get_weather", {"city": "x" * 700 + " end", "days": 7}), ("now", {})],
}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: list[Call]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {dumps(args)}}}\n</tool_call>' for name, args in calls
    )


def qwen3_coder(calls: list[Call]) -> str:
    out = []
    for name, args in calls:
        body = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else dumps(value)}\n</parameter>\n"
            for key, value in args.items()
        )
        out.append(f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>")
    return "\n".join(out)


def llama3(calls: list[Call]) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {dumps(args)}}}' for name, args in calls)


def pythonic(calls: list[Call]) -> str:
    return (
        "["
        + ", ".join(f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls)
        + "]"
    )


def mistral(calls: list[Call]) -> str:
    return "[TOOL_CALLS] " + dumps([{"name": name, "arguments": args} for name, args in calls])


def jamba(calls: list[Call]) -> str:
    lines = ",\n".join("    " + dumps({"name": name, "arguments": args}) for name, args in calls)
    return f"<tool_calls>[\n{lines}\n]</tool_calls>"


def mistral_new(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(args)}" for name, args in calls)


def deepseekv3(calls: list[Call]) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(args)}\n```<｜tool▁call▁end｜>"
        for name, args in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseekv31(calls: list[Call]) -> str:
    inner = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(args)}<｜tool▁call▁end｜>" for name, args in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseekv32(calls: list[Call]) -> str:
    out = ""
    for name, args in calls:
        body = "".join(
            f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
            f"{value if isinstance(value, str) else dumps(value)}</｜DSML｜parameter>\n"
            for key, value in args.items()
        )
        out += f'<｜DSML｜invoke name="{name}">\n{body}</｜DSML｜invoke>\n'
    return f"<｜DSML｜function_calls>\n{out}</｜DSML｜function_calls>"


def glm(newline: str) -> Callable[[list[Call]], str]:
    def write(calls: list[Call]) -> str:
        out = []
        for name, args in calls:
            body = "".join(
                f"<arg_key>{key}</arg_key>{newline}<arg_value>{value if isinstance(value, str) else dumps(value)}"
                f"</arg_value>{newline}"
                for key, value in args.items()
            )
            out.append(f"<tool_call>{name}{newline}{body}</tool_call>")
        return newline.join(out)

    return write


def kimi_k2(calls: list[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{dumps(args)}<|tool_call_end|>"
        for i, (name, args) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def gpt_oss(calls: list[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(args)}<|call|>"
        for name, args in calls
    )


def gpt_oss_role(calls: list[Call]) -> str:
    return "".join(
        f"<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>{dumps(args)}<|call|>"
        for name, args in calls
    )


def minimax_m2(calls: list[Call]) -> str:
    out = ""
    for name, args in calls:
        body = "".join(
            f'<parameter name="{key}">{value if isinstance(value, str) else dumps(value)}</parameter>\n'
            for key, value in args.items()
        )
        out += f'<invoke name="{name}">\n{body}</invoke>\n'
    return f"<minimax:tool_call>\n{out}</minimax:tool_call>"


def step3(calls: list[Call]) -> str:
    out = ""
    for name, args in calls:
        body = "".join(
            f'<steptml:parameter name="{key}">{value if isinstance(value, str) else dumps(value)}</steptml:parameter>\n'
            for key, value in args.items()
        )
        out += (
            f'<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n{body}</steptml:invoke>'
            "<｜tool_call_end｜>\n"
        )
    return f"<｜tool_calls_begin｜>\n{out}<｜tool_calls_end｜>"


def json_array(calls: list[Call]) -> str:
    return dumps([{"name": name, "parameters": args} for name, args in calls])


def array(begin: str, end: str, key: str = "name", arguments: str = "arguments") -> Callable[[list[Call]], str]:
    def write(calls: list[Call]) -> str:
        return f"{begin}{dumps([{key: name, arguments: args} for name, args in calls])}{end}"

    return write


def apertus(calls: list[Call]) -> str:
    return f"<|tools_prefix|>{dumps([{name: args} for name, args in calls])}<|tools_suffix|>"


def framed(begin: str, end: str, arguments: str = "arguments") -> Callable[[list[Call]], str]:
    def write(calls: list[Call]) -> str:
        return "\n".join(f"{begin}{dumps({'name': name, arguments: args})}{end}" for name, args in calls)

    return write


def olmo3(calls: list[Call]) -> str:
    lines = (f"{name}({', '.join(f'{key}={dumps(value)}' for key, value in args.items())})" for name, args in calls)
    return "<function_calls>" + "\n".join(lines) + "</function_calls>"


def gemma4(calls: list[Call]) -> str:
    def value(given: Any) -> str:
        if isinstance(given, str):
            return f'<|"|>{given}<|"|>'
        if isinstance(given, dict):
            return "{" + ",".join(f"{key}:{value(item)}" for key, item in given.items()) + "}"
        return f"[{','.join(map(value, given))}]" if isinstance(given, list) else dumps(given)

    return "".join(f"<|tool_call>call:{name}{value(args)}<tool_call|>" for name, args in calls)


WRITERS: dict[str, tuple[str, Callable[[list[Call]], str]]] = {
    "hermes": ("hermes", hermes),
    "ernie45": ("ernie45", hermes),
    "qwen3_coder": ("qwen3_coder", qwen3_coder),
    "llama3": ("llama3", llama3),
    "llama3 with tag": ("llama3", lambda calls: "<|python_tag|>" + llama3(calls)),
    "pythonic": ("pythonic", pythonic),
    "pythonic with tags": ("pythonic", lambda calls: f"<|python_start|>{pythonic(calls)}<|python_end|>"),
    "mistral": ("mistral", mistral),
    "jamba": ("jamba", jamba),
    "mistral v11": ("mistral", mistral_new),
    "deepseekv3": ("deepseekv3", deepseekv3),
    "deepseekv31": ("deepseekv31", deepseekv31),
    "deepseekv32": ("deepseekv32", deepseekv32),
    "glm45": ("glm45", glm("\n")),
    "glm47": ("glm45", glm("")),
    "kimi_k2": ("kimi_k2", kimi_k2),
    "gpt_oss": ("gpt_oss", gpt_oss),
    "gpt_oss by role": ("gpt_oss", gpt_oss_role),
    "minimax_m2": ("minimax_m2", minimax_m2),
    "step3": ("step3", step3),
    "seed_oss": ("seed_oss", lambda calls: qwen3_coder(calls).replace("tool_call>", "seed:tool_call>")),
    "granite": ("granite", array("<|tool_call|>", "")),
    "granite 3.1": ("granite", array("<tool_call>", "")),
    "phi4_mini": ("granite", array("<|tool_call|>", "<|/tool_call|>")),
    "phi4_mini_json": ("phi4_mini_json", array("functools", "")),
    "apertus": ("apertus", apertus),
    "cohere_command": ("cohere_command", array("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters")),
    "internlm": ("internlm", framed("<|action_start|><|plugin|>\n", "<|action_end|>", "parameters")),
    "longcat": ("longcat", framed("<longcat_tool_call>\n", "\n</longcat_tool_call>")),
    "lfm2": ("lfm2", lambda calls: f"<|tool_call_start|>{pythonic(calls)}<|tool_call_end|>"),
    "olmo3": ("olmo3", olmo3),
    "gemma4": ("gemma4", gemma4),
    "json_array": ("json_array", json_array),
}


def parser(form: str, tools: list[dict[str, Any]] | None = None) -> ToolParser:
    return FORMATS.module(form).Parser(TOOLS if tools is None else tools, lambda: "id")


def whole(form: str, text: str) -> Parsed:
    return parser(form).parse(text)


def chunked(form: str, text: str, cuts: list[int]) -> list[Event]:
    made, events = parser(form), list[Event]()
    edges = [0, *sorted(cuts), len(text)]
    for begin, end in zip(edges, edges[1:], strict=False):  # noqa: RUF007
        events += made.push(text[begin:end])
    return events + made.finish()


def same_in_chunks(form: str, text: str, rand: random.Random) -> Parsed:
    once = whole(form, text)
    assert collect(chunked(form, text, list(range(1, len(text))))) == once, "one character at a time"
    for _ in range(3):
        cuts = [rand.randint(0, len(text)) for _ in range(rand.randint(0, 6))]
        assert collect(chunked(form, text, cuts)) == once, cuts
    return once


def as_calls(parsed: Parsed) -> list[Call]:
    return [(call.name, json.loads(call.arguments)) for call in parsed.calls]


def test_every_format_of_the_folder_is_tested() -> None:
    assert {form for form, _ in WRITERS.values()} == set(FORMATS.names())


@pytest.mark.parametrize("case", list(CALLS))
@pytest.mark.parametrize("kind", list(WRITERS))
def test_well_formed(kind: str, case: str) -> None:
    form, write = WRITERS[kind]
    calls = CALLS[case]
    text = write(calls)
    parsed = same_in_chunks(form, text, random.Random(1))
    assert as_calls(parsed) == calls
    assert parsed.text == ""
    assert whole(form, text + "\n").text == ""


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind not in ("llama3", "pythonic", "json_array")])
def test_text_around_calls(kind: str) -> None:
    form, write = WRITERS[kind]
    text = f"Let me look: <b> 1 < 2 [x]\n\n{write(CALLS['two'])}\n"
    parsed = same_in_chunks(form, text, random.Random(2))
    assert parsed.text == "Let me look: <b> 1 < 2 [x]" and as_calls(parsed) == CALLS["two"]
    if kind not in ("llama3 with tag",):
        parsed = same_in_chunks(form, text + "Done. ", random.Random(3))
        assert parsed.text == "Let me look: <b> 1 < 2 [x]\nDone. " and as_calls(parsed) == CALLS["two"]


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_truncation(kind: str) -> None:
    form, write = WRITERS[kind]
    text = write(CALLS["two"])
    seen = set[int]()
    for size in range(len(text)):
        parsed = same_in_chunks(form, text[:size], random.Random(size)) if size % 5 == 0 else whole(form, text[:size])
        seen.add(len(parsed.calls))
        for call, expected in zip(parsed.calls, CALLS["two"], strict=False):
            assert (call.name, json.loads(call.arguments)) == expected, "a short call comes whole or not at all"
        if not parsed.calls:
            assert parsed.text == text[:size], "what is no call is the text that it was"
    assert seen >= ({0} if form in ("pythonic", "lfm2") else {0, 1}), "a Python list is read as a whole"


@pytest.mark.parametrize("kind", list(WRITERS))
def test_malformed_comes_back_as_text(kind: str) -> None:
    form, write = WRITERS[kind]
    good = write([("get_weather", {"days": 3, "where": {"a": 1}})])
    for text in (
        good.replace("get_weather", "unknown_tool"),
        good.replace("get_weather", ""),
        *([good.replace("3", "3 4"), good.replace(":", ";")] if ": 3" in good else []),
    ):
        parsed = same_in_chunks(form, text, random.Random(4))
        assert parsed.text == text and not parsed.calls, text


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_bad_call_does_not_hide_a_good_one(kind: str) -> None:
    form, write = WRITERS[kind]
    if not parser(form).begins or kind in ("llama3", "pythonic"):
        return
    text = write([("unknown_tool", {})]) + "\n" + write(CALLS["one"])
    parsed = same_in_chunks(form, text, random.Random(5))
    assert as_calls(parsed) == CALLS["one"] and "unknown_tool" in parsed.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(WRITERS))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_texts_in_any_chunks(kind: str, data: st.DataObject) -> None:
    form, write = WRITERS[kind]
    rand = random.Random(data.draw(st.integers(0, 2**32)))
    text = list("Text. " * rand.randint(0, 1) + write(CALLS[data.draw(st.sampled_from(list(CALLS)))]))
    for _ in range(rand.randint(0, 3)):
        at = rand.randint(0, len(text))
        match rand.randint(0, 3):
            case 0:
                del text[at : at + rand.randint(1, 20)]
            case 1:
                text[at:at] = rand.choice(['"', "}", "{", "<", "\\", "]", ",", "\n", "<tool_call>", "[", "x", "\\u12"])
            case 2:
                del text[at:]
            case _:
                text[at:at] = text[: rand.randint(0, 40)]
    parsed = same_in_chunks(form, "".join(text), rand)
    if not parsed.calls:
        assert parsed.text == "".join(text)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS.names())
@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=" \n<>[]{}|\"'tool_call/abc｜▁=:,;\\🙂世", max_size=80), seed=st.integers(0, 99))
def test_text_without_a_call_passes_unchanged(form: str, text: str, seed: int) -> None:
    parsed = same_in_chunks(form, text, random.Random(seed))
    assert parsed.text == text and not parsed.calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["hermes", "qwen3_coder", "deepseekv31", "kimi_k2", "minimax_m2", "mistral", "gpt_oss"]
)
def test_long_arguments_stream(kind: str) -> None:
    form, write = WRITERS[kind]
    text = write([("write-file", {"path": "a.txt", "text": "word " * 2000})])
    made = parser(form)
    pieces = [event for char in text for event in made.push(char) if isinstance(event, Arguments)]
    assert len(pieces) > 1000
    assert max(len(piece.text) for piece in pieces) < 600


def test_text_streams_at_once() -> None:
    made = parser("hermes")
    sent = [made.push(char) for char in "Hi there <b>"]
    assert sent[0] == [Text("H")] and collect([event for events in sent for event in events]).text == "Hi there <b>"


def test_argument_text_is_kept_as_written() -> None:
    text = '<tool_call>{"arguments":{ "city" :"\\u00fcber\\n"  , "days":1}, "name":"get_weather"}</tool_call>'
    assert whole("hermes", text).calls[0].arguments == '{ "city" :"\\u00fcber\\n"  , "days":1}'


def test_slips_are_mended() -> None:
    for written, value in [("a\nb", "a\nb"), (r"C:\dir", r"C:\dir"), (r"\'x\'", r"\'x\'")]:
        text = '<tool_call>{"name": "get_weather", "arguments": {"city": "' + written + '"}}</tool_call>'
        assert as_calls(same_in_chunks("hermes", text, random.Random(0))) == [("get_weather", {"city": value})]
    text = '<tool_call>{"name": "get_weather", "arguments": {"metric": True, "ratio": None}}</tool_call>'
    assert as_calls(whole("hermes", text)) == [("get_weather", {"metric": True, "ratio": None})]
    for arguments in ('"{\\"days\\": 2}"', '{"days": 2}'):
        text = f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>'
        assert as_calls(whole("hermes", text)) == [("get_weather", {"days": 2})]
    for tail in ("", ', "arguments": null', ', "arguments": {}', ', "arguments": ""'):
        assert as_calls(whole("hermes", f'<tool_call>{{"name": "now"{tail}}}</tool_call>')) == [("now", {})]


def test_values_follow_the_schema() -> None:
    text = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>123</arg_value><arg_key>days</arg_key>"
    text += "<arg_value> 4 </arg_value><arg_key>ratio</arg_key><arg_value>null</arg_value></tool_call>"
    assert as_calls(whole("glm45", text)) == [("get_weather", {"city": "123", "days": 4, "ratio": None})]
    text = "<tool_call><function=get_weather><parameter=city>\n\nline\n\n</parameter><parameter=metric>True</parameter>"
    text += '<parameter=list>[1, "a"]</parameter><parameter=where>no json</parameter></function></tool_call>'
    expected = {"city": "\nline\n", "metric": True, "list": [1, "a"], "where": "no json"}
    assert as_calls(same_in_chunks("qwen3_coder", text, random.Random(0))) == [("get_weather", expected)]


def test_numbers_beyond_what_a_float_holds_stay_json() -> None:
    text = '<minimax:tool_call><invoke name="get_weather"><parameter name="ratio">-1E999</parameter></invoke>'
    assert whole("minimax_m2", text).calls[0].arguments == '{"ratio": -1E999}'
    (call,) = as_calls(whole("pythonic", "[get_weather(ratio=-1E999, days=2)]"))
    assert call[1]["ratio"] < -1e308 and call[1]["days"] == 2
    assert "Infinity" not in whole("pythonic", "[get_weather(where={'a': 1e999})]").calls[0].arguments


def test_ids_that_the_format_gives() -> None:
    assert [call.id for call in whole("kimi_k2", kimi_k2(CALLS["two"])).calls] == [
        "functions.get_weather:0",
        "functions.now:1",
    ]
    twice = whole("kimi_k2", kimi_k2(CALLS["empty"]) * 2)
    assert [call.id for call in twice.calls] == ["functions.now:0", "id"], "an id is used once"
    text = "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}"
    assert whole("mistral", text).calls[0].id == "abcdefghi"
    made = FORMATS.module("mistral").Parser(TOOLS)
    assert len(made.parse(mistral(CALLS["one"])).calls[0].id) == 9
    made = FORMATS.module("hermes").Parser(TOOLS)
    assert made.parse(hermes(CALLS["one"])).calls[0].id.startswith("call_")


def test_without_tools_any_name_is_taken() -> None:
    parsed = parser("hermes", []).parse('<tool_call>{"name": "anything", "arguments": {"a": 1}}</tool_call>')
    assert as_calls(parsed) == [("anything", {"a": 1})]


@pytest.mark.parametrize("form", FORMATS.names())
def test_tags_frame_what_the_parser_reads(form: str) -> None:
    made = parser(form)
    frame = made.tag("get_weather")
    if frame is None:
        assert form in ("pythonic", "json_array", "step3", "lfm2", "olmo3", "gemma4")
    elif made.style == "json":
        assert as_calls(whole(form, frame[0] + '{"days": 2}' + frame[1])) == [("get_weather", {"days": 2})]
    else:
        assert as_calls(whole(form, frame[0] + frame[1])) == [("get_weather", {})]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS.names())
def test_hostile_texts_cost_little(form: str) -> None:
    made = parser(form)
    opening = (made.begins or (made.lead,))[0]
    texts = [opening * 3000, opening + '{"name": "now", "arguments": ' + '{"a":' * 5000, opening + "[" * 20000]
    texts += [(made.lead or "x") + "(" * 20000, opening + " " * 50000, opening + '"' + "\\" * 20000]
    started = time.process_time()
    for text in texts:
        made = parser(form)
        events = [event for at in range(0, len(text), 50) for event in made.push(text[at : at + 50])]
        parsed = collect([*events, *made.finish()])
        assert parsed.text == text or parsed.calls
    assert time.process_time() - started < 8


def test_events_come_in_order() -> None:
    events = chunked("hermes", "a " + hermes(CALLS["two"]) + " b", list(range(200)))
    kinds = [type(event) for event in events if not isinstance(event, Text) or event.text.strip()]
    assert kinds == [Text, CallStart, Arguments, CallStart, Arguments, Text]
