"""GGUF files of recurrent and other odd families: hostile metadata, ranks' shares, packed matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, Engine

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.distributed.mesh import Mesh
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.testing.checkpoints import tiny_gguf

CPU = torch.device("cpu")


def without(source: Path, target: Path, key: str = "", tensor: str = "") -> Path:
    """A file that lacks a key, or whose layers lack a tensor."""
    import gguf

    add, write = gguf.GGUFWriter.add_tensor, gguf.GGUFWriter.write_header_to_file

    def fewer(writer: Any, name: str, values: Any, **rest: Any) -> None:
        if not tensor or not name.endswith(tensor):
            add(writer, name, values, **rest)

    def shorter(writer: Any) -> None:
        for part in writer.kv_data:
            part.pop(key, None)
        write(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", fewer)
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", shorter)
        return tiny_gguf(source, target)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("mamba", "mamba.ssm.inner_size", 0, r"mamba.ssm.inner_size is 0, expected 1 to"),
        ("mamba", "mamba.ssm.state_size", 2**31, r"mamba.ssm.state_size is 2147483648, expected 1 to"),
        ("mamba", "mamba.ssm.time_step_rank", "auto", r"mamba.ssm.time_step_rank is 'auto', expected a number"),
        ("mamba", "mamba.ssm.conv_kernel", 2.5, r"mamba.ssm.conv_kernel is 2.5, expected a whole number"),
        ("mamba", "mamba.attention.layer_norm_rms_epsilon", "small", "layer_norm_rms_epsilon is 'small', expected"),
        ("mamba", "mamba.block_count", 2**31, r"mamba.block_count is 2147483648, expected"),
        ("mamba", "mamba.embedding_length", 0, "mamba.embedding_length is 0, expected"),
        ("mamba2", "mamba2.ssm.time_step_rank", 5, "inner_size 64 is not a multiple of .*time_step_rank 5"),
        ("mamba2", "mamba2.ssm.group_count", 3, r"3 groups .* 8 heads"),
        ("falcon_h1", "falcon-h1.attention.head_count", 0, "head_count is 0, expected a whole number from 1"),
        ("nemotron_h", "nemotron_h_moe.expert_used_count", 9, "num_experts_per_tok: 9 of 8 experts"),
        ("gemma3n_text", "gemma3n.altup.active_idx", 4, "altup_active_idx is 4, but there are 4 streams"),
        ("gemma3n_text", "gemma3n.altup.num_inputs", 5, r"altup_proj.weight is \[3, 32, 32\], expected 4 stacked"),
        ("gemma3n_text", "gemma3n.attention.shared_kv_layers", 5, "num_kv_shared_layers 5: no layer before them"),
        ("gemma3n_text", "gemma3n.activation_sparsity_scale", [1.0, 2.0], "has 2 numbers for 5 layers"),
        ("gemma3n_text", "gemma3n.activation_sparsity_scale", ["a"] * 5, "holds 'a', expected numbers"),
        ("llama4_text", "llama4.expert_count", 4, r"ffn_gate_exps.weight is \[5, 24, 32\], expected 4 stacked"),
        ("gemma3n_text", "gemma3n.activation_sparsity_scale", float("inf"), "activation_sparsity_scale holds inf"),
        ("granitemoehybrid", "granitehybrid.residual_scale", 0.0, "residual_scale is 0.0, expected more than 0"),
        ("granitemoehybrid", "granitehybrid.logit_scale", 0.0, "logit_scale is 0.0, expected more than 0"),
        ("nemotron_h", "nemotron_h_moe.feed_forward_length", 0, "nothing says how wide"),
        ("nemotron_h", "nemotron_h_moe.expert_group_count", 3, "n_group: 3 groups of 8 experts"),
        ("gemma3n_text", "gemma3n.attention.layer_norm_rms_epsilon", 0.0, "epsilon is 0.0, expected a number above 0"),
        ("lfm2_moe", "lfm2moe.expert_weights_scale", [1, 2], "expert_weights_scale differs from layer to layer"),
        ("gemma3n_text", "gemma3n.altup.active_idx", 1.5, "altup.active_idx is 1.5, expected a whole number"),
        (
            "gpt_neox",
            "gptneox.attention.value_length",
            [[1], [2]],
            r"gptneox.attention.value_length = \[array",
        ),
        (
            "gpt_neox",
            "tokenizer.ggml.bos_token_id",
            "first",
            "tokenizer.ggml.bos_token_id is 'first', expected",
        ),
        ("gpt_neox", "tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens is .*, expected texts"),
        ("gpt_neox", "tokenizer.ggml.bos_token_id", -1.0, "bos_token_id is -1.0, expected a token id"),
        ("deepseek_v3", "deepseek2.attention.key_length_mla", "x", "key_length_mla is 'x', expected a whole number"),
        ("deepseek_v3", "deepseek2.attention.value_length_mla", [1, 2], "value_length_mla differs from layer to layer"),
        ("gpt_neox", "tokenizer.ggml.tokens", 1, "tokenizer.ggml.tokens is 1, expected texts"),
        ("gpt_neox", "gptneox.rope.dimension_count", "all", "gptneox.rope.dimension_count is 'all', expected a number"),
        ("gpt_neox", "gptneox.rope.dimension_count", 7, "gptneox.rope.dimension_count is 7, but a head has 16"),
    ],
)
def test_numbers_that_fit_no_model_are_named(
    name: str, key: str, value: Any, said: str, made: Any, tmp_path: Path
) -> None:
    file = tiny_gguf(made(name)[0], tmp_path / "tiny.gguf", **{key.replace(".", "__"): value})
    with pytest.raises(ModelLoadError, match=said):
        Engine(file)


@pytest.mark.parametrize(
    ("name", "key", "tensor", "said"),
    [
        ("mamba", "mamba.ssm.inner_size", "", "its metadata has no mamba.ssm.inner_size"),
        ("mamba2", "mamba2.ssm.group_count", "", "its metadata has no mamba2.ssm.group_count"),
        ("granitemoehybrid", "granitehybrid.embedding_scale", "", "its metadata has no granitehybrid.embedding_scale"),
        ("gemma3n_text", "gemma3n.activation_sparsity_scale", "", "no gemma3n.activation_sparsity_scale"),
        ("gemma3n_text", "", "laurel_l.weight", "has no tensor blk.0.laurel_l.weight"),
        ("granitemoehybrid", "", "ssm_in.weight", r"layer 0 has none of blk.0.\{ssm_in.weight, attn_q.weight\}"),
        ("jamba", "", "ssm_a", "model.layers.0.mamba.A_log"),
    ],
)
def test_what_is_not_there_is_named(name: str, key: str, tensor: str, said: str, made: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=said):
        Engine(without(made(name)[0], tmp_path / "tiny.gguf", key, tensor))


def test_a_table_of_decays_in_another_order_is_refused(made: Any, tmp_path: Path) -> None:
    import gguf

    add = gguf.GGUFWriter.add_tensor

    def turned(writer: Any, name: str, values: Any, **rest: Any) -> None:
        add(writer, name, values.T.copy() if name.endswith("ssm_a") else values, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", turned)
        file = tiny_gguf(made("mamba")[0], tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match="A_log"):
        Engine(file)


def test_a_decay_that_grows_is_refused(made: Any, tmp_path: Path) -> None:
    import gguf

    add = gguf.GGUFWriter.add_tensor

    def grown(writer: Any, name: str, values: Any, **rest: Any) -> None:
        add(writer, name, abs(values) if name.endswith("ssm_a") else values, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", grown)
        file = tiny_gguf(made("mamba")[0], tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"blk.0.ssm_a holds a decay that is not negative"):
        Engine(file)


def test_norms_of_groups_in_other_axes_are_refused(made: Any, tmp_path: Path) -> None:
    import gguf

    add = gguf.GGUFWriter.add_tensor

    def turned(writer: Any, name: str, values: Any, **rest: Any) -> None:
        add(writer, name, values.T.copy() if name.endswith("ssm_norm.weight") else values, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", turned)
        file = tiny_gguf(made("mamba2", n_groups=2)[0], tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"mixer.norm.weight"):
        Engine(file)


@pytest.mark.parametrize(
    ("count", "said"),
    [(4, "nextn_predict_layers is 4, but there are 4 layers"), (2, r"layer 2 of 4 has no tensor blk.2.nextn.\*")],
)
def test_layers_that_answer_are_not_taken_for_layers_that_draft(
    count: int, said: str, made: Any, tmp_path: Path
) -> None:
    file = tiny_gguf(made("glm4_moe")[0], tmp_path / "tiny.gguf", glm4moe__nextn_predict_layers=count)
    with pytest.raises(ModelLoadError, match=said):
        describe(str(file))


def test_value_heads_in_another_order_stay_on_one_rank(made: Any, tmp_path: Path) -> None:
    file = tiny_gguf(made("qwen3_5_text")[0], tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match="value heads of this GGUF file are in an order that cannot be shared out"):
        load_model(describe(str(file)), BuildContext(Ops(), torch.float32, CPU, mesh=Mesh.of(0, tp=2)))


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.5], "has 1 numbers for 3 layers"), (["a"] * 3, "holds 'a'"), (None, "has no xielu.alpha_p")],
)
def test_numbers_of_an_activation_that_are_not_there_are_named(
    values: Any, said: str, made: Any, tmp_path: Path
) -> None:
    from phloem.testing import checkpoints

    def write(writer: Any, tensors: Any, config: Any) -> Any:
        del config
        for key in ("alpha_n", "beta", "eps") + ("alpha_p",) * (values is not None):
            writer.add_array(f"xielu.{key}", values if key == "alpha_p" else [0.5] * 3)
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "write_numbers", write)
        file = tiny_gguf(made("apertus")[0], tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=said):
        Engine(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jamba", "falcon_h1-gate", "granitemoehybrid-still", "nemotron_h", "gpt_neox"])
def test_shares_are_slices_of_the_whole(name: str, made: Any, tmp_path: Path) -> None:
    overrides = {"mamba_n_groups": 2} if name == "falcon_h1-gate" else {}
    file = tiny_gguf(made(name, **overrides)[0], tmp_path / "tiny.gguf")
    models: list[Any] = [
        load_model(describe(str(file)), BuildContext(Ops(), torch.float32, CPU, mesh=mesh))
        for mesh in (Mesh(), Mesh.of(0, tp=2), Mesh.of(1, tp=2))
    ]
    by_name = {name: (weight, n) for weight in models[0].weights() for n, name in enumerate(weight.names)}
    for model in models[1:]:
        for share in model.weights():
            if share.role == "matrix" or len(share.names) > 1:
                continue
            weight, number = by_name[share.names[0]]
            spans = tuple(slice(*span) for span in share.spans(0))
            torch.testing.assert_close(share.value, weight.value[weight.rows(number)][spans], atol=0, rtol=0)


@pytest.mark.slow
def test_matrices_stay_packed(made: Any, tmp_path: Path) -> None:
    """Of a hybrid in 8 bits, whose scans and filters are plain."""
    path, theirs = made("falcon_h1", hidden_size=64, mamba_d_ssm=96, intermediate_size=64)
    ours = Engine(tiny_gguf(path, tmp_path / "tiny.gguf", "Q8_0")).whole(PROMPT)
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.05
