"""The arg-max of a large head through its screen: the token is the one that whole rows give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from linear_cases import Source, cases, make_source, needs_native

from phloem.kernels import native
from phloem.kernels.native_linear import TALL, NativeLinear, PackedLinear

pytestmark = needs_native
CPU = torch.device("cpu")
VOCAB = 4099
KINDS = {"Q8_0": 5, "Q6_K": 1, "dense": 3}  # and blocks of inputs


@pytest.fixture(params=cases(1, 3))
def linear(request: Any) -> Iterator[NativeLinear]:
    level, threads = request.param
    native.table(threads, level)
    yield NativeLinear(native.runtime())
    native.runtime().library.set_level(None)


def head(linear: NativeLinear, source: Source, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    return linear.prepare_linear([source], dtype, CPU)


def normal(kind: str, seed: int, vocab: int = VOCAB) -> Source:
    """Weights such as models have, in the type: `make_source` has every bit pattern instead."""
    values = torch.randn(vocab, 32 * KINDS[kind], generator=torch.Generator().manual_seed(seed)) * 0.05
    if kind == "dense":
        return Source.dense_of(values.bfloat16())
    assert kind == "Q8_0"
    groups = values.view(vocab, -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    q = (groups / scale.float()).round().clamp(-127, 127).to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), q.view(torch.uint8)], -1).reshape(vocab, -1).numpy()
    return Source("w", (vocab, 32 * KINDS[kind]), kind, data)


def whole(linear: NativeLinear, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
    return linear.linear(x, weight, None)[0].argmax(-1).int()


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", [*KINDS, "normal Q8_0", "normal dense"])
def test_the_token_is_that_of_whole_rows(linear: NativeLinear, kind: str, rows: int) -> None:
    name = kind.split()[-1]
    source = normal(name, 3) if kind != name else make_source(name, VOCAB, KINDS[name], seed=3)
    weight = head(linear, source)
    for seed in range(4):
        x = torch.randn(rows, source.shape[1], generator=torch.Generator().manual_seed(seed))
        x[:, seed] *= 30  # an outlier, as hidden states have them
        assert torch.equal(linear.linear_argmax(x, weight), whole(linear, x, weight))
    assert isinstance(weight.screen, torch.Tensor)


@pytest.mark.some(7)
@pytest.mark.parametrize("random_bits", [True, False])
def test_a_tall_head_of_bytes_is_split(linear: NativeLinear, random_bits: bool) -> None:
    """Its halves lie apart, and every op gives the bits that it gives of one that is whole."""
    vocab = TALL + 7
    source = make_source("Q8_0", vocab, 5, seed=1) if random_bits else normal("Q8_0", 1, vocab)
    weight, other = head(linear, source), NativeLinear(native.runtime(), exact=True)
    same = head(other, source)
    assert weight.split and not same.split and weight.nbytes == same.nbytes
    ids = torch.tensor([0, 17, vocab - 1])
    assert torch.equal(linear.embedding(ids, weight, 1.0), source.dense(torch.float32)[ids])
    for rows in (1, 5, 8, 9, 40):
        x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(rows))
        x[:, rows] *= 20
        want, _ = other.linear(x, same)
        assert torch.equal(linear.linear(x, weight, None)[0], want)
        assert torch.equal(linear.linear_argmax(x, weight), want.argmax(-1).int())
        values, tokens, sums = linear.linear_topk(x, weight, 3, None, 1)
        assert torch.equal(values[:, 0], want.amax(1)) and torch.equal(tokens[:, 0], want.argmax(-1).int())
        torch.testing.assert_close(sums[:, 0], want.logsumexp(-1))
    assert weight.screen is None
    assert linear.screens.bytes_read(weight) == weight.nbytes * 576 // 1088
    assert other.screens.bytes_read(same) == same.nbytes


def test_lower_halves_that_are_ruled_out_are_not_read(linear: NativeLinear) -> None:
    """Those of blocks that are far below the best are set to please the input, which no rounding does."""
    weight = head(linear, normal("Q8_0", 6, TALL))
    x = torch.randn(1, 160, generator=torch.Generator().manual_seed(7))
    token = int(whole(linear, x, weight))
    x_COTK = torch.nn.functional.pad(x[0], (0, 32)).view(-1, 2, 4, 4)  # chunk, half, vector, input of an operand
    nibbles_CTK = ((x_COTK[:, 0] > 0) * 15 + (x_COTK[:, 1] > 0) * 240).to(torch.uint8)
    lower_BCTFK = weight.memory[0][TALL // 16 * 3 * 576 :].view(TALL // 16, 6, 4, 16, 4)
    best_B = linear.linear(x, weight, None)[0][0].view(-1, 16).amax(1)
    lower_BCTFK[best_B < 0.65 * best_B.max()] = nibbles_CTK[:, :, None]
    assert int(whole(linear, x, weight)) != token
    assert int(linear.linear_argmax(x, weight)) == token


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dense_heads(linear: NativeLinear, dtype: torch.dtype) -> None:
    source = Source.dense_of(torch.randn(VOCAB, 70, generator=torch.Generator().manual_seed(1)).to(dtype))
    weight = head(linear, source, dtype)
    x = torch.randn(2, 70, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear.linear_argmax(x, weight), whole(linear, x, weight))
    assert isinstance(weight.screen, torch.Tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_of_the_screen_is_off_by_more_than_half_a_step(linear: NativeLinear, kind: str) -> None:
    source = make_source(kind, VOCAB, KINDS[kind], seed=5)
    weight = head(linear, source)
    screen = linear.screens.of(weight, 1)
    assert screen is not None
    blocks = -(-VOCAB // 16)
    segments = torch.tensor([[screen.data_ptr(), 0, blocks, VOCAB, 0, 0]])
    n = weight.in_features
    seen = PackedLinear(
        n, VOCAB, weight.padded_inputs, ("Q4_0",), 1, False, screen.numel(), weight.dtype, segments, [screen], linear
    )
    want, got = (w.view(VOCAB, -1, 32).double() for w in (weight.dense(), seen.dense()))
    step = want.abs().amax(-1, keepdim=True) / 7.5
    assert ((got - want).abs() <= step * 0.501).all()
    assert (got - want).abs().max() > 0


def test_equal_logits_give_the_first_token(linear: NativeLinear) -> None:
    values = torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(1))
    best = values[1234] * 3
    values[[77, 1234, 4098]] = best
    weight = head(linear, Source.dense_of(values.bfloat16()))
    assert linear.linear_argmax(best[None], weight).tolist() == [77]
    assert linear.linear_argmax(torch.zeros(2, 64), weight).tolist() == [0, 0]
    assert isinstance(weight.screen, torch.Tensor)


def test_what_the_screen_rules_out_is_not_read(linear: NativeLinear) -> None:
    """A screen of zeros, which is a wrong one, leaves the blocks that a thread begins with."""
    weight = head(linear, normal("Q8_0", 1))
    screen = linear.screens.of(weight, 1)
    assert screen is not None
    screen.zero_()
    x = torch.randn(1, 160, generator=torch.Generator().manual_seed(8))
    logits = linear.linear(x, weight, None)[0][0]
    token = int(linear.linear_argmax(x, weight))
    threads, blocks = native.runtime().library.threads(), -(-VOCAB // 16)
    columns = [c for t in range(threads) for c in range(blocks * t // threads * 16, blocks * t // threads * 16 + 16)]
    assert token == max(columns, key=lambda column: float(logits[column]))
    assert token != int(logits.argmax())


def test_what_is_not_a_number_concerns_its_row(linear: NativeLinear) -> None:
    weight = head(linear, normal("Q8_0", 2))
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(2))
    want = whole(linear, x, weight)
    x[1, 5] = float("nan")
    got = linear.linear_argmax(x, weight)
    assert got[0] == want[0] and got[2] == want[2] and 0 <= got[1] < VOCAB


def test_where_there_is_no_screen(linear: NativeLinear) -> None:
    x = torch.randn(1, 160)
    small = head(linear, make_source("Q8_0", 4080, 5, 1))
    four = head(linear, make_source("Q4_1", VOCAB, 5, 1))
    values = torch.randn(VOCAB, 160)
    values[7, 3] = 1e6
    large = head(linear, Source.dense_of(values), torch.float32)
    for weight in (small, four, large):
        assert torch.equal(linear.linear_argmax(x, weight), whole(linear, x, weight))
        assert weight.screenless and weight.screen is None
    biased, bias = head(linear, normal("Q8_0", 1)), torch.randn(VOCAB)
    want = linear.linear(x, biased, bias)[0].argmax(-1).int()
    assert torch.equal(linear.linear_argmax(x, biased, bias), want) and biased.screen is None
    exact = NativeLinear(native.runtime(), exact=True)
    weight = head(exact, normal("Q8_0", 1))
    assert torch.equal(exact.linear_argmax(x, weight), whole(exact, x, weight)) and weight.screen is None
    many = torch.randn(9, 160)
    assert torch.equal(linear.linear_argmax(many, biased), whole(linear, many, biased)) and biased.screen is None


def test_a_recorded_step_uses_a_screen_that_is_there(linear: NativeLinear) -> None:
    weight, x = head(linear, normal("Q8_0", 4)), torch.randn(2, 160)
    recorder = native.Recorder(native.runtime())
    graph, token = recorder.record(lambda: linear.linear_argmax(x, weight))
    assert weight.screen is None
    linear.linear_argmax(x, weight)
    screened, again = recorder.record(lambda: linear.linear_argmax(x, weight))
    for seed in range(3):
        x.copy_(torch.randn(2, 160, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        screened.replay()
        assert torch.equal(token, again) and torch.equal(token, whole(linear, x, weight))
