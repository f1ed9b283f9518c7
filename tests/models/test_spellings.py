"""Checkpoints whose settings are spelled twice, or in the old way, answer as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, Engine, close, edited, reference

from phloem.checkpoint.describe import describe
from phloem.testing.checkpoints import families

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"type": "linear", "factor": 4.0}


def check(made: Any, tmp_path: Path, family: str, change: dict[str, Any], differs: bool = True) -> None:
    """Ours of an edited checkpoint are transformers' of the same files, and not those of the unedited one."""
    path, plain = made(family)
    changed = edited(path, tmp_path / "x", **change)
    theirs = reference(changed, PROMPT)
    assert ((theirs - plain).abs().max() > 0.01) == differs
    close(Engine(changed).whole(PROMPT), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("scaling", [YARN, LINEAR, {**YARN, "beta_fast": 8, "attention_factor": 0.9}])
def test_scaling_added_by_hand(made: Any, tmp_path: Path, family: str, scaling: dict[str, Any]) -> None:
    assert "rope_parameters" in json.loads((made(family)[0] / "config.json").read_text())
    check(made, tmp_path, family, {"rope_scaling": scaling})


@pytest.mark.some(22)
@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in families() if name not in ("phi3", "phimoe")])  # LongRoPE alone
def test_scaling_added_by_hand_to_any_family(made: Any, tmp_path: Path, family: str) -> None:
    config = json.loads((made(family)[0] / "config.json").read_text())
    rope = config.get("text_config", config).get("rope_parameters") or {}
    if rope.get("rope_type") != "default":
        pytest.skip("no plain rotation to which one adds a scaling")
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section") if key in rope}
    change: dict[str, Any] = {"rope_scaling": {**LINEAR, **kept}}
    if "text_config" in config:
        change = {"text_config": {**config["text_config"], **change}}
    check(made, tmp_path, family, change)


@pytest.mark.slow
def test_scaling_added_to_a_model_with_two_rotations(made: Any, tmp_path: Path) -> None:
    check(made, tmp_path, "gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})


def test_scaling_that_replaces_another(made: Any, tmp_path: Path) -> None:
    check(made, tmp_path, "gpt_oss", {"rope_scaling": {**YARN, "rope_theta": 150000.0, "truncate": False}})


def test_the_old_spelling_alone(made: Any, tmp_path: Path) -> None:
    old = {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": YARN, "dtype": None, "torch_dtype": "float16"}
    check(made, tmp_path, "llama", old)
    assert describe(str(tmp_path / "x")).config["dtype"] == "float16"


def test_a_base_inside_counts_before_one_at_the_top(made: Any, tmp_path: Path) -> None:
    inside = {"rope_type": "default", "rope_theta": 700.0}
    check(made, tmp_path, "llama", {"rope_theta": 1e6, "rope_parameters": inside})


def test_a_trained_length_beside_the_scaling(made: Any, tmp_path: Path) -> None:
    check(made, tmp_path, "llama", {"rope_scaling": YARN, "original_max_position_embeddings": 64})


def test_a_family_has_its_own_base_where_none_is_said(made: Any, tmp_path: Path) -> None:
    check(made, tmp_path, "mixtral", {"rope_parameters": None}, differs=False)


def test_the_first_name_of_long_rotations(made: Any, tmp_path: Path) -> None:
    path, theirs = made("phi3-long")
    rope = json.loads((path / "config.json").read_text())["rope_parameters"]
    old = {"rope_parameters": None, "rope_scaling": {**rope, "rope_type": None, "type": "su"}}
    close(Engine(edited(path, tmp_path / "x", **old)).whole(PROMPT), theirs)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_either_name_of_the_number_of_experts(made: Any, tmp_path: Path, family: str) -> None:
    path, theirs = made(family)
    config = json.loads((path / "config.json").read_text())
    count = config.get("num_experts") or config["num_local_experts"]
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        one = edited(path, tmp_path / name, **{name: count, other: None})
        assert torch.equal(Engine(one).whole(PROMPT), Engine(path).whole(PROMPT))
    close(Engine(path).whole(PROMPT), theirs)
