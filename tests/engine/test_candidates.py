"""Sampling from the head's best tokens: the op against whole rows, and draws that are those of whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import levels, make_source, needs_native

from phloem import Engine
from phloem.core.request import SamplingParams
from phloem.engine.sampling.candidates import FEW, MANY, Candidates, candidates_wanted
from phloem.engine.sampling.sampler import SamplingRows, sample
from phloem.kernels import native
from phloem.kernels.native_linear import NativeLinear
from phloem.kernels.ops import Ops
from phloem.kernels.reference_sampling import linear_topk, top_of_logits
from phloem.models import _common as common
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
CASES = [(level, threads) for level in levels() for threads in (1, 3)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def linear(request: Any) -> Iterator[NativeLinear]:
    level, threads = request.param
    native.table(threads, level)
    yield NativeLinear(native.runtime())
    native.runtime().library.set_level(None)


def head(linear: NativeLinear, kind: str, vocab: int) -> Any:
    return linear.prepare_linear([make_source(kind, vocab, 1 if kind.endswith("_K") else 8, 2)], torch.bfloat16, CPU)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_native
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q6_K", "IQ4_NL", "dense"])
@pytest.mark.parametrize(
    "vocab,rows,k,cap",
    [(1003, 5, 64, 0.0), (40, 3, 64, 0.0), (1537, 70, 128, 5.0), (1500, 1, 1, 0.0), (17, 12, 4, 30.0)],
)
def test_op_against_whole_rows(linear: NativeLinear, kind: str, vocab: int, rows: int, k: int, cap: float) -> None:
    weight = head(linear, kind, vocab)
    x, scale = random(rows, weight.in_features), random(rows, 2, seed=1).abs() + 0.3
    logits, _ = linear.linear(x, weight)
    if cap:
        logits = native.table(linear.rt.library.threads(), linear.rt.library.level()).softcap(logits, cap)
    values, ids, sums = linear.linear_topk(x, weight, k, scale, 2, cap)
    want = top_of_logits(logits, k, scale, 2)
    assert torch.equal(values, want[0]) and torch.equal(ids, want[1])
    torch.testing.assert_close(sums, want[2], rtol=1e-6, atol=3e-5)
    assert linear.linear_topk(x, weight, k)[2].shape == (rows, 0)


@needs_native
def test_op_agrees_with_the_reference(linear: NativeLinear) -> None:
    weight = head(linear, "dense", 300)
    x = random(4, weight.in_features).bfloat16().float()
    got, want = linear.linear_topk(x, weight, 3, None, 1, 8.0), linear_topk(x, weight.dense(), 3, None, 1, 8.0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], want[1])


@needs_native
def test_ties_bias_and_what_is_not_a_number(linear: NativeLinear) -> None:
    weight = head(linear, "Q8_0", 1003)
    values, ids, sums = linear.linear_topk(torch.zeros(2, weight.in_features), weight, 5, None, 1)
    assert values.eq(0).all() and ids.tolist() == [list(range(5))] * 2
    assert sums.flatten().tolist() == pytest.approx([float(np.log(1003))] * 2, rel=1e-6)
    bias = torch.zeros(1003)
    bias[[1002, 700]] = 100.0
    assert linear.linear_topk(torch.zeros(1, weight.in_features), weight, 3, None, 0, 0.0, bias)[1].tolist() == [
        [700, 1002, 0]
    ]
    bias[5] = float("nan")
    assert (
        linear.linear_topk(torch.zeros(1, weight.in_features), weight, 3, None, 1, 0.0, bias.clone())[2].isnan().all()
    )
    lowest = torch.full((1003,), float("-inf"))
    lowest[1000] = 1.0
    values, ids, sums = linear.linear_topk(torch.zeros(1, weight.in_features), weight, 2, None, 1, 0.0, lowest)
    assert ids[0, 0] == 1000 and values.tolist() == [[1.0, float("-inf")]] and sums.tolist() == [[1.0]]


@needs_native
def test_bits_do_not_depend_on_threads_or_on_recording() -> None:
    found: list[tuple[torch.Tensor, ...]] = []
    for threads in (1, 2, 3):
        native.table(threads)
        linear = NativeLinear(native.runtime())
        weight = head(linear, "Q8_0", 5003)
        x, scale = random(7, weight.in_features), torch.ones(7, 1)
        found.append(linear.linear_topk(x, weight, 20, scale, 1))

        def step(x: Any = x, linear: Any = linear, weight: Any = weight, scale: Any = scale) -> Any:
            return linear.linear_topk(x, weight, 20, scale, 1)

        graph, out = native.Recorder(native.runtime()).record(step)
        for tensor in out:
            tensor.zero_()
        graph.replay()
        found.append(out)
        alone = linear.linear_topk(x[3:4], weight, 20, scale[3:4], 1)
        assert all(torch.equal(a[0], b[3]) for a, b in zip(alone, out, strict=True))
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@needs_native
def test_a_weight_of_several_formats_is_refused() -> None:
    native.table(1)
    linear = NativeLinear(native.runtime())
    weight = linear.prepare_linear([make_source("Q4_1", 32, 2, 1), make_source("Q8_0", 32, 2, 1)], torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="one part"):
        linear.linear_topk(random(1, 64), weight, 2)
    with pytest.raises(ValueError, match="scale"):
        linear.linear_topk(random(1, 256), head(linear, "Q8_0", 40), 2, torch.ones(1, 1), 2)


def test_what_needs_whole_rows() -> None:
    def wanted(logprobs: int = 0, chosen: bool = False, plain: bool = True, **fields: Any) -> int:
        return candidates_wanted(SamplingParams(**fields), plain, logprobs, chosen, 50_000)

    assert wanted(temperature=1.0, top_p=1.0) == 0
    assert wanted(temperature=1.0, top_p=0.9) == wanted(temperature=1.0, min_p=0.1) == FEW
    assert wanted(temperature=1.0, top_k=100) == MANY and wanted(temperature=1.0, top_k=1000) == 0
    assert wanted(temperature=0.0) == FEW and wanted(temperature=0.0, logprobs=100) == MANY
    assert wanted(temperature=0.0, logprobs=500) == wanted(temperature=0.0, chosen=True) == 0
    assert wanted(temperature=0.0, plain=False) == 0


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.0, "top_k": 40}, {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95}, {"temperature": 0.6, "min_p": 0.05},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.02}, {"temperature": 1.3, "top_k": 5, "min_p": 0.1},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("spread", [3.0, 0.5])
@pytest.mark.parametrize("table", ["reference", pytest.param("native", marks=needs_native)])
def test_draws_are_those_of_whole_rows(spread: float, table: str) -> None:
    ops = native.table(2) if table == "native" else Ops()
    vocab, count = 4000, 40 * len(SETTINGS)
    logits = random(count, vocab, seed=3) * spread
    params = [SamplingParams(**SETTINGS[i % len(SETTINGS)]) for i in range(count)]
    rows = SamplingRows.of(params, list(range(count)), [5] * count, vocab)
    scales = Candidates.scales(rows, logprobs=table == "native")
    few = Candidates(*top_of_logits(logits, FEW, scales, scales.shape[1]))
    sure = few.sure(rows, vocab)
    assert sure.mean() > (0.9 if spread > 1 else 0.3)
    assert spread > 1 or not sure.all()  # a flat distribution has nuclei of more tokens than there are candidates
    got, want = few.draw(rows, vocab, ops), sample(logits, rows, ops)
    assert torch.equal(got[sure], want[sure])
    if not sure.all():
        part = np.flatnonzero(~sure)
        assert torch.equal(sample(logits[part], rows.of_rows(part), ops), want[part])


def test_a_tie_at_the_end_is_not_decided_by_candidates() -> None:
    logits = torch.zeros(3, 500)
    logits[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    params = [SamplingParams(temperature=1.0, top_k=10)] * 2 + [SamplingParams(temperature=0.0)]
    rows = SamplingRows.of(params, [0, 1, 2], [0, 0, 0], 500)
    scales = Candidates.scales(rows, logprobs=False)
    assert scales.shape == (3, 0)
    few = Candidates(*top_of_logits(logits, FEW, scales, scales.shape[1]))
    assert few.sure(rows, 500).tolist() == [False, False, True]
    short = Candidates(*top_of_logits(logits[:, :FEW], FEW, scales, scales.shape[1]))
    assert short.sure(rows, FEW).all()


@needs_native
def test_the_engine_gives_what_whole_rows_give(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))
    prompts = [[i + 3, 7, 11] for i in range(2 * len(SETTINGS))]
    params = [
        {**SETTINGS[i % len(SETTINGS)], "max_new_tokens": 10, "ignore_eos": True, "sampling_seed": i}
        for i in range(len(prompts))
    ]
    asked: dict[str, Any] = {"return_logprob": [i % 2 == 0 for i in range(len(prompts))], "top_logprobs_num": 3}
    best, calls = common.Decoder.best, [0, 0]

    def counted(self: Any, *arguments: Any) -> Any:
        found = best(self, *arguments)
        calls[0] += found is not None
        return found

    monkeypatch.setattr(common.Decoder, "best", counted)
    with Engine(model_path=str(path), dtype="float32", max_total_tokens=4096) as engine:
        fused: Any = engine.generate(input_ids=prompts, sampling_params=params, **asked)
        assert calls[0] > 0
        monkeypatch.setattr(common.Decoder, "best", lambda *_: None)
        whole: Any = engine.generate(input_ids=prompts, sampling_params=params, **asked)
    for one, other in zip(fused, whole, strict=True):
        assert one["output_ids"] == other["output_ids"]
        ours, theirs = (item["meta_info"].get("output_token_logprobs") for item in (one, other))
        assert (ours is None) == (theirs is None)
        if ours:
            assert [item[0] for item in ours] == pytest.approx([item[0] for item in theirs], abs=1e-5)
            tops = [[(pair[1], round(pair[0], 4)) for pair in top] for top in one["meta_info"]["output_top_logprobs"]]
            assert tops == [
                [(pair[1], round(pair[0], 4)) for pair in top] for top in other["meta_info"]["output_top_logprobs"]
            ]
