"""Settings that a config.json may spell in two ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phloem.checkpoint.spelling import one_spelling, text_part
from phloem.core.errors import ModelLoadError

PATH = Path("config.json")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def settle(config: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    return one_spelling(text_part(config), defaults, PATH)


def test_rope_scaling_takes_the_place_of_rope_parameters() -> None:
    given = {"rope_type": "default", "rope_theta": 10000.0}
    assert settle({"rope_parameters": given, "rope_scaling": YARN}) == {"rope_parameters": YARN}
    assert settle({"rope_parameters": given, "rope_scaling": None}) == {"rope_parameters": given}
    assert settle({"rope_parameters": given, "rope_scaling": {}}) == {"rope_parameters": given}


def test_the_old_name_of_a_type_is_known() -> None:
    assert settle({"rope_scaling": {"type": "linear", "factor": 2.0}})["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 2.0,
    }


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 500000.0), ("partial_rotary_factor", 0.5)])
def test_a_base_that_would_be_lost_is_refused_with_both_names(key: str, value: float) -> None:
    config: dict[str, Any] = {"rope_parameters": {"rope_type": "default", key: value}, "rope_scaling": YARN}
    with pytest.raises(ModelLoadError, match=f"rope_scaling takes .* rope_parameters, whose {key} is {value}"):
        settle(config)
    # Whoever says it where it counts is heard.
    assert settle({**config, key: value})["rope_parameters"] == YARN
    assert settle({**config, "rope_scaling": {**YARN, key: value}})["rope_parameters"] == {**YARN, key: value}
    assert settle(config, **{key: value})["rope_parameters"] == YARN


def test_scaling_of_a_model_with_two_rotations_is_that_of_its_global_layers() -> None:
    local, whole = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e6}
    given = {"sliding_attention": local, "full_attention": whole}
    found = settle({"rope_parameters": given, "rope_scaling": {"type": "linear", "factor": 8.0}})["rope_parameters"]
    assert found == {
        "sliding_attention": local,
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }


def test_the_trained_length_beside_a_scaling_counts_before_the_one_inside() -> None:
    found = settle({"rope_scaling": YARN, "original_max_position_embeddings": 64})["rope_parameters"]
    assert found["original_max_position_embeddings"] == 64


def test_dtype_counts_before_torch_dtype(caplog: pytest.LogCaptureFixture) -> None:
    assert settle({"torch_dtype": "float16"})["dtype"] == "float16"
    assert settle({"dtype": None, "torch_dtype": "float16"})["dtype"] == "float16"
    assert not caplog.records
    assert settle({"dtype": "bfloat16", "torch_dtype": "float16"}) == {"dtype": "bfloat16"}
    assert "torch_dtype is float16 and dtype is bfloat16, which counts" in caplog.text


def test_a_base_at_the_top_and_another_inside_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = settle({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert found["rope_parameters"]["rope_theta"] == 1e4
    assert "rope_theta is 1000000.0 and rope_theta of rope_parameters is 10000.0, which counts" in caplog.text


@pytest.mark.parametrize(
    ("first", "second"), [("num_local_experts", "num_experts"), ("num_experts_per_tok", "experts_per_token")]
)
def test_two_names_of_one_number_must_agree(first: str, second: str) -> None:
    for config in ({first: 4}, {second: 4}, {first: 4, second: 4}):
        assert settle(config) == {first: 4, second: 4}
    with pytest.raises(ModelLoadError, match=f"{first} is 4 and {second} is 8, but they are one setting"):
        settle({first: 4, second: 8})


def test_the_text_part_counts_however_it_is_spelled() -> None:
    whole = {"dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "vocab_size": 8}
    text = {"torch_dtype": "bfloat16", "rope_scaling": YARN, "rope_theta": 1e6}
    found = settle({**whole, "text_config": text})
    assert found["dtype"] == "bfloat16"
    assert (found["rope_parameters"], found["rope_theta"], found["vocab_size"]) == (YARN, 1e6, 8)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="rope_scaling is 'yarn', expected an object"):
        settle({"rope_scaling": "yarn"})
