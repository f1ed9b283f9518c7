"""The native sparse layer against `reference_experts.moe`: every type, odd shapes, every level and thread count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import GGUF_TYPES, Source, as_int8, cases, levels, make_source, needs_native

from phloem.core.errors import ModelLoadError
from phloem.kernels import native, reference_models
from phloem.kernels import reference_experts as ref
from phloem.kernels.ops import Ops
from phloem.kernels.specs import RouterSpec
from phloem.quant import int4, int8

pytestmark = needs_native
CPU = torch.device("cpu")
CASES = cases(1, 3)
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(params=CASES)
def table(request: Any) -> Any:
    level, threads = request.param
    yield native.table(threads, level)
    native.table(2, None)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Sparse:
    """One sparse layer: packed, and dense for the reference."""

    def __init__(self, kind: str, experts: int, n: int, inner: int, quant: Any = None) -> None:
        def make(rows: int, columns: int, seed: int) -> Any:
            if kind in FLOATS:
                return Source.dense_of((random(rows, columns, seed=seed) / columns**0.5).to(FLOATS[kind]))
            width = 256 if kind.endswith("_K") else 32
            return make_source(kind, rows, columns // width, seed)

        self.dtype = FLOATS.get(kind, torch.bfloat16)
        self.experts = experts
        up = [make(inner, n, 2 * e + half) for e in range(experts) for half in range(2)]
        down = [make(n, inner, 1000 + e) for e in range(experts)]
        if quant is not None:
            up, down = [quant.wrap(part) for part in up], [quant.wrap(part) for part in down]
        self.up, self.down = up, down
        self.dense_up = torch.cat([part.dense(torch.float32) for part in up])
        self.dense_down = torch.cat([part.dense(torch.float32) for part in down])

    def pack(self, ops: Ops) -> tuple[Any, Any]:
        return (
            ops.prepare_experts(self.up, self.dtype, CPU, self.experts),
            ops.prepare_experts(self.down, self.dtype, CPU, self.experts),
        )

    def rounded(self, x: torch.Tensor, logits: torch.Tensor, k: int, renormalise: bool) -> torch.Tensor:
        """As the specification, in float64, with activations rounded as the kernels do."""
        kinds = {torch.bfloat16: lambda y: y.bfloat16().double()}
        take = as_int8 if self.up[0].kind != "dense" else kinds.get(self.dtype, lambda y: y.double())
        weights, ids = ref.route(logits, k, renormalise)
        up, down = (w.double().unflatten(0, (self.experts, -1)) for w in (self.dense_up, self.dense_down))
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t, row in enumerate(x):
            for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
                gate, other = (up[e] @ take(row).double()).chunk(2)
                hidden = torch.nn.functional.silu(gate) * other
                out[t] += weight * (down[e] @ take(hidden.float()).double())
        return out

    def want(self, x: torch.Tensor, logits: torch.Tensor, k: int, renormalise: bool) -> torch.Tensor:
        return ref.moe(x, logits, self.dense_up, self.dense_down, k, renormalise)


def run(ops: Ops, layer: Sparse, tokens: int, n: int, k: int, renormalise: bool = True) -> None:
    up, down = layer.pack(ops)
    x, logits = random(tokens, n, seed=tokens), random(tokens, layer.experts, seed=tokens + 1)
    got, want = ops.moe(x, logits, up, down, k, renormalise), layer.want(x, logits, k, renormalise)
    assert got.shape == want.shape and got.dtype == torch.float32
    # Activations are rounded twice, to 8 bits or to bfloat16; to nothing where the weights are float16 or float32.
    exact = layer.up[0].kind == "dense" and layer.dtype != torch.bfloat16
    assert (got - want).norm() < (1e-5 if exact else 4e-2) * want.norm()
    if tokens < 10:
        # A hidden value may fall to the next step; everything else is the sums' rounding.
        close = layer.rounded(x, logits, k, renormalise)
        assert (got - close).norm() < (1e-5 if exact else 4e-3) * close.norm()


@pytest.mark.some(28)
@pytest.mark.slow
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_quantised(table: Ops, kind: str) -> None:
    wide = kind.endswith("_K")
    layer = Sparse(kind, 5, 256 if wide else 96, 256 if wide else 64)
    for tokens in (1, 3, 90):
        run(table, layer, tokens, layer.dense_up.shape[1], 2)


@pytest.mark.some(22)
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("n,inner", [(48, 32), (33, 24), (70, 17)])
def test_dense(table: Ops, kind: str, n: int, inner: int) -> None:
    layer = Sparse(kind, 4, n, inner)
    for tokens in (1, 2, 77):
        run(table, layer, tokens, n, 3, renormalise=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", [int8, int4])
def test_online_quantisation(table: Ops, method: Any) -> None:
    layer = Sparse("BF16", 4, 80, 40, method)
    for tokens in (1, 50):
        run(table, layer, tokens, 80, 2)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 3, 5, 8, 17, 40, 64, 129, 300]),
    experts=st.integers(1, 20),
    k=st.integers(1, 20),
    n=st.integers(1, 90),
    inner=st.integers(1, 70),
    renormalise=st.booleans(),
    level=st.sampled_from(levels() or [None]),
    threads=st.integers(1, 4),
)
def test_any_shape(
    tokens: int, experts: int, k: int, n: int, inner: int, renormalise: bool, level: str, threads: int
) -> None:
    ops = native.table(threads, level)
    try:
        run(ops, Sparse("F32", experts, n, inner), tokens, n, min(k, experts), renormalise)
    finally:
        native.table(2, None)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F32", "BF16"])
def test_a_token_does_not_depend_on_its_company(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: any number of tokens, threads and panels give the result of the token alone."""
    layer = Sparse(kind, 6, 64, 64)
    x, logits = random(300, 64), random(300, 6, seed=1)
    results: list[torch.Tensor] = []
    for threads in (1, 3):
        ops = native.table(threads, invariant=True)
        up, down = layer.pack(ops)
        for panel in (128 << 20, 20_000):
            monkeypatch.setattr("phloem.kernels._native_moe.PANEL_BYTES", panel)
            results += [ops.moe(x[:count], logits[:count], up, down, 2, True) for count in (300, 1, 7, 33, 120)]
            results.append(torch.cat([ops.moe(x[i : i + 1], logits[i : i + 1], up, down, 2, True) for i in range(40)]))
    native.table(2)
    for result in results:
        assert torch.equal(result, results[0][: len(result)])


def test_experts_without_tokens_and_one_with_all(table: Ops) -> None:
    layer = Sparse("Q8_0", 8, 64, 32)
    up, down = layer.pack(table)
    for tokens in (1, 6, 120):
        x, logits = random(tokens, 64), random(tokens, 8, seed=2)
        logits[:, 5] += 50
        logits[:, [0, 7]] -= 50
        got, want = table.moe(x, logits, up, down, 2, False), layer.want(x, logits, 2, False)
        assert (got - want).norm() < 4e-2 * want.norm()


def test_ties_take_the_first_experts(table: Ops) -> None:
    layer = Sparse("F32", 9, 32, 16)
    up, down = layer.pack(table)
    x, logits = random(3, 32), torch.zeros(3, 9)
    logits[1, 4] = logits[1, 8] = 1.0
    torch.testing.assert_close(table.moe(x, logits, up, down, 3, True), layer.want(x, logits, 3, True))


@pytest.mark.parametrize("where", ["x", "logits", "all"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_what_is_not_a_number_stays_in_its_row(table: Ops, where: str, tokens: int) -> None:
    layer = Sparse("Q4_1", 6, 64, 32)
    up, down = layer.pack(table)
    x, logits = random(tokens, 64), random(tokens, 6, seed=3)
    if where == "x":
        x[1, 7] = float("nan")
    elif where == "logits":
        logits[1, 5] = float("nan")
    else:
        logits[1] = float("nan")
    got = table.moe(x, logits, up, down, 2, True)
    assert got[1].isnan().all()
    assert got[torch.arange(tokens) != 1].isfinite().all()


def test_masked_experts_are_never_taken(table: Ops) -> None:
    layer = Sparse("F32", 6, 32, 16)
    up, down = layer.pack(table)
    x, logits = random(4, 32), random(4, 6, seed=3)
    logits[:, 1:4] = float("-inf")
    torch.testing.assert_close(table.moe(x, logits, up, down, 3, True), layer.want(x, logits, 3, True))


def test_gate_and_up_of_two_types(table: Ops) -> None:
    """They cannot be combined where they are made."""
    layer = Sparse("Q8_0", 3, 64, 32)
    layer.up[1::2] = [make_source("Q4_1", 32, 2, 40 + e) for e in range(3)]
    layer.dense_up = torch.cat([part.dense(torch.float32) for part in layer.up])
    for tokens in (1, 60):
        run(table, layer, tokens, 64, 2)


def test_rows_come_back(table: Ops) -> None:
    """Live updates read one projection of one expert out of the stacked matrix."""
    layer = Sparse("Q5_0", 3, 64, 40)
    up, down = layer.pack(table)
    for packed, dense in ((up, layer.dense_up), (down, layer.dense_down)):
        assert packed.shape == tuple(dense.shape)
        assert torch.equal(table.embedding(torch.arange(len(dense)), packed, 1.0), dense)


def test_views_and_nothing(table: Ops) -> None:
    layer = Sparse("F32", 4, 32, 16)
    up, down = layer.pack(table)
    wide, logits = random(5, 80), random(5, 9, seed=1)[:, 2:6]
    x = wide[:, 10:42]
    torch.testing.assert_close(table.moe(x, logits, up, down, 2, True), layer.want(x, logits, 2, True))
    assert table.moe(x[:0], logits[:0], up, down, 2, True).shape == (0, 32)


def test_recorded_step_routes_anew() -> None:
    """The choice of experts is made when the step is replayed, also by a pool that has become larger since."""
    ops, rt = native.table(2), native.runtime()
    layer = Sparse("Q8_0", 8, 64, 32)
    router = ops.prepare_linear([make_source("dense", 8, 2, 77)], torch.bfloat16, CPU)
    up, down = layer.pack(ops)
    for tokens in (1, 4, 150):
        x = random(tokens, 64)

        def step(x: torch.Tensor = x) -> torch.Tensor:
            return ops.moe(x, ops.linear(x, router)[0], up, down, 2, True)

        graph, out = native.Recorder(rt).record(step)
        first = step()
        assert torch.equal(out, first)
        x.copy_(random(tokens, 64, seed=9))
        rt.library.set_threads(4)
        graph.replay()
        assert torch.equal(out, step()) and not torch.equal(out, first)
        rt.library.set_threads(2)


@pytest.mark.some(10)
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_that_were_chosen_elsewhere(table: Ops, tokens: int) -> None:
    layer = Sparse("BF16", 5, 96, 32, int4)
    up, down = layer.pack(table)
    x, weights = random(tokens, 96, seed=4), random(tokens, 3, seed=5).abs()
    # Of another place (-1, 5 and more), the same one twice, and tokens of which nothing is here.
    ids = torch.randint(-1, 7, (tokens, 3), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    ids[tokens // 2] = torch.tensor([-1, 9, -1], dtype=torch.int32)
    got = table.chosen_experts(x, ids, weights, up, down)
    want = ref.chosen_experts(x, ids, weights, layer.dense_up, layer.dense_down)
    assert (got - want).norm() <= 4e-2 * want.norm() and not got[tokens // 2].any()
    # By its own router's choice it is the same op.
    logits = random(tokens, 5, seed=7)
    scores, chosen = ref.route(logits, 2, True)
    same = table.chosen_experts(x, chosen, scores, up, down)
    assert (same - table.moe(x, logits, up, down, 2, True)).norm() <= 1e-6 * same.norm()
    split = chosen.clone(), chosen.clone()
    split[0][chosen > 2], split[1][chosen <= 2] = -1, -1
    both = sum(table.chosen_experts(x, part, scores, up, down) for part in split)
    assert torch.allclose(both, same, rtol=1e-5, atol=1e-6)


def test_wrong_inputs_are_refused() -> None:
    ops = native.table(2)
    layer = Sparse("F32", 4, 32, 16)
    up, down = layer.pack(ops)
    x, logits = random(3, 32), random(3, 4)
    with pytest.raises(ValueError, match="weights of 4 and 4 experts"):
        ops.moe(x, random(3, 5), up, down, 2, True)
    with pytest.raises(ValueError, match="take 32 inputs, not 31"):
        ops.moe(x[:, :31], logits, up, down, 2, True)
    with pytest.raises(ValueError, match="5 experts of 4"):
        ops.moe(x, logits, up, down, 5, True)
    with pytest.raises(ValueError, match="down takes 32"):
        ops.moe(
            x, logits, up, ops.prepare_experts([Source.dense_of(random(32, 32))] * 4, torch.float32, CPU, 4), 2, True
        )
    with pytest.raises(TypeError, match="float32"):
        ops.moe(x.half(), logits, up, down, 2, True)
    with pytest.raises(TypeError, match="int32 and float32"):
        ops.chosen_experts(x, torch.zeros(3, 2, dtype=torch.int64), random(3, 2), up, down)
    with pytest.raises(ValueError, match="of 3 tokens"):
        ops.chosen_experts(x, torch.zeros(2, 2, dtype=torch.int32), random(2, 2), up, down)
    mixed = [make_source(kind, 32, 2, 1) for kind in ("Q8_0", "Q8_0", "Q8_0", "Q4_1")]
    with pytest.raises(ModelLoadError, match="first expert"):
        ops.prepare_experts(mixed, torch.float32, CPU, 2)


ROUTERS = [
    RouterSpec(4, "sigmoid", renormalise=True, eps=1e-20, scale=2.5, groups=8, keep=4),
    RouterSpec(3, "sigmoid"),
    RouterSpec(5, scale=16.0, groups=4, keep=2, group_best=1),
    RouterSpec(3, "softmax", True, floor=1e-12),
    RouterSpec(2, "chosen_softmax"),
]


@pytest.mark.parametrize("spec", ROUTERS, ids=lambda spec: f"{spec.score}-{spec.groups}")
def test_routers_choose_as_the_reference(table: Any, spec: RouterSpec) -> None:
    for experts, tokens in ((32, 1), (40, 67), (256, 9)):
        logits, bias = random(tokens, experts + 3)[:, :experts], random(experts, seed=1) * 0.3
        for correction in (None, bias):
            ids, weights = table.route(logits, correction, spec)
            wanted_ids, wanted = reference_models.route(logits, correction, spec)
            assert torch.equal(ids, wanted_ids)
            torch.testing.assert_close(weights, wanted)


@pytest.mark.parametrize("about", [6.9, 1e8])
def test_a_large_correction_decides_and_stays_out_of_the_weights(about: float) -> None:
    """Near 7 its spread is below a step of bfloat16; beside 1e8 the score itself is lost in the sum."""
    bias = about + torch.arange(8, dtype=torch.float32) * (1e-3 if about < 10 else 1e3)
    spec = RouterSpec(2, "sigmoid", True, eps=1e-20, scale=2.5)
    for table in (Ops(), native.table(2)):
        ids, weights = table.route(torch.zeros(3, 8), bias, spec)
        assert ids.tolist() == [[7, 6]] * 3
        torch.testing.assert_close(weights, torch.full((3, 2), 1.25))


def test_of_equal_scores_the_first_experts_are_chosen_and_what_is_no_number_chooses_some_expert() -> None:
    spec, table = RouterSpec(3, "sigmoid", True, groups=4, keep=2), native.table(2)
    assert table.route(torch.zeros(2, 16), None, spec)[0].tolist() == [[0, 1, 2]] * 2
    ids, weights = table.route(torch.full((1, 16), float("nan")), None, spec)
    assert ((ids >= 0) & (ids < 16)).all() and weights.isnan().all()
    assert table.route(torch.zeros(0, 16), None, spec)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="groups=3"):
        table.route(torch.zeros(1, 16), None, RouterSpec(3, "sigmoid", groups=3))


def test_a_recorded_router_is_replayed_with_other_logits() -> None:
    table, spec, fixed = native.table(2), ROUTERS[0], torch.zeros(3, 32)
    bias, seen = random(32, seed=1), dict[str, torch.Tensor]()

    def step() -> torch.Tensor:
        seen["ids"], weights = table.route(fixed, bias, spec)
        return weights

    graph, got = native.Recorder(native.runtime()).record(step)
    ids = seen["ids"]
    fixed.copy_(random(3, 32, seed=5))
    graph.replay()
    wanted_ids, wanted = reference_models.route(fixed, bias, spec)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(got, wanted)
