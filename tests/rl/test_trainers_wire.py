"""The calls of slime, Miles and TRL's client of vLLM, body by body as their own sources write them: what is served, and
what is refused with which text (docs/rl.md has the table). verl's and AReaL's classes stand in tests/compat."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_door import http_door

from phloem import Engine
from phloem.server.routes.refused import REFUSED
from phloem.testing.checkpoints import tiny_checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()
SHORT: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def http(model: Path) -> Iterator[httpx.Client]:
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 2048, "enable_return_routed_experts": True}
    with (
        Engine(model_path=str(model), enable_lora=True, **settings) as engine,
        http_door(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


# (method, path, body, status, text of the answer), in the order in which a trainer makes them
GROUP: dict[str, Any] = {
    "master_address": "127.0.0.1", "master_port": 29511, "rank_offset": 1, "world_size": 2, "group_name": "slime",
}  # fmt: skip
SLIME: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/health_generate", None, 200, ""),
    ("GET", "/flush_cache", None, 200, ""),
    ("POST", "/init_weights_update_group", {**GROUP, "backend": "nccl"}, 400, "this engine runs on the host, use gloo"),
    ("POST", "/destroy_weights_update_group", {"group_name": "slime"}, 400, "there is no group 'slime'"),
    ("POST", "/pause_generation", {}, 200, ""),
    ("POST", "/continue_generation", {}, 200, ""),
    ("POST", "/release_memory_occupation", {}, 200, ""),
    ("POST", "/resume_memory_occupation", {"tags": ["weights"]}, 200, ""),
    ("POST", "/resume_memory_occupation", {"tags": None}, 200, ""),
    ("POST", "/weights_checker", {"action": "snapshot"}, 200, ""),
    ("POST", "/weights_checker", {"action": "compare"}, 200, "all tensors are those"),
    (
        "POST", "/post_process_weights",
        {"restore_weights_before_load": False, "post_process_quantization": True}, 200, "",
    ),
    ("POST", "/abort_request", {"abort_all": True}, 200, ""),
    ("GET", "/v1/loads?include=core,disagg,queues", None, 200, "loads"),
    (
        "POST", "/update_weights_from_tensor",
        {"serialized_named_tensors": ["Li4="], "load_format": "slime.custom.load", "flush_cache": False},
        400, "no code of a caller's is run",
    ),
    (
        "POST", "/pull_weights",
        {"local_checkpoint_dir": "/a", "source_dir": "/b", "target_version": 3}, 400, "not fetched",
    ),
    ("POST", "/generate", {"input_ids": [5, 6], "sampling_params": SHORT, "return_sampling_mask": True}, 400, "mask"),
]  # fmt: skip
MILES: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/pause_generation", {"mode": "retract"}, 200, ""),
    ("POST", "/begin_weight_update", {"selector": "all"}, 200, ""),
    ("POST", "/end_weight_update", {}, 200, ""),
    ("POST", "/begin_weight_update", {"selector": "draft"}, 400, "drafts have no weights of their own"),
    ("POST", "/continue_generation", {}, 200, ""),
    ("POST", "/update_weight_version", {"new_version": "5", "abort_all_requests": False}, 200, '"weight_version":"5"'),
    ("GET", "/model_info", None, 200, '"weight_version":"5"'),
    (
        "POST", "/weights_checker",
        {"action": "checksum", "allow_quant_error": False, "selector": "all", "skip_tensor_list": ["norm"]}, 200, "",
    ),
    ("POST", "/weights_checker", {"action": "checksum", "allow_quant_error": True}, 400, "digests are of the bits"),
    (
        "POST", "/update_weights_from_distributed",
        {"names": ["a"], "dtypes": ["bfloat16"], "shapes": [[1]], "group_name": "g", "flush_cache": False,
         "selector": "all"},
        400, "there is no group 'g'",
    ),
    (
        "POST", "/load_lora_adapter_from_distributed",
        {"lora_name": "l", "config_dict": {"r": 8}, "names": ["w"], "dtypes": ["bfloat16"], "shapes": [[1]],
         "group_name": "g", "pinned": False, "upsert": False},
        400, "there is no group 'g'",
    ),
    ("POST", "/unload_lora_adapter", {"lora_name": "l"}, 400, "l"),
    ("GET", "/parallelism_config?rank=0", None, 400, "no peer writes into this engine's memory"),
    ("GET", "/get_remote_instance_transfer_engine_info?rank=0", None, 400, "no peer writes"),
    (
        "POST", "/start_profile",
        {"output_dir": None, "start_step": None, "num_steps": None, "activities": None, "profile_by_stage": True,
         "with_stack": None, "record_shapes": None},
        400, "each step in a trace says what it computes",
    ),
]  # fmt: skip
VLLM: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/get_world_size", None, 400, "/update_weights_from_tensor"),
    ("POST", "/init_weight_transfer_engine", {"init_info": {}}, 400, "not spoken"),
    ("POST", "/start_weight_update", {}, 400, "/begin_weight_update"),
    ("POST", "/update_weights", {"update_info": {"names": ["a"]}}, 400, "not spoken"),
    ("POST", "/finish_weight_update", {}, 400, "/end_weight_update"),
    ("POST", "/reset_prefix_cache", None, 200, ""),
]


@pytest.mark.slow
@pytest.mark.parametrize("calls", [SLIME, MILES, VLLM], ids=["slime", "miles", "vllm"])
def test_each_call_is_served_or_refused_with_its_text(
    http: httpx.Client, calls: list[tuple[str, str, Any, int, str]]
) -> None:
    for method, path, body, status, text in calls:
        answer = http.request(method, path, json=body) if body is not None else http.request(method, path)
        assert answer.status_code == status, (path, body, answer.text)
        assert text in answer.text, (path, answer.text)
        if status == 400:
            told = answer.json()
            assert told.get("error_message") or told["error"]["message"]  # adapters' answers have a shape of their own


def test_the_page_has_every_call() -> None:
    table = PAGE[PAGE.index("### Call by call") :]
    for _, path, *_ in SLIME + MILES + VLLM:
        plain = path.partition("?")[0]
        assert plain in table or plain == "/reset_prefix_cache", path
    for path in REFUSED:
        known = re.search(rf"`[^|]*{re.escape(path)}[`?]", table)
        assert known or "remote_instance" in path, path


@pytest.mark.slow
def test_slime_finds_what_it_reads_of_an_engine_that_it_has_not_started(http: httpx.Client) -> None:
    """`discover_external_engines` of its later versions; `_sanity_check_server_args` of its earlier ones."""
    for path in ("/server_info", "/get_server_info"):
        info = http.get(path).json()
        assert int(info.get("tp_size") or 1) * int(info.get("pp_size") or 1) == 1 and not info.get("num_gpus")
        assert not info.get("encoder_only") and info["disaggregation_mode"] not in ("prefill", "decode")
        assert int(info["disaggregation_bootstrap_port"]) > 0
        expected = {"nnodes": 1, "node_rank": 0, "gpu_id_step": 1, "base_gpu_id": 0, "dp_size": 1, "ep_size": 1}
        expected |= {"enable_memory_saver": True, "enable_return_routed_experts": True}
        assert {name: info.get(name) for name in expected} == expected


@pytest.mark.slow
def test_a_session_server_takes_ids_logprobs_and_experts_out_of_a_chat(http: httpx.Client, model: Path) -> None:
    """As Miles' does: what it reads is `choices[].meta_info`; the same texts by `/generate` have the same experts."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "input_ids": [5, 6, 7, 8], "max_tokens": 4}
    body |= {"temperature": 0, "ignore_eos": True, "logprobs": True, "no_stop_trim": False}
    more = {"return_meta_info": True, "return_prompt_token_ids": True, "return_routed_experts": True}
    answer = http.post("/v1/chat/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    ids = [token for _, token, _ in choice["meta_info"]["output_token_logprobs"]]
    native = http.post(
        "/generate", json={"input_ids": [5, 6, 7, 8], "sampling_params": SHORT, "return_routed_experts": True}
    ).json()
    assert ids == native["output_ids"] and choice["prompt_token_ids"] == [5, 6, 7, 8]
    assert choice["meta_info"]["routed_experts"] == native["meta_info"]["routed_experts"]
    answer = http.post("/v1/chat/completions", json=body | {"return_routed_experts": True})
    assert answer.status_code == 400 and "return_meta_info" in answer.text
