"""Engines that share a store: what one has computed another of the same model reads, and none of another model."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_stand_ins import UNREACHABLE, Stores, real, stand_in
from tier_engines import EXTRA, Asked, call, prompts_of, settings

from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.kvcache.tiers import _staged as staged
from phloem.launch import tiers
from phloem.testing.checkpoints import tiny_checkpoint

KINDS = [("mooncake", "stand-in"), ("nixl", "stand-in"), ("mooncake", "real"), ("nixl", "real")]
pytestmark = pytest.mark.slow


@pytest.fixture(params=KINDS, ids="-".join)
def stores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stores]:
    name, kind = request.param
    folder = tmp_path / "store"
    yield from real(name, folder) if kind == "real" else stand_in(name, monkeypatch, folder)


def sharing(model: Path, stores: Stores, **values: Any) -> Config:
    """Requests wait for all that there is, and read however little it is."""
    extra: dict[str, Any] = {"prefetch_threshold": 1, **stores.extra}
    if stores.folder is not None:
        extra |= {"path": str(stores.folder), "max_size": "64MiB"}
    more = {"hicache_storage_backend": stores.name, "hicache_storage_prefetch_policy": "wait_complete"}
    return settings(model, model, **{EXTRA: json.dumps(extra), **more, **values})


def test_another_machine_reads_what_one_has_computed_and_says_the_same(stores: Stores, tmp_path: Path) -> None:
    model, prompts = tiny_checkpoint("llama", tmp_path / "model"), prompts_of(3)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    for path in copy.iterdir():
        os.utime(path, (1.0, 1.0))
    first = Asked(sharing(model, stores), prompts)
    assert first.sources == [(0, 0, 0)] * 3
    other = Asked(sharing(copy, stores), prompts)
    assert other.texts == first.texts and other.sources == [(0, 0, 192)] * 3
    assert other.state["tiers"]["storage_failures"] == 0
    again = Asked(sharing(copy, stores, page_size=8), prompts[:1])
    assert again.texts == first.texts[:1] and again.sources == [(0, 0, 0)]


def test_other_weights_are_never_mixed_with_these(stores: Stores, tmp_path: Path) -> None:
    model, prompts = tiny_checkpoint("llama", tmp_path / "model"), prompts_of(1)
    config = sharing(model, stores)
    first = Asked(config, prompts)
    new = call("update_weights", source="random", flush=True)
    changed = Asked(config, prompts * 2, calls=(new,))
    assert changed.sources[0] == (0, 0, 0) and changed.texts[0] == changed.texts[1] != first.texts[0]
    again = Asked(config, prompts)
    assert again.texts == first.texts and again.sources == [(0, 0, 192)]
    cleared = Asked(config, prompts, calls=(call("clear_hicache_storage"),))
    assert cleared.replies[0].ok and cleared.sources == [(0, 0, 0)] and cleared.texts == first.texts


def test_a_store_that_is_gone_costs_time_alone(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if stores.fault is None:
        pytest.skip("real masters are killed in tests/kvcache/test_distant_stores.py")
    monkeypatch.setattr(staged, "CALL_SECONDS", 0.1)
    monkeypatch.setattr(staged, "REST", 0.0)
    model, prompts = tiny_checkpoint("llama", tmp_path / "model"), prompts_of(2)
    config = sharing(model, stores)
    first = Asked(config, prompts)
    stores.fault.code = UNREACHABLE if stores.name == "nixl" else 0
    stores.fault.gate = threading.Event()
    without = Asked(config, prompts)
    assert without.texts == first.texts and without.sources == [(0, 0, 0)] * 2
    assert without.state["tiers"]["storage_failures"] > 0
    stores.fault.code = 0
    stores.fault.gate.set()
    assert Asked(config, prompts).sources == [(0, 0, 192)] * 2


@pytest.mark.parametrize(
    ("backend", "extra", "word"),
    [
        ("mooncake", {}, "master_server_address"),
        ("mooncake", {"master_server_address": "127.0.0.1:1", "path": "/x"}, "path: mooncake has no folder"),
        ("mooncake", {"master_server_adress": "127.0.0.1:1"}, "unknown master_server_adress"),
        ("nixl", {"path": "/proc/nothing"}, "path"),
        ("nixl", {"module_path": "x"}, "unknown module_path"),
        ("file", {"plugin": "POSIX"}, "unknown plugin"),
    ],
)
def test_settings_of_another_store_are_refused(
    backend: str, extra: dict[str, Any], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    for _ in stand_in("nixl" if backend == "nixl" else "mooncake", monkeypatch, tmp_path):
        config = settings(model, tmp_path, **{"hicache_storage_backend": backend, EXTRA: json.dumps(extra)})
        with pytest.raises(ConfigError, match=word):
            tiers.check(config)
            Asked(config, [])
