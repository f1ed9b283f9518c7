"""The `openai` package against a real socket: it is the client that most programs bring."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from door import MODEL, Served, served

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(config={"api_key": "key"}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5)
    assert len(answer.choices[0].message.content or "") == 5
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 3


def test_chat_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = ["", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    assert [len(text) for text in texts] == [6, 6]
    assert usage is not None and usage.completion_tokens == 12


def test_the_stream_helper_assembles_the_answer(client: openai.OpenAI) -> None:
    stop = list("aeiou")  # the helper takes an answer that ends at its limit for an error
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=400, stop=stop, seed=1) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == "".join(deltas) != ""


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 4 and entry.logprob < 0 for entry in logprobs.content)


def test_completions_by_text_and_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["ab", "cd"], max_tokens=2, logprobs=1, echo=True)
    assert [choice.text[:2] for choice in answer.choices] == ["ab", "cd"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.token_logprobs[0] is None
    parts = [
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt=[1, 2], max_tokens=3, stream=True)
    ]
    assert len("".join(parts)) == 3


def test_extensions_through_extra_body(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=3, extra_body={"top_k": 1, "ignore_eos": True, "rid": "mine"}
    )
    assert answer.id == "mine"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_async_client(server: Served) -> None:
    async def main() -> list[int]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="key") as client:

            async def one(number: int) -> int:
                text = ""
                stream = await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=number, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return len(text)

            return await asyncio.gather(*(one(number) for number in range(1, 9)))

    assert asyncio.run(main()) == list(range(1, 9))


def test_errors_map_to_its_classes(client: openai.OpenAI, server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    assert "temperature must be in" in bad.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    stranger = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.BadRequestError, match="not supported yet: tools"):
        tool: openai.types.chat.ChatCompletionToolParam = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[tool])
    assert client.models.list().data, "an error leaves the connection in order"


def test_an_error_inside_a_stream_raises() -> None:
    with (
        served(delay=0.005) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=400, stream=True)
        with pytest.raises(openai.APIError, match="killed by signal 9"):
            for number, _ in enumerate(stream):
                if number == 3:
                    server.call(server.engine.die, "killed by signal 9")
        with pytest.raises(openai.InternalServerError) as gone:
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert gone.value.status_code == 503 and gone.value.type == "engine_unavailable"
