"""Which type the KV cache has when nobody names one, and what an 8-bit one declines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import needs_native

from phloem.attention import AttentionNeed
from phloem.attention.cpu import Backend
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ModelLoadError
from phloem.engine import worker
from phloem.engine.runner import ModelRunner
from phloem.kernels import native
from phloem.layers.context import AttentionSpec
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = needs_native
CPU = torch.device("cpu")


def kv_type(**settings: Any) -> tuple[str, str]:
    """The type that an engine of the default model's Q4_1 file decides on, and why."""
    try:
        checkpoint = describe("demo")
    except ModelLoadError:
        pytest.skip("the default model is not installed")
    config = Config.from_flat({"max_total_tokens": 256, "disable_step_graph": True, **settings})
    built = worker.build(config, checkpoint, lambda name, seconds: None)
    told = next(item for item in built.decisions if item.name == "kv_cache_dtype")
    assert built.info["kv_cache_dtype"] == told.value
    return told.value, told.reason


@pytest.mark.some(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "value", "reason"),
    [
        ({}, "int8", "as the weights are quantised"),
        ({"kv_cache_dtype": "bfloat16"}, "bfloat16", "as asked"),
        ({"kv_cache_dtype": "int8"}, "int8", "as asked"),
        ({"dtype": "float32"}, "float32", "the type of the model"),
        ({"ops": "reference", "dtype": "auto"}, None, "the type of the model"),
        ({"page_size": 6}, None, "the type of the model"),
    ],
)
def test_eight_bits_beside_quantised_weights_unless_a_type_is_named(
    settings: dict[str, Any], value: str | None, reason: str
) -> None:
    found, why = kv_type(**settings)
    assert why == reason and found != "int8" if value is None else (found, why) == (value, reason)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, "bfloat16"),
        ({"quantization": "int8"}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"kv_cache_dtype": "float32"}, "float32"),
    ],
)
def test_latents_lie_in_what_the_kernels_read(tmp_path: Path, settings: dict[str, Any], value: str) -> None:
    """Whatever the processor: on one without arithmetic of bfloat16 the model's own type is float32."""
    tiny_checkpoint("deepseek_v3", tmp_path)
    config = Config.from_flat({"max_total_tokens": 256, "disable_step_graph": True, **settings})
    built = worker.build(config, describe(str(tmp_path)), lambda name, seconds: None)
    assert built.info["kv_cache_dtype"] == value


@pytest.mark.parametrize(
    ("size", "page", "refused"), [(64, 16, False), (64, None, False), (6, 16, True), (64, 6, True)]
)
def test_an_int8_cache_takes_multiples_of_four(size: int, page: int | None, refused: bool) -> None:
    spec = AttentionSpec(0, 2, 1, size, 1.0)
    backend = Backend(native.table(2), [spec], CPU, torch.int8)
    declined = backend.decline(AttentionNeed([spec], torch.int8, CPU, page))
    assert ("multiples of 4" in declined) if refused and declined else (declined is None) == (not refused)


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["native", "reference"])
def test_steps_of_latents_are_recorded_where_the_table_reads_them(ops: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("deepseek_v3", tmp_path)
    settings = {"skip_tokenizer_init": True, "max_total_tokens": 256, "record_graphs_before_ready": True, "ops": ops}
    config = Config.from_flat({"model_path": str(path), **settings})
    built = worker.build(config, describe(str(path)), lambda name, seconds: None)
    assert isinstance(built.runner, ModelRunner)
    try:
        assert str(built.runner.pool.keys[0].dtype) == f"torch.{built.info['kv_cache_dtype']}"
        recorded = {way.decision: way.graphs.refused for way in built.runner.recorded}
        assert recorded == ({"step_graphs": None, "prefill_graph": None} if ops == "native" else {})
    finally:
        built.runner.close()
