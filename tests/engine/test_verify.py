"""Steps that verify drafts give the tokens of plain decoding, whatever the drafts are and whatever is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_support import built
from stepping import HOST, LateCopies, Row, Stepper, bits, pool_of, runner_of

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Batch
from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.recorded.flexible import FlexibleSteps
from phloem.engine.wanted import Wanted
from phloem.kernels import native
from phloem.kernels import reference as ref
from phloem.kernels.compose import linear_of
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.platforms._facts import StepFacts
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

CPU = torch.device("cpu")
WORDS = (VOCAB + 31) // 32
LENGTH = 24
DEVICE = StepFacts()  # as on a device, over the CPU: values are read late


class Parity:
    """Allows tokens whose parity follows from all tokens so far; ends nothing."""

    def __init__(self) -> None:
        self.total, self.calls = 0, 0

    def masks(self, sampled: Sequence[int], drafts: Sequence[int]) -> list[Any]:
        self.total += sum(sampled)
        self.calls += 1
        found, total = list[Any](), self.total
        for token in [None, *drafts]:
            if token is not None:
                if token % 2 != total % 2:
                    return found  # not allowed: nothing behind it counts
                total += token
            found.append(bits(*range(total % 2, VOCAB, 2), words=WORDS))
        return found


def rows() -> list[Row]:
    """A row of every kind of request."""
    sampling, logprobs = SamplingParams, {"return_logprob": True}
    asked: list[tuple[SamplingParams, dict[str, Any], Any]] = [
        (sampling(temperature=0.0), {}, None),
        (sampling(temperature=0.9), {}, None),
        (sampling(temperature=0.7, top_p=0.9, top_k=40), {**logprobs, "top_logprobs": 3}, None),
        (
            SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.7),
            logprobs,
            None,
        ),
        (sampling(temperature=1.1, presence_penalty=1.0, logit_bias={"9": 3.0}), {"return_hidden": True}, None),
        (sampling(temperature=0.8, min_new_tokens=9), {"eos_ids": tuple(range(0, VOCAB, 3))}, None),
        (sampling(temperature=1.0), {}, Parity),
        (sampling(temperature=0.0, processors={"no_repeat_ngram": {"ngram_size": 1}}), {}, None),
        (sampling(temperature=0.0), {**logprobs, "token_ids_logprob": (3, 4)}, Parity),
    ]
    return [
        Row([5 + place, 9, 11, 7 * place + 3][: 2 + place % 3], params, options, follow)
        for place, (params, options, follow) in enumerate(asked)
    ]


def by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A matrix library may add in another order for another number of rows; row by row it cannot."""
    return torch.cat([ref.product(x[row : row + 1], weight, bias) for row in range(len(x))])


OPS = replace(Ops(), linear=linear_of(by_rows))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return load_model(describe(str(path)), BuildContext(OPS, torch.float32, CPU))


@pytest.fixture(scope="module")
def plain(model: Any) -> list[Row]:
    stepper = Stepper(runner_of(model, 9, OPS), rows())
    stepper.run(LENGTH + 8)
    stepper.runner.close()
    return stepper.rows


def drafter(plain: list[Row], seed: int, right: float, most: int = 6) -> Any:
    """Up to `most` drafts, each the right one with this probability: anything from all wrong to all right."""
    rng = random.Random(seed)

    def draft(place: int, row: Row) -> list[int]:
        following = plain[place].tokens[len(row.tokens) :][: rng.randrange(most + 1)]
        return [token if rng.random() < right else rng.randrange(VOCAB) for token in following]

    return draft


@pytest.mark.some(4)
@pytest.mark.slow
@pytest.mark.parametrize("right", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
def test_any_drafts_give_the_tokens_of_plain_decoding(model: Any, plain: list[Row], right: float, late: bool) -> None:
    options: dict[str, Any] = {"facts": DEVICE, "streams": LateCopies()} if late else {}
    stepper = Stepper(runner_of(model, 9, OPS, **options), rows())
    got = stepper.run(LENGTH, drafter(plain, int(10 * right), right))
    stepper.runner.close()
    assert got == [row.tokens[:LENGTH] for row in plain]
    drafted = sum(output.drafted for output in stepper.outputs)
    accepted = sum(int(output.counts.sum()) for output in stepper.outputs) - 9 * len(stepper.outputs)
    assert drafted > 100 and (accepted == drafted if right == 1 else accepted < drafted)
    assert stepper.steps < LENGTH / 2 if right == 1 else stepper.steps > 4
    for row, want in zip(stepper.rows, plain, strict=True):
        for a, b in zip(row.logprobs[:LENGTH], want.logprobs[:LENGTH], strict=True):
            assert a.token == pytest.approx(b.token, abs=1e-5)
            assert [pair[1] for pair in a.top] == [pair[1] for pair in b.top]
            assert [pair[0] for pair in a.chosen] == pytest.approx([pair[0] for pair in b.chosen], abs=1e-5)
        for a, b in zip(row.hidden[:LENGTH], want.hidden[:LENGTH], strict=True):
            assert np.allclose(a, b, atol=1e-5)
    assert [len(row.logprobs) > 0 for row in plain] == [False, False, True, True, False, False, False, False, True]
    assert len(plain[4].hidden) > LENGTH


@pytest.mark.slow
def test_rows_that_verify_and_rows_that_do_not_share_a_step(model: Any, plain: list[Row]) -> None:
    half = drafter(plain, 3, 0.9)
    stepper = Stepper(runner_of(model, 9, OPS), rows())
    got = stepper.run(LENGTH, lambda place, row: half(place, row) if place % 2 else [])
    stepper.runner.close()
    assert got == [row.tokens[:LENGTH] for row in plain]


@pytest.mark.slow
def test_the_next_step_may_take_the_last_accepted_token_from_the_device(model: Any, plain: list[Row]) -> None:
    for options in ({}, {"facts": DEVICE, "streams": LateCopies()}):
        stepper = Stepper(runner_of(model, 9, OPS, **options), rows())
        stepper.step()
        draft = drafter(plain, 1, 0.7)
        stepper.step(draft)
        batch = stepper._batch([[] for _ in rows()])
        batch.input_ids = np.full_like(batch.input_ids, -1)
        tokens = stepper.runner.launch(batch).result().tokens
        stepper.runner.close()
        assert tokens.tolist() == [want.tokens[len(row.tokens)] for row, want in zip(stepper.rows, plain, strict=True)]


class Choosy(Parity):
    """Fails, or allows nothing, behind so many tokens."""

    def __init__(self, at: int, error: Exception | None) -> None:
        super().__init__()
        self.at, self.error, self.seen = at, error, 0

    def masks(self, sampled: Sequence[int], drafts: Sequence[int]) -> list[Any]:
        self.seen += len(sampled)
        if self.error is not None and self.seen >= self.at:
            raise self.error
        found = super().masks(sampled, drafts)
        return [np.zeros(WORDS, np.int32) if self.seen + place == self.at else one for place, one in enumerate(found)]


@pytest.mark.slow
def test_a_row_fails_behind_drafts_only_when_it_gets_there(model: Any, plain: list[Row]) -> None:
    """A grammar that ends inside the drafts costs no token before its end."""
    row = replace(rows()[6], follow=lambda: Choosy(3, None))
    stepper = Stepper(runner_of(model, 1, OPS), [row])
    stepper.step()
    # The draws are those of another slot here: the row's own plain tokens first.
    want = Stepper(runner_of(model, 1, OPS), [replace(rows()[6])])
    want.run(8)
    stepper.step(lambda place, row: want.rows[0].tokens[1:6])
    assert row.tokens == want.rows[0].tokens[:3]
    batch = stepper._batch([[]])
    output = stepper.runner.launch(batch).result()
    assert output.counts.tolist() == [0] and "allows no token" in output.failed[0] and not output.refused
    refused = replace(rows()[6], follow=lambda: Choosy(0, BadRequest("no such thing")))
    stepper = Stepper(runner_of(model, 1, OPS), [refused])
    output = stepper.runner.launch(stepper._batch([[]])).result()
    assert output.failed == {0: "no such thing"} and output.refused == {0} and not len(output.tokens)


def test_damaged_hidden_states_fail_their_row_alone(model: Any) -> None:
    stepper = Stepper(runner_of(model, 2, OPS), rows()[:2])
    stepper.step()
    batch = stepper._batch([[1, 2], []])
    chooser = stepper.runner._work.chooser
    run = chooser.run

    def damaged(choice: Any) -> Any:
        choice.hidden_LN[0] = float("nan")
        return run(choice)

    chooser.run = damaged  # type: ignore[method-assign]
    output = stepper.runner.launch(batch).result()
    assert output.counts.tolist() == [0, 1] and list(output.failed) == [0] and len(output.tokens) == 1


def test_positions_that_yield() -> None:
    batch = Batch(
        step=0,
        slots=np.array([4, 2, 7], np.int32),
        query_lens=np.array([3, 4, 1], np.int32),
        prefix_lens=np.array([10, 0, 6], np.int32),
        input_ids=np.array([1, 21, 22, 5, 6, 7, 8, 9], np.int32),
        tables=(),
        outputs=np.array([3, 0, 1], np.int32),
    )
    wanted = Wanted.of(batch)
    assert wanted.rows.tolist() == [0, 0, 0, 2] and wanted.slots.tolist() == [4, 4, 4, 7]
    assert wanted.known.tolist() == [11, 12, 13, 7] and wanted.at.tolist() == [0, 1, 2, 7]
    assert wanted.drafts is not None and wanted.drafts.tolist() == [21, 22, -1, -1] and wanted.drafted == 2
    assert list(wanted.spans()) == [(0, 3), (3, 4)] and wanted.drafts_of(0, 3) == [21, 22]
    for tokens, last in (([21, 22, 3, 4], [2, 3]), ([21, 9, 3, 4], [1, 3]), ([8, 22, 3, 4], [0, 3])):
        assert wanted.last(np.array(tokens)).tolist() == last
        on_device, kept = wanted.last_on_device(
            torch.tensor(tokens), lambda arrays: [torch.from_numpy(a) for a in arrays]
        )
        assert on_device.tolist() == last
        assert kept.tolist() == [place <= last[0] for place in range(3)] + [True]


needs_native = pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_recorded_steps_verify_to_the_same_bits(family: str, tmp_path: Path) -> None:
    """Rows of 1 to 8 tokens give what steps of one token give, where ops and cache promise it (int8; bfloat16 not)."""
    ops = native.table(2, invariant=True)
    made: Any = load_model(describe(str(tiny_checkpoint(family, tmp_path))), BuildContext(ops, torch.float32, CPU))

    def run(recorded: bool, draft: Any) -> Stepper:
        pool = pool_of(made, 9, dtype=torch.int8)
        backend = BACKENDS.module("cpu").Backend(ops, made.attention_specs, CPU, torch.int8)
        ways: list[Any] = []
        if recorded:
            recorder = ops.recorder() if ops.recorder is not None else None
            assert recorder is not None
            facts = replace(HOST, patience=2)
            ways = [
                DecodeGraphs(recorder, made, backend, pool, facts, 9, 16),
                FlexibleSteps(recorder, made, backend, pool, facts, 128, 9, 16),
            ]
        stepper = Stepper(runner_of(made, 9, ops, "cpu", pool=pool, recorded=ways), rows())
        stepper.run(LENGTH + 8, draft)
        stepper.runner.close()
        assert not ways or ways[1].graphs.refused is ways[0].graphs.refused is None
        return stepper

    want = run(False, lambda place, row: [])
    for recorded in (False, True):
        got = run(recorded, drafter(want.rows, 5, 0.8, 7))
        for a, b in zip(got.rows, want.rows, strict=True):
            assert a.tokens[:LENGTH] == b.tokens[:LENGTH]
            assert all(np.array_equal(x, y) for x, y in zip(a.hidden[:LENGTH], b.hidden[:LENGTH], strict=True))
            assert [one.token for one in a.logprobs[:LENGTH]] == [one.token for one in b.logprobs[:LENGTH]]
