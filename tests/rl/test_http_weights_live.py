"""Weights, pauses and sleep over HTTP: the requests that verl, slime and AReaL are documented to send, and who may."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_door import http_door
from safetensors.torch import load_file, save
from torch import multiprocessing

from phloem import Engine
from phloem.server.middleware import ApiKey, Keys
from phloem.testing.checkpoints import tiny_checkpoint

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("new"), seed=9)


@pytest.fixture(scope="module")
def http(old: Path) -> Iterator[httpx.Client]:
    with (
        Engine(model_path=str(old), max_total_tokens=4096, weight_version="base") as engine,
        http_door(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def as_it_was(http: httpx.Client, old: Path) -> Iterator[None]:
    yield
    post(http, "/update_weights_from_disk", model_path=str(old), weight_version="base")


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def generate(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    return post(http, "/generate", input_ids=[5, 6, 7, 8], sampling_params=GREEDY, **fields)


@pytest.mark.slow
def test_safetensors_as_a_body_in_base64_and_from_disk_give_the_same(http: httpx.Client, new: Path) -> None:
    before = generate(http)["output_ids"]
    blob = save(load_file(new / "model.safetensors"))
    raw = {"content-type": "application/octet-stream"}
    query = {"weight_version": "raw", "flush_cache": "false"}
    answer = http.post("/update_weights_from_tensor", content=blob, headers=raw, params=query)
    assert answer.status_code == 200 and answer.json()["weight_version"] == "raw"
    after = generate(http)
    assert after["output_ids"] != before and after["meta_info"]["weight_version"] == "raw"
    assert http.get("/model_info").json()["weight_version"] == "raw"
    sums = post(http, "/weights_checker", action="checksum")["checksums"]
    texts = [base64.b64encode(save({n: t})).decode() for n, t in load_file(new / "model.safetensors").items()]
    done = post(http, "/update_weights_from_tensor", serialized_named_tensors=texts, load_format="safetensors")
    assert done["success"] and done["num_tensors"] == len(texts)
    assert generate(http)["output_ids"] == after["output_ids"]
    assert post(http, "/weights_checker", action="checksum")["checksums"] == sums


def test_what_verl_sends(http: httpx.Client, new: Path) -> None:
    """Shared tensors as `MultiprocessingSerializer` writes them, between release and resume by tags."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        tensors = [(name, tensor.clone()) for name, tensor in load_file(new / "model.safetensors").items()]
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(tensors)
        sent = base64.b64encode(buffer.getvalue()).decode()
        post(http, "/release_memory_occupation", tags=["kv_cache", "weights"])
        post(http, "/resume_memory_occupation", tags=["weights"])
        body = {"serialized_named_tensors": [sent], "load_format": None, "flush_cache": False}
        assert post(http, "/update_weights_from_tensor", **body)["success"]
        post(http, "/resume_memory_occupation", tags=["kv_cache"])
        assert http.get("/flush_cache").status_code == 200
    finally:
        multiprocessing.set_sharing_strategy(before)
    after = generate(http)["output_ids"]
    post(http, "/update_weights_from_disk", model_path=str(new))
    assert generate(http)["output_ids"] == after


def test_what_areal_sends(http: httpx.Client, new: Path) -> None:
    """Pause, update from disk, continue; a request that was cut goes on by its token ids, versions known."""
    whole = generate(http)
    post(http, "/pause_generation")
    body = {"model_path": str(new), "load_format": "auto", "abort_all_requests": True, "weight_version": "3"}
    assert post(http, "/update_weights_from_disk", **body, is_async=False, token_step=0)["success"]
    post(http, "/continue_generation")
    assert http.get("/get_weight_version").json()["weight_version"] == "3"
    part = {**GREEDY, "max_new_tokens": 9}
    rest = post(http, "/generate", input_ids=[5, 6, 7, 8, *whole["output_ids"][:3]], sampling_params=part)
    assert rest["meta_info"]["completion_tokens"] == 9 and rest["meta_info"]["weight_version"] == "3"


@pytest.mark.slow
def test_a_rollout_that_is_cut_keeps_its_part_and_goes_on_as_if_it_had_not_been(http: httpx.Client) -> None:
    seeded = {"temperature": 1.0, "sampling_seed": 7, "max_new_tokens": 300, "ignore_eos": True}
    whole = post(http, "/generate", input_ids=[5, 6, 7], sampling_params=seeded, return_logprob=True)
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        with httpx.Client(base_url=http.base_url, timeout=60) as own:
            answers.append(post(own, "/generate", input_ids=[5, 6, 7], sampling_params=seeded, return_logprob=True))

    thread = threading.Thread(target=ask)
    thread.start()
    while not post(http, "/abort_request", abort_all=True)["message"].startswith("1"):
        assert thread.is_alive()
    thread.join()
    load = http.get("/v1/loads", params={"include": "core"}).json()["loads"][0]
    assert load["num_running_reqs"] + load["num_waiting_reqs"] == 0, "at once"
    (part,) = answers
    ids, meta = part["output_ids"], part["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    if not ids:
        assert meta["finish_reason"]["message"].startswith("Abort before prefill")
    assert ids == whole["output_ids"][: len(ids)]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == ids
    left = {**seeded, "max_new_tokens": 300 - len(ids)}
    rest = post(http, "/generate", input_ids=[5, 6, 7, *ids], sampling_params=left)
    assert ids + rest["output_ids"] == whole["output_ids"]


def test_slime_may_call_what_does_nothing_here(http: httpx.Client) -> None:
    assert post(http, "/post_process_weights", restore_weights_before_load=True)["success"]
    assert post(http, "/update_weight_version", new_version="7", abort_all_requests=False)["weight_version"] == "7"
    post(http, "/begin_weight_update", selector="all")
    post(http, "/end_weight_update")


ONE: dict[str, Any] = {"serialized_named_tensors": ["Li4="]}
WRONG = [
    ("/update_weights_from_disk", {}, "model_path is needed"),
    ("/update_weights_from_disk", {"model_path": "/nowhere/at/all"}, "there is no"),
    ("/update_weights_from_tensor", {}, "serialized_named_tensors is needed"),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["?"]}, "not base64"),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["Li4="]}, "no pickle of weights"),
    (
        "/update_weights_from_tensor",
        {"serialized_named_tensors": ["Li4="], "load_format": "os.system"},
        "is not one of",
    ),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["Li4="], "selector": "draft"}, "drafts have no"),
    ("/update_weights_from_distributed", {"names": ["a"], "dtypes": ["x"], "shapes": [[1]]}, "there is no group"),
    ("/init_weights_update_group", {"master_address": "x", "master_port": "a"}, "is no port"),
    ("/update_weights_from_ipc", {}, "zmq_handles is needed"),
    ("/update_weights_from_ipc", {"zmq_handles": {"CPU": "tcp://10.0.0.7:1"}}, "no socket of this machine"),
    ("/weights_checker", {"action": "look"}, "unknown action"),
    ("/release_memory_occupation", {"tags": ["all"]}, "unknown tags"),
    ("/update_weight_version", {}, "new_version is needed"),
    ("/end_weight_update", {}, "no update has begun"),
    ("/destroy_weights_update_group", {"group_name": "x"}, "there is no group"),
]


@pytest.mark.parametrize(("path", "body", "told"), WRONG)
def test_what_is_wrong_is_told_in_both_shapes_and_changes_nothing(
    http: httpx.Client, path: str, body: dict[str, Any], told: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]
    assert answer.json().get("success") in (False, None)
    assert http.get("/weight_version").json()["weight_version"] == "base"


def told(keys: Keys, path: str, client: str = "127.0.0.1", key: str = "") -> int:
    """Which status the gate answers with; 0: it lets the call through."""
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "path": path, "headers": headers, "client": (client, 1)}
    error = ApiKey(None, keys)._error(scope)  # pyright: ignore[reportArgumentType, reportPrivateUsage]
    return 0 if error is None else error.status


def test_who_may_change_weights() -> None:
    update, other = "/update_weights_from_disk", "/generate"
    assert told(Keys(), update) == 0 and told(Keys(), update, "10.0.0.7") == 403
    assert told(Keys(), other, "10.0.0.7") == 0 and told(Keys(remote=True), update, "10.0.0.7") == 0
    one = Keys(key="k")
    assert told(one, update, "10.0.0.7") == 401 and told(one, update, "10.0.0.7", "k") == 0
    both = Keys(key="k", admin="a")
    assert [told(both, update, key=key) for key in ("", "k", "a")] == [401, 401, 0]
    assert [told(both, other, key=key) for key in ("", "k", "a")] == [401, 0, 0]
    admin = Keys(admin="a")
    assert [told(admin, path) for path in (update, "/pause_generation", "/load_lora_adapter", other)] == [401] * 3 + [0]
    assert [told(admin, path) for path in ("/flush_cache", "/reset_prefix_cache", "/disaggregation_mode")] == [401] * 3
    assert told(admin, f"{update}/") == 401 and told(admin, "/health") == 0


def test_bodies_with_weights_have_a_limit_of_their_own(old: Path) -> None:
    settings: dict[str, Any] = {"max_body_bytes": 2000, "max_update_bytes": 10_000, "max_total_tokens": 512}
    with Engine(model_path=str(old), **settings) as engine, http_door(engine) as url:
        raw = {"content-type": "application/octet-stream"}
        for size, path, status in ((5000, "tensor", 400), (20_000, "tensor", 413), (5000, "disk", 413)):
            answer = httpx.post(f"{url}/update_weights_from_{path}", content=b"x" * size, headers=raw)
            assert answer.status_code == status, answer.text
