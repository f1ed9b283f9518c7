"""Heads that are trained from a server's states, from a head that is there, and with a vocabulary that is given."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from served import Server

from phloem.core.errors import ConfigError, PhloemError
from phloem.testing.checkpoints import CORPUS, tiny_checkpoint
from phloem.training import checkpoints
from phloem.training.data import Sample
from phloem.training.head import Eagle3
from phloem.training.low_rank import add_low_rank, whole_weights
from phloem.training.options import Options
from phloem.training.remote import Remote
from phloem.training.report import Bars
from phloem.training.run import train
from phloem.training.target import Target, head_config

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "draft_vocab_size": 100,
    "eval_prompts": 0,
    "ttt_length": 2,
    "max_num_steps": 6,
    "batch_size": 2,
    "learning_rate": 3e-3,
    "log_interval": 1,
    "threads": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture")
    tiny_checkpoint("llama", folder / "model", num_hidden_layers=6)
    words = " ".join(CORPUS).split()
    lines = [json.dumps({"text": " ".join(words[at : at + 12])}) for at in range(8)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    found = Server(place / "model", "--enable-spec-capture", "--spec-capture-dir", str(place / "store"))
    try:
        yield found.wait_ready()
    finally:
        found.close()


def options(place: Path, output: str, **settings: Any) -> Options:
    paths = {"target_model_path": str(place / "model"), "train_data_path": str(place / "texts.jsonl")}
    values: dict[str, Any] = {**SETTINGS, **paths, "output_dir": str(place / output), **settings}
    return Options(**values)


def trained(given: Options) -> dict[str, torch.Tensor]:
    with Bars() as bars:
        assert train(given, bars) == 0
    return load_file(checkpoints.found_in(Path(given.output_dir))[-1] / "model.safetensors")


@pytest.fixture(scope="module")
def head(place: Path) -> Path:
    given = options(place, "plain")
    trained(given)
    return checkpoints.found_in(Path(given.output_dir))[-1]


def test_a_server_captures_while_it_serves_and_the_head_is_the_same(place: Path, server: Server, head: Path) -> None:
    target = Target(str(place / "model"), "auto", 1)
    samples = [Sample(tuple(range(5, 5 + count)), (True,) * count) for count in (3, 40, 17)]
    want = target.states(samples)
    target.remote = Remote(server.url, place / "store", target.layers, target.model.hidden_size)
    for mine, theirs in zip(target.states(samples), want, strict=True):
        assert torch.allclose(mine.aux_SA.float(), theirs.aux_SA.float(), atol=1e-5)
        assert torch.allclose(mine.last_SN.float(), theirs.last_SN.float(), atol=1e-5)
    assert not list((place / "store").rglob("*.safetensors")), "what was read is gone"
    got = trained(options(place, "online", capture_url=server.url, capture_dir=str(place / "store")))
    own = load_file(head / "model.safetensors")
    assert got.keys() == own.keys()
    assert all(torch.allclose(got[name].float(), own[name].float(), atol=1e-3) for name in own)


def test_the_answer_says_what_was_captured(place: Path, server: Server) -> None:
    features = {"aux": "aux_hidden_state", "last_hidden": "hidden_state"}
    passed = [{"name": "loss_mask", "data": [0] * count, "shape": [1, count, 1], "dtype": "int64"} for count in (3, 2)]
    body: dict[str, Any] = {
        "input_ids": [[5, 6, 7], [8, 9]],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "spec_capture": [
            {
                "store_id": "s",
                "sample_id": f"run:{at}",
                "gen": 3,
                "replace": False,
                "features": features,
                "auth_token": "read, and no more",
                "passthrough": [passed[at]],
            }
            for at in range(2)
        ],
    }
    answers = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    for answer, count, at in zip(answers, (3, 2), "01", strict=True):
        assert len(answer["output_ids"]) == 1
        told = answer["meta_info"]["spec_capture"]
        assert (told["store_id"], told["sample_id"], told["gen"]) == ("s", f"run:{at}", 3)
        assert told["features"]["aux_hidden_state"]["shape"] == [1, count, 96]
        assert told["features"]["loss_mask"] == {"shape": [1, count, 1], "dtype": "int64"}
        assert told["layers"] == [2, 3, 3] and told["aux_layer_ids"] == [1, 2, 2]
        file = load_file(place / "store" / "s" / f"run:{at}.safetensors")
        assert file["hidden_state"].shape == (1, count, 32) and not file["loss_mask"].any()
    again = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert again.status_code == 400 and "replace is false" in again.text
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"store_id": "../x", "sample_id": "1"}, "store_id"),
        ({"store_id": "s", "sample_id": 7}, "sample_id"),
        ({"store_id": "s", "sample_id": "9", "features": {"eye": "x"}}, "features"),
        ({"store_id": "s", "sample_id": "9", "features": {"aux": "__metadata__"}}, "features"),
        ({"store_id": "s", "sample_id": "9", "features": {"aux": "x" * 200}}, "features"),
        ({"store_id": "s", "sample_id": "9", "gen": 1 << 64}, "gen"),
        ({"store_id": "s", "sample_id": "9", "wishes": 1}, "wishes is not known"),
        ({"store_id": "s", "sample_id": "a/b"}, "sample_id"),
        ({"store_id": "s", "sample_id": "9", "passthrough": [{"name": "x"}]}, "passthrough"),
        ({"store_id": "s", "sample_id": "9", "passthrough": [{**passed[0], "name": "aux"}]}, "passthrough"),
        ({"store_id": "s", "sample_id": "9", "passthrough": [{**passed[0], "shape": [4]}]}, "passthrough"),
        ({"store_id": "s", "sample_id": "9", "passthrough": [{**passed[0], "data": [1 << 70] * 3}]}, "passthrough"),
        ({"store_id": "s", "sample_id": "9", "passthrough": [passed[0]] * 9}, "passthrough"),
    ]
    for one, why in wrong:
        reply = httpx.post(
            f"{server.url}/generate", json={**body, "input_ids": [5, 6], "spec_capture": one}, timeout=60
        )
        assert reply.status_code == 400 and why in reply.text, reply.text
        assert reply.json()["error"]["param"] == f"spec_capture.{why.split()[0]}"
    assert not (place / "x").exists() and not (place / "store" / "s" / "9.safetensors").exists()
    (place / "store" / "file").write_text("where a store's folder should be")
    body = {**body, "input_ids": [5, 6], "spec_capture": {"store_id": "file", "sample_id": "9"}}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert reply.status_code == 400 and "the states cannot be written" in reply.text
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_a_server_that_does_not_capture_says_what_it_needs(place: Path) -> None:
    plain = Server(place / "model").wait_ready()
    try:
        (place / "empty").mkdir()
        remote = Remote(plain.url, place / "empty", (2, 3, 3), 32)
        with pytest.raises(PhloemError, match="--enable-spec-capture"):
            remote.capture([[5, 6]])
    finally:
        plain.close()
    with pytest.raises(PhloemError, match="cannot be asked"):
        remote.capture([[5, 6]])


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://[::1", "http://a b", "http://host:port", "host:1"])
def test_an_address_that_is_none_is_refused_by_name(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"capture_url: .* expected http://HOST:PORT"):
        Remote(url, tmp_path, (2, 3, 3), 32)


def test_a_server_of_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote("http://host", tmp_path, (2, 3, 3), 32)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b'["no states"]'))
    with pytest.raises(PhloemError, match="answers otherwise than /generate"):
        remote.capture([[5, 6]])


def test_low_rank_additions_train_alone_and_are_written_as_their_sum(place: Path, head: Path) -> None:
    given = options(place, "low", draft_model_path=str(head), lora_rank=2, max_num_steps=4)
    got, own = trained(given), load_file(head / "model.safetensors")
    assert got.keys() == own.keys()
    assert torch.equal(got["d2t"], own["d2t"]) and torch.equal(got["norm.weight"], own["norm.weight"])
    for name in ("fc.weight", "midlayer.self_attn.q_proj.weight", "lm_head.weight"):
        change = got[name] - own[name]
        assert change.abs().max() > 0 and torch.linalg.matrix_rank(change, atol=1e-5) <= 2, name
    # A pause changes nothing: the additions and their moments are kept beside the sum.
    trained(options(place, "halves", draft_model_path=str(head), lora_rank=2, max_num_steps=4, save_interval=2))
    halves = checkpoints.found_in(place / "halves")
    for file in halves[-1].iterdir():
        file.unlink()
    halves[-1].rmdir()
    more = options(
        place, "halves", draft_model_path=str(head), lora_rank=2, max_num_steps=4, save_interval=2, resume=True
    )
    assert all(torch.equal(value, got[name]) for name, value in trained(more).items())


def test_a_fresh_addition_changes_nothing(place: Path) -> None:
    config = head_config(Target(str(place / "model"), "auto", 1).checkpoint, 50, {})
    one = Eagle3(config, 16)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    add_low_rank(one, 4, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in whole_weights(one).items())


def test_a_vocabulary_may_be_given(place: Path, head: Path) -> None:
    ids = [3, 8, 5, *range(20, 60)]
    torch.save(torch.tensor(ids), place / "hot.pt")
    got = trained(options(place, "mapped", vocab_mapping_path=str(place / "hot.pt"), max_num_steps=1))
    assert (got["d2t"] + torch.arange(len(ids))).tolist() == sorted(ids)
    assert got["lm_head.weight"].shape[0] == len(ids) and got["t2d"].sum() == len(ids)
    again = checkpoints.read_map(head / "model.safetensors", 384)
    assert torch.equal(again.d2t_D, load_file(head / "model.safetensors")["d2t"])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"lora_rank": 4}, "lora_rank needs draft_model_path"),
        ({"capture_url": "http://x"}, "capture_url needs capture_dir"),
        ({"vocab_mapping_path": "gone.pt"}, "vocab_mapping_path: gone.pt cannot be read"),
        ({"draft_model_path": "a", "vocab_mapping_path": "b"}, "vocab_mapping_path: a head that is trained on keeps"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(place: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why), Bars() as bars:
        train(options(place, "refused", **settings), bars)
