"""Adapters that come as tensors, without a folder: from a trainer beside the server, or in the same process."""

from __future__ import annotations

import base64
import json
import pickle
import re
import threading
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_door import http_door
from safetensors.torch import save, save_file
from torch import multiprocessing

from phloem import Engine
from phloem.core.errors import BadRequest, PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0, rank: int = 4) -> Tensors:
    made = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    down, up = torch.randn(rank, 32, generator=made), torch.randn(64, rank, generator=made)
    return {f"{name}_A.weight": down, f"{name}_B.weight": up}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 1024, "enable_lora": True}
    with Engine(model_path=str(path), max_loaded_loras=2, **settings) as found:
        yield found


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    with http_door(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def said(engine: Engine, name: str | None) -> list[int]:
    answer: Any = engine.generate("hello", GREEDY, lora_path=name)
    return answer["output_ids"]


def folder(path: Path, found: Tensors) -> str:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(found, path / "adapter_model.safetensors")
    return str(path)


def text(found: Any, kind: str) -> str:
    if kind == "safetensors":
        return base64.b64encode(save(found)).decode()
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        return base64.b64encode(bytes(ForkingPickler.dumps(found))).decode()
    finally:
        multiprocessing.set_sharing_strategy(before)


def test_tensors_of_this_process_are_the_adapter_of_the_same_folder(engine: Engine, tmp_path: Path) -> None:
    given = tensors(1)
    engine.load_lora_adapter("folder", folder(tmp_path / "a", given))
    assert engine.load_lora_adapter_from_tensors("sent", given, CONFIG)["sent"] == "__tensor__/sent"
    for tensor in given.values():
        tensor.zero_()  # the trainer goes on
    wanted = said(engine, "folder")
    assert said(engine, "sent") == wanted != said(engine, None)
    engine.load_lora_adapter_from_tensors("sent", list(tensors(2).items()), CONFIG)
    other = said(engine, "sent")
    assert other != wanted
    engine.load_lora_adapter("third", folder(tmp_path / "b", tensors(3)))
    for name in ("third", "folder"):  # two places: it has given way
        said(engine, name)
    assert said(engine, "sent") == other
    for name in ("folder", "sent", "third"):
        engine.unload_lora_adapter(name)


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_a_trainer_sends_an_adapter_over_http(engine: Engine, http: httpx.Client, tmp_path: Path, kind: str) -> None:
    given = tensors(4)
    body: dict[str, Any] = {"lora_name": "sent", "config_dict": CONFIG}
    body["serialized_named_tensors"] = [text(given, kind)]
    body["load_format"] = None if kind == "pickle" else kind
    answer = http.post("/load_lora_adapter_from_tensors", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["loaded_adapters"] == {"sent": "__tensor__/sent"}
    engine.load_lora_adapter("folder", folder(tmp_path / "a", given))
    assert said(engine, "sent") == said(engine, "folder") != said(engine, None)
    old = {**body, "serialized_tensors": body.pop("serialized_named_tensors")[0], "lora_name": "old"}
    assert http.post("/load_lora_adapter_from_tensors", json=old).status_code == 200
    assert said(engine, "old") == said(engine, "folder")
    for name in ("folder", "sent", "old"):
        engine.unload_lora_adapter(name)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"config_dict": None}, "config_dict is needed"),
        ({"config_dict": {**CONFIG, "r": 0}}, "r must be a whole number"),
        ({"config_dict": {**CONFIG, "r": 8}}, "says rank 8"),
        ({"serialized_named_tensors": []}, "serialized_named_tensors is needed"),
        ({"serialized_named_tensors": ["?"]}, "not base64"),
        ({"serialized_named_tensors": [text(tensors(), "safetensors")] * 2, "load_format": None}, "2 payloads"),
        ({"serialized_named_tensors": [text({"x": torch.ones(1)}, "safetensors")]}, "not known: x"),
        ({"serialized_named_tensors": [text(tensors(rank=3), "safetensors")]}, "says rank 4"),
        ({"serialized_named_tensors": [base64.b64encode(b"\0" * 9).decode()]}, "not safetensors"),
        ({"load_format": "os.system"}, "no code of a caller's is run"),
        ({"added_tokens_config": {"a": 5}}, "added_tokens_config is not supported"),
    ],
)
def test_what_is_wrong_with_one_is_told_and_changes_nothing(
    engine: Engine, http: httpx.Client, change: dict[str, Any], names: str
) -> None:
    engine.load_lora_adapter_from_tensors("sent", tensors(5), CONFIG)
    before = said(engine, "sent")
    body: dict[str, Any] = {"lora_name": "sent", "config_dict": CONFIG, "load_format": "safetensors"}
    body["serialized_named_tensors"] = [text(tensors(), "safetensors")]
    answer = http.post("/load_lora_adapter_from_tensors", json={**body, **change})
    assert answer.status_code == 400 and names in answer.text, answer.text
    assert said(engine, "sent") == before
    engine.unload_lora_adapter("sent")


@pytest.mark.parametrize(
    ("given", "config", "names"),
    [
        (tensors(), None, "its config must be a dict, got None"),
        (tensors(), "r=4", "its config must be a dict"),
        ([("a",)], CONFIG, "a list of (name, tensor) is needed"),
        ([("a", 5)], CONFIG, "a list of (name, tensor) is needed"),
        ({name: one.numpy() for name, one in tensors().items()}, CONFIG, "a list of (name, tensor) is needed"),
    ],
)
def test_what_python_hands_over_is_looked_at(engine: Engine, given: Any, config: Any, names: str) -> None:
    with pytest.raises(PhloemError, match=re.escape(names)):
        engine.load_lora_adapter_from_tensors("wrong", given, config)


def test_a_payload_that_would_run_code_is_refused(engine: Engine, http: httpx.Client, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (tmp_path / "touched").touch, ()

    body: dict[str, Any] = {"lora_name": "sent", "config_dict": CONFIG}
    body["serialized_named_tensors"] = [base64.b64encode(pickle.dumps({"a": Bomb()})).decode()]
    answer = http.post("/load_lora_adapter_from_tensors", json=body)
    assert answer.status_code == 400 and not (tmp_path / "touched").exists()
    with pytest.raises(PhloemError, match=r"do not fit|not of an adapter"):
        engine.load_lora_adapter_from_tensors("sent", {name: one.int() for name, one in tensors().items()}, CONFIG)
    with pytest.raises(BadRequest, match="no adapter 'sent'"):
        said(engine, "sent")


def test_as_many_as_there_are_places_are_kept_and_the_one_unused_for_longest_is_forgotten(engine: Engine) -> None:
    engine.load_lora_adapter_from_tensors("kept", tensors(6), CONFIG, pinned=True)
    for name in ("v1", "v2", "v3"):
        loaded = engine.load_lora_adapter_from_tensors(name, tensors(7), CONFIG)
        assert set(loaded) == {"kept", name}
    with pytest.raises(BadRequest, match="no adapter 'v2'"):
        said(engine, "v2")
    for name in ("kept", "v3"):
        engine.unload_lora_adapter(name)


def test_numbers_of_a_config_that_no_adapter_has_are_refused_over_http(http: httpx.Client) -> None:
    payload = {"serialized_named_tensors": [text(tensors(), "safetensors")], "load_format": "safetensors"}
    for alpha in (1e308, 10**30):
        body = {"lora_name": "odd", "config_dict": {**CONFIG, "lora_alpha": alpha}, **payload}
        answer = http.post("/load_lora_adapter_from_tensors", json=body)
        assert answer.status_code == 400 and "lora_alpha must be a number" in answer.text


def test_patterns_that_take_for_ever_are_refused_and_nobody_waits_for_them(engine: Engine) -> None:
    given = tensors()
    name = "base_model.model." + "a" * 60 + ".q_proj.lora"
    given |= {f"{name}_A.weight": torch.ones(4, 32), f"{name}_B.weight": torch.ones(64, 4)}
    config, refused = {**CONFIG, "rank_pattern": {"(a|aa)+b": 4}}, list[str]()

    def load() -> None:
        with pytest.raises(BadRequest) as raised:
            engine.load_lora_adapter_from_tensors("slow", given, config)
        refused.append(str(raised.value))

    thread = threading.Thread(target=load)
    thread.start()
    while thread.is_alive():
        said(engine, None)
    assert "rank_pattern or alpha_pattern takes too long" in refused[0]
