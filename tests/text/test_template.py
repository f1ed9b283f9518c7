"""Chat templates: as `transformers` renders them, and within limits when they are hostile."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.core.errors import BadRequest, ConfigError
from phloem.text.template import ChatTemplate, flatten, from_source, load_template

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TOOLS = """{{- bos_token }}
{%- macro show(tool) %}{{ tool | tojson(indent=2) }}{% endmacro %}
{%- if tools %}{% for tool in tools %}{{ show(tool) }}
{% endfor %}{% endif %}
{%- set ns = namespace(n=0) %}
{%- for m in messages if m.role != 'ignored' %}
    {%- set ns.n = ns.n + 1 %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}
        {%- continue %}
    {%- endif %}
    {%- generation %}{{ m.content | trim }}{% endgeneration %}
    {%- if ns.n >= 10 %}{% break %}{% endif %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ eos_token }}"""

PARTS = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m['content'] %}{% if part.type == 'text' %}<{{ part.text }}>{% endif %}
{%- endfor %}{% endif %}{% endfor %}"""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Sei <nett> & 世界"},
    {"role": "user", "content": " Hi 🙂 "},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": "é<b>"}'}}],
    },
    {"role": "tool", "content": "42"},
    {"role": "user", "content": "And?"},
]
WEATHER = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": "<é>"}}}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **values: Any) -> str:
    return from_source(source, SPECIAL).render(
        [{"role": "user", "content": "hi"}] if messages is None else messages, **values
    )


def theirs(source: str, messages: list[dict[str, Any]], **values: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(conversations=[messages], chat_template=source, **{**SPECIAL, **values})
    return rendered[0]


def as_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    copy = json.loads(json.dumps(messages))
    for message in copy:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copy


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, WEATHER])
@pytest.mark.parametrize("source", [CHATML, TOOLS, PARTS])
def test_as_transformers_renders(source: str, tools: Any, prompt: bool) -> None:
    expected = theirs(source, as_objects(TALK), tools=tools, add_generation_prompt=prompt, enable_thinking=False)
    assert render(source, TALK, tools=tools, add_generation_prompt=prompt, enable_thinking=False) == expected


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=40)), max_size=6))
def test_any_text_passes_through(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    assert render(CHATML, messages) == theirs(CHATML, messages, add_generation_prompt=True)


def test_helpers_of_the_environment() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{{ {'b': '<é>', 'a': [1, true, none]} | tojson }}") == '{"b": "<é>", "a": [1, true, null]}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ {'a': 1} | tojson(separators=(',', ':')) }}") == '{"a":1}'
    with pytest.raises(BadRequest, match=r"^roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_chat_template_kwargs_reach_the_template_but_not_its_names() -> None:
    assert render("{{ thinking }} {{ documents | length }}", thinking=True, documents=[1]) == "True 1"
    for name in ("raise_exception", "_step", "strftime_now", "a b"):
        with pytest.raises(BadRequest, match="cannot be set"):
            render("x", **{name: 1})


@pytest.mark.parametrize("content", ["The answer is", [{"type": "text", "text": "The answer is"}]])
@pytest.mark.parametrize(
    "source", [CHATML, "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}", PARTS]
)
def test_continue_final_message(source: str, content: Any) -> None:
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": content}]
    text = render(source, messages, continue_final_message=True)
    assert text.endswith("The answer is") and "Go." in text
    assert messages[1]["content"] is content, "the caller's messages stay as they are"


def test_continue_final_message_needs_a_text() -> None:
    for messages in ([], [{"role": "assistant", "content": None}], [{"role": "assistant", "content": []}]):
        with pytest.raises(BadRequest, match="continue_final_message"):
            render(CHATML, messages, continue_final_message=True)
    with pytest.raises(BadRequest, match="leaves out"):
        render("fixed", [{"role": "assistant", "content": "x"}], continue_final_message=True)


def test_content_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\na\nb<|im_end|>" in render(CHATML, parts)
    assert render(PARTS, parts) == "<a><b>"
    assert flatten(["x", {"type": "text", "text": "y"}]) == "x\ny"
    with pytest.raises(BadRequest, match="image_url"):
        render(CHATML, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_arguments_as_text_where_the_template_adds_them_up() -> None:
    call = "{{ 'call ' + c.function.arguments }}"
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}{% endfor %}"
    assert render(source, TALK) == 'call {"x": "é<b>"}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ messages[0].role + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ messages | map(attribute='a.b.c') | sum }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ (1, 2)['x'].y }}",
    ],
)
def test_what_fails_while_rendering_is_the_requests_fault(source: str) -> None:
    with pytest.raises(BadRequest):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(BadRequest):
        render(source)
    assert render("{{ raise_exception.__globals__ }}{{ messages.__class__ }}") == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{% set x = 'a' * 2000000000 %}",
        "{% set x = [0] * 2000000000 %}",
        "{{ 2000000000 * 'ab' }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_hostile_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phloem.text.template.MAX_SECONDS", 0.3)
    monkeypatch.setattr("phloem.text.template.MAX_CHARACTERS", 1 << 20)
    started = time.monotonic()
    with pytest.raises(BadRequest, match=r"stopped|does not accept"):
        render(source)
    assert time.monotonic() - started < 3


def test_a_very_long_conversation_renders_in_time() -> None:
    messages = [{"role": "user", "content": "x" * 100}] * 20_000
    started = time.process_time()
    assert len(render(CHATML, messages)) > 2_000_000
    assert time.process_time() - started < 3


@dataclass
class FakeCheckpoint:
    tokenizer_path: Path
    gguf: GGUFFile | None = None


def load(path: Path, override: Path | None = None, gguf: GGUFFile | None = None) -> ChatTemplate:
    return load_template(FakeCheckpoint(path, gguf), override, None)  # type: ignore[arg-type]


def test_where_templates_are_found(tmp_path: Path) -> None:
    empty = load(tmp_path)
    assert empty.source is None
    with pytest.raises(BadRequest, match="no chat template"):
        empty.render([])
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "config"}))
    assert load(tmp_path).render([]) == "config"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load(tmp_path).render([]) == "plain" and load(tmp_path).render([], tools=WEATHER) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load(tmp_path).render([]) == "file"
    assert load(tmp_path / "tokenizer.json").source == "file"
    other = tmp_path / "mine.jinja"
    other.write_text("mine {{ messages | length }}")
    assert load(tmp_path, other).render([]) == "mine 0"


def test_templates_in_gguf_metadata(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template": "main", "tokenizer.chat_template.tool_use": "with tools"}
    file = GGUFFile(tmp_path / "x.gguf", 3, metadata, {})
    found = load(tmp_path / "x.gguf", gguf=file)
    assert found.render([]) == "main" and found.render([], tools=WEATHER) == "with tools"
    assert load(tmp_path, gguf=file).source == "main", "a directory without one falls back to the model's file"


def test_broken_templates(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_text("ok\n{% for %}")
    with pytest.raises(BadRequest, match=r"broken.*line 2"):
        load(tmp_path).render([])
    with pytest.raises(ConfigError, match=r"chat_template\.jinja.*line 2"):
        load(tmp_path, file)
    with pytest.raises(ConfigError, match="absent"):
        load(tmp_path, tmp_path / "absent")
