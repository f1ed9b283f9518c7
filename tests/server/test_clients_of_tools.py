"""Clients that send tools and formats with every turn, unchanged, against a real socket: `openai`, `anthropic`'s runner
of tools, `instructor`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import openai
import pytest
from door import MODEL, Served, make_info, served
from pydantic import BaseModel

INFO = make_info(
    features=frozenset({"tools", "reasoning", "grammar"}),
    tool_parser="hermes",
    context_length=8192,
    explain_tools=True,
    spell_calls=True,
)
pytestmark = pytest.mark.filterwarnings("ignore")  # inside the libraries
PROMPT: Any = [{"role": "user", "content": "hi"}]
CITY = '{"name":"Rom","people":3}'


class City(BaseModel):
    name: str
    people: int


def call_of(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(INFO, {"api_key": "key"}, mode="say", per_step=3) as found:
        yield found


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("calls", [False, True])
def test_openai_parses_formats_and_tools_of_one_request(client: openai.OpenAI, server: Served, calls: bool) -> None:
    class Weather(BaseModel):
        city: str

    server.engine.text = call_of("Weather", '{"city":"Rom"}') if calls else CITY
    tools: Any = [openai.pydantic_function_tool(Weather)]
    choice = client.chat.completions.parse(model=MODEL, messages=PROMPT, tools=tools, response_format=City).choices[0]
    with client.chat.completions.stream(model=MODEL, messages=PROMPT, tools=tools, response_format=City) as stream:
        again = stream.get_final_completion().choices[0]
    tag = server.engine.submits[-1].sampling.structural_tag or ""
    assert "people" in tag and "Weather" in tag
    flat: Any = [{"type": "function", "name": "Weather", "parameters": Weather.model_json_schema(), "strict": False}]
    response = client.responses.parse(model=MODEL, input="hi", tools=flat, text_format=City)
    for found in (choice, again):
        if calls:
            assert found.message.tool_calls and found.message.tool_calls[0].function.parsed_arguments == Weather(
                city="Rom"
            )
            assert found.message.parsed is None and found.finish_reason == "tool_calls"
        else:
            assert found.message.parsed == City(name="Rom", people=3) and not found.message.tool_calls
    assert [item.type for item in response.output] == ["function_call" if calls else "message"]
    assert response.output_parsed == (None if calls else City(name="Rom", people=3))


def test_openai_functions_there_and_back(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = call_of("weather", '{"city":"Rom"}')
    functions: Any = [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    first = client.chat.completions.create(
        model=MODEL, messages=PROMPT, functions=functions, function_call={"name": "weather"}
    )
    call = first.choices[0].message.function_call
    assert call is not None and json.loads(call.arguments) == {"city": "Rom"}
    assert first.choices[0].finish_reason == "function_call"
    stream = client.chat.completions.create(model=MODEL, messages=PROMPT, functions=functions, stream=True)
    deltas = [chunk.choices[0].delta.function_call for chunk in stream if chunk.choices]
    assert "".join(delta.arguments or "" for delta in deltas if delta) == '{"city":"Rom"}'
    server.engine.text = "Sunny."
    turns: Any = [*PROMPT, first.choices[0].message, {"role": "function", "name": "weather", "content": "sun"}]
    second = client.chat.completions.create(model=MODEL, messages=turns, functions=functions)
    assert second.choices[0].message.content == "Sunny." and "sun" in server.prompt()


def test_openai_counts_input_tokens(client: openai.OpenAI, server: Served) -> None:
    server.engine.text = "Hello."
    counted = client.responses.input_tokens.count(model=MODEL, input="hi", instructions="Be short.")
    made = client.responses.create(model=MODEL, input="hi", instructions="Be short.")
    assert made.usage is not None and counted.input_tokens == made.usage.input_tokens


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_runner_of_tools(server: Served, stream: bool) -> None:
    anthropic: Any = pytest.importorskip("anthropic")
    asked: list[str] = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tells the weather of a city."""
        asked.append(city)
        server.engine.text = "Sunny."
        return "sun"

    server.engine.text = call_of("weather", '{"city":"Rom"}')
    with anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as made:
        runner = made.beta.messages.tool_runner(
            model=MODEL, max_tokens=400, system="Be short.", messages=PROMPT, tools=[weather], stream=stream
        )
        answers = [answer.get_final_message() if stream else answer for answer in runner]
    assert asked == ["Rom"] and [answer.stop_reason for answer in answers] == ["tool_use", "end_turn"]
    assert answers[-1].content[0].text == "Sunny."
    prompt = server.prompt()
    assert all(part in prompt for part in ("Be short.", "hi", "<tool_response>\nsun", "Tells the weather"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS", "PARALLEL_TOOLS"])
def test_instructor_makes_objects(client: openai.OpenAI, server: Served, mode: str) -> None:
    instructor: Any = pytest.importorskip("instructor")
    server.engine.text = CITY if mode == "JSON_SCHEMA" else call_of("City", CITY)
    made = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    if mode == "PARALLEL_TOOLS":
        found = list(made.chat.completions.create(model=MODEL, messages=PROMPT, response_model=Iterable[City]))
        assert found == [City(name="Rom", people=3)]
        return
    found = made.chat.completions.create(model=MODEL, messages=PROMPT, response_model=City, max_retries=0)
    assert (found.name, found.people) == ("Rom", 3)
    sampling = server.engine.submits[-1].sampling
    assert "people" in (sampling.structural_tag or sampling.json_schema or "")
    if mode in ("TOOLS", "RESPONSES_TOOLS"):
        server.engine.text = call_of("PartialCity", CITY)
        parts = list(made.chat.completions.create_partial(model=MODEL, messages=PROMPT, response_model=City))
        assert (parts[-1].name, parts[-1].people) == ("Rom", 3)


@pytest.mark.slow
def test_instructor_over_messages(server: Served) -> None:
    instructor: Any = pytest.importorskip("instructor")
    anthropic: Any = pytest.importorskip("anthropic")
    server.engine.text = call_of("City", CITY)
    with anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as client:
        made = instructor.from_anthropic(client, mode=instructor.Mode.ANTHROPIC_TOOLS)
        found = made.messages.create(model=MODEL, max_tokens=300, messages=PROMPT, response_model=City, max_retries=0)
    assert (found.name, found.people) == ("Rom", 3)
