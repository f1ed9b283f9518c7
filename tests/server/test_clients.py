"""Clients written for other servers, unchanged, against a real socket: `openai` beyond chat, `anthropic`, LangChain's
ChatOpenAI and LiteLLM's OpenAI path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from door import MODEL, Served, make_info, served
from pydantic import BaseModel

INFO = make_info(
    features=frozenset({"tools", "reasoning", "grammar"}),
    tool_parser="hermes",
    reasoning_parser="qwen3",
    context_length=4096,
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the libraries
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
FULL = f"<think>\nHm.\n</think>\n\nLooking.\n{CALL}"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
PROMPT: Any = [{"role": "user", "content": "hi"}]


class City(BaseModel):
    name: str
    people: int


ROME = '{"name": "Rom", "people": 2800000}'


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(INFO, {"api_key": "key"}, mode="say", per_step=3) as found:
        yield found


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as made:
        yield made


def schema_of(server: Served) -> dict[str, Any]:
    return json.loads(server.engine.submits[-1].sampling.json_schema or "null")


# --- openai


@pytest.mark.slow
def test_openai_parses_chat_into_models(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = ROME
    answer = client.chat.completions.parse(model=MODEL, messages=PROMPT, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Rom", people=2800000)
    assert schema_of(server)["properties"].keys() == {"name", "people"}
    with client.chat.completions.stream(model=MODEL, messages=PROMPT, response_format=City) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == City(name="Rom", people=2800000)


def test_openai_parses_tool_calls(client: openai.OpenAI, server: Served) -> None:
    class weather(BaseModel):
        city: str

    server.engine.text = FULL
    tool = openai.pydantic_function_tool(weather)
    answer = client.chat.completions.parse(model=MODEL, messages=PROMPT, tools=[tool])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.parsed_arguments == weather(city="Rom")
    assert getattr(choice.message, "reasoning_content", None) == "Hm."
    assert "weather" in (server.engine.submits[-1].sampling.structural_tag or "")


def test_openai_tools_in_a_stream_and_back(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = FULL
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    with client.chat.completions.stream(model=MODEL, messages=PROMPT, tools=[tool]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Looking." and message.tool_calls is not None
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Rom"}
    server.engine.text = "Sunny."
    turns: Any = [*PROMPT, message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    answer = client.chat.completions.create(model=MODEL, messages=turns, tools=[tool])
    assert answer.choices[0].message.content == "Sunny."
    assert server.prompt().endswith("<assistant>Looking.<end><tool>sun<end><assistant>")


@pytest.mark.slow
def test_openai_responses(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = FULL
    tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    first = client.responses.create(model=MODEL, input="hi", tools=[tool], instructions="Be short.")
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert first.output_text == "Looking." and first.status == "completed"
    assert first.usage is not None and first.usage.output_tokens_details.reasoning_tokens == 3
    call: Any = first.output[2]
    server.engine.text = "Sunny."
    given: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}]
    second = client.responses.create(model=MODEL, input=given, previous_response_id=first.id, tools=[tool])
    assert second.output_text == "Sunny."
    assert server.prompt().endswith("<user>hi<end><assistant>Looking.<end><tool>sun<end><assistant>")
    everything: Any = [*PROMPT, *first.output, *given]
    echoed = client.responses.create(model=MODEL, input=everything, tools=[tool])
    assert echoed.output_text == "Sunny."
    assert client.responses.retrieve(second.id).output_text == "Sunny."
    assert len(client.responses.input_items.list(second.id).data) == 1
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.retrieve(second.id)
    assert missing.value.code == "response_not_found"


def test_openai_streams_responses(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = FULL
    tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    with client.responses.stream(model=MODEL, input="hi", tools=[tool]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Looking."
    call: Any = final.output[-1]
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"city": "Rom"})
    raw = client.responses.create(model=MODEL, input="hi", stream=True)
    assert [event.type for event in raw][-1] == "response.completed"


def test_openai_parses_responses(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = ROME
    answer = client.responses.parse(model=MODEL, input="hi", text_format=City)
    assert answer.output_parsed == City(name="Rom", people=2800000)
    assert schema_of(server)["required"] == ["name", "people"]


def test_openai_background_responses(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = "x" * 3000
    server.engine.delay = 0.002
    try:
        started = client.responses.create(model=MODEL, input="hi", background=True)
        assert started.status == "queued"
        assert client.responses.cancel(started.id).status == "cancelled"
    finally:
        server.engine.delay = 0.0


def test_openai_takes_a_background_stream_up_again(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = "a word or two"
    with client.responses.create(model=MODEL, input="hi", background=True, stream=True) as events:
        begun = next(iter(events))
    assert begun.type == "response.created"
    rest = list(client.responses.retrieve(begun.response.id, stream=True, starting_after=begun.sequence_number))
    assert [event.sequence_number for event in rest] == list(range(1, len(rest) + 1))
    assert rest[-1].type == "response.completed" and rest[-1].response.output_text == "a word or two"


def test_openai_errors_of_responses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model=MODEL, input="hi", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="only functions are"):
        client.responses.create(model=MODEL, input="hi", tools=[{"type": "web_search"}])
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_none")


# --- anthropic


@pytest.fixture
def anthropic_client(server: Served) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as made:
        yield made


@pytest.mark.slow
def test_anthropic_messages(anthropic_client: Any, server: Served) -> None:
    server.engine.text = "Hello."
    answer = anthropic_client.messages.create(model=MODEL, max_tokens=50, messages=PROMPT, system="Be short.")
    assert (answer.content[0].text, answer.stop_reason, answer.role) == ("Hello.", "end_turn", "assistant")
    assert answer.usage.output_tokens == 7
    counted = anthropic_client.messages.count_tokens(model=MODEL, messages=PROMPT, system="Be short.")
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


@pytest.mark.slow
def test_anthropic_tools_there_and_back(anthropic_client: Any, server: Served) -> None:
    server.engine.text = FULL
    tools = [{"name": "weather", "description": "Tells it.", "input_schema": PARAMETERS}]
    first = anthropic_client.messages.create(model=MODEL, max_tokens=300, messages=PROMPT, tools=tools)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    assert first.stop_reason == "tool_use" and first.content[2].input == {"city": "Rom"}
    server.engine.text = "Sunny."
    result = {"type": "tool_result", "tool_use_id": first.content[2].id, "content": "sun"}
    turns = [*PROMPT, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = anthropic_client.messages.create(model=MODEL, max_tokens=300, messages=turns, tools=tools)
    assert second.content[0].text == "Sunny."
    assert server.prompt().endswith("<assistant>Looking.<end><tool>sun<end><assistant>")


@pytest.mark.slow
def test_anthropic_streams(anthropic_client: Any, server: Served) -> None:
    server.engine.text = FULL
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    with anthropic_client.messages.stream(model=MODEL, max_tokens=300, messages=PROMPT, tools=tools) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Looking." and [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].thinking == "Hm." and final.content[2].input == {"city": "Rom"}
    assert final.stop_reason == "tool_use" and final.usage.output_tokens > 20
    raw = anthropic_client.messages.create(model=MODEL, max_tokens=300, messages=PROMPT, stream=True)
    assert [event.type for event in raw][-1] == "message_stop"


@pytest.mark.slow
def test_anthropic_errors(anthropic_client: Any, server: Served) -> None:
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.BadRequestError) as bad:
        anthropic_client.messages.create(model=MODEL, max_tokens=5, messages=PROMPT, extra_body={"temperature": -1})
    assert bad.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        anthropic_client.messages.create(model="other", max_tokens=5, messages=PROMPT)
    wrong = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(model=MODEL, max_tokens=5, messages=PROMPT)


# --- LangChain


def langchain_model(server: Served, **options: Any) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        model=MODEL, base_url=server.url + "/v1", api_key="key", max_retries=0, **options
    )


@pytest.mark.slow
def test_langchain_chat_and_streams(server: Served) -> None:
    model = langchain_model(server, temperature=0, stream_usage=True)
    server.engine.text = "Hello."
    answer = model.invoke([("system", "Be short."), ("human", "hi")])
    assert answer.content == "Hello." and answer.usage_metadata["output_tokens"] == 7
    assert server.prompt() == "<bos><system>Be short.<end><user>hi<end><assistant>"
    chunks = list(model.stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == "Hello."
    assert [chunk for chunk in chunks if chunk.usage_metadata][-1].usage_metadata["output_tokens"] == 7


@pytest.mark.slow
def test_langchain_tools(server: Served) -> None:
    messages = pytest.importorskip("langchain_core.messages")
    server.engine.text = FULL
    tool = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}}
    model = langchain_model(server).bind_tools([tool], tool_choice="auto")
    answer = model.invoke("hi")
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Rom"})
    server.engine.text = "Sunny."
    result = messages.ToolMessage(content="sun", tool_call_id=call["id"])
    after = model.invoke([messages.HumanMessage("hi"), answer, result])
    assert after.content == "Sunny."
    server.engine.text = FULL
    whole = None
    for chunk in model.stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.tool_calls[0]["args"] == {"city": "Rom"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_structured_output(server: Served, method: str) -> None:
    server.engine.text = ROME
    if method == "function_calling":
        server.engine.text = f'<tool_call>\n{{"name": "City", "arguments": {ROME}}}\n</tool_call>'
    model = langchain_model(server).with_structured_output(City, method=method)
    assert model.invoke("hi") == City(name="Rom", people=2800000)


@pytest.mark.slow
def test_langchain_responses_api(server: Served) -> None:
    server.engine.text = "Hello."
    answer = langchain_model(server, use_responses_api=True).invoke("hi")
    assert [block["text"] for block in answer.content] == ["Hello."]
    assert answer.response_metadata["status"] == "completed"


# --- LiteLLM


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks the network for its prices otherwise
    found = pytest.importorskip("litellm")
    found.suppress_debug_info = True
    return found


@pytest.mark.slow
def test_litellm_chat(litellm: Any, server: Served) -> None:
    about = {"model": f"openai/{MODEL}", "api_base": server.url + "/v1", "api_key": "key", "messages": PROMPT}
    server.engine.text = "Hello."
    answer = litellm.completion(**about, max_tokens=50, temperature=0)
    assert answer.choices[0].message.content == "Hello." and answer.usage.completion_tokens == 7
    parts = litellm.completion(**about, max_tokens=50, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "Hello."
    with pytest.raises(litellm.BadRequestError, match="temperature must be in"):
        litellm.completion(**about, temperature=-1)


@pytest.mark.slow
def test_litellm_tools_and_schemas(litellm: Any, server: Served) -> None:
    about = {"model": f"openai/{MODEL}", "api_base": server.url + "/v1", "api_key": "key", "messages": PROMPT}
    server.engine.text = FULL
    tools = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    answer = litellm.completion(**about, tools=tools, tool_choice="auto")
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rom"}
    server.engine.text = ROME
    answer = litellm.completion(**about, response_format=City)
    assert City.model_validate_json(answer.choices[0].message.content).name == "Rom"
    assert schema_of(server)["required"] == ["name", "people"]


@pytest.mark.slow
def test_litellm_text_completion(litellm: Any, server: Served) -> None:
    server.engine.text = "Hello."
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=server.url + "/v1",
        api_key="key",
        prompt="hi",
        max_tokens=50,
    )
    assert answer.choices[0].text == "Hello."
