"""The language without a model: chat formats, choices, traces, prefixes, API backends against a server of the test."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from phloem import lang
from phloem.core.errors import BadRequest, PhloemError
from phloem.lang.backends._base import Backend, Prompt
from phloem.lang.chat import FORMATS, by_model_name, derive
from phloem.lang.choices import Scored
from phloem.lang.ir import Sampling


def chatml(messages: list[dict[str, Any]], generate: bool) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    if messages[0]["role"] != "system":
        text = "<|im_start|>system\nBe kind.<|im_end|>\n" + text
    return "<s>" + text + ("<|im_start|>assistant\n" if generate else "")


def gemma(messages: list[dict[str, Any]], generate: bool) -> str:
    text, begun = "<bos>", ""
    for m in messages:
        if m["role"] == "system":
            begun = m["content"] + "\n\n"
            continue
        role = "model" if m["role"] == "assistant" else "user"
        text += f"<start_of_turn>{role}\n{begun}{m['content']}<end_of_turn>\n"
        begun = ""
    return text + ("<start_of_turn>model\n" if generate else "")


def no_system(messages: list[dict[str, Any]], generate: bool) -> str:
    if messages[0]["role"] == "system":
        raise BadRequest("no system role")
    return "".join(f"[{m['role']}]{m['content']}[end]" for m in messages) + ("[assistant]" if generate else "")


@pytest.mark.parametrize(("render", "bos"), [(chatml, "<s>"), (gemma, "<bos>"), (no_system, "")])
def test_a_template_is_cut_into_turns(render: Any, bos: str) -> None:
    form = derive(render, bos)
    assert form is not None
    talks = [["user"], ["user", "assistant", "user", "assistant", "user"], ["system", "user", "assistant", "user"]]
    for roles in talks:
        messages = [{"role": role, "content": f"words {i}"} for i, role in enumerate(roles)]
        if roles[0] == "system" and render is no_system:
            continue
        text, before = "", None
        for m in messages:
            text += form.open(before, m["role"]) + m["content"] + form.close(m["role"])
            before = m["role"]
        assert bos + text == render(messages, False)
        assert bos + text + form.open("user", "assistant") == render(messages, True)


def test_templates_that_cannot_be_cut_are_known() -> None:
    assert derive(lambda messages, generate: "always the same", "") is None
    assert by_model_name("org/Qwen3-8B") is FORMATS["chatml"] and by_model_name("gpt2") is FORMATS["default"]


def test_three_ways_to_choose() -> None:
    scored = Scored(
        ["a", "a b", "c"], [[1], [1, 2], [3]], [[-0.5], [-0.5, -3.0], [-0.6]], [[-0.4], [-0.4, -9.0], [-5.0]]
    )
    assert lang.token_length_normalized(scored).decision == "a"
    assert lang.greedy_token_selection(scored).decision == "a"
    assert lang.unconditional_likelihood_normalized(scored).decision == "c"
    # The first token decides, whatever follows: a choice with a better mean loses.
    scored = Scored(["x y", "z w"], [[1, 2], [3, 4]], [[-1.0, -5.0], [-2.0, -0.1]])
    assert lang.greedy_token_selection(scored).decision == "x y"
    assert lang.token_length_normalized(scored).decision == "z w"
    # A longer choice wins over its own beginning where what follows is likelier than the mean so far.
    scored = Scored(["a", "a b"], [[1], [1, 2]], [[-1.0], [-1.0, -0.1]])
    assert lang.greedy_token_selection(scored).decision == "a b"


class Script(Backend):
    """Answers from a list, and keeps what it was asked."""

    def __init__(self, answers: list[str], chat: bool = False) -> None:
        self.chat_only = chat
        self.answers = answers
        self.asked: list[tuple[Prompt, Sampling]] = []
        self.cached: list[str] = []

    def generate(self, prompt: Prompt, sampling: Sampling) -> Any:
        self.asked.append((prompt, sampling))
        return self.answers.pop(0), {}

    def cache_prefix(self, text: str) -> None:
        self.cached.append(text)


@pytest.mark.parametrize("chat", [False, True])
def test_one_call_answers_several(chat: bool) -> None:
    @lang.function(num_api_spec_tokens=64)
    def card(s: Any) -> None:
        if chat:
            s += lang.user("Describe the tree.")
            s += lang.assistant_begin()
        s += "Name: " + lang.gen("name", stop="\n") + "\nAge: " + lang.gen("age", stop="\n") + "\nEnd"
        if chat:
            s += lang.assistant_end()

    said = ("Name: " if chat else "") + "oak\nAge: 90\nand more"
    script = Script([said], chat)
    state = card.run(backend=script)
    assert state["name"] == "oak" and state["age"] == "90" and len(script.asked) == 1
    assert script.asked[0][1].stop is None and script.asked[0][1].max_new_tokens == 64
    # Another answer than the program's text: what does not fit is asked again.
    wrong = Script(
        ["Name: oak\nBirthday: 3 May\n", "Name: oak\nAge: 7\n"] if chat else ["oak\nBirthday: May\n", "7\n"], chat
    )
    state = card.run(backend=wrong)
    assert (state["name"], state["age"], len(wrong.asked)) == ("oak", "7", 2)


def test_reasoning_is_taken_out_of_the_text() -> None:
    @lang.function
    def think(s: Any) -> None:
        s += lang.user("How many?")
        s += lang.assistant(lang.separate_reasoning(lang.gen("x") + "!", model_type="qwen3"))
        s["seen"] = s["x_reasoning_content"]

    state = think.run(backend=Script(["<think>One and one.</think>Two"]))
    assert state["x"].strip() == "Two" and state["seen"].strip() == "One and one."
    assert "think" not in state.text() and state.messages()[1]["content"].strip() == "Two!"


def test_a_stop_beyond_the_guess_is_asked_for_alone() -> None:
    @lang.function(num_api_spec_tokens=4)
    def line(s: Any) -> None:
        s += "Tell: " + lang.gen("x", stop="\n")

    script = Script(["no stop here", "the whole"])
    assert line.run(backend=script)["x"] == "the whole" and script.asked[1][1].stop == "\n"


def test_a_chat_model_writes_only_at_the_beginning_of_its_turn() -> None:
    from phloem.lang.backends.openai import OpenAI

    backend = OpenAI("gpt-x", api_key="none", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(BadRequest, match="num_api_spec_tokens"):
        backend.generate(Prompt("", [], "assistant", "It is "), Sampling())
    with pytest.raises(BadRequest, match="assistant"):
        backend.generate(Prompt("hello"), Sampling())
    strict = OpenAI("gpt-x", api_key="none")
    with pytest.raises(BadRequest, match="top_k"):
        strict.generate(Prompt("", [], "assistant"), Sampling(top_k=3))


def test_common_prefixes_of_batches_are_found_in_front_of_the_first_call() -> None:
    seen: list[str] = []

    @lang.function
    def ask(s: Any, shots: str, question: str) -> None:
        seen.append(question)
        s += shots + f"Q: {question}\nA:"
        s += lang.gen("x", stop="\n")

    script = Script(["1", "2", "3"])
    shots = "Q: What is two and two?\nA: four\n" * 4
    states = ask.run_batch([{"question": f"{i}?"} for i in range(3)], shots=shots, backend=script)
    assert script.cached == [shots + "Q: "]
    assert sorted(state["x"] for state in states) == ["1", "2", "3"]
    assert len(seen) == 5  # two short runs in search of the prefix
    script = Script(["1"])
    ask.run_batch([{"question": "1?"}], shots=shots, backend=script)
    assert script.cached == []


def test_traces_show_a_program_without_running_it(capsys: pytest.CaptureFixture[str]) -> None:
    @lang.function
    def plan(s: Any, topic: str) -> None:
        s += lang.user(f"Plan: {topic}")
        with s.assistant():
            s += lang.gen("plan", max_tokens=7)
        forks = s.fork(2)
        for fork in forks:
            fork += lang.select("good", ["yes", "no"])
        forks.join()
        s += s["good"]

    plan.trace().print_graph_dfs()
    shown = capsys.readouterr().out
    for line in ("text 'Plan: {topic}'", "fork 2", "  select 'good' ['yes', 'no']", "join 2", "variable 'good'"):
        assert line in shown
    assert "'max_new_tokens': 7" in shown
    assert plan.trace(topic="trees").nodes[1].value == "Plan: trees"


class Api(BaseHTTPRequestHandler):
    """Speaks as much of two APIs as the backends read; says back what it was sent."""

    requests: list[tuple[str, dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append((self.path, body))
        if body["model"] == "broken":
            self._send({"error": {"type": "server_error", "message": "out of order"}}, 400)
        elif self.path.endswith("/messages"):
            self._send(
                {
                    "id": "m1",
                    "type": "message",
                    "role": "assistant",
                    "model": body["model"],
                    "content": [{"type": "text", "text": "hello"}],
                    "stop_reason": "end_turn",
                    "stop_sequence": None,
                    "usage": {"input_tokens": 5, "output_tokens": 1},
                }
            )
        else:
            message = {"role": "assistant", "content": "green, surely"}
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
            self._send(
                {
                    "id": "c1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "m",
                    "choices": choices,
                    "usage": usage,
                }
            )

    def _send(self, answer: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def api() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@lang.function
def colour(s: Any) -> None:
    s += lang.system("Be short.")
    s += lang.user(lang.image("data:image/png;base64,AAAA") + "Which colour?")
    s += lang.assistant(lang.gen("x", stop=["\n\n."], temperature=0.5, max_tokens=9))


@pytest.mark.slow
def test_openai_chat_is_asked_in_its_own_words(api: str) -> None:
    backend = lang.OpenAI("gpt-x", api_key="none", base_url=f"{api}/v1", max_retries=0)
    state = colour.run(backend=backend)
    assert state["x"] == "green, surely" and state.get_meta_info("x")["prompt_tokens"] == 3
    path, body = Api.requests[-1]
    assert path == "/v1/chat/completions" and body["max_tokens"] == 9 and body["temperature"] == 0.5
    assert body["messages"][1]["content"][0]["type"] == "image_url" and body["stop"] == ["\n\n."]

    @lang.function
    def pick(s: Any) -> None:
        s += lang.user("Which colour?")
        s += lang.assistant(lang.select("x", ["red", "green"]))

    assert pick.run(backend=backend)["x"] == "green"
    with pytest.warns(UserWarning, match="out of order"):
        state = colour.run(backend=lang.OpenAI("broken", api_key="none", base_url=f"{api}/v1", max_retries=0))
    assert isinstance(state.error(), PhloemError)
    backend.shutdown()


@pytest.mark.slow
def test_anthropic_continues_a_turn(api: str) -> None:
    pytest.importorskip("anthropic")
    backend = lang.Anthropic("claude-x", api_key="none", base_url=api, max_retries=0)
    state = colour.run(backend=backend)
    assert state["x"] == "hello" and state.get_meta_info("x")["completion_tokens"] == 1
    body = Api.requests[-1][1]
    assert body["system"] == "Be short." and body["max_tokens"] == 9 and body["stop_sequences"] == ["\n\n."]
    assert body["temperature"] == 0.5 and body["messages"][0]["content"][1]["text"] == "Which colour?"
    source = body["messages"][0]["content"][0]["source"]
    assert source == {"type": "base64", "media_type": "image/png", "data": "AAAA"}

    @lang.function
    def begun(s: Any) -> None:
        s += lang.user("Say it.")
        s += lang.assistant("I say " + lang.gen("x", top_k=5))

    assert begun.run(backend=backend).text().endswith("I say hello\n")
    assert Api.requests[-1][1]["messages"][-1] == {"role": "assistant", "content": "I say"}
    with pytest.warns(UserWarning, match="out of order"):
        assert begun.run(backend=lang.Anthropic("broken", api_key="none", base_url=api, max_retries=0)).error()
