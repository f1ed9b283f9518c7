"""Grouped products of many rows by programs that walk all tiles, against plain torch, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_support import DTYPES, assert_close, need_interpreter

from phloem.kernels import reference_experts as ref
from phloem.kernels import reference_formats as formats

need_interpreter()
from phloem.kernels.triton import many, moe, trial  # noqa: E402

NAMES = [form.name for form in many.FORMS]


def drawn(tokens: int, experts: int, features: int, between: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(tokens, features).to(dtype)
    gate_up = (torch.randn(experts, 2 * between, features) / features**0.5).to(dtype)
    return x, gate_up, (torch.randn(experts, features, between) / between**0.5).to(dtype)


def by(
    form: many.Form, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, **how: Tensor
) -> Tensor:
    """What the form gives, summed over choices."""
    scales = (how["first"], how["second"]) if how else None
    lists = moe.sort_by_expert(ids, len(down), many.TILE)

    def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # By the reference: the interpreter rounds float8 wrongly. Rows past the last tile are of nothing.
        x = x.float().nan_to_num()
        return (
            formats.quantise_fp8(x, dtype, 128) if scales and scales[0].dim() == 3 else formats.quantise_fp8(x, dtype)
        )

    parts = many.parts_of_many(x, weights, gate_up, down, 0, scales, lists, form, quantise)
    return parts.view(*ids.shape, -1).float().sum(1)


def by_row(weight: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    values, scale = formats.quantise_fp8(weight.flatten(0, 1), kind)
    return values.view(weight.shape), scale.view(weight.shape[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", many.FORMS, ids=NAMES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "features", "between"),
    [(150, 4, 2, 72, 40), (131, 9, 8, 16, 24), (90, 3, 1, 200, 136), (7, 5, 5, 264, 8)],
)
def test_every_form_gives_what_torch_gives(
    form: many.Form, dtype: torch.dtype, tokens: int, experts: int, top_k: int, features: int, between: int
) -> None:
    """The last expert is never chosen but where all are; features are no multiple of any tile."""
    x, gate_up, down = drawn(tokens, experts, features, between, dtype)
    ids = torch.stack([torch.randperm(max(experts - 1, top_k))[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k)
    got = by(form, x, weights, ids, gate_up, down)
    assert_close(got, ref.experts(x.float(), weights, ids, gate_up.float(), down.float()), dtype)


@pytest.mark.parametrize("form", many.FORMS, ids=NAMES)
@pytest.mark.parametrize("rows", [127, 128, 129, 300])
def test_one_expert_has_all_rows(form: many.Form, rows: int) -> None:
    x, gate_up, down = drawn(rows, 6, 24, 16, torch.float32)
    ids, weights = torch.full((rows, 1), 4, dtype=torch.int32), torch.rand(rows, 1)
    assert_close(by(form, x, weights, ids, gate_up, down), ref.experts(x, weights, ids, gate_up, down), torch.float32)


@pytest.mark.parametrize("form", many.FORMS_FLOAT8, ids=lambda form: form.name)
@pytest.mark.parametrize("blocks", [True, False])
def test_float8_weights(form: many.Form, blocks: bool) -> None:
    """Scales per block, with a block of features that begins a new one, and per row."""
    tokens, count, features, between = 140, 3, 320, 256
    x, gate_up, down = drawn(tokens, count, features, between, torch.float32)
    kind = torch.float8_e4m3fn
    make = formats.quantise_blocks if blocks else by_row
    (gate_up8, first), (down8, second) = make(gate_up * torch.rand(count, 2 * between, 1), kind), make(down, kind)
    ids, weights = torch.randint(count, (tokens, 2)).int(), torch.rand(tokens, 2)
    got = by(form, x, weights, ids, gate_up8, down8, first=first, second=second)
    if blocks:
        wide = formats.spread_blocks(gate_up8, first), formats.spread_blocks(down8, second)
        rounded = formats.spread_groups(*formats.quantise_fp8(x, kind, 128))
    else:
        wide = gate_up8.float() * first[..., None], down8.float() * second[..., None]
        values, scale = formats.quantise_fp8(x, kind)
        rounded = values.float() * scale[:, None]
    want = ref.experts(rounded, weights, ids, *wide)
    # What remains is the rounding of what lies between the products.
    assert (got - want).norm() / want.norm() < 0.04


@pytest.mark.parametrize("tokens", [3, 9, 300])
@pytest.mark.parametrize("matrix", [True, False])
def test_float8_scales_of_rows_and_of_matrices(tokens: int, matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard kernels: of few tokens, of small tiles and of large ones."""
    monkeypatch.setattr(moe, "per_token_fp8", formats.quantise_fp8)
    kind, count = torch.float8_e4m3fn, 3
    x, gate_up, down = drawn(tokens, count, 160, 96, torch.float32)
    if matrix:
        gate_up, down = gate_up / gate_up.abs().amax() * 300, down / down.abs().amax() * 300
        first, second = torch.rand(count) / 100, torch.rand(count) / 100
        gate_up8, down8, shape = gate_up.to(kind), down.to(kind), (count, 1, 1)
    else:
        (gate_up8, first), (down8, second) = by_row(gate_up, kind), by_row(down, kind)
        shape = (count, -1, 1)
    ids, weights = torch.randint(count, (tokens, 2)).int(), torch.rand(tokens, 2)
    got = moe.experts(x, weights, ids, gate_up8, down8, scales=(first, second))
    wide = gate_up8.float() * first.view(shape), down8.float() * second.view(shape)
    want = ref.experts(x, weights, ids, *wide)
    assert (got - want).norm() / want.norm() < (1e-5 if tokens <= moe.FEW_TOKENS else 0.06)


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "tried", lambda *_: pytest.fail("tried"))
    x, gate_up, down = drawn(300, 2, 16, 16, torch.float32)
    ids, weights = torch.randint(2, (300, 1)).int(), torch.rand(300, 1)
    assert_close(moe.experts(x, weights, ids, gate_up, down), ref.experts(x, weights, ids, gate_up, down), x.dtype)


def test_a_trial_of_real_products_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended clock. A form that is given a wrong tile is found out, one that raises is left out."""
    monkeypatch.setattr(trial, "EACH", (70,))
    x, gate_up, down = drawn(5, 2, 24, 16, torch.float32)
    work = trial.Work(gate_up, down, 0, None, moe.parts_of_tiles)
    times = iter([5.0, 3.0, 2.0, 1.0])
    assert trial.tried(work, x, 2, lambda run: next(times)) == ((70, many.FORMS[2]),)
    whole = many.parts_of_many

    def broken(*args: object) -> Tensor:
        form = args[-2]
        if form is many.FORMS[2]:
            raise RuntimeError("out of resource: shared memory\nmore")
        return whole(*args) * (2.0 if form is many.FORMS[1] else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(many, "parts_of_many", broken)
    times = iter([5.0, 3.0])
    assert trial.tried(work, x, 2, lambda run: next(times)) == ((70, many.FORMS[0]),)
    (told,) = [one for name, one in trial.chosen.told().items() if "2 of 2, 24 x 16" in name]
    assert told["kernel"] == many.FORMS[0].name
    assert f"{many.FORMS[2].name} fails: out of resource: shared memory" in told["why"] and "is off by" in told["why"]
