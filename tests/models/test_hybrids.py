"""Models with recurrent layers through the whole engine: greedy tokens are those of transformers, on a prefix hit too,
beside others, in chunks, and where a conversation goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, their_greedy
from native_support import built

from phloem import Engine
from phloem.checkpoint.families import family
from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import build_model
from phloem.models._per_layer import sources
from phloem.models.glm_moe_dsa import borrowing
from phloem.models.granitemoehybrid import attends as granite_attends
from phloem.models.kimi_linear import attends as kimi_attends
from phloem.models.nemotron_h import kinds
from phloem.models.qwen3_next import attends
from phloem.testing.checkpoints import tiny_checkpoint

SERVED = [
    "lfm2",
    "lfm2_moe",
    "qwen3_next",
    "kimi_linear",
    "qwen3_5_text",
    "nemotron_h",
    "mamba2",
    "falcon_h1",
    "jamba",
    "falcon_mamba",
]
COUNT = 24
TABLES = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not built(), reason="the native library is not built")),
]


def settings(path: Path, ops: str, **more: Any) -> dict[str, Any]:
    base = {"dtype": "float32", "max_total_tokens": 1024, "chunked_prefill_size": 16, "page_size": 4}
    return {"model_path": str(path), "ops": ops, "debug_invariants": True, **base, **more}


@pytest.mark.some(6)
@pytest.mark.slow
@pytest.mark.parametrize("ops", TABLES)
@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_transformers(name: str, ops: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(name, tmp_path)
    long = PROMPT * 2
    wanted = their_greedy(path, long, COUNT)
    sampling = {"max_new_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    with Engine(**settings(path, ops)) as engine:
        first: Any = engine.generate(input_ids=long, sampling_params=sampling)
        again: Any = engine.generate(input_ids=[long, long[:9], long], sampling_params=sampling)
        # A conversation goes on from the state at its end.
        turn = [*long, *first["output_ids"], 7, 8, 9]
        after: Any = engine.generate(input_ids=turn, sampling_params=sampling)
    assert first["output_ids"] == wanted
    assert again[0]["output_ids"] == again[2]["output_ids"] == wanted
    assert again[0]["meta_info"]["cached_tokens"] >= 16
    assert after["meta_info"]["cached_tokens"] >= len(long)
    assert after["output_ids"] == their_greedy(path, turn, COUNT)


def test_layers_that_are_not_known_are_refused_by_name() -> None:
    assert kinds({"hybrid_override_pattern": "ME*-"}) == ["linear_attention", "moe", "full_attention", "mlp"]
    with pytest.raises(ModelLoadError, match="unknown: X"):
        kinds({"hybrid_override_pattern": "MX"})
    assert borrowing({"num_hidden_layers": 4, "index_topk_pattern": "FSSF"}) == [False, True, True, False]
    older = {"num_hidden_layers": 6, "index_topk_freq": 2, "index_skip_topk_offset": 2}
    assert borrowing(older) == [False, False, True, False, True, False]
    with pytest.raises(ModelLoadError, match=r"unknown: .*X"):
        borrowing({"num_hidden_layers": 2, "index_topk_pattern": "FX"})
    with pytest.raises(ModelLoadError, match="2 entries for 3 layers"):
        granite_attends({"num_hidden_layers": 3, "layer_types": ["mamba", "attention"]})
    with pytest.raises(ModelLoadError, match="no layer before them is of kind 'full'"):
        sources(["near", "near", "full"], 1)
    assert sources(["near", "full", "near", "full", "near"], 2) == [None, None, None, 1, 2]
    counted = {"full_attn_layers": [3], "kda_layers": [1, 2]}  # from 1
    assert kimi_attends({"num_hidden_layers": 3, "linear_attn_config": counted}) == [False, False, True]
    with pytest.raises(ModelLoadError, match="layers 1 to 4 once"):
        kimi_attends({"num_hidden_layers": 4, "linear_attn_config": counted})
    with pytest.raises(ModelLoadError, match="sliding"):
        attends({"layer_types": ["sliding"], "num_hidden_layers": 1, "full_attention_interval": 4})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": 5}, "layer_types is 5: expected a list"),
        ({"layer_types": [{}, {}, {}]}, "layer_types: 3 entries, expected 3; unknown"),
        ({"layer_types": None, "linear_attn_config": [1]}, r"linear_attn_config is \[1\]: expected an object"),
        (
            {"layer_types": None, "linear_attn_config": {"kda_layers": "13", "full_attn_layers": [2]}},
            "kda_layers '13': no lists",
        ),
        ({"linear_attn_config": {"num_heads": "4"}}, r"linear_attn_config\.num_heads is '4': expected a whole number"),
        ({"linear_num_heads": -4}, "linear_num_heads is -4: expected a whole number"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types: 1 entries, expected 3"),
        ({"first_k_dense_replace": "x"}, "first_k_dense_replace 'x'"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing or null, which kimi_linear needs"),
    ],
)
def test_settings_of_kimi_linear_that_are_wrong_or_missing_are_named(change: dict[str, Any], said: str) -> None:
    facts = family("kimi_linear")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "vocab_size": 384,
        "hidden_act": "silu",
    }
    more = {"num_attention_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    changed = {**facts.defaults, **(facts.tiny or {}), **sizes, **more, **change}
    config = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(ModelLoadError, match=said):
        build_model("kimi_linear", config, BuildContext(Ops(), torch.float32, torch.device("meta")), 64)
