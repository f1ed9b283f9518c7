"""Fields of SGLang 0.5.23's native clients and of its gateways (sglang-router 0.3.2, smg 1.13.0), as they send them."""

from __future__ import annotations

from typing import Any

import pytest
from door import make_info, on_loop, open_door

from phloem.testing.fake_engine import FakeEngine

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": 2}},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": HI, "max_tokens": 2},
    "/v1/score": {"query": "a", "items": ["b"], "label_token_ids": [65]},
    "/tokenize": {"messages": HI},
    "/abort_request": {"rid": "none"},
    "/flush_cache": {},
    "/pause_generation": {"mode": "in_place"},
    "/continue_generation": {},
    "/open_session": {"capacity_of_str_len": 100},
    "/parse_function_call": {"text": "hi"},
}
# What the two gateways put into every request, whatever the client sent.
FILLED: list[tuple[str, dict[str, Any]]] = [
    (
        "/generate",
        {
            "model": "unknown",
            "return_text_in_logprobs": False,
            "stream": False,
            "log_metrics": True,
            "return_hidden_states": False,
            "background": False,
            "no_logs": False,
            "return_bytes": False,
            "return_entropy": False,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "logprobs": False,
            "stream": False,
            "no_stop_trim": False,
            "ignore_eos": False,
            "continue_final_message": False,
            "skip_special_tokens": True,
            "separate_reasoning": True,
            "stream_reasoning": True,
            "return_hidden_states": False,
        },
    ),
    (
        "/v1/completions",
        {
            "stream": False,
            "echo": False,
            "no_stop_trim": False,
            "ignore_eos": False,
            "skip_special_tokens": True,
            "return_hidden_states": False,
        },
    ),
    (
        "/v1/responses",
        {
            "store": True,
            "stream": None,
            "temperature": 1.0,
            "top_p": 1.0,
            "priority": 0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        },
    ),
]
ROUTING = {"routed_dp_rank": 0, "disagg_prefill_dp_rank": None, "bootstrap_host": None, "bootstrap_room": None}
OPENAI = {
    **ROUTING,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "return_spec_tokens_details": False,
    "return_token_ids": False,
    "session_id": "s",
    "custom_labels": {"a": "b"},
    "images_config": {},
    "mm_processor_kwargs": {},
    "watermark": None,
    "sampling_seed": 3,
}
# The defaults of a client that writes all it knows, and what hints at nothing that could be missed.
HARMLESS: list[tuple[str, dict[str, Any]]] = [
    *FILLED,
    (
        "/generate",
        {
            **ROUTING,
            "log_metrics": False,
            "session_id": "s",
            "http_worker_ipc": None,
            "external_trace_header": {"traceparent": "00"},
            "received_time": 1.5,
            "kv_hints": {"version": 1},
            "use_audio_in_video": False,
            "video_config": None,
            "images_config": {"a": 1},
            "mm_processor_kwargs": {},
            "max_dynamic_patch": 3,
            "image_max_dynamic_patch": None,
            "return_sampling_mask": [False],
            "return_flat_raw_top_logprobs": False,
            "return_flat_raw_output_top_logprobs": False,
            "return_flat_raw_top_logprobs_b64": False,
            "return_indexer_topk": False,
            "routed_experts_start_len": 0,
            "modalities": ["text"],
            "lora_id": [None],
            "need_wait_for_mm_inputs": False,
            "encoder_urls": [],
            "mm_hashes": [],
        },
    ),
    ("/generate", {"sampling_params": {"max_new_tokens": 2, "watermark": {"enabled": False}}}),
    ("/v1/completions", OPENAI),
    (
        "/v1/chat/completions",
        {
            **OPENAI,
            "return_meta_info": False,
            "return_prompt_token_ids": False,
            "return_input_ids_in_sglext": False,
            "return_output_ids_in_sglext": False,
            "return_sampling_mask": False,
            "return_flat_raw_output_top_logprobs": False,
            "return_flat_raw_top_logprobs_b64": True,
            "thinking": {"type": "adaptive"},
            "use_audio_in_video": False,
            "messages": [{"role": "user", "content": "hi", "phase": "commentary", "prefix": False, "tools": []}],
        },
    ),
    ("/v1/responses", {**ROUTING, "session_id": "s", "data_parallel_rank": 0}),
    ("/v1/messages", {**ROUTING, "betas": ["a-2025"]}),
    (
        "/v1/score",
        {
            "temperature": 1.0,
            "return_token_logprobs": False,
            "return_pooled_hidden_states": False,
            "apply_softmax": False,
            "embed_override_token_id": None,
        },
    ),
    ("/tokenize", {"tool_choice": "auto", "reasoning_effort": "low", "add_generation_prompt": True}),
    ("/abort_request", {"http_worker_ipc": None, "weight_versions": None}),
    ("/flush_cache", {"timeout_s": 0.0, "rid": None}),
    ("/pause_generation", {"rid": None}),
    ("/continue_generation", {"torch_empty_cache": True}),
    ("/open_session", {"rid": "r", "http_worker_ipc": None}),
    ("/parse_function_call", {"rid": None, "tool_call_parser": "hermes"}),
]
# What asks for something that is not here.
ASKS: list[tuple[str, dict[str, Any]]] = [
    *[("/generate", {name: value}) for name, value in {
        "return_bytes": True,
        "return_entropy": True,
        "return_indexer_topk": True,
        "return_routed_experts": True,
        "routed_experts_start_len": 4,
        "return_sampling_mask": [True],
        "sampling_logprobs_mode": "support",
        "return_flat_raw_top_logprobs": True,
        "mm_hashes": ["a"],
        "modalities": ["image"],
        "lora_id": "a",
        "positional_embed_overrides": [[1]],
        "bootstrap_pair_key": "a",
        "decode_tp_size": 2,
        "disagg_prefill_dp_rank": 1,
        "routed_dp_rank": 1,
        "encoder_urls": ["http://e"],
        "multi_item_delimiter_indices": [1],
        "token_indices_to_pool": [1],
        "use_audio_in_video": True,
        "spec_capture": {},
        "watermark": {"key": 1},
    }.items()],
    *[(path, {name: value}) for path in ("/v1/chat/completions", "/v1/completions") for name, value in {
        "return_spec_tokens_details": True,
        "return_routed_experts": True,
        "watermark": {"enabled": True},
        "bootstrap_host": ["h"],
        "routed_dp_rank": 1,
    }.items()],
    *[("/v1/chat/completions", {name: value}) for name, value in {
        "return_output_ids_in_sglext": True,
        "task": "query",
        "sampling_logprobs_mode": "selected",
    }.items()],
    ("/v1/responses", {"bootstrap_room": 1}),
    ("/v1/responses", {"request_id": "resp_mine"}),
    ("/v1/messages", {"bootstrap_host": "h"}),
    ("/v1/score", {"return_token_logprobs": True}),
    ("/v1/score", {"temperature": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "more"), HARMLESS)
@on_loop
async def test_fields_that_ask_for_nothing_are_accepted(path: str, more: dict[str, Any]) -> None:
    async with open_door(info=make_info(features=frozenset({"tools", "reasoning"}))) as door:
        answer = await door.post(path, {**BODIES[path], **more})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("path", "more"), ASKS)
@on_loop
async def test_fields_that_ask_for_what_is_not_here_are_refused_by_name(path: str, more: dict[str, Any]) -> None:
    async with open_door() as door:
        answer = await door.post(path, {**BODIES[path], **more})
        (name,) = more
        assert answer.status_code == 400 and not door.engine.submits, answer.text
        assert name in answer.json()["error"]["message"]
        if path != "/v1/messages":
            assert answer.json()["error"]["param"] == name


@on_loop
async def test_a_field_of_a_message_is_refused_with_its_place() -> None:
    async with open_door() as door:
        for name, value in (("prefix", True), ("tools", [{"type": "function"}])):
            messages = [*HI, {"role": "assistant", "content": "a", name: value}]
            answer = await door.post("/v1/chat/completions", {"messages": messages})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == f"messages[1].{name}"


@on_loop
async def test_the_seed_by_its_other_name() -> None:
    engine = FakeEngine()
    async with open_door(engine) as door:
        for path in ("/v1/chat/completions", "/v1/completions"):
            for named in ({"sampling_seed": 3}, {"seed": 3}, {"seed": 3, "sampling_seed": 4}):
                assert (await door.post(path, {**BODIES[path], **named})).status_code == 200
    assert [submit.sampling.sampling_seed for submit in engine.submits] == [3] * 6


@on_loop
async def test_thinking_is_told_to_the_template() -> None:
    async with open_door() as door:
        for kind, status in (("enabled", 200), ("disabled", 200), ("adaptive", 200), ("loud", 400)):
            body = {**BODIES["/v1/chat/completions"], "thinking": {"type": kind}}
            assert (await door.post("/v1/chat/completions", body)).status_code == status


@on_loop
async def test_flushing_waits_as_long_as_the_body_says() -> None:
    engine = FakeEngine()
    async with open_door(engine) as door:
        assert (await door.post("/flush_cache", {"timeout_s": 2.5})).status_code == 200
        assert (await door.post("/flush_cache", {"timeout_s": -1})).json()["error"]["param"] == "timeout_s"
    assert [control.args for control in engine.controls if control.name == "flush_cache"] == [{"timeout": 2.5}]


@on_loop
async def test_a_server_alone_says_how_it_would_share_prompts() -> None:
    async with open_door() as door:
        for field, value in (("kv_transfer_params", {"do_remote_decode": True}), ("bootstrap_room", 3)):
            answer = await door.post("/v1/completions", {"prompt": "a", field: value})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == field
            assert "--disaggregation-mode" in answer.text
        answer = await door.post("/disaggregation_mode", {"mode": "both"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "mode"
