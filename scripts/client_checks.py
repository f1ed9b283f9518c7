"""What `scripts/clients.py` asks of each client, unchanged, against a running server. Runs in the client's environment.

    python client_checks.py CLIENT CHECK URL MODEL

Prints nothing and ends with 0 where the client got what it should; else with the error. Only the standard library and
the client itself are imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

Check = Callable[[str, str], object]
CHECKS: dict[str, dict[str, Check]] = {}

ASK = [{"role": "user", "content": "Say hello."}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather now.", "parameters": PARAMETERS}}
FORCED = {"type": "function", "function": {"name": "weather"}}


def check(client: str, name: str) -> Callable[[Check], Check]:
    def take(function: Check) -> Check:
        CHECKS.setdefault(client, {})[name] = function
        return function

    return take


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def rome_or_oslo(arguments: str | dict) -> None:
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert found["city"] in ("Rome", "Oslo"), found


# --- openai


def _openai(url: str):
    import openai

    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)


@check("openai", "chat, whole and streamed")
def openai_chat(url: str, model: str) -> None:
    client = _openai(url)
    answer = client.chat.completions.create(model=model, messages=ASK, max_tokens=8, temperature=0)
    parts = client.chat.completions.create(model=model, messages=ASK, max_tokens=8, temperature=0, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == answer.choices[0].message.content and answer.usage.completion_tokens == 8


@check("openai", "completions with logprobs")
def openai_completions(url: str, model: str) -> None:
    answer = _openai(url).completions.create(model=model, prompt="One two", max_tokens=4, logprobs=2)
    assert len(answer.choices[0].logprobs.tokens) == 4


@check("openai", "parse into a model")
def openai_parse(url: str, model: str) -> None:
    from typing import Literal

    import pydantic

    class City(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]

    answer = _openai(url).chat.completions.parse(model=model, messages=ASK, response_format=City, max_tokens=64)
    assert answer.choices[0].message.parsed.city in ("Rome", "Oslo")


@check("openai", "a tool, named and required")
def openai_tools(url: str, model: str) -> None:
    for choice in (FORCED, "required"):
        answer = _openai(url).chat.completions.create(
            model=model, messages=ASK, tools=[TOOL], tool_choice=choice, max_tokens=200, parallel_tool_calls=False
        )
        rome_or_oslo(answer.choices[0].message.tool_calls[0].function.arguments)


@check("openai", "responses, stored and gone on from")
def openai_responses(url: str, model: str) -> None:
    client = _openai(url)
    first = client.responses.create(model=model, input="Say hello.", max_output_tokens=16)
    again = client.responses.create(
        model=model, input="Again.", max_output_tokens=16, previous_response_id=first.id, stream=True
    )
    assert [event.type for event in again][-1] in ("response.completed", "response.incomplete")
    assert client.responses.retrieve(first.id).id == first.id


@check("openai", "models")
def openai_models(url: str, model: str) -> None:
    assert model in [item.id for item in _openai(url).models.list()]


# --- anthropic


def _anthropic(url: str):
    import anthropic

    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60)


@check("anthropic", "messages, whole and streamed")
def anthropic_messages(url: str, model: str) -> None:
    client = _anthropic(url)
    assert client.messages.create(model=model, messages=ASK, max_tokens=8).content[0].text
    with client.messages.stream(model=model, messages=ASK, max_tokens=8) as stream:
        assert stream.get_final_text() and stream.get_final_message().usage.output_tokens <= 8


@check("anthropic", "a named tool")
def anthropic_tools(url: str, model: str) -> None:
    tool = {"name": "weather", "description": "Weather now.", "input_schema": PARAMETERS}
    answer = _anthropic(url).messages.create(
        model=model, messages=ASK, tools=[tool], tool_choice={"type": "tool", "name": "weather"}, max_tokens=200
    )
    rome_or_oslo(next(block.input for block in answer.content if block.type == "tool_use"))


@check("anthropic", "counting tokens")
def anthropic_count(url: str, model: str) -> None:
    assert _anthropic(url).messages.count_tokens(model=model, messages=ASK).input_tokens > 3


# --- litellm


@check("litellm", "chat, whole and streamed")
def litellm_chat(url: str, model: str) -> None:
    import litellm

    where = {"model": f"openai/{model}", "api_base": url + "/v1", "api_key": "none", "messages": ASK, "max_tokens": 8}
    assert litellm.completion(**where).choices[0].message.content
    assert [part for part in litellm.completion(**where, stream=True)]


@check("litellm", "a named tool")
def litellm_tools(url: str, model: str) -> None:
    import litellm

    answer = litellm.completion(
        model=f"openai/{model}", api_base=url + "/v1", api_key="none", messages=ASK, tools=[TOOL], tool_choice=FORCED
    )
    rome_or_oslo(answer.choices[0].message.tool_calls[0].function.arguments)


@check("litellm", "Anthropic's route")
def litellm_anthropic(url: str, model: str) -> None:
    import litellm

    answer = litellm.completion(
        model=f"anthropic/{model}", api_base=url, api_key="none", messages=ASK, max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content


# --- frameworks


def _langchain(url: str, model: str):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=url + "/v1", api_key="none", model=model, max_tokens=100, temperature=0)


@check("langchain-openai", "invoke and stream")
def langchain_chat(url: str, model: str) -> None:
    chat = _langchain(url, model)
    assert chat.invoke("Say hello.").content and list(chat.stream("Say hello."))


@check("langchain-openai", "structured output and a forced tool")
def langchain_structured(url: str, model: str) -> None:
    chat = _langchain(url, model)
    schema = {"title": "weather", "description": "Weather now.", **PARAMETERS}
    for method in ("json_schema", "function_calling"):
        rome_or_oslo(chat.with_structured_output(schema, method=method).invoke("Which city?"))


@check("llama-index-llms-openai-like", "chat, complete and stream")
def llamaindex_chat(url: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=model, api_base=url + "/v1", api_key="none", is_chat_model=True, max_tokens=8)
    assert llm.chat([ChatMessage(role="user", content="Say hello.")]).message.content
    assert list(llm.stream_complete("Say hello."))


@check("instructor", "modes TOOLS, JSON_SCHEMA")
def instructor_modes(url: str, model: str) -> None:
    from typing import Literal

    import instructor
    import openai
    import pydantic

    class City(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=url + "/v1", api_key="none"), mode=mode)
        found = client.chat.completions.create(
            model=model, messages=ASK, response_model=City, max_tokens=200, max_retries=0
        )
        assert found.city in ("Rome", "Oslo")


@check("instructor", "mode RESPONSES_TOOLS")
def instructor_responses(url: str, model: str) -> None:
    from typing import Literal

    import instructor
    import openai
    import pydantic

    class City(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]

    client = instructor.from_openai(
        openai.OpenAI(base_url=url + "/v1", api_key="none"), mode=instructor.Mode.RESPONSES_TOOLS
    )
    found = client.responses.create(model=model, input="Which city?", response_model=City, max_retries=0)
    assert found.city in ("Rome", "Oslo")


@check("pydantic-ai", "an agent with a typed answer")
def pydantic_ai_agent(url: str, model: str) -> None:
    from typing import Literal

    import pydantic
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class City(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]

    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url + "/v1", api_key="none"))
    found = Agent(chat, output_type=City, model_settings={"max_tokens": 200}).run_sync("Which city?")
    assert found.output.city in ("Rome", "Oslo")


def _agents(url: str, model: str, responses: bool) -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", timeout=60)
    kind = agents.OpenAIResponsesModel if responses else agents.OpenAIChatCompletionsModel
    settings = agents.ModelSettings(max_tokens=32, temperature=0)
    agent = agents.Agent(name="A", instructions="Be short.", model=kind(model, client), model_settings=settings)
    assert isinstance(agents.Runner.run_sync(agent, "Say hello.").final_output, str)


@check("openai-agents", "an agent over chat completions")
def agents_chat(url: str, model: str) -> None:
    _agents(url, model, responses=False)


@check("openai-agents", "an agent over responses")
def agents_responses(url: str, model: str) -> None:
    _agents(url, model, responses=True)


# --- evaluation and load


@check("lm-eval", "local-completions")
def lm_eval(url: str, model: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=url + "/v1/completions", model=model, tokenizer_backend=None, tokenized_requests=False
    )
    (text,) = lm.generate_until(
        [Instance("generate_until", {}, ("The sky is", {"max_gen_toks": 8, "until": ["."]}), 0)]
    )
    assert isinstance(text, str)


@check("lm-eval", "local-chat-completions")
def lm_eval_chat(url: str, model: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    lm = LocalChatCompletion(base_url=url + "/v1/chat/completions", model=model)
    prompt = JsonChatStr(json.dumps(ASK))
    (text,) = lm.generate_until([Instance("generate_until", {}, (prompt, {"max_gen_toks": 8, "until": ["\n\n"]}), 0)])
    assert isinstance(text, str)


@check("guidellm", "a benchmark of a few requests")
def guidellm(url: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"Say {at}."}) + "\n" for at in range(6)))
        command = [str(Path(sys.executable).parent / "guidellm"), "benchmark", "run", "--target", url, "--model", model]
        command += ["--data", str(data), "--rate-type", "synchronous", "--max-requests", "3", "--disable-progress"]
        command += ["--processor", sys.argv[5]]
        report = Path(folder) / "out.json"
        _run([*command, "--output-path", str(report)], folder)
        done = json.loads(report.read_text())["benchmarks"][0]["requests"]["successful"]
        assert len(done) == 3, len(done)


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        raise RuntimeError("no end within 150 s") from None
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip()[-600:])


# --- SGLang's own


@check("sglang", "the frontend language")
def sglang_frontend(url: str, model: str) -> None:
    import sglang as sgl
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    @sgl.function
    def program(s):
        s += sgl.user("Say hello.")
        s += sgl.assistant(sgl.gen("said", max_tokens=8, temperature=0))
        s += sgl.user("Which?")
        s += sgl.assistant(sgl.select("chosen", ["Rome", "Oslo"]))

    state = program.run(backend=RuntimeEndpoint(url))
    assert state["said"] and state["chosen"] in ("Rome", "Oslo")


@check("sglang", "the frontend: unconditional_likelihood_normalized")
def sglang_choices(url: str, model: str) -> None:
    import sglang as sgl
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
    from sglang.lang.choices import unconditional_likelihood_normalized

    @sgl.function
    def program(s):
        s += "The capital of Italy is "
        s += sgl.select("c", ["Rome", "Oslo"], choices_method=unconditional_likelihood_normalized)

    assert program.run(backend=RuntimeEndpoint(url))["c"] in ("Rome", "Oslo")


def _bench(url: str, model: str, backend: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        turns = [{"from": "human", "value": "Say hello to everybody here."}, {"from": "gpt", "value": "Hello to you."}]
        data.write_text(json.dumps([{"id": str(at), "conversations": turns} for at in range(4)]))
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", backend, "--base-url", url]
        command += ["--model", model, "--tokenizer", sys.argv[5], "--dataset-name", "sharegpt"]
        command += ["--dataset-path", str(data), "--num-prompts", "3", "--sharegpt-output-len", "8"]
        _run([*command, "--output-file", str(Path(folder) / "out.jsonl")], folder)
        report = json.loads((Path(folder) / "out.jsonl").read_text().splitlines()[-1])
        assert report["completed"] == 3, report["completed"]


for _backend in ("sglang", "sglang-oai", "sglang-oai-chat", "vllm"):
    check("sglang", f"bench_serving, backend {_backend}")(lambda url, model, b=_backend: _bench(url, model, b))


# --- gateways: the script starts one, and `url` is its address


def _gateway_routes(url: str, model: str) -> None:
    answer = post(url + "/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 4}})
    assert answer["meta_info"]["completion_tokens"] <= 4


def _gateway_stream(url: str, model: str) -> None:
    body = {"input_ids": [1, 2, 3], "stream": True, "sampling_params": {"max_new_tokens": 4}}
    request = urllib.request.Request(url + "/generate", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert b"[DONE]" in answer.read()


def _gateway_chat(url: str, model: str) -> None:
    body = {"model": model, "messages": ASK, "max_tokens": 4}
    assert post(url + "/v1/chat/completions", body)["usage"]["completion_tokens"] <= 4
    assert post(url + "/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 4})["choices"]


def _gateway_tools(url: str, model: str) -> None:
    body = {"model": model, "messages": ASK, "max_tokens": 200, "tools": [TOOL], "tool_choice": FORCED}
    rome_or_oslo(
        post(url + "/v1/chat/completions", body)["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    )


def _gateway_responses(url: str, model: str) -> None:
    assert post(url + "/v1/responses", {"model": model, "input": "Hi", "max_output_tokens": 4})["output"]


def _gateway_control(url: str, model: str) -> None:
    assert post(url + "/flush_cache", {})["workers_flushed"] == 1
    with urllib.request.urlopen(url + "/get_loads", timeout=60) as answer:
        loads = json.load(answer)
    assert loads.get("loads") or loads["workers"][0]["load"] >= 0, loads


def _gateway_messages(url: str, model: str) -> None:
    assert post(url + "/v1/messages", {"model": model, "messages": ASK, "max_tokens": 4})["content"]


for _gateway in ("sglang-router", "smg"):
    check(_gateway, "/generate")(_gateway_routes)
    check(_gateway, "/generate, streamed")(_gateway_stream)
    check(_gateway, "chat and text completions")(_gateway_chat)
    check(_gateway, "a named tool")(_gateway_tools)
    check(_gateway, "responses")(_gateway_responses)
    check(_gateway, "flush_cache, loads")(_gateway_control)
check("smg", "messages")(_gateway_messages)


if __name__ == "__main__":
    CHECKS[sys.argv[1]][sys.argv[2]](sys.argv[3], sys.argv[4])
