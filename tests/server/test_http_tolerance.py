"""What clients send and ask for in ways of their own, and get served."""

from __future__ import annotations

import json
from typing import Any

import pytest
from door import make_info, on_loop, open_door

from phloem.core.errors import BadRequest
from phloem.server.chat.toolplan import plan
from phloem.server.completions.logprobs import _best_by_text
from phloem.testing.byte_tokenizer import ByteTokenizer
from phloem.testing.fake_engine import FakeEngine
from phloem.text.template import from_source

HI = [{"role": "user", "content": "hi"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


@on_loop
async def test_edits_that_only_clear_context_are_accepted() -> None:
    async with open_door() as door:
        body = {"messages": HI, "max_tokens": 3}
        for edits in ([], [{"type": "clear_tool_uses_20250919"}]):
            answer = await door.post(MESSAGES, {**body, "context_management": {"edits": edits}})
            assert answer.status_code == 200, answer.text
        answer = await door.post(MESSAGES, {**body, "context_management": {"edits": [{"type": "compact_20260112"}]}})
        assert answer.status_code == 400 and "compact" in answer.json()["error"]["message"]
        for path, wanted in ((RESPONSES, {"max_output_tokens": 3}), ("/v1/responses/input_tokens", {})):
            for edits, status in (([], 200), ([{"type": "clear_tool_uses"}], 200), ([{"type": "compaction"}], 400)):
                answer = await door.post(path, {"input": "a", "context_management": edits, **wanted})
                assert answer.status_code == status, answer.text


@on_loop
async def test_metadata_of_clients_is_accepted() -> None:
    async with open_door() as door:
        more = {"client_metadata": {"a": "b"}, "thread": "t"}
        assert (await door.post(RESPONSES, {"input": "a", "max_output_tokens": 3, **more})).status_code == 200
        assert (await door.post(CHAT, {"messages": HI, "max_tokens": 3, **more})).status_code == 200
        for path, wanted in ((MESSAGES, {"max_tokens": 3}), (MESSAGES + "/count_tokens", {})):
            body = {"messages": HI, "client_metadata": {"a": "b"}, **wanted}
            assert (await door.post(path, body)).status_code == 200


@on_loop
async def test_foreign_tools_beside_functions_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    info = make_info(features=frozenset({"tools", "reasoning"}), tool_parser="hermes")
    async with open_door(info=info) as door:
        bodies: list[tuple[str, dict[str, Any]]] = [
            (CHAT, {"messages": HI, "max_tokens": 3, "tools": [{"type": "web_search"}, function("f")]}),
            (
                RESPONSES,
                {"input": "a", "max_output_tokens": 3, "tools": [{"type": "function", "name": "f"}, {"type": "mcp"}]},
            ),
            (MESSAGES, {"messages": HI, "max_tokens": 3, "tools": [{"name": "f"}, {"type": "bash_20250124"}]}),
        ]
        for path, body in bodies:
            assert (await door.post(path, body)).status_code == 200, path
            alone = {**body, "tools": [tool for tool in body["tools"] if tool.get("type") not in (None, "function")]}
            assert (await door.post(path, alone)).status_code == 400, path
    assert all(name in caplog.text for name in ("web_search", "mcp", "bash_20250124"))


def test_allowed_tools_narrow_the_choice() -> None:
    tools = [function("f"), function("g")]
    nested = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("g")]}}
    assert [tool["function"]["name"] for tool in plan(tools, nested, None, "hermes").tools] == ["g"]
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    made = plan(tools, flat, None, "hermes")
    assert [tool["function"]["name"] for tool in made.tools] == ["f"] and made.constraint is not None
    beside = {**flat, "tools": [*flat["tools"], {"type": "mcp", "server_label": "x"}]}
    assert plan(tools, beside, None, "hermes") == made
    alone = {**flat, "tools": [{"type": "mcp", "server_label": "x"}]}
    for wrong in (alone, {**flat, "tools": [{"name": "h"}]}, {**flat, "mode": "maybe"}, {"type": "allowed_tools"}):
        with pytest.raises(BadRequest) as caught:
            plan(tools, wrong, None, "hermes")
        assert caught.value.param == "tool_choice"


@on_loop
async def test_a_forced_tool_without_parameters_takes_none() -> None:
    features = frozenset({"tools", "reasoning", "grammar"})
    engine = FakeEngine()
    async with open_door(engine, make_info(features=features, tool_parser="hermes")) as door:
        choice = {"type": "function", "function": {"name": "f"}}
        for given in ({}, {"parameters": None}):
            tool = {"type": "function", "function": {"name": "f", **given}}
            await door.post(CHAT, {"messages": HI, "max_tokens": 3, "tools": [tool], "tool_choice": choice})
        chosen = {"type": "tool", "name": "f"}
        await door.post(MESSAGES, {"messages": HI, "max_tokens": 3, "tools": [{"name": "f"}], "tool_choice": chosen})
        flat = {"type": "function", "name": "f"}
        await door.post(RESPONSES, {"input": "a", "max_output_tokens": 3, "tools": [flat], "tool_choice": flat})
    assert len(engine.submits) == 4
    for submit in engine.submits:
        tag = json.dumps(json.loads(submit.sampling.structural_tag or "null"))
        assert '"additionalProperties": false' in tag and '"properties": {}' in tag


@on_loop
async def test_head_answers_as_get_without_a_body() -> None:
    async with open_door() as door:
        for path in ("/health", "/v1/models", "/metrics", "/v1/models/nobody"):
            got, head = await door.http.get(path), await door.http.head(path)
            assert head.status_code == got.status_code and head.content == b""
            assert head.headers["content-type"] == got.headers["content-type"]
        assert (await door.http.head(CHAT)).status_code == 405


@on_loop
async def test_the_list_of_models_with_a_slash() -> None:
    async with open_door() as door:
        assert (await door.http.get("/v1/models/")).json() == (await door.http.get("/v1/models")).json()


@on_loop
async def test_origins_are_let_in_where_they_are_named() -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with open_door(cors_origins="https://a.example, https://b.example", api_key="k") as door:
        answer = await door.http.options(CHAT, headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert (await door.http.options(CHAT, headers={**ask, "origin": "https://c.example"})).status_code == 400
        answer = await door.http.get("/v1/models", headers={"origin": "https://b.example", "x-api-key": "k"})
        assert answer.headers["access-control-allow-origin"] == "https://b.example"
    async with open_door() as door:
        answer = await door.http.get("/v1/models", headers=ask)
        assert "access-control-allow-origin" not in answer.headers


ONE_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
NO_DEVELOPER = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
KNOWS_DEVELOPER = "{# roles: developer, user #}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
SYSTEM_ONLY_AS_DEVELOPER = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
ANY = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "roles", "prompt"),
    [
        (ANY, ("developer", "user"), "[system]a[user]b"),
        (ANY, ("user", "developer", "user"), "[user]a[system]b[user]c"),
        (KNOWS_DEVELOPER, ("developer", "user"), "[developer]a[user]b"),
        (SYSTEM_ONLY_AS_DEVELOPER, ("developer", "user"), "[developer]a[user]b"),
        (ANY, ("system", "user", "system"), "[system]a[user]b[system]c"),
        (NO_DEVELOPER, ("developer", "user"), "[system]a[user]b"),
        (NO_DEVELOPER, ("user", "developer", "user"), "[user]a[system]b[user]c"),
        (ONE_SYSTEM, ("system", "user", "system"), "[system]a\n\nc[user]b"),
        (ONE_SYSTEM, ("user", "system"), "[system]b[user]a"),
        (ONE_SYSTEM, ("system", "developer", "user"), "[system]a\n\nb[user]c"),
    ],
)
def test_instructions_come_in_a_shape_that_the_template_takes(source: str, roles: tuple[str, ...], prompt: str) -> None:
    messages = [{"role": role, "content": text} for role, text in zip(roles, "abc", strict=False)]
    assert from_source(source).render(messages) == prompt


def test_what_no_shape_helps_is_refused_in_the_templates_words() -> None:
    template = from_source("{{ raise_exception('no roles at all') }}")
    with pytest.raises(BadRequest, match="no roles at all"):
        template.render([{"role": "developer", "content": "a"}, *HI])


def test_the_likeliest_of_tokens_with_one_text_is_kept() -> None:
    class Same(ByteTokenizer):
        def token_text(self, token: int) -> str:
            return "\ufffd" if token > 127 else chr(token)

    row = [(-0.5, 200), (-0.7, 97), (-2.0, 201)]
    assert _best_by_text(row, Same()) == {"\ufffd": -0.5, "a": -0.7}  # type: ignore[arg-type]
