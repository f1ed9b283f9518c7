"""Quantised checkpoints on the Triton table stay as narrow as they come, and compute what their values stand for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import packers
import pytest
import torch
from pools import pool_of
from triton_support import need_interpreter

from phloem.attention import Memory, begin
from phloem.attention.reference import TableStep
from phloem.checkpoint.describe import describe
from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.kernels import reference_formats as formats
from phloem.kernels.ops import Adapters, Ops, PagedBatch
from phloem.kernels.specs import ExpertSpec
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.models import load_model
from phloem.models._sources import GGUFSource
from phloem.quant import Report, method_for
from phloem.quant._source import View
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

need_interpreter()
from phloem.attention import triton as backend_file  # noqa: E402
from phloem.kernels.triton import gemm_gguf, table  # noqa: E402
from phloem.kernels.triton.weights import Float8Blocks, Float8Rows, GroupedWeight, Int4Weight, widened  # noqa: E402

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 4},
}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
TENSORS = {"quant_method": "compressed-tensors", "config_groups": {}}
INTS = {**TENSORS, "format": "pack-quantized"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
# What packs, what config.json says, and the form that comes of it.
KEPT: dict[str, tuple[Any, dict[str, Any], type]] = {
    "blocks": (partial(packers.float8, by="block", scale_name="weight_scale_inv"), BLOCKS, Float8Blocks),
    "matrices": (partial(packers.float8, by="tensor"), {"quant_method": "modelopt", "quant_algo": "FP8"}, Float8Rows),
    "rows": (partial(packers.float8, by="row"), {**TENSORS, "format": "float-quantized"}, Float8Rows),
    "rows of fbgemm": (partial(packers.float8, by="row"), {"quant_method": "fbgemm_fp8"}, Float8Rows),
    "awq": (packers.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, Int4Weight),
    "gptq": (packers.gptq, GPTQ, Int4Weight),
    "gptq with zero points": (partial(packers.gptq, symmetric=False, group=64), {**GPTQ, "sym": False}, Int4Weight),
    "packed": (partial(packers.packed_ints, group=128), INTS, Int4Weight),
    "packed, 3 bits": (partial(packers.packed_ints, bits=3), INTS, Int4Weight),
    "packed, zero points, rows": (partial(packers.packed_ints, symmetric=False, group=0), INTS, Int4Weight),
    "packed, 5 bits": (partial(packers.packed_ints, bits=5), INTS, GroupedWeight),
    "gptq, 8 bits": (partial(packers.gptq, bits=8, symmetric=False, group=128), {**GPTQ, "bits": 8}, GroupedWeight),
    "int8 rows": (packers.int8_rows, {**TENSORS, "format": "int-quantized"}, GroupedWeight),
}
FLOAT8 = (Float8Rows, Float8Blocks)


@pytest.fixture(autouse=True)
def large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a program of few rows as for one of many."""
    monkeypatch.setattr(gemm_gguf, "_blocks", lambda x: (256, 4, 4))
    monkeypatch.setattr(gemm_gguf, "_ROWS", 256)


def loaded(path: Path, ops: Ops, quantization: str | None = None, device: torch.device = CPU) -> Any:
    found = describe(str(path))
    method = method_for(quantization, found.stored)
    return load_model(found, BuildContext(ops, torch.float32, device, quant=method))


def matrices(model: Any) -> dict[str, Any]:
    """Values of the linear layers by the name of the first of their tensors."""
    found = {weight.names[0]: weight.value for weight in model.weights() if weight.role == "matrix"}
    return {name: value for name, value in found.items() if name.endswith("_proj.weight")}


def steps(vocab: int) -> list[tuple[PagedBatch, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A prefill of more tokens than widen their weights (two rows), and a decode step."""
    pages, done, made = torch.tensor([[1, 2, 3], [4, 5, 6]]).int(), [0, 0], []
    generator = torch.Generator().manual_seed(1)
    for new in ([7, 15], [1, 1]):
        positions = torch.cat([torch.arange(done[row], done[row] + new[row]) for row in range(2)])
        rows = torch.repeat_interleave(torch.arange(2), torch.tensor(new))
        done = [done[row] + new[row] for row in range(2)]
        start = torch.tensor([0, *new]).cumsum(0).int()
        slots = pages[rows, positions // 8] * 8 + positions % 8
        batch = PagedBatch(start, torch.tensor(done).int(), pages, slots.int(), max(new), max(done))
        made.append((batch, torch.randint(0, vocab, (sum(new),), generator=generator), positions, start[1:].long() - 1))
    return made


def check_logits(ours: Any, theirs: Any, *off: float) -> None:
    """Both models through both steps, each within its part of the logits' norm."""
    specs = theirs.attention_specs
    want_pool, got_pool = (pool_of(specs, 8, 8, torch.float32, CPU) for _ in range(2))
    backend = backend_file.Backend(table.table(), specs, CPU, torch.float32)
    vocab = theirs.index.slots["model.embed_tokens.weight"][0][0].shapes[0][0]
    for (batch, ids, positions, last), most in zip(steps(vocab), off, strict=True):
        want_step = ForwardBatch(ids, positions, Memory(want_pool, [TableStep(Ops(), batch, want_pool)]), last)
        got_step = ForwardBatch(ids, positions, begin(backend, [batch], got_pool), last)
        want = theirs.head(theirs.forward(want_step))
        got = ours.head(ours.forward(got_step))
        assert (got - want).norm() <= most * want.norm()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.mark.parametrize("case", KEPT)
def test_checkpoints_stay_narrow(case: str, llama: Path, tmp_path: Path) -> None:
    pack, config, form = KEPT[case]
    packed, plain = packers.quantised(llama, tmp_path, pack, config)
    ours, theirs = loaded(packed, table.table()), loaded(plain, Ops())
    found = matrices(ours)
    assert len(found) == 4 and all(type(value) is form for value in found.values())
    dense = matrices(theirs)
    assert sum(found[name].nbytes for name in found) < 0.29 * sum(value.nbytes for value in dense.values())
    saved = sum(value.nbytes - found[name].nbytes for name, value in dense.items())
    assert ours.weight_bytes == theirs.weight_bytes - saved
    wide = loaded(packed, Ops())
    for name in theirs.weight_names():
        torch.testing.assert_close(ours.get_weight(name), wide.get_weight(name), rtol=1e-6, atol=1e-9)
    # Of more than 16 tokens activations become float8 too, which the interpreter rounds wrongly.
    check_logits(ours, theirs, *((0.2, 0.2) if form in FLOAT8 else (1e-3, 1e-3)))


@pytest.mark.parametrize("method,form", [("fp8", Float8Rows), ("int4", Int4Weight), ("int8", GroupedWeight)])
def test_plain_checkpoints_become_narrow(method: str, form: type, llama: Path) -> None:
    ours, theirs = loaded(llama, table.table(), method), loaded(llama, Ops(), method)
    assert all(type(value) is form for value in matrices(ours).values())
    for name in theirs.weight_names():
        torch.testing.assert_close(ours.get_weight(name), theirs.get_weight(name), rtol=2e-3, atol=3e-4)
    check_logits(ours, theirs, *((0.2, 0.2) if form is Float8Rows else (1e-2, 1e-2)))


def decision(path: Path, ops: Ops) -> tuple[Any, str]:
    found = describe(str(path))
    method = method_for(None, found.stored)
    assert method is not None and method.report is not None
    model = load_model(found, BuildContext(ops, torch.float32, CPU, quant=method))
    return model, method.report.decision("float32")[1]


ODD = {"hidden_size": 160, "intermediate_size": 160, "num_attention_heads": 5, "num_key_value_heads": 5}
# What packs, what config.json says, changes of the model's sizes, and a word of the reason.
UNPACKED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "act-order": (partial(packers.gptq, act=True), {**GPTQ, "desc_act": True}, {}, "act-order"),
    "odd groups": (partial(packers.packed_ints, group=40), INTS, ODD, "40"),
    "groups of powers of two": (packers.mxfp8_matrix, {**TENSORS, "format": "mxfp8"}, {}, "float8"),
    "groups of 5": (partial(packers.packed_ints, bits=5, group=40), INTS, ODD, "no multiples of 16"),
    "blocks in the middle": (KEPT["blocks"][0], BLOCKS, {"num_key_value_heads": 2}, "end with their blocks"),
    "odd sizes": (KEPT["rows"][0], KEPT["rows"][1], {"intermediate_size": 200}, "multiples of 16"),
}


@pytest.mark.parametrize("case", UNPACKED)
def test_what_no_kernel_takes_is_unpacked_and_says_why(case: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pack, config, sizes, why = UNPACKED[case]
    made = tiny_checkpoint("llama", tmp_path / "made", **SIZES | sizes)
    packed, plain = packers.quantised(made, tmp_path, pack, config)
    ours, told = decision(packed, table.table())
    theirs = loaded(plain, Ops())
    assert why in told and "unpacked to float32" in told
    dense = {name for name, value in matrices(ours).items() if isinstance(value, torch.Tensor)}
    assert dense if case in ("blocks in the middle", "odd sizes") else dense == set(matrices(ours))
    for name in dense:
        torch.testing.assert_close(ours.get_weight(name), theirs.get_weight(name), rtol=1e-6, atol=1e-7)


def test_what_is_kept_is_told(llama: Path, tmp_path: Path) -> None:
    packed, _ = packers.quantised(llama, tmp_path, *KEPT["blocks"][:2])
    assert decision(packed, table.table())[1] == "7 matrices keep their bits as float8 with scales of blocks"
    _, told = decision(packed, table.invariant_table())
    assert told == "7 are unpacked to float32: the batch-invariant kernels multiply plain weights alone"
    assert "this op table keeps no float8" in decision(packed, Ops())[1]


# Of experts: what packs, what config.json says, the form.
EXPERTS: dict[str, tuple[Any, dict[str, Any], type]] = {
    "blocks": KEPT["blocks"],
    "rows": KEPT["rows"],
}
MOE: dict[str, Any] = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}


def stacks(model: Any) -> list[Any]:
    return [weight.value for weight in model.weights() if weight.experts]


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_stay_narrow(case: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pack, config, form = EXPERTS[case]
    made = tiny_checkpoint("qwen3_moe", tmp_path / "made", **SIZES | MOE)
    packed, plain = packers.quantised(made, tmp_path, pack, config)
    (ours, told), theirs = decision(packed, table.table()), loaded(plain, Ops())
    assert len(stacks(ours)) == 2 and all(isinstance(value, form) for value in stacks(ours))
    assert "unpacked" not in told
    for name in theirs.weight_names():
        torch.testing.assert_close(ours.get_weight(name), theirs.get_weight(name), rtol=1e-6, atol=1e-7)
    check_experts(ours, theirs)


def check_experts(ours: Any, theirs: Any) -> None:
    """The block alone, of few tokens and of more: routing to other experts would not be an error of a product."""
    (got,), (want,) = ([layer.mlp for layer in model.layers] for model in (ours, theirs))
    for tokens, most in ((3, 1e-4), (40, 0.15)):
        x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens))
        out, expected = got(None, x, None, add=False)[0], want(None, x, None, add=False)[0]
        assert (out - expected).norm() <= most * expected.norm()


def test_experts_of_another_rank_may_be_narrow() -> None:
    """Those of the ids 2 and 3, of which some tokens choose none."""
    generator = torch.Generator().manual_seed(1)
    wide = [torch.randn(2 * rows, 128, generator=generator) / 11 for rows in (256, 128)]
    pair = [Float8Blocks(*formats.quantise_blocks(one, torch.float8_e4m3fn), torch.float32) for one in wide]
    ids = torch.tensor([[0, 2], [3, 2], [1, 0]])
    x, weights, spec = torch.randn(3, 128, generator=generator), torch.rand(3, 2), ExpertSpec(2, first=2)
    got = table.table().experts(x, ids, weights, pair[0], pair[1], spec, None)
    dense = [one.rows(torch.arange(len(one.values))) for one in pair]
    want = Ops().experts(x, ids, weights, dense[0], dense[1], spec, None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    other = replace(spec, activation="relu2", gated=False)  # which is computed of plain matrices
    got = table.table().experts(x, ids, weights, pair[1], pair[1], other, None)
    half = pair[1].rows(torch.arange(256))
    torch.testing.assert_close(got, Ops().experts(x, ids, weights, half, half, other, None))


@pytest.mark.parametrize("case", ["blocks", "rows", "fp8", "int4", "int8"])
def test_new_values_are_put_into_narrow_memory(case: str, llama: Path, tmp_path: Path) -> None:
    packed = packers.quantised(llama, tmp_path, *KEPT[case][:2])[0] if case in KEPT else llama
    model = loaded(packed, table.table(), None if case in KEPT else case)
    name, beside = (f"model.layers.0.self_attn.{each}_proj.weight" for each in "kv")
    before, places = model.get_weight(beside), [t.data_ptr() for t in matrices(model)[q_of(name)].tensors()]
    new = torch.randn(model.get_weight(name).shape, generator=torch.Generator().manual_seed(3)) / 16
    assert not model.update_weights([(name, new)])
    assert [t.data_ptr() for t in matrices(model)[q_of(name)].tensors()] == places
    off = 0.15 if case == "int4" else 0.04
    assert 0 < (model.get_weight(name) - new).norm() < off * new.norm()
    assert (model.get_weight(beside) - before).norm() < off / 2 * before.norm()
    found = matrices(model)[q_of(name)]
    assert sum(piece.numel() for piece in table.table().memory(found)) == found.nbytes  # type: ignore[misc]


def q_of(name: str) -> str:
    return name.replace("k_proj", "q_proj")


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1"])
def test_gguf_files_stay_narrow(kind: str, llama: Path, tmp_path: Path) -> None:
    file = tiny_gguf(llama, tmp_path / "tiny.gguf", kind)
    ours, theirs = loaded(file, table.table()), loaded(file, Ops())
    found = [weight.value for weight in ours.weights() if weight.role == "matrix"]
    assert len(found) == 6 and all(type(value) is GroupedWeight for value in found)  # embedding and head too
    assert ours.index.report.decision("float32") == ("GGUF", f"9 matrices keep their bits as {kind}")
    assert ours.weight_bytes < 0.28 * theirs.weight_bytes
    for name in theirs.weight_names():
        torch.testing.assert_close(ours.get_weight(name), theirs.get_weight(name), rtol=1e-6, atol=1e-7)
    check_logits(ours, theirs, 1e-5, 1e-5)


def test_experts_of_gguf_files_are_unpacked_and_say_why(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made = tiny_checkpoint("qwen3_moe", tmp_path / "made", **SIZES | MOE)
    model = loaded(tiny_gguf(made, tmp_path / "tiny.gguf", "Q8_0"), table.table())
    assert all(isinstance(value, torch.Tensor) for value in stacks(model))
    assert "12 are unpacked to float32: experts in groups of" in model.index.report.decision("float32")[1]


def test_ranks_have_shares_of_gguf_matrices(llama: Path, tmp_path: Path) -> None:
    """Rows in the file's order or turned, and columns of whole blocks."""
    file = GGUFFile.open(tiny_gguf(llama, tmp_path / "tiny.gguf", "Q5_0"))
    for name, heads in (("blk.0.attn_q.weight", 4), ("blk.0.ffn_down.weight", 0)):
        stored = file.tensors[name]
        source = GGUFSource(name, stored.shape, stored.kind, tensor=stored, heads=heads, report=Report("GGUF"))
        rows, cols = slice(32, 64, 1), slice(64, 224, 1)
        share = View(name, (32, 160), source, (rows, cols))
        got = table.table().prepare_linear([share], torch.float32, CPU)
        assert isinstance(got, GroupedWeight)
        torch.testing.assert_close(widened(got), share.dense(torch.float32), rtol=1e-6, atol=1e-7)
        odd = View(name, (32, 16), source, (rows, slice(16, 32, 1)))
        got = table.table().prepare_linear([odd], torch.float32, CPU)
        assert isinstance(got, torch.Tensor) and torch.equal(got, odd.dense(torch.float32))
        assert source.report is not None and "ends inside a block" in source.report.decision("float32")[1]


def test_adapters_stand_beside_gguf_matrices(llama: Path, tmp_path: Path) -> None:
    file = tiny_gguf(llama, tmp_path / "tiny.gguf", "Q8_0")
    ours, theirs = (matrices(loaded(file, ops)) for ops in (table.table(), Ops()))
    name = "model.layers.0.self_attn.o_proj.weight"
    generator = torch.Generator().manual_seed(1)
    (rows, columns), index = ours[name].shape, torch.tensor([1, 0, 1]).int()
    down, up = (torch.randn(2, *size, generator=generator) / 16 for size in ((1, 8, columns), (8, rows)))
    facts, flat = torch.tensor([[0, 0], [8, 0]]).int(), torch.zeros(2, rows)
    adapter = Adapters(index, facts, down, up, flat + 1, flat, torch.tensor([rows]))
    x = torch.randn(3, columns, generator=generator)
    got, want = (
        ops.linear(x, weights[name], adapter=adapter)[0] for ops, weights in ((table.table(), ours), (Ops(), theirs))
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gptq", "gguf"])
def test_other_values_of_stored_integers_take_another_form(case: str, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    path = tiny_gguf(llama, file, "Q8_0") if case == "gguf" else packers.quantised(llama, tmp_path, *KEPT[case][:2])[0]
    model = loaded(path, table.table())
    name = "model.layers.0.self_attn.o_proj.weight"
    new = torch.randn(model.get_weight(name).shape)
    assert model.update_weights([(name, new)]) and torch.equal(model.get_weight(name), new)
