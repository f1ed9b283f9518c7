"""`--kt-*`: experts of a served model on the processor beside the device, and what is refused before it is ready."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packers
import pytest
from linear_cases import needs_native

from phloem import Engine
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.testing.checkpoints import tiny_checkpoint

TEXTS = ["The quick brown fox", "The quick brown fox jumps over", "What is the capital of France?"]
GREEDY = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def checkpoint(folder: Path, family: str) -> str:
    path = folder / family
    return str(path if path.exists() else tiny_checkpoint(family, path))


def tokens(path: str, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Several at once, behind a prompt of which they have the first part; and what the start decided."""
    with Engine(model_path=path, chunked_prefill_size=64, **{"dtype": "float32", **options}) as engine:
        first = [engine.generate(TEXTS[0] * 12, GREEDY)]
        both = engine.generate([*TEXTS, TEXTS[0] * 12], GREEDY)
        info = engine.get_server_info()
    return [item["output_ids"] for item in [*first, *both]], info


def told(info: dict[str, Any]) -> dict[str, str]:
    return {name: f"{value}: {reason}" for name, value, reason in info["decisions"]}


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_greedy_tokens_are_those_of_one_place(folder: Path, family: str) -> None:
    path = checkpoint(folder, family)
    want, _ = tokens(path, ops="reference")
    for each in (0, 2):
        options = {"kt_num_gpu_experts": each, "kt_weight_path": path, "kt_gpu_prefill_token_threshold": 40}
        got, info = tokens(path, ops="reference", **options)
        assert got == want
        said = told(info)
        assert said["expert_ops"].startswith("native") and said["device_experts"].startswith(f"{each}: of ")
        assert "experts are computed on the host" in said["step_graphs"]


@needs_native
@pytest.mark.slow
def test_on_a_processor_alone_one_table_computes_all_experts_and_steps_are_recorded(folder: Path) -> None:
    path = checkpoint(folder, "qwen3_moe")
    want, _ = tokens(path, dtype="bfloat16")
    got, info = tokens(path, dtype="bfloat16", kt_num_gpu_experts=0)
    assert got == want
    assert told(info)["host_experts"].startswith("all: the device is this processor")
    assert told(info)["step_graphs"].startswith("on")


@needs_native
@pytest.mark.slow
def test_hot_experts_move_to_the_device_between_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phloem.engine.choices.experts.STEPS", 8)
    path = checkpoint(folder, "qwen3_moe")
    want, _ = tokens(path, ops="reference")
    got, info = tokens(path, ops="reference", kt_num_gpu_experts=2, kt_enable_dynamic_expert_update=True)
    assert got == want
    facts = info["internal_states"][0]["prepared"]["experts"]
    assert facts["moved"] > 0 and facts["device_experts"] == 6
    # What is told can be given back as the counts to begin with.
    assert [len(row) for row in facts["counts"]] == [6, 6, 6]


@pytest.mark.slow
def test_counts_decide_which_experts_stay(folder: Path, tmp_path: Path) -> None:
    path = checkpoint(folder, "qwen3_moe")
    counts = [[1, 2, 3, 4, 5, 6]] * 3
    (tmp_path / "counts.json").write_text(json.dumps({"counts": counts}))
    options = {"kt_num_gpu_experts": 2, "kt_expert_placement_strategy": "frequency", "ops": "reference"}
    got, info = tokens(path, init_expert_location=str(tmp_path / "counts.json"), **options)
    assert got and "frequency" in told(info)["device_experts"]


@pytest.mark.slow
def test_a_method_that_says_another_stored_format_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    plain = tiny_checkpoint("qwen3_moe", tmp_path / "plain", **sizes)
    how = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    path, _ = packers.quantised(plain, tmp_path / "packed", packers.awq, how)
    _, info = tokens(str(path), kt_num_gpu_experts=0, kt_method="RAWINT4")
    assert told(info)["host_experts"].startswith("all")
    for name in ("FP8", "MXFP4", "GPTQ_INT4"):
        with pytest.raises(ConfigError, match=f"kt_method: {name}, but the weights are stored as awq"):
            tokens(str(path), kt_num_gpu_experts=0, kt_method=name)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kt_cpuinfer": 1}, "needs kt_num_gpu_experts"),
        ({"kt_num_gpu_experts": 7}, "7 of 6 experts"),
        ({"kt_num_gpu_experts": 7, "ops": None}, "7 of 6 experts"),
        (
            {
                "kt_num_gpu_experts": 0,
                "kt_expert_placement_strategy": "frequency",
                "init_expert_location": "/none.json",
                "ops": None,
            },
            "No such file",
        ),
        ({"kt_expert_placement_strategy": "random"}, "needs kt_num_gpu_experts"),
        ({"kt_num_gpu_experts": -1}, "below 0"),
        ({"kt_num_gpu_experts": 0, "kt_cpuinfer": 4096}, "4096 threads, but"),
        ({"kt_num_gpu_experts": 0, "kt_threadpool_count": 2}, "2 pools"),
        ({"kt_num_gpu_experts": 0, "kt_weight_path": "/elsewhere"}, "is not the model"),
        ({"kt_num_gpu_experts": 0, "kt_method": "AMXINT3"}, "AMXINT3"),
        ({"kt_num_gpu_experts": 0, "kt_method": "LLAMAFILE"}, "the weights are plain"),
        ({"kt_num_gpu_experts": 0, "kt_method": "FP8"}, "the weights are plain"),
        ({"kt_num_gpu_experts": 0, "kt_max_deferred_experts_per_token": 2}, "2 of 2 experts"),
        ({"kt_num_gpu_experts": 2, "kt_expert_placement_strategy": "frequency"}, "none are given"),
        ({"kt_num_gpu_experts": 2, "init_expert_location": "/none.json"}, "none.json: places are uniform"),
        ({"kt_num_gpu_experts": 0, "tp_size": 2}, "not with tp_size"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_to_ends_the_start(folder: Path, options: dict[str, Any], word: str) -> None:
    from phloem.checkpoint.describe import describe
    from phloem.engine import worker

    path = checkpoint(folder, "qwen3_moe")
    with pytest.raises(ConfigError, match=word):
        config = Config.from_flat({"model_path": path, "ops": "reference", "dtype": "float32", **options})
        if config.runtime.tp_size > 1:
            from phloem.engine.choices.experts import hosting

            hosting(config, describe(path), None, None, [])  # pyright: ignore[reportArgumentType]
        worker.build(config, describe(path), lambda phase, seconds: None)
