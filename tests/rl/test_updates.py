"""Weights that change while the engine runs: the answers are those of a fresh start with the new ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phloem import Engine
from phloem.core.errors import PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

LONG: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
SETTINGS: dict[str, Any] = {"max_total_tokens": 4096, "context_length": 512}
FORMS = [
    pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
    pytest.param({"dtype": "float32"}, id="float32"),
    pytest.param({"quantization": "int8"}, id="int8", marks=pytest.mark.slow),
    pytest.param({"ops": "reference", "dtype": "float32"}, id="reference", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2", tmp_path_factory.mktemp("new"), seed=9)


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def ids(engine: Engine, **fields: Any) -> list[int]:
    answer: Any = engine.generate("hello there, all of you", LONG, **fields)
    return answer["output_ids"]


def fresh(path: Path, form: dict[str, Any]) -> list[int]:
    with Engine(model_path=str(path), **SETTINGS, **form) as engine:
        return ids(engine)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.mark.some(2)
@pytest.mark.slow
def test_answers_are_those_of_a_fresh_start_whatever_way_the_weights_came(
    old: Path, new: Path, form: dict[str, Any]
) -> None:
    before, after = fresh(old, form), fresh(new, form)
    assert before != after
    with Engine(model_path=str(old), **SETTINGS, **form) as engine:
        assert ids(engine) == before
        digests = engine.weights_checker("checksum")
        assert engine.update_weights_from_disk(str(new), weight_version="v1")[0]
        assert ids(engine) == after
        assert engine.update_weights_from_tensor(stored(old).items(), flush_cache=False)[0]
        assert ids(engine) == before, "nothing cached of other weights is found"
        assert engine.weights_checker("checksum") == digests
        engine.begin_weight_update()
        for name, tensor in stored(new).items():
            engine.update_weights_from_tensor([(name, tensor)])
            assert ids(engine) == before, "what is collected does not serve"
        engine.end_weight_update(weight_version="v2")
        answer: Any = engine.generate("hello there, all of you", LONG)
        assert answer["output_ids"] == after and answer["meta_info"]["weight_version"] == "v2"
        for name, tensor in stored(old).items():  # one after another: a fused weight in three calls
            engine.update_weights_from_tensor([(name, tensor)])
        assert form.get("quantization") or ids(engine) == before
        state = engine.get_server_info()["internal_states"][0]
        assert (state["weight_version"], state["weight_epoch"]) == ("v2", 3 + len(stored(old)))


@pytest.fixture(scope="module")
def engine(old: Path) -> Iterator[Engine]:
    with Engine(model_path=str(old), dtype="bfloat16", stream_interval=3, **SETTINGS) as found:
        yield found


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest, old: Path) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").update_weights_from_disk(str(old), weight_version="default")


WRONG: list[tuple[Any, str]] = [
    ({"model.nothing": torch.ones(3)}, "no weight is called 'model.nothing'"),
    ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \[3\], expected"),
    ({"model.norm.weight": torch.ones(32, dtype=torch.int64)}, "int64"),
    ([("model.norm.weight", [1.0])], "named_tensors"),
    ({"model.norm.weight": torch.full((32,), float("nan"))}, r"model.norm.weight has numbers that are NaN"),
    ({"model.norm.weight": torch.full((32,), 1e30)}, r"or beyond 1e\+18"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "told"), WRONG)
def test_one_wrong_tensor_changes_nothing(engine: Engine, new: Path, bad: Any, told: str) -> None:
    before = ids(engine)
    pairs = list(bad.items()) if isinstance(bad, dict) else bad
    with pytest.raises(PhloemError, match=told):
        engine.update_weights_from_tensor([*stored(new).items(), *pairs])
    assert ids(engine) == before and engine.get_weight_version() == "default"


@pytest.mark.slow
@pytest.mark.parametrize("bad", [None, 3, [("a",)], ["model.norm.weight"]], ids=repr)
def test_what_is_no_list_of_tensors_is_named(engine: Engine, bad: Any) -> None:
    with pytest.raises(PhloemError, match="named_tensors: a list of"):
        engine.update_weights_from_tensor(bad)


@pytest.mark.slow
def test_a_damaged_checkpoint_changes_nothing(engine: Engine, new: Path, tmp_path: Path) -> None:
    before = ids(engine)
    for file in new.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = stored(new)
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PhloemError, match=r"model.norm.weight"):
        engine.update_weights_from_disk(str(tmp_path))
    tensors["model.norm.weight"] = torch.full((32,), float("-inf"))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PhloemError, match=r"model.norm.weight has numbers that are NaN, infinite"):
        engine.update_weights_from_disk(str(tmp_path))
    with pytest.raises(PhloemError, match="there is no"):
        engine.update_weights_from_disk(str(tmp_path / "nowhere"))
    with pytest.raises(PhloemError, match="there is no"):
        engine.update_weights_from_disk("/" + "x" * 4000)
    with pytest.raises(PhloemError, match="'banana' is not one of auto, safetensors"):
        engine.update_weights_from_disk(str(new), load_format="banana")
    engine.update_weights_from_tensor([])  # what is in memory is a checkpoint's still
    engine.update_weights_from_tensor([("model.norm.weight", stored(new)["model.norm.weight"])])
    before = ids(engine)
    other = tiny_checkpoint("llama", tmp_path / "llama")
    with pytest.raises(PhloemError, match="is a llama, this engine serves a qwen2"):
        engine.update_weights_from_disk(str(other))
    assert ids(engine) == before


def test_a_request_tells_which_weights_made_which_token(engine: Engine, new: Path) -> None:
    seen: list[int] = []
    long = {**LONG, "max_new_tokens": 200}
    stream: Any = engine.generate("hello", long, stream=True)
    for event in stream:
        seen.append(len(event["output_ids"]))
        if len(seen) == 4:
            engine.update_weights_from_disk(str(new), weight_version="v1")
        last = event
    spans = last["meta_info"]["weight_versions"]
    assert last["meta_info"]["weight_version"] == "v1"
    assert [span[0] for span in spans] == ["default", "v1"]
    assert spans[0][1] == 0 and spans[0][2] == spans[1][1] and spans[1][2] == len(last["output_ids"]) == 200
    assert spans[0][2] >= seen[3]


@pytest.mark.slow
def test_requests_go_on_beside_updates_in_a_row(engine: Engine, old: Path, new: Path) -> None:
    answers: list[Any] = []

    def ask() -> None:
        answers.append(engine.generate(["hello there", "what else", "and then"], {**LONG, "max_new_tokens": 300}))

    thread = threading.Thread(target=ask)
    thread.start()
    for turn in range(6):
        engine.update_weights_from_disk(str(new if turn % 2 == 0 else old), weight_version=f"v{turn}")
    thread.join()
    assert [len(answer["output_ids"]) for answer in answers[0]] == [300] * 3


def test_an_update_that_aborts_gives_what_there_is(engine: Engine, new: Path) -> None:
    stream: Any = engine.generate("hello", {**LONG, "max_new_tokens": 400}, stream=True, return_logprob=True)
    next(stream)
    engine.update_weights_from_disk(str(new), abort_all_requests=True)
    *_, last = stream
    meta = last["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and 0 < len(last["output_ids"]) < 400
    assert len(meta["output_token_logprobs"]) == len(last["output_ids"])


def test_digests_tell_whether_all_weights_came(engine: Engine, old: Path) -> None:
    engine.weights_checker("snapshot")
    engine.weights_checker("compare")
    engine.weights_checker("reset")
    with pytest.raises(PhloemError, match="tensors are not those of the snapshot"):
        engine.weights_checker("compare")
    engine.update_weights_from_tensor(stored(old).items())
    engine.weights_checker("compare")
    with pytest.raises(PhloemError, match="unknown action"):
        engine.weights_checker("look")


def test_updates_begin_and_end_in_pairs(engine: Engine) -> None:
    with pytest.raises(PhloemError, match="no update has begun"):
        engine.end_weight_update()
    engine.begin_weight_update()
    with pytest.raises(PhloemError, match="has begun already"):
        engine.begin_weight_update()
    engine.end_weight_update()


def test_what_a_trainer_that_is_gone_has_sent_can_be_forgotten(engine: Engine, new: Path) -> None:
    before = ids(engine)
    with pytest.raises(PhloemError, match="no update has begun"):
        engine.abort_weight_update()
    engine.begin_weight_update()
    engine.update_weights_from_tensor(list(stored(new).items())[:5])
    with pytest.raises(PhloemError, match="abort_weight_update"):
        engine.begin_weight_update()
    assert "5 tensors are forgotten" in engine.abort_weight_update()[1]
    assert ids(engine) == before
    engine.begin_weight_update()
    engine.end_weight_update()
    assert ids(engine) == before, "nothing of it is left"


def test_a_checkpoint_that_was_refused_is_not_what_comes_back_after_sleep(
    engine: Engine, new: Path, tmp_path: Path
) -> None:
    before = ids(engine)
    for file in new.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = stored(new)
    tensors["model.norm.weight"] = torch.full((32,), 7, dtype=torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PhloemError, match="is I64"):
        engine.update_weights_from_disk(str(tmp_path))
    engine.begin_weight_update()
    engine.end_weight_update()
    engine.release_memory_occupation(["weights"])
    assert engine.resume_memory_occupation() == "" and ids(engine) == before


def test_a_checkpoint_may_go_as_soon_as_it_was_read(engine: Engine, new: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step"
    copy.mkdir()
    for file in new.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    engine.update_weights_from_disk(str(copy), weight_version="1")
    want = ids(engine)
    for file in copy.iterdir():
        file.unlink()
    engine.begin_weight_update()
    engine.end_weight_update()
    assert ids(engine) == want
    engine.release_memory_occupation(["weights"])
    with pytest.raises(PhloemError, match="given back"):
        engine.get_weights_by_name("model.norm.weight")
    assert "No such file" in engine.resume_memory_occupation()


def test_weights_go_by_the_names_of_their_file_where_these_are_others(tmp_path: Path) -> None:
    old, new = (tiny_checkpoint("gpt2", tmp_path / str(seed), seed=seed) for seed in (0, 9))
    name = "transformer.h.1.attn.c_attn.weight"
    with Engine(model_path=str(old), dtype="float32", **SETTINGS) as engine:
        assert torch.equal(torch.tensor(engine.get_weights_by_name(name)), stored(old)[name])
        engine.update_weights_from_tensor([(name, stored(new)[name])], weight_version=7)  # type: ignore[arg-type]
        assert engine.get_weight_version() == "7"
        assert torch.equal(torch.tensor(engine.get_weights_by_name(name)), stored(new)[name])
        for wrong in ("transformer.h.7.attn.c_attn.weight", "transformer", ""):
            with pytest.raises(PhloemError, match=r"no weight is called|name"):
                engine.get_weights_by_name(wrong)
