"""Engines with cache tiers: what comes back after a restart or a kill gives the same text; what cannot be is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from served import Server, eventually
from tier_engines import EXTRA, Asked, call, prompts_of, settings

from phloem.checkpoint.describe import describe, described
from phloem.checkpoint.fingerprint import fingerprint
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.launch import tiers
from phloem.launch.core import EngineCore
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.mark.some(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {}),
        pytest.param("llama", {"kv_cache_dtype": "int8", "ops": None, "attention_backend": "cpu"}, id="int8"),
        ("deepseek_v3", {}),
        ("gemma3", {}),
        ("qwen3_next", {}),
        ("lfm2", {}),
    ],
)
def test_text_is_the_same_with_and_without_tiers_and_after_a_restart(
    family: str, values: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"sliding_window": 40} if family == "gemma3" else {}
    model, prompts = tiny_checkpoint(family, tmp_path / "model", **sizes), prompts_of(4)
    plain = Config.from_flat(
        {**settings(model, tmp_path, **values).flat(), "enable_hierarchical_cache": False, EXTRA: None}
        | {"hicache_storage_backend": None}
    )
    without = Asked(plain, prompts)
    config = settings(model, tmp_path / "store", **values)
    first = Asked(config, prompts * 2)
    again = Asked(config, prompts)
    assert first.texts == without.texts * 2 and again.texts == without.texts
    assert [sum(found) for found in first.sources] == [0] * 4 + [192] * 4
    assert first.sources[4][0] == 0 and {found for found in again.sources} == {(0, 0, 192)}
    assert "file" in str(first.decisions["hicache_storage_backend"]) and first.state["tiers"]["storage_failures"] == 0
    cleared = Asked(config, prompts[:1], calls=(call("clear_hicache_storage"),))
    assert cleared.replies[0].ok and cleared.replies[0].data["pages"] >= 48 and cleared.sources == [(0, 0, 0)]


def test_another_model_or_other_types_find_nothing(tmp_path: Path) -> None:
    model, prompts = tiny_checkpoint("llama", tmp_path / "model"), prompts_of(1)
    Asked(settings(model, tmp_path / "store"), prompts)
    for values in ({"dtype": "bfloat16"}, {"page_size": 8}, {"context_length": 300}):
        assert Asked(settings(model, tmp_path / "store", **values), prompts).sources == [(0, 0, 0)]
    for path in model.glob("*.safetensors"):
        os.utime(path, (1, 1))
    assert Asked(settings(model, tmp_path / "store"), prompts).sources == [(0, 0, 0)]


def test_a_sibling_whose_files_have_the_same_sizes_and_times_finds_nothing(tmp_path: Path) -> None:
    """As fine-tuned models have that come out of one image or archive."""
    model, prompts = tiny_checkpoint("llama", tmp_path / "model"), prompts_of(1)
    Asked(settings(model, tmp_path / "store"), prompts)
    sibling = shutil.copytree(model, tmp_path / "sibling")
    path = sibling / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 2.0
    save_file(tensors, path, metadata={"format": "pt"})
    for one in model.iterdir():
        shutil.copystat(one, sibling / one.name)
        assert (sibling / one.name).stat().st_size == one.stat().st_size
    assert fingerprint(describe(str(sibling))) != fingerprint(describe(str(model)))
    assert Asked(settings(sibling, tmp_path / "store"), prompts).sources == [(0, 0, 0)]


def test_memory_that_was_given_back_is_filled_from_the_store_and_new_weights_find_nothing(tmp_path: Path) -> None:
    model, prompts = tiny_checkpoint("llama", tmp_path / "model"), prompts_of(1)
    config = settings(model, tmp_path / "store")
    first = Asked(config, prompts)
    slept = Asked(config, prompts * 2, calls=(call("release_memory", tags=["kv_cache"]), call("resume_memory")))
    assert all(reply.ok for reply in slept.replies) and slept.texts == first.texts * 2
    assert slept.sources == [(0, 0, 192), (192, 0, 0)]
    other = Asked(config, prompts, calls=(call("update_weights", source="random", flush=True),))
    assert other.replies[0].ok and other.sources == [(0, 0, 0)] and other.texts != first.texts
    again = Asked(config, prompts)
    assert again.texts == first.texts and again.sources == [(0, 0, 192)]


@pytest.mark.parametrize(
    ("family", "values", "word"),
    [
        ("gemma3_text", {"hicache_write_policy": "write_back"}, "write_back"),
        ("qwen3_next", {"hicache_write_policy": "write_back"}, "write_back"),
        ("qwen3_next", {"hicache_size": 1.3e-5}, "a recurrent state fills"),
        ("bert", {}, "does not generate"),
        ("qwen3_moe", {"enable_return_routed_experts": True}, "experts"),
    ],
)
def test_what_cannot_have_tiers_serves_without_and_says_why(
    family: str, values: dict[str, Any], word: str, tmp_path: Path
) -> None:
    model = tiny_checkpoint(family, tmp_path / "model")
    config = settings(model, tmp_path / "store", **values)
    core = EngineCore(config, described(config.model), lambda message: None)
    decisions = {name: (value, reason) for name, value, reason in core.info["decisions"]}
    core.close()
    assert decisions["hierarchical_cache"][0] == "none" and word in decisions["hierarchical_cache"][1]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"hicache_ratio": -1}, "hicache_ratio"),
        ({"hicache_ratio": "nan"}, "hicache_ratio"),
        ({"hicache_ratio": "inf"}, "hicache_ratio"),
        ({"hicache_ratio": 1e15}, "hicache_ratio"),
        ({"hicache_size": -0.5}, "hicache_size"),
        ({"hicache_size": 1e9}, "hicache_size"),
        ({"hicache_size": 1e-9}, "hicache_size"),
        ({"hicache_storage_backend": "flie"}, "hicache_storage_backend"),
        ({"hicache_storage_backend": "host"}, "hicache_storage_backend"),
        ({"hicache_write_policy": "never"}, "hicache_write_policy"),
        ({EXTRA: "{"}, EXTRA),
        ({EXTRA: "[]"}, EXTRA),
        ({EXTRA: "@/nowhere"}, EXTRA),
        ({EXTRA: {"pth": "x"}}, "unknown pth"),
        ({EXTRA: {"max_size": "10000TB"}}, "max_size"),
        ({EXTRA: {"max_size": "900000GiB"}}, "max_size"),
        ({EXTRA: {"max_size": "1B"}}, "max_size"),
        ({EXTRA: {"max_size": "-1GB"}}, "max_size"),
        ({EXTRA: {"prefetch_threshold": -1}}, "prefetch_threshold"),
        ({EXTRA: {"path": "/proc/nothing"}}, "path"),
        ({"disable_radix_cache": True}, "disable_radix_cache"),
        ({"enable_hierarchical_cache": False, "enable_hicache": False}, "needs enable_hierarchical_cache"),
        ({"hicache_storage_backend": "dynamic", EXTRA: {"module_path": "json", "class_name": "Nothing"}}, "Nothing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_refused_by_name(values: dict[str, Any], word: str, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=word):
        config = settings(model, tmp_path / "store", **values)
        tiers.check(config)
        EngineCore(config, described(config.model), lambda message: None).close()


@pytest.mark.slow
def test_a_killed_engine_leaves_what_the_next_one_reads(tmp_path: Path) -> None:
    """Over HTTP: the engine process is killed while it writes; the one that the server starts again finds pages."""
    model = tiny_checkpoint("llama", tmp_path / "model")
    extra = json.dumps({"path": str(tmp_path / "store"), "prefetch_threshold": 1})
    server = Server(
        model, "--enable-hierarchical-cache", "--hicache-storage-backend", "file",
        "--hicache-storage-backend-extra-config", extra, "--hicache-storage-prefetch-policy", "wait_complete",
        "--max-total-tokens", "1024", "--dtype", "float32", "--ops", "reference", "--page-size", "16",
    )  # fmt: skip
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    prompts = prompts_of(30)

    def ask(ids: list[int]) -> Any:
        answer = httpx.post(f"{server.url}/generate", json={"input_ids": ids, "sampling_params": params}, timeout=60)
        return answer.json() if answer.status_code == 200 else None

    try:
        server.wait_ready()
        texts = [ask(ids)["output_ids"] for ids in prompts[:12]]
        ask_again = ask(prompts[0])
        assert ask_again["output_ids"] == texts[0] and ask_again["meta_info"]["cached_tokens_details"]["storage"] == 192
        metrics = server.get("/metrics").text
        assert "phloem:backuped_tokens_total" in metrics and "phloem:hicache_host_total_tokens" in metrics
        lines = [line.split() for line in metrics.splitlines() if line.startswith("phloem:cached_tokens_total{")]
        by_source = {
            source: float(value)
            for name, value in lines
            for source in ("device", "host", "storage")
            if f'"{source}"' in name
        }
        assert by_source["storage"] == 192 and sum(by_source.values()) == 192
        with httpx.stream(
            "POST", f"{server.url}/generate", json={"input_ids": prompts[12:], "sampling_params": params}, timeout=60
        ):
            pass
        os.kill(server.engine_pid(), signal.SIGKILL)
        eventually(lambda: ask(prompts[0]) is not None, 60)
        found = [ask(ids) for ids in prompts[:12]]
        assert [one["output_ids"] for one in found] == texts
        assert sum(one["meta_info"]["cached_tokens_details"].get("storage", 0) for one in found) >= 192 * 8
        state = server.state()["tiers"]
        assert state["storage"]["corrupt"] == 0 and state["host"]["pinned"] == 0
        chat = {
            "model": server.get("/v1/models").json()["data"][0]["id"],
            "prompt": prompts[1],
            "max_tokens": 2,
            "return_cached_tokens_details": True,
        }
        told = httpx.post(f"{server.url}/v1/completions", json=chat, timeout=60).json()
        assert set(told["sglext"]["cached_tokens_details"]) >= {"device", "host"}
        cleared = httpx.post(f"{server.url}/clear_hicache_storage_backend", timeout=60).json()
        assert cleared["success"] and "pages" in cleared["message"]
    finally:
        server.close()
