"""`bench step --limits`: what a step must read and compute, counted by hand, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phloem.bench import _floors, step
from phloem.bench._floors import Peaks, Work
from phloem.core.errors import BadRequest
from phloem.kernels import native
from phloem.layers.context import AttentionSpec
from phloem.testing.checkpoints import tiny_checkpoint

PEAKS = Peaks(read=100.0, int8=1000.0, bf16=10.0)


def work(*specs: AttentionSpec, **other: int) -> Work:
    values: dict[str, Any] = {"weight_bytes": 500, "kv_bytes": 10, "int8": 0, "bf16": 0, "head_int8": 0, "head_bf16": 0}
    return Work(**{**values, **other}, specs=specs)


def spec(window: int = 0) -> AttentionSpec:
    return AttentionSpec(pool=0, heads=2, kv_heads=1, head_size=4, scale=0.5, window=window)


def test_decode_reads_weights_once_and_each_rows_cache() -> None:
    assert work().decode(1, 7, PEAKS) == ((500 + 70) / 100, 0.0)
    assert work().decode(3, 7, PEAKS) == ((500 + 3 * 70) / 100, 0.0)


def test_few_rows_leave_out_a_part_of_the_head() -> None:
    assert work(head_rest=100).decode(8, 7, PEAKS)[0] == (400 + 8 * 70) / 100
    assert work(head_rest=100).decode(9, 7, PEAKS)[0] == (500 + 9 * 70) / 100
    assert work(head_rest=100).prefill(20, PEAKS)[0] == (400 + 20 * 10) / 100


def test_arithmetic_counts_at_the_peak_that_serves_it() -> None:
    parts = work(int8=100, bf16=20, head_int8=7, head_bf16=3)
    assert parts.decode(2, 1, PEAKS)[1] == pytest.approx(2 * 107 / 1000 + 2 * 23 / 10)
    assert parts.prefill(5, PEAKS)[1] == pytest.approx((5 * 100 + 7) / 1000 + (5 * 20 + 3) / 10)  # one row in the head


def test_attention_sees_what_is_before_it_and_no_more_than_its_window() -> None:
    pair = 4 * 2 * 4
    assert work(spec()).decode(3, 7, PEAKS)[1] == pytest.approx(3 * 7 * pair / 10)
    assert work(spec()).prefill(4, PEAKS)[1] == pytest.approx((1 + 2 + 3 + 4) * pair / 10)
    assert work(spec(window=2)).decode(1, 7, PEAKS)[1] == pytest.approx(2 * pair / 10)
    assert work(spec(window=2), spec()).prefill(4, PEAKS)[1] == pytest.approx((1 + 2 + 2 + 2 + 10) * pair / 10)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def run(tiny: Path, *flags: str) -> int:
    base = [str(tiny), "--threads", "1", "--steps", "4", "--context", "20", "--prefill", "32", "--limits"]
    return step.main([*base, "--turns", "2", *flags])


@pytest.mark.slow
def test_shares_of_a_tiny_model(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        native.runtime()
    except native.Unavailable:
        pytest.skip("the native library is not built here")
    assert run(tiny, "--load-format", "dummy", "--quantization", "int8") == 0
    text = capsys.readouterr().out
    record = json.loads(text.strip().splitlines()[-1])
    assert "GB/s over" in text and "decode:" in text and "of the limit" in text
    assert 0 < record["decode_share"] < 1 and 0 < record["prefill_share"] < 1
    assert record["step_bytes"] > record["weight_bytes"] > 0 and record["model"] == tiny.name
    assert record["cpu_level"] == native.runtime().library.levels()[-1]
    assert run(tiny, "--prefill", "0") == 0
    assert "prefill:" not in capsys.readouterr().out


def test_weights_that_are_not_packed_have_no_limits(tiny: Path) -> None:
    with pytest.raises(BadRequest, match="native kernels"):
        run(tiny, "--ops", "reference")


def test_experts_have_no_limits(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="dense models"):
        run(tiny_checkpoint("qwen3_moe", tmp_path / "moe"))


@pytest.mark.parametrize("bits", [4, 8])
def test_counted_off_a_model(tiny: Path, bits: int) -> None:
    """Against the sizes in the tiny model's configuration; weights take their bits at least, and compute in int8."""
    from phloem.checkpoint.describe import describe
    from phloem.core.config import Config
    from phloem.engine import worker

    try:
        native.runtime()
    except native.Unavailable:
        pytest.skip("the native library is not built here")
    settings = {"quantization": f"int{bits}", "dtype": "bfloat16", "max_total_tokens": 256, "threads": 1}
    config = Config.from_flat({"model_path": str(tiny), **settings})
    checkpoint = describe(str(tiny))
    built = worker.build(config, checkpoint, lambda phase, seconds: None)
    try:
        found = _floors.work_of(built.runner.model, built.runner.pool)
    finally:
        built.runner.close()
    c = checkpoint.config
    size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    layer = 2 * c["hidden_size"] * size * (c["num_attention_heads"] + c["num_key_value_heads"])
    layer += 3 * c["hidden_size"] * c["intermediate_size"]
    assert found.int8 == 2 * c["num_hidden_layers"] * layer and found.bf16 == 0
    assert found.head_bf16 == 0 and found.head_int8 == 2 * c["vocab_size"] * c["hidden_size"]
    assert found.weight_bytes >= (found.int8 + found.head_int8) // 2 * bits // 8
    assert found.kv_bytes == 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * size * 2
