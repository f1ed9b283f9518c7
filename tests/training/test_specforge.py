"""SpecForge's own client of a capturing server, driven against ours: what it sends is taken, what it checks holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from served import Server

from phloem.speculation.capture import aux_layers, capture, open_target
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow
LAYERS, SIZE = 6, 32


def client() -> tuple[Any, Any, Any]:
    """(The client's module, that of what it checks, that of its tasks), or a skip with what is missing.

    Its package imports more than its client needs, on a machine without a GPU in vain.
    """
    reason = "pip install --no-deps specforge (its client of a capturing server is tested where it is installed)"
    found = pytest.importorskip("specforge.inference.adapters.server_capture", reason=reason, exc_type=ImportError)
    checked = pytest.importorskip("specforge.inference.capture", reason=reason, exc_type=ImportError)
    tasks = pytest.importorskip("specforge.runtime.contracts", reason=reason, exc_type=ImportError)
    return found, checked, tasks


class Store:
    """What the client wants of its store: who owns what was written. Ours are files of a folder."""

    store_id = "run"

    def __init__(self) -> None:
        self.adopted: list[Any] = []
        self.reclaimed: list[tuple[Any, str]] = []

    def adopt(self, ref: Any) -> None:
        self.adopted.append(ref)

    def reclaim(self, ref: Any, *, reason: str = "") -> None:
        self.reclaimed.append((ref, reason))

    def abort(self, sample_id: str, *, reason: str = "") -> None:
        self.reclaimed.append((sample_id, reason))

    def track_external_attempt(self, sample_id: str, **more: Any) -> None:
        del sample_id, more

    def discard_external_attempts(self, *given: Any, **more: Any) -> None:
        del given, more


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    client()
    folder = tmp_path_factory.mktemp("store")
    found = Server(model, "--enable-spec-capture", "--spec-capture-dir", str(folder))
    try:
        yield found.wait_ready().url, folder
    finally:
        found.close()


def made(kind: Any, **values: Any) -> Any:
    """Of those that its constructor has: they differ a little between releases."""
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in values.items() if name in known})


def test_its_client_takes_what_the_server_captures(server: tuple[str, Path], model: Path) -> None:
    url, folder = server
    module, checked, contracts = client()
    schema = made(
        module.ServerCaptureSchema, strategy="eagle3", aux_feature="hidden_state", last_hidden_feature="target",
        passthrough=(("input_ids", "input_ids", ()), ("loss_mask", "loss_mask", ())),
        attention_mask_feature="attention_mask",
    )  # fmt: skip
    store, sent = Store(), list[dict[str, Any]]()

    def post(address: str, json_body: dict[str, Any], timeout: float) -> Any:
        sent.append(json_body)
        reply = httpx.post(address, json=json_body, timeout=timeout)
        assert reply.status_code == 200, reply.text
        return reply.json()

    adapter = made(
        module.SGLangServerCaptureAdapter, base_url=url, store=store, run_id="run", strategy="eagle3",
        algorithm="eagle3", schema=schema, post_fn=post, capture_token="read, and no more", timeout_s=60.0,
    )  # fmt: skip
    outputs = tuple(layer - 1 for layer in aux_layers(LAYERS))
    wanted = {"hidden_state", "target", "input_ids", "loss_mask", "attention_mask"}
    asked = made(
        checked.CaptureConfig, feature_names=frozenset(wanted), aux_hidden_state_layer_ids=outputs,
        target_repr="hidden_state", target_hidden_size=SIZE, target_vocab_size=384,
    )  # fmt: skip
    texts = [[5, 6, 7, 8, 9], [40, 41, 42]]
    tasks = [
        made(
            contracts.PromptTask, task_id=f"task-{at}", run_id="run", source_id="rows", prompt_id=str(at), attempt=0,
            payload={"input_ids": text, "loss_mask": [0, *[1] * (len(text) - 1)]}, metadata={}, sampling_config={},
            max_new_tokens=1, max_length=64, strategy="eagle3",
        )
        for at, text in enumerate(texts)
    ]  # fmt: skip
    refs = adapter.produce_refs(tasks, capture=asked)
    assert [getattr(ref, "reason", None) for ref in refs] == [None, None]
    assert len(store.adopted) == 2 and not store.reclaimed and len(sent) == 1
    states = capture(open_target(str(model), device="cpu", threads=1), texts)
    for ref, text, want in zip(refs, texts, states, strict=True):
        assert ref.num_tokens == len(text) and set(ref.feature_specs) == wanted
        tensors = load_file(folder / "run" / f"{ref.sample_id}.safetensors")
        for name, spec in ref.feature_specs.items():
            assert tuple(tensors[name].shape) == tuple(spec.shape) and str(tensors[name].dtype).endswith(spec.dtype)
        assert tensors["input_ids"].tolist() == [text] and tensors["loss_mask"][0, 0] == 0
        torch.testing.assert_close(tensors["hidden_state"][0].float(), want.aux_TA.float(), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(tensors["target"][0].float(), want.last_TN.float(), atol=1e-3, rtol=1e-3)
    other = made(
        checked.CaptureConfig, feature_names=frozenset(wanted), aux_hidden_state_layer_ids=(0, 1, 2),
        target_repr="hidden_state", target_hidden_size=SIZE, target_vocab_size=384,
    )  # fmt: skip
    again = [made(type(task), **{**vars(task), "attempt": 1, "task_id": f"more-{task.task_id}"}) for task in tasks]
    refused = adapter.produce_refs(again, capture=other)
    assert all("aux-layer id mismatch" in one.reason for one in refused) and len(store.reclaimed) == 2
