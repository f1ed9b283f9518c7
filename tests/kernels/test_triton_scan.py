"""Mamba's scans against plain torch, under the interpreter; whole models over them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from triton_support import DTYPES, assert_close, need_interpreter

from phloem.kernels import reference_models as models
from phloem.kernels import reference_scan as ref
from phloem.kernels.calls import PooledStates

need_interpreter()
from phloem.kernels.triton import gates, recurrent, rope, scan  # noqa: E402

OPS = {
    **{name: getattr(scan, name) for name in ("mamba2_scan", "selective_scan")},
    **{name: getattr(gates, name) for name in ("step_sizes", "decays", "delta_gates", "gated_rms_norm")},
    **{name: getattr(recurrent, name) for name in ("causal_conv", "gated_delta")},
}

LENGTHS = [[1], [1, 1, 1], [0, 5, 0, 2], [9, 0, 17, 1, 40]]


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def mamba2(lengths: list[int], heads: int, size: int, groups: int, state: int, dtype: torch.dtype) -> list[Tensor]:
    """What the op is given: views of one wide tensor, as a layer has them."""
    tokens, inner, shared = sum(lengths), heads * size, groups * state
    mixed = torch.randn(tokens, inner + 2 * shared + 3).to(dtype)[:, : inner + 2 * shared]
    x, b, c = mixed.split([inner, shared, shared], -1)
    dt = torch.rand(tokens, heads + 2)[:, :heads]
    x, b, c = x.unflatten(-1, (heads, size)), b.unflatten(-1, (groups, state)), c.unflatten(-1, (groups, state))
    states = torch.randn(len(lengths), heads, size, state)
    return [x, dt, -torch.rand(heads) * 4, b, c, torch.randn(heads), states, starts(lengths)]


def compare(
    got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> None:
    """Sums of a state's numbers, by chunks of that type in another order: to a share of the largest."""
    for one, other in zip(got, want, strict=True):
        if len(other):
            top = other.float().abs().max().clamp_min(1.0)
            assert_close(one.float() / top, other.float() / top, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("short", [0, scan.SHORT])
@pytest.mark.parametrize(("heads", "size", "groups", "state"), [(1, 4, 1, 12), (6, 20, 2, 16), (2, 72, 2, 130)])
def test_mamba2(
    lengths: list[int], short: int, heads: int, size: int, groups: int, state: int, dtype: torch.dtype
) -> None:
    given = mamba2(lengths, heads, size, groups, state, dtype)
    before = given[6].clone()
    got, want = scan.mamba2_scan(*given, short), ref.mamba2_scan(*given)
    assert got[1] is not None and got[0].dtype == dtype and torch.equal(given[6], before)
    compare((got[0], got[1]), want, dtype)
    if short == 0 or max(lengths) <= short:
        assert_close(got[1], want[1], torch.float32)


def test_steps_and_decays_of_any_size_overflow_nothing() -> None:
    """What a token has left behind after long steps is 0, and what it adds is what it is."""
    given = mamba2([33], 2, 16, 1, 16, torch.float32)
    given[1] = given[1] * 1000
    given[2] = torch.tensor([-300.0, -1e-4])
    compare(scan.mamba2_scan(*given, 8), ref.mamba2_scan(*given), torch.float32)  # type: ignore[arg-type]


def mamba1(lengths: list[int], channels: int, state: int, dtype: torch.dtype) -> list[Tensor]:
    tokens = sum(lengths)
    x = torch.randn(tokens, channels + 5).to(dtype)[:, :channels]
    b, c = torch.randn(tokens, 2 * state + 3).to(dtype)[:, 3:].split(state, -1)
    dt, states = torch.rand(tokens, channels), torch.randn(len(lengths), channels, state)
    return [x, dt, -torch.rand(channels, state) * 4, b, c, torch.randn(channels), states, starts(lengths)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("channels", "state"), [(3, 5), (70, 16), (40, 1)])
def test_mamba1(lengths: list[int], channels: int, state: int, dtype: torch.dtype) -> None:
    given = mamba1(lengths, channels, state, dtype)
    before = given[6].clone()
    got, want = scan.selective_scan(*given), ref.selective_scan(*given)
    assert got[1] is not None and torch.equal(given[6], before)
    assert_close(got[0], want[0], dtype)
    assert_close(got[1], want[1], torch.float32)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [3, 20, 1, 9]])
@pytest.mark.parametrize("which", ["mamba1", "mamba2"])
def test_states_are_read_and_written_where_they_lie(lengths: list[int], which: str) -> None:
    """Of rows that begin, of two that read one place, and of one that writes where it reads; the bits are the same."""
    make, run, want = {
        "mamba1": (lambda: mamba1(lengths, 20, 16, torch.float32), scan.selective_scan, ref.selective_scan),
        "mamba2": (lambda: mamba2(lengths, 4, 20, 2, 16, torch.float32), scan.mamba2_scan, ref.mamba2_scan),
    }[which]
    given = make()
    pool = torch.randn(9, *given[6].shape[1:])
    reads, writes = torch.tensor([3, 5, 3, 1]), torch.tensor([2, 5, 4, 8])
    fresh = torch.tensor([False, False, False, True])
    given[6] = ref.read_states(pool, reads, fresh)
    apart, plain = run(*given), want(*given)
    whole = pool.clone()
    out, none = run(*given[:6], PooledStates(whole, reads, writes, fresh), given[7])
    assert none is None and torch.equal(out, apart[0]) and torch.equal(whole[writes], apart[1])
    compare(apart, plain, torch.float32)
    others = [place for place in range(9) if place not in writes.tolist()]
    assert torch.equal(whole[others], pool[others])


def test_no_rows_are_no_launch() -> None:
    for given, run in (
        (mamba2([], 2, 16, 1, 16, torch.float32), scan.mamba2_scan),
        (mamba1([], 4, 16, torch.float32), scan.selective_scan),
    ):
        out, after = run(*given)
        assert after is not None and len(out) == len(after) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(0, 3), (1, 1), (5, 24), (3, 300)])
@pytest.mark.parametrize("bounds", [(0.0, float("inf")), (1e-3, 0.1)])
def test_step_sizes(tokens: int, width: int, bounds: tuple[float, float], dtype: torch.dtype) -> None:
    dt = (torch.randn(tokens, width + 2) * 12).to(dtype)[:, 1 : 1 + width]
    bias = torch.randn(width)
    got, want = gates.step_sizes(dt, bias, *bounds), ref.step_sizes(dt, bias, *bounds)
    torch.testing.assert_close(got, want, atol=0.0, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("heads", "each"), [(1, None), (33, None), (3, 20), (2, 300)])
def test_delta_gates(tokens: int, heads: int, each: int | None, dtype: torch.dtype) -> None:
    """Of heads, and of each entry of a key."""
    own = (heads,) if each is None else (heads, each)
    a, b = (
        (torch.randn(tokens, heads * ((each or 1) + 1) + 3) * 6)
        .to(dtype)[:, 3:]
        .split([heads * (each or 1), heads], -1)
    )
    log = torch.randn(heads) if each is None else torch.randn(heads, 1)
    given = a.unflatten(1, own), b, torch.randn(own), log
    for got, want in zip(gates.delta_gates(*given), ref.delta_gates(*given), strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=4e-6)
    torch.testing.assert_close(gates.decays(log), ref.decays(log))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("shape", "group"), [((0, 8), 0), ((5, 60), 0), ((3, 72), 24), ((4, 3, 20), 0), ((2, 2, 300), 300)]
)
def test_gated_rms_norm(shape: tuple[int, ...], group: int, first: bool, dtype: torch.dtype) -> None:
    """Of strided views: whole rows, groups of them, heads."""
    x, gate = (torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., shape[-1] :] for _ in range(2))
    given = x, gate, torch.randn(shape[-1]), 1e-5, group, first
    assert_close(gates.gated_rms_norm(*given), models.gated_rms_norm(*given), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sections", [(2, 3, 3), (16, 24, 24), (5, 0, 6)])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_table_of_three_positions(tokens: int, sections: tuple[int, ...], interleaved: bool) -> None:
    positions, table = torch.randint(0, 40, (3, tokens + 2))[:, 1 : 1 + tokens], torch.randn(40, 2, sum(sections))
    for got, want in zip(
        rope.mrope_table(positions, table, sections, interleaved),
        models.mrope_table(positions, table, sections, interleaved),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_no_op_of_the_table_reads_values_but_that_over_whole_texts() -> None:
    """Whose op is not called: their attention is torch's (`attention/_packed.py`)."""
    from phloem.kernels import shapes_only
    from phloem.kernels.ops import Ops
    from phloem.kernels.triton.table import invariant_table, table

    plain = Ops()
    for made in (table(), invariant_table()):
        left = {name for name in shapes_only._FORMS if getattr(made, name) is getattr(plain, name)}
        assert left == {"packed_attention"}


FAMILIES = ["mamba", "mamba2", "jamba", "falcon_h1", "nemotron_h"]


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_models_write_the_same(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny checkpoints on a table with these ops, prompts by chunks, states where they lie, against transformers."""
    pytest.importorskip("transformers")
    from model_support import PROMPT, Engine, their_greedy

    from phloem.kernels.ops import Ops
    from phloem.testing.checkpoints import tiny_checkpoint

    path = tiny_checkpoint(name, tmp_path_factory.mktemp(name))
    ops = {**OPS, "mamba2_scan": partial(scan.mamba2_scan, short=scan.SHORT)}
    mine = Engine(path, ops=replace(Ops(), pooled_states=True, **ops))
    torch.testing.assert_close(mine.whole(PROMPT), Engine(path).whole(PROMPT), atol=1e-4, rtol=1e-4)
    assert mine.greedy(PROMPT, 3) == their_greedy(path, PROMPT, 3)
