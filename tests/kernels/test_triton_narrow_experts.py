"""Whole tiny models whose experts stay in 4 bits on the Triton table: as narrow as they come, and what they compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import packers
import pytest
import torch
from pools import pool_for
from triton_support import need_interpreter

from phloem.attention import begin
from phloem.attention import reference as reference_backend
from phloem.checkpoint.describe import describe
from phloem.core.memory import groups_of
from phloem.distributed.mesh import Mesh
from phloem.kernels.ops import Ops, PagedBatch
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.models import load_model
from phloem.quant import method_for
from phloem.testing.checkpoints import tiny_checkpoint

need_interpreter()
from phloem.attention import triton as backend_file  # noqa: E402
from phloem.kernels.triton import table  # noqa: E402
from phloem.kernels.triton.weights import Form, Int4Experts, Mxfp4Weight  # noqa: E402

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
}
QWEN: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
}
OSS: dict[str, Any] = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
TENSORS = {"quant_method": "compressed-tensors", "config_groups": {}}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
# The family, what packs, whether by name, what config.json says, the form that experts have.
KEPT: dict[str, tuple[str, Any, bool, dict[str, Any], type]] = {
    "gptq": ("qwen3_moe", packers.gptq, False, GPTQ, Int4Experts),
    "gptq, zero points": (
        "qwen3_moe", partial(packers.gptq, symmetric=False, group=64), False, {**GPTQ, "sym": False}, Int4Experts,
    ),
    "awq": ("qwen3_moe", packers.awq, False, {"quant_method": "awq", "bits": 4, "version": "gemm"}, Int4Experts),
    "packed": ("qwen3_moe", packers.packed_ints, False, {**TENSORS, "format": "pack-quantized"}, Int4Experts),
    "mxfp4": ("qwen3_moe", packers.mxfp4_matrix, False, {**TENSORS, "format": "mxfp4-pack-quantized"}, Mxfp4Weight),
    "gpt-oss": ("gpt_oss", packers.mxfp4_stack, True, MXFP4, Mxfp4Weight),
}  # fmt: skip


def made(name: str, target: Path) -> Path:
    pytest.importorskip("transformers")
    return tiny_checkpoint(name, target / "made", **SIZES, **(OSS if name == "gpt_oss" else QWEN))


def packed(case: str, target: Path) -> tuple[Path, Path]:
    name, pack, named, config, _ = KEPT[case]
    return packers.quantised(made(name, target), target, pack, config, named=named)


def loaded(path: Path, ops: Ops, quantization: str | None = None, **options: Any) -> tuple[Any, str]:
    """The model, and what the decision `weights` tells."""
    found = describe(str(path))
    method = method_for(quantization, found.stored)
    model = load_model(found, BuildContext(ops, torch.float32, CPU, quant=method, **options))
    told = "" if method is None or method.report is None else method.report.decision("float32")[1]
    return model, told


def stacks(model: Any) -> list[Any]:
    return [weight.value for weight in model.weights() if weight.experts]


def steps(vocab: int) -> list[tuple[PagedBatch, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A prefill of two rows, and a decode step of both."""
    pages, done, found = torch.tensor([[1, 2, 3], [4, 5, 6]]).int(), [0, 0], []
    generator = torch.Generator().manual_seed(1)
    for new in ([7, 15], [1, 1]):
        positions = torch.cat([torch.arange(done[row], done[row] + new[row]) for row in range(2)])
        rows = torch.repeat_interleave(torch.arange(2), torch.tensor(new))
        done = [done[row] + new[row] for row in range(2)]
        start = torch.tensor([0, *new]).cumsum(0).int()
        slots = pages[rows, positions // 8] * 8 + positions % 8
        batch = PagedBatch(start, torch.tensor(done).int(), pages, slots.int(), max(new), max(done))
        ids = torch.randint(0, vocab, (sum(new),), generator=generator)
        found.append((batch, ids, positions, start[1:].long() - 1))
    return found


def check_logits(ours: Any, theirs: Any, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models through both steps; no op of ours asks which expert has which token."""
    memory = theirs.memory
    want_pool, got_pool = (pool_for(memory, 8, 8, torch.float32, CPU) for _ in range(2))
    assert len(groups_of(memory)) >= 1
    plain = reference_backend.Backend(Ops(), theirs.attention_specs, CPU, torch.float32)
    backend = backend_file.Backend(table.table(), theirs.attention_specs, CPU, torch.float32)
    vocab = theirs.index.slots["model.embed_tokens.weight"][0][0].shapes[0][0]
    for batch, ids, positions, last in steps(vocab):
        groups = [batch] * len(groups_of(memory))
        want = theirs.head(theirs.forward(ForwardBatch(ids, positions, begin(plain, groups, want_pool), last)))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "nonzero", lambda *_, **__: pytest.fail("the device was waited for"))
            got = ours.head(ours.forward(ForwardBatch(ids, positions, begin(backend, groups, got_pool), last)))
        assert (got - want).norm() <= most * want.norm()
        assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("case", KEPT)
def test_experts_of_checkpoints_stay_in_4_bits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = packed(case, tmp_path)
    (ours, told), (theirs, _) = loaded(path, table.table()), loaded(plain, Ops())
    found, dense = stacks(ours), stacks(theirs)
    assert len(found) == 2 and all(type(value) is KEPT[case][4] for value in found)
    assert sum(value.nbytes for value in found) < 0.17 * sum(value.nbytes for value in dense)  # of float32
    assert "4-bit" in told and "unpacked" not in told
    wide, _ = loaded(path, Ops())
    for name in theirs.weight_names():
        torch.testing.assert_close(ours.get_weight(name), wide.get_weight(name), rtol=1e-6, atol=1e-9)
    check_logits(ours, theirs, 1e-3, monkeypatch)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_plain_experts_of_any_kind_do_not_wait(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(name, tmp_path)
    (ours, _), (theirs, _) = loaded(path, table.table()), loaded(path, Ops())
    check_logits(ours, theirs, 1e-4, monkeypatch)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method,form", [("int4", Int4Experts), ("mxfp4", Mxfp4Weight)])
def test_plain_experts_are_rounded_to_4_bits(
    method: str, form: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(name, tmp_path)
    (ours, _), (theirs, _) = loaded(path, table.table(), method), loaded(path, Ops(), method)
    assert len(stacks(ours)) == 2 and all(type(value) is form for value in stacks(ours))
    for tensor in theirs.weight_names():
        torch.testing.assert_close(ours.get_weight(tensor), theirs.get_weight(tensor), rtol=2e-3, atol=3e-4)
    check_logits(ours, theirs, 1e-2 if method == "int4" else 1e-3, monkeypatch)


@pytest.mark.parametrize("case,mesh", [("gptq", {"ep": 2}), ("gptq", {"tp": 2}), ("gpt-oss", {"ep": 2}),
                                       ("gpt-oss", {"tp": 2}), ("mxfp4", {"tp": 4})])  # fmt: skip
def test_ranks_keep_their_shares_in_4_bits(case: str, mesh: dict[str, int], tmp_path: Path) -> None:
    """What the ranks' experts make of rows, summed, is what one's make; a share that cuts groups is unpacked, and the
    decision says so."""
    path, plain = packed(case, tmp_path)
    theirs, _ = loaded(plain, Ops())
    size = max(mesh.values())
    ranks = [loaded(path, table.table(), mesh=Mesh.of(rank, tp=size, ep=mesh.get("ep", 1))) for rank in range(size)]
    cut = mesh == {"tp": 4}  # 64 columns of the second product among 4 ranks
    for model, told in ranks:
        kinds = [isinstance(value, Form) for value in stacks(model)]
        assert kinds == [True, not cut] and ("do not end where" in told) == cut
    for tokens in (3, 21):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
        want = theirs.layers[0].mlp(None, x, None, add=False)[0]
        got = torch.stack([model.layers[0].mlp(None, x, None, add=False)[0] for model, _ in ranks]).sum(0)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["int4", "mxfp4"])
def test_new_values_are_put_into_the_memory_of_rounded_experts(method: str, tmp_path: Path) -> None:
    path = made("qwen3_moe", tmp_path)
    model, _ = loaded(path, table.table(), method)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    beside = name.replace("experts.2", "experts.1")
    before, places = model.get_weight(beside), [t.data_ptr() for one in stacks(model) for t in one.tensors()]
    new = torch.randn(model.get_weight(name).shape, generator=torch.Generator().manual_seed(3)) / 8
    model.update_weights([(name, new)])
    assert [t.data_ptr() for one in stacks(model) for t in one.tensors()] == places
    assert 0 < (model.get_weight(name) - new).norm() < 0.15 * new.norm()
    assert (model.get_weight(beside) - before).norm() < 0.08 * before.norm()


def test_other_values_of_stored_experts_take_another_form(tmp_path: Path) -> None:
    model, _ = loaded(packed("gpt-oss", tmp_path)[0], table.table())
    name = "model.layers.0.mlp.experts.down_proj"
    new = torch.randn(model.get_weight(name).shape)
    assert model.update_weights([(name, new)]) and torch.equal(model.get_weight(name), new)
    assert [isinstance(value, Form) for value in stacks(model)] == [True, False]
