"""Mixture of experts against plain torch, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_support import DTYPES, assert_close, filled_with_nan, need_interpreter

from phloem.kernels import reference_experts as ref
from phloem.kernels import reference_formats as formats
from phloem.kernels import reference_models as models
from phloem.kernels.specs import ExpertSpec, RouterSpec

need_interpreter()
from phloem.kernels.triton import moe, route  # noqa: E402


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (5, 5)])
def test_route(experts: int, top_k: int, renormalise: bool) -> None:
    logits = torch.randn(7, experts) * 2
    weights, ids = moe.route(logits, top_k, renormalise)
    want_weights, want_ids = ref.route(logits, top_k, renormalise)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, atol=1e-6, rtol=1e-5)


def test_route_by_sigmoid_with_a_bias() -> None:
    """The bias decides who is chosen; the weight is the score without it."""
    logits, bias = torch.randn(6, 16), torch.randn(16)
    weights, ids = moe.route(logits, 3, True, sigmoid=True, bias_E=bias, scaling=2.5)
    chosen = (logits.sigmoid() + bias).topk(3, -1).indices
    scores = logits.sigmoid().gather(1, chosen)
    assert torch.equal(ids.long(), chosen)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("about", [6.9, 1e8])
def test_a_large_bias_decides_and_stays_out_of_the_weights(about: float) -> None:
    bias = about + torch.arange(8, dtype=torch.float32) * (1e-3 if about < 10 else 1e3)
    weights, ids = moe.route(torch.zeros(3, 8), 2, True, sigmoid=True, bias_E=bias, scaling=2.5)
    assert ids.tolist() == [[7, 6]] * 3
    torch.testing.assert_close(weights, torch.full((3, 2), 1.25))


def test_equal_scores_go_to_the_lower_expert() -> None:
    assert moe.route(torch.zeros(2, 6), 3, True)[1].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 2, 8), (37, 3, 6), (300, 4, 9)])
def test_sorting(tokens: int, top_k: int, experts: int) -> None:
    ids = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)]).int()  # the last is never chosen
    order, tile_expert = moe.sort_by_expert(ids, experts, 16)
    pairs = tokens * top_k
    used = tile_expert >= 0
    tiles = order.view(-1, 16)
    listed = tiles[used].flatten()
    assert sorted(listed[listed < pairs].tolist()) == list(range(pairs))
    for tile, expert in zip(tiles[used], tile_expert[used].tolist(), strict=True):
        inside = tile[tile < pairs]
        assert (ids.flatten()[inside.long()] == expert).all() and (inside.diff() > 0).all()
    assert sum(-(-int((ids == e).sum()) // 16) for e in range(experts)) == int(used.sum())


@pytest.mark.parametrize(("tokens", "top_k", "experts", "tile"), [(5, 2, 8, 16), (64, 3, 6, 32), (33, 4, 60, 16)])
def test_one_launch_sorts_as_two_do(
    tokens: int, top_k: int, experts: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of no expert here, on either side, are left out; one may stand twice."""
    ids = torch.randint(-1, experts + 3, (tokens, top_k)).int()
    ids[1] = ids[1, 0]
    order, tile_expert = route.sort_by_expert(ids, experts, tile)
    monkeypatch.setattr(route, "SORTED_TOKENS", 0)
    want_order, want_expert = route.sort_by_expert(ids, experts, tile)
    used = want_expert >= 0
    assert torch.equal(tile_expert, want_expert)
    assert torch.equal(order.view(-1, tile)[used], want_order.view(-1, tile)[used])


@pytest.mark.some(5)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "tile"), [(5, 2, 8, 16), (33, 3, 6, 16), (64, 8, 128, 16), (7, 4, 60, 32)]
)
def test_one_launch_routes_and_sorts_as_three_do(
    tokens: int, top_k: int, experts: int, tile: int, renormalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(tokens, experts) * 2
    logits[1] = 0.0  # equal scores
    weights, ids, lists = moe.route_and_sort(logits, top_k, renormalise, tile)
    want_weights, want_ids = moe.route(logits, top_k, renormalise)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(route, "SORTED_TOKENS", 0)
    order, tile_expert = moe.sort_by_expert(want_ids, experts, tile)
    used = tile_expert >= 0
    assert torch.equal(lists[1], tile_expert)
    assert torch.equal(lists[0].view(-1, tile)[used], order.view(-1, tile)[used])


def test_damaged_logits_name_experts_that_exist() -> None:
    logits = torch.full((5, 6), float("nan"))
    _, ids, (_, tile_expert) = moe.route_and_sort(logits, 2, True, 16)
    assert int(ids.min()) >= 0 and int(ids.max()) < 6 and int(tile_expert.max()) < 6
    assert int(moe.route(logits, 2, True)[1].max()) < 6


def test_many_tokens_are_routed_and_sorted_in_launches_of_their_own() -> None:
    logits = torch.randn(65, 8)
    _, ids, lists = moe.route_and_sort(logits, 2, True, 16)
    assert torch.equal(ids, ref.route(logits, 2, True)[1])
    assert torch.equal(lists[1], moe.sort_by_expert(ids, 8, 16)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (4, 6, 3), (5, 4, 2), (70, 3, 1)])
def test_moe(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    x, logits = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, experts).to(dtype)
    gate_up, down = (torch.randn(experts, 48, 40) / 6).to(dtype), (torch.randn(experts, 40, 24) / 5).to(dtype)
    gate_up, down = gate_up.flatten(0, 1), down.flatten(0, 1)
    got = moe.moe(x, logits, gate_up, down, top_k, True)
    assert_close(got, ref.moe(x, logits, gate_up, down, top_k, True), dtype)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("experts", "top_k", "damage"),
    [
        (6, 3, None),
        (17, 8, None),
        (128, 8, None),
        (5, 5, None),
        (40, 1, None),
        (24, 4, "equal"),
        (24, 4, "tiny"),
        (6, 2, "nan"),
    ],
)
def test_the_first_product_of_few_tokens_routes_as_a_launch_of_its_own_does(
    experts: int, top_k: int, damage: str | None, renormalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(12)
    x, logits = torch.randn(4, 24), torch.randn(4, experts) * 2
    if damage == "equal":
        logits[1], logits[2] = 0.0, logits[2].round()
    if damage == "tiny":
        logits[0, 2:] = -1e4  # scores that are all 0
        logits[1, 3:] = float("-inf")
    if damage == "nan":
        logits[:] = float("nan")
    gate_up, down = torch.randn(experts, 2 * 16, 24) / 5, torch.randn(experts, 24, 16) / 4
    seen: list[torch.Tensor] = []
    few = moe._few

    def kept(*args: object) -> torch.Tensor:
        seen.extend(args[1:3])  # type: ignore[arg-type]
        return few(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(moe, "_few", kept)
    got = moe.moe(x, logits, gate_up.flatten(0, 1), down.flatten(0, 1), top_k, renormalise)
    weights, ids = seen
    if damage == "nan":
        assert int(ids.min()) >= 0 and int(ids.max()) < experts
        return
    want_weights, want_ids = moe.route(logits, top_k, renormalise)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, atol=1e-6, rtol=1e-5)
    assert_close(got, ref.experts(x, want_weights, want_ids, gate_up, down), torch.float32)


SPECS = [
    RouterSpec(3, "sigmoid", True, eps=1e-20, scale=2.5),
    RouterSpec(2, "softmax", False, scale=16.0),
    RouterSpec(4, "sigmoid", True, eps=1e-20, scale=2.5, groups=4, keep=2),
    RouterSpec(3, "softmax", False, groups=8, keep=3, group_best=1),
    RouterSpec(2, "softmax", True, floor=0.7),
    RouterSpec(1, "chosen_sigmoid"),
    RouterSpec(4, "chosen_softmax"),
    RouterSpec(3, "chosen_sigmoid", True, scale=2.0),
    RouterSpec(3, "chosen_softmax", groups=4, keep=2),
    RouterSpec(2, "sparse_mixer", jitter=0.01),
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_any_router(spec: RouterSpec, biased: bool) -> None:
    torch.manual_seed(13)
    logits, bias = torch.randn(5, 32), torch.randn(32) if biased else None
    logits[0] = 0.0  # all equal: the lowest groups and experts
    ids, weights = route.route_op(logits, bias, spec)
    want_ids, want_weights = models.route(logits, bias, spec)
    assert torch.equal(ids, want_ids) and ids.dtype == torch.int32
    torch.testing.assert_close(weights, want_weights, atol=1e-6, rtol=1e-5)


def test_groups_that_no_kernel_takes_are_routed_all_the_same() -> None:
    spec = RouterSpec(3, "sigmoid", True, groups=3, keep=2)
    logits = torch.randn(4, 24)
    for got, want in zip(route.route_op(logits, None, spec), models.route(logits, None, spec), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [0, 1, 4, 7, 70])
@pytest.mark.parametrize(
    "spec",
    [ExpertSpec(5), ExpertSpec(4, "gelu_tanh", first=3), ExpertSpec(3, first=2), ExpertSpec(5, "relu2", gated=False)],
    ids=str,
)
def test_experts_that_were_chosen_elsewhere(tokens: int, spec: ExpertSpec) -> None:
    """Ids of other ranks' experts, and -1, add nothing, whatever stood in memory."""
    torch.manual_seed(14)
    rows = 2 * 16 if spec.gated else 16
    x, gate_up = torch.randn(tokens, 24), torch.randn(spec.experts * rows, 24) / 5
    down, weights = torch.randn(spec.experts * 24, 16) / 4, torch.rand(tokens, 3)
    ids = torch.randint(-1, 9, (tokens, 3)).int()
    with filled_with_nan():
        got = moe.experts_op(x, ids, weights, gate_up, down, spec)
        plain = moe.chosen_experts(x, ids, weights, gate_up, down) if spec.plain else None
    assert_close(got, models.experts(x, ids, weights, gate_up, down, spec), torch.float32)
    if plain is not None:
        assert_close(plain, ref.chosen_experts(x, ids, weights, gate_up, down), torch.float32)


def test_moe_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block-scaled weights; activations are quantised by the reference, as the interpreter rounds float8 wrongly."""
    torch.manual_seed(10)
    monkeypatch.setattr(moe, "per_group_fp8", lambda x, dtype: formats.quantise_fp8(x, dtype, 128))
    x, logits = torch.randn(5, 160), torch.randn(5, 4)
    gate_up, gate_scale = formats.quantise_blocks(torch.randn(4, 2 * 128, 160) / 12, torch.float8_e4m3fn)
    down, down_scale = formats.quantise_blocks(torch.randn(4, 160, 128) / 11, torch.float8_e4m3fn)
    weights, ids = ref.route(logits, 2, True)
    got = moe.experts(x, weights, ids, gate_up, down, scales=(gate_scale, down_scale))
    wide = formats.spread_blocks(gate_up, gate_scale), formats.spread_blocks(down, down_scale)
    want = ref.experts(x, weights, ids, *wide)
    # What remains is the rounding of activations to three bits of mantissa; between the products the kernel rounds
    # itself, and the interpreter cuts off where a GPU rounds to nearest.
    assert (got - want).norm() / want.norm() < 0.12
    exact = ref.experts(formats.spread_groups(*formats.quantise_fp8(x, torch.float8_e4m3fn, 128)), weights, ids, *wide)
    assert (got - exact).norm() / exact.norm() < 0.12


def test_few_tokens_meet_float8_experts_unquantised() -> None:
    torch.manual_seed(11)
    x, logits = torch.randn(3, 160), torch.randn(3, 4)
    gate_up, gate_scale = formats.quantise_blocks(torch.randn(4, 2 * 128, 160) / 12, torch.float8_e4m3fn)
    down, down_scale = formats.quantise_blocks(torch.randn(4, 160, 128) / 11, torch.float8_e4m3fn)
    weights, ids = ref.route(logits, 2, True)
    got = moe.experts(x, weights, ids, gate_up, down, scales=(gate_scale, down_scale))
    wide = formats.spread_blocks(gate_up, gate_scale), formats.spread_blocks(down, down_scale)
    assert_close(got, ref.experts(x, weights, ids, *wide), torch.float32)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("size", "inner", "top_k"), [(400, 384, 3), (264, 24, 1)])
def test_few_tokens_meet_scaled_experts_in_several_turns(size: int, inner: int, top_k: int, rows: bool) -> None:
    """Features that fill more than one turn and end inside one; choices that are no power of two."""
    torch.manual_seed(12)
    x, logits, float8 = torch.randn(2, size), torch.randn(2, 5), torch.float8_e4m3fn
    wide = torch.randn(5, 2 * inner, size) / size**0.5, torch.randn(5, size, inner) / inner**0.5
    if rows:
        scales = wide[0].abs().amax(-1) / 448, wide[1].abs().amax(-1) / 448
        gate_up, down = ((w / s[..., None]).to(float8) for w, s in zip(wide, scales, strict=True))
        wide = gate_up.float() * scales[0][..., None], down.float() * scales[1][..., None]
    else:
        (gate_up, first), (down, second) = (formats.quantise_blocks(each, float8) for each in wide)
        scales, wide = (first, second), (formats.spread_blocks(gate_up, first), formats.spread_blocks(down, second))
    weights, ids = ref.route(logits, top_k, True)
    got = moe.experts(x, weights, ids, gate_up, down, scales=scales)
    assert_close(got, ref.experts(x, weights, ids, *wide), torch.float32)


@pytest.mark.parametrize("tokens", [1, 3, 9, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_another_router_chose(tokens: int, dtype: torch.dtype) -> None:
    """Weights of any sum; ids that no expert here has, on either side, add nothing."""
    experts, top_k, size, inner = 6, 3, 32, 48
    x = torch.randn(tokens, size).to(dtype)
    gate_up = (torch.randn(experts * 2 * inner, size) / 6).to(dtype)
    down = (torch.randn(experts * size, inner) / 7).to(dtype)
    ids = torch.stack([torch.randperm(experts + 3)[:top_k] for _ in range(tokens)]).int() - 1
    weights = torch.rand(tokens, top_k) * 2.5
    got = moe.chosen_experts(x, ids, weights, gate_up, down)
    here = (ids >= 0) & (ids < experts)
    want = ref.chosen_experts(x.float(), ids.where(here, -1), weights, gate_up.float(), down.float())
    assert_close(got, want, dtype)
    wide = torch.cat([weights, weights], 1)[:, :top_k]  # not contiguous, as a router gives it
    assert torch.equal(moe.chosen_experts(x, ids, wide, gate_up, down), got)
