"""Metadata of GGUF files that changes answers: read as transformers reads its own spelling of it, or refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from model_support import PROMPT, Engine, close, edited, reference

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.testing.checkpoints import tiny_gguf

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_KEYS = {
    "llama__rope__scaling__type": "yarn",
    "llama__rope__scaling__factor": 4.0,
    "llama__rope__scaling__original_context_length": 16,
}


def check(made: Any, tmp_path: Path, keys: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    path, plain = made("llama")
    theirs = plain if scaling is None else reference(edited(path, tmp_path / "hf", rope_scaling=scaling), PROMPT)
    assert ((theirs - plain).abs().max() > 0.01) == (scaling is not None)
    close(Engine(tiny_gguf(path, tmp_path / "tiny.gguf", **keys)).whole(PROMPT), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"llama__rope__scale_linear": 4.0},
        {"llama__rope__scaling__factor": 4.0},
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
        {"llama__rope__scaling__factor": 4.0, "llama__rope__scale_linear": 2.0},
    ],
)
def test_linear_scaling_is_read_however_it_is_written(made: Any, tmp_path: Path, keys: dict[str, Any]) -> None:
    check(made, tmp_path, keys, {"rope_type": "linear", "factor": 4.0})


@pytest.mark.parametrize(
    "keys",
    [
        {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
        {"llama__rope__scaling__type": "linear"},
        {"llama__rope__scale_linear": 0.0, "llama__rope__scaling__finetuned": True},
        {"llama__rope__dimension_count": 16, "llama__attention__value_length_swa": 16, "llama__vocab_size": 384},
        {"llama__expert_count": 0, "llama__logit_scale": 1.0, "llama__attention__causal": True},
        {"llama__attention__scale": 0.25, "llama__attention__sliding_window": 512, "llama__note": "by hand"},
    ],
)
def test_keys_that_ask_for_nothing_change_nothing(made: Any, tmp_path: Path, keys: dict[str, Any]) -> None:
    check(made, tmp_path, keys, None)


def test_yarn_is_read_with_all_its_numbers(made: Any, tmp_path: Path) -> None:
    """The file's factor on attention comes on top of the one that follows from the scaling."""
    more = {
        "llama__rope__scaling__attn_factor": 0.8,
        "llama__rope__scaling__yarn_beta_fast": 8.0,
        "llama__rope__scaling__yarn_beta_slow": 2.0,
        "llama__rope__scaling__yarn_ext_factor": 1.0,
    }
    attention = 0.8 * (0.1 * math.log(4.0) + 1.0)
    scaling = {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": attention}
    check(made, tmp_path, {**YARN_KEYS, **more}, scaling)


def test_a_plain_yarn(made: Any, tmp_path: Path) -> None:
    check(made, tmp_path, YARN_KEYS, YARN)


def with_divisors(made: Any, target: Path, value: float, **keys: Any) -> Path:
    import gguf
    import numpy as np

    write = gguf.GGUFWriter.write_header_to_file

    def more(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.full(8, value, np.float32))
        write(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", more)
        return tiny_gguf(made("llama")[0], target, **keys)


def test_divisors_and_a_factor_multiply(made: Any, tmp_path: Path) -> None:
    file = with_divisors(made, tmp_path / "tiny.gguf", 2.0, llama__rope__scale_linear=2.0)
    theirs = reference(edited(made("llama")[0], tmp_path / "hf", rope_scaling={"type": "linear", "factor": 4}), PROMPT)
    close(Engine(file).whole(PROMPT), theirs)
    with pytest.raises(ModelLoadError, match=r"rope_freqs.weight beside llama.rope.scaling.type 'yarn'"):
        describe(str(with_divisors(made, tmp_path / "yarn.gguf", 2.0, **YARN_KEYS)))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rope__scaling__type", "longrope", "llama.rope.scaling.type 'longrope' is not known"),
        ("rope__scaling__attn_factor", 1.5, "llama.rope.scaling.attn_factor 1.5 is not supported beside"),
        ("rope__scaling__yarn_ext_factor", 1.0, "llama.rope.scaling.yarn_ext_factor 1.0 is not supported beside"),
        ("rope__scaling__yarn_log_multiplier", 0.5, r"asks for .* llama.rope.scaling.yarn_log_multiplier = 0.5"),
        ("rope__scaling__alpha", 8.0, "llama.rope.scaling.alpha = 8.0"),
        ("rope__dimension_count", 8, "llama.rope.dimension_count is 8, but a head has 16"),
        ("rope__dimension_sections", [4, 2, 2, 0], "llama.rope.dimension_sections = "),
        ("rope__new_idea", "spiral", "llama.rope.new_idea = spiral"),
        ("attention__value_length_swa", 8, "llama.attention.value_length_swa = 8"),
        ("attention__sliding_window", 8, "llama.attention.sliding_window = 8"),
        ("attention__scale", 0.5, "llama.attention.scale = 0.5"),
        ("attention__causal", False, "llama.attention.causal = False"),
        ("attention__clamp_kqv", 8.0, "llama.attention.clamp_kqv = 8.0"),
        ("attention__max_alibi_bias", 8.0, "llama.attention.max_alibi_bias = 8.0"),
        ("logit_scale", 0.5, "llama.logit_scale = 0.5"),
        ("embedding_scale", 12.0, "llama.embedding_scale = 12.0"),
        ("final_logit_softcapping", 30.0, "llama.final_logit_softcapping = 30.0"),
        ("expert_count", 8, "has no llama.expert_used_count"),
        ("nextn_predict_layers", 1, "llama.nextn_predict_layers = 1"),
        ("use_parallel_residual", True, "llama.use_parallel_residual = True"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(made: Any, tmp_path: Path, key: str, value: Any, said: str) -> None:
    file = tiny_gguf(made("llama")[0], tmp_path / "tiny.gguf", **{f"llama__{key}": value})
    with pytest.raises(ModelLoadError, match=said):
        describe(str(file))


def test_a_share_of_each_head_may_turn_where_halves_are_paired(made: Any, tmp_path: Path) -> None:
    file = tiny_gguf(made("qwen3")[0], tmp_path / "tiny.gguf", qwen3__rope__dimension_count=10)
    model = Engine(file).model
    assert model.layers[0].mixer.rope.spec.rotary_size == 10


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [3, [True, True, False, True, True, False, True]])
def test_the_pattern_of_windows_is_read(made: Any, tmp_path: Path, pattern: Any) -> None:
    path, plain = made("gemma3_text", query_pre_attn_scalar=16)
    types = ["full_attention" if n % 3 == 2 else "sliding_attention" for n in range(7)]
    theirs = reference(edited(path, tmp_path / "hf", layer_types=types), PROMPT)
    assert (theirs - plain).abs().max() > 0.01
    file = tiny_gguf(path, tmp_path / "tiny.gguf", gemma3__attention__sliding_window_pattern=pattern)
    close(Engine(file).whole(PROMPT), theirs)


def test_soft_caps_are_read(made: Any, tmp_path: Path) -> None:
    path, theirs = made("gemma3_text-caps", query_pre_attn_scalar=16)
    keys = {"gemma3__attn_logit_softcapping": 3.0, "gemma3__final_logit_softcapping": 2.0}
    close(Engine(tiny_gguf(path, tmp_path / "tiny.gguf", **keys)).whole(PROMPT), theirs)


def test_biases_of_the_mlp_are_found_by_their_tensors(made: Any, tmp_path: Path) -> None:
    path, theirs = made("llama-bias")
    file = tiny_gguf(path, tmp_path / "tiny.gguf")
    assert describe(str(file)).config["mlp_bias"] is True
    close(Engine(file).whole(PROMPT), theirs)


def test_more_experts_than_any_model_has_are_refused_before_each_gets_its_names(made: Any, tmp_path: Path) -> None:
    counts: dict[str, Any] = {"llama__expert_count": 20_000, "llama__expert_used_count": 2}
    file = tiny_gguf(made("llama")[0], tmp_path / "tiny.gguf", **counts)
    with pytest.raises(ModelLoadError, match="num_local_experts is 20000, expected at most 10000"):
        Engine(file)
