"""Adapters over HTTP: how they are asked for on every route, listed, loaded and unloaded, in both spellings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_support import write_adapter
from engine_door import http_door

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("peft", reason="PEFT writes the adapters")
pytestmark = pytest.mark.slow
MODEL = "org/tiny:v1"
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
OPENAI = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))
    write_adapter(base, base / "poet", 5, strong=3.0)
    return base


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(
        model_path=str(folder),
        served_model_name=MODEL,
        max_total_tokens=2048,
        lora_paths=[f"poet={folder}/poet"],
        max_loaded_loras=2,
    ) as found:
        yield found


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    with http_door(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def text(http: httpx.Client, model: str | None, **fields: Any) -> str:
    answer = http.post("/v1/completions", json={"prompt": "The quick", "model": model, **OPENAI, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_models_are_listed_with_their_parent(http: httpx.Client, folder: Path) -> None:
    base, poet = http.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == (MODEL, None)
    assert (poet["id"], poet["parent"], poet["root"]) == ("poet", MODEL, f"{folder}/poet")
    assert http.get("/v1/models/poet").json() == poet
    assert http.get(f"/v1/models/{MODEL}:poet").json() == poet
    assert http.get("/v1/models/prose").status_code == 404


def test_completions_take_an_adapter_as_model_or_behind_it_or_as_lora_path(http: httpx.Client) -> None:
    plain, poem = text(http, MODEL), text(http, "poet")
    assert plain != poem
    assert text(http, f"{MODEL}:poet") == text(http, None, lora_path="poet") == text(http, "default:poet") == poem
    assert text(http, None) == text(http, MODEL) == plain
    said = http.post("/v1/completions", json={"prompt": "x", "model": f"{MODEL}:poet", **OPENAI}).json()
    assert said["model"] == f"{MODEL}:poet"


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **OPENAI}),
    ("/v1/responses", {"input": "hi", "temperature": 0, "max_output_tokens": 6}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6}),
    ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5, 6], "apply_softmax": True}),
]


@pytest.mark.parametrize(("route", "body"), ROUTES)
def test_every_route_answers_with_the_adapter_that_its_model_names(
    http: httpx.Client, route: str, body: dict[str, Any]
) -> None:
    def said(model: str) -> Any:
        answer = http.post(route, json={**body, "model": model})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["model"] == model
        return found.get("choices") or found.get("output") or found.get("content") or found["scores"]

    def words(found: Any) -> str:
        return (
            str([one.get("message") or one.get("content") or one.get("text") for one in found])
            if isinstance(found[0], dict)
            else str(found)
        )

    assert words(said("poet")) == words(said(f"{MODEL}:poet")) != words(said(MODEL))
    unknown = http.post(route, json={**body, "model": f"{MODEL}:prose"})
    assert unknown.status_code == 404 and "prose" in unknown.text


def test_the_native_route_takes_one_for_all_or_one_for_each(http: httpx.Client) -> None:
    both = http.post(
        "/generate", json={"text": ["The quick"] * 2, "lora_path": ["poet", None], "sampling_params": GREEDY}
    ).json()
    assert both[0]["output_ids"] != both[1]["output_ids"]
    one = http.post("/generate", json={"text": "The quick", "lora_path": "poet", "sampling_params": GREEDY}).json()
    assert one["output_ids"] == both[0]["output_ids"]
    streamed = http.post(
        "/generate", json={"text": "The quick", "lora_path": "poet", "sampling_params": GREEDY, "stream": True}
    )
    assert streamed.text.split("\n\n")[-3].count("output_ids") == 1


@pytest.mark.parametrize(
    ("route", "body", "status", "names"),
    [
        ("/generate", {"text": "a", "lora_path": "prose"}, 400, "there is no adapter 'prose'; known: poet"),
        ("/generate", {"text": ["a", "b"], "lora_path": ["poet"]}, 400, "1 entries for 2 prompts"),
        ("/v1/completions", {"prompt": "a", "model": "prose"}, 404, "'poet'"),
        ("/v1/completions", {"prompt": "a", "lora_path": "prose"}, 400, "prose"),
        ("/v1/completions", {"prompt": "a", "model": "poet", "lora_path": "prose"}, 400, "asks for adapter 'poet'"),
        ("/load_lora_adapter", {}, 400, "lora_name"),
        ("/load_lora_adapter", {"lora_name": "x"}, 400, "lora_path"),
        ("/load_lora_adapter", {"lora_name": MODEL, "lora_path": "/x"}, 400, "the name of the base"),
        ("/load_lora_adapter", {"lora_name": "x", "lora_path": "/none"}, 400, "no such folder"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/none"}, 400, "no such folder"),
        ("/load_lora_adapter", {"lora_name": "a\nb", "lora_path": "/none"}, 400, "lora_name: at most 500 printable"),
        ("/load_lora_adapter", {"lora_name": "x" * 501, "lora_path": "/none"}, 400, "lora_name: at most 500 printable"),
        ("/load_lora_adapter", {"lora_nam": "x"}, 400, "did you mean 'lora_name'"),
        ("/unload_lora_adapter", {"lora_name": "prose"}, 400, "there is no adapter 'prose'"),
        ("/v1/unload_lora_adapter", {}, 400, "lora_name"),
    ],
)
def test_what_is_wrong_is_told_and_changes_nothing(
    http: httpx.Client, route: str, body: dict[str, Any], status: int, names: str
) -> None:
    answer = http.post(route, json=body)
    assert answer.status_code == status, answer.text
    assert names in answer.text
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == [MODEL, "poet"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4}}),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4}, "stream": True}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    ],
)
def test_an_unknown_adapter_has_one_code_on_every_route(http: httpx.Client, route: str, body: dict[str, Any]) -> None:
    answer = http.post(route, json={**body, "lora_path": "prose"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "adapter_not_found" and error["param"] == "lora_path"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_adapters_are_loaded_replaced_and_unloaded(
    http: httpx.Client, folder: Path, tmp_path: Path, prefix: str
) -> None:
    prose = write_adapter(folder, tmp_path / "prose", 9, strong=3.0)
    done = http.post(f"{prefix}/load_lora_adapter", json={"lora_name": "prose", "lora_path": str(prose)})
    assert done.status_code == 200, done.text
    assert done.json()["success"] and done.json()["loaded_adapters"] == {
        "poet": f"{folder}/poet",
        "prose": str(prose),
    }
    first = text(http, "prose")
    assert first not in (text(http, MODEL), text(http, "poet"))
    http.post(f"{prefix}/load_lora_adapter", json={"lora_name": "prose", "lora_path": f"{folder}/poet"})
    assert text(http, "prose") == text(http, "poet")
    gone = http.post(f"{prefix}/unload_lora_adapter", json={"lora_name": "prose"})
    assert gone.status_code == 200 and gone.json()["loaded_adapters"] == {"poet": f"{folder}/poet"}
    assert http.post("/v1/completions", json={"prompt": "a", "model": "prose"}).status_code == 404


def test_pinned_adapters_may_not_fill_all_places(http: httpx.Client, folder: Path) -> None:
    pinned = {"lora_name": "p1", "lora_path": f"{folder}/poet", "pinned": True}
    assert http.post("/load_lora_adapter", json=pinned).status_code == 200
    more = http.post("/load_lora_adapter", json={**pinned, "lora_name": "p2"})
    assert more.status_code == 400 and "one must stay free" in more.text
    assert http.post("/unload_lora_adapter", json={"lora_name": "p1"}).status_code == 200


def test_without_adapters_the_fields_are_refused_with_the_way_to_them(folder: Path) -> None:
    with (
        Engine(model_path=str(folder), max_total_tokens=512) as engine,
        http_door(engine) as url,
        httpx.Client(base_url=url) as http,
    ):
        refused = http.post("/generate", json={"text": "a", "lora_path": "x"})
        assert refused.status_code == 400 and "--enable-lora" in refused.text
        refused = http.post("/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x"})
        assert refused.status_code == 400 and "--enable-lora" in refused.text
        assert len(http.get("/v1/models").json()["data"]) == 1
