"""Reference meanings of ops that only some families need, against independent formulas or transformers' own code."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from phloem.kernels.ops import Ops
from phloem.kernels.specs import ExpertSpec, RouterSpec

OPS = Ops()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_id(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Weights by expert [T, E], whatever order they were chosen in."""
    return torch.zeros(len(ids), experts).scatter_(1, ids.long(), weights.float())


# Routers


def hf_router(kind: str, experts: int, **settings: Any) -> Any:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as ernie

    made = {
        "v2": v2.DeepseekV2TopkRouter, "v3": v3.DeepseekV3TopkRouter, "ernie": ernie.Ernie4_5_MoeTopKRouter
    }[kind]  # fmt: skip
    base = {"num_experts": experts, "num_local_experts": experts, "hidden_size": experts, "num_experts_per_tok": 3}
    router = made(SimpleNamespace(**base, **settings))
    router.weight.data = torch.eye(experts)  # what it is given are the logits
    return router


@pytest.mark.parametrize(
    ("kind", "settings", "spec"),
    [
        (
            "v3",
            {"routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
            RouterSpec(3, "sigmoid", True, eps=1e-20, scale=2.5, groups=4, keep=2),
        ),
        (
            "v3",
            {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
            RouterSpec(3, "sigmoid"),
        ),
        (
            "v2",
            {"routed_scaling_factor": 16.0, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
            RouterSpec(3, scale=16.0, groups=4, keep=2, group_best=1),
        ),
        (
            "v2",
            {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
            RouterSpec(3),
        ),
        ("ernie", {"moe_norm_min": 1e-12}, RouterSpec(3, "softmax", True, floor=1e-12)),
    ],
)
def test_routers_choose_as_transformers_does(kind: str, settings: Any, spec: RouterSpec) -> None:
    logits, bias = random(50, 16), random(16, seed=1) * 0.3
    router = hf_router(kind, 16, **settings)
    if kind == "v3":
        router.e_score_correction_bias = bias
    elif kind == "ernie":
        router.moe_statics.e_score_correction_bias.data = bias[None]
    else:
        bias = None
    with torch.no_grad():
        _, weights, ids = router(logits)
    ours = OPS.route(logits, bias, spec)
    assert ours[0].dtype == torch.int32
    torch.testing.assert_close(by_id(*ours, 16), by_id(ids, weights, 16))


def test_a_large_correction_bias_is_not_rounded_and_stays_out_of_the_weights() -> None:
    """Biases near 7 with a spread below bfloat16's step there decide who is chosen; weights are the scores'."""
    logits, bias = torch.zeros(1, 8), 6.9 + torch.arange(8) * 1e-3
    ids, weights = OPS.route(logits, bias, RouterSpec(2, "sigmoid", True, eps=1e-20))
    assert ids.tolist() == [[7, 6]]
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))


def test_a_softmax_over_the_chosen_alone() -> None:
    logits = random(20, 9)
    ids, weights = OPS.route(logits, None, RouterSpec(3, "chosen_softmax"))
    for row in range(20):
        best = sorted(range(9), key=lambda e: -float(logits[row, e]))[:3]
        assert ids[row].tolist() == best
        powers = [math.exp(float(logits[row, e])) for e in best]
        assert weights[row].tolist() == pytest.approx([p / sum(powers) for p in powers], rel=1e-5)


def test_a_sigmoid_of_the_chosen() -> None:
    logits = random(20, 9)
    ids, weights = OPS.route(logits, None, RouterSpec(1, "chosen_sigmoid"))
    assert ids[:, 0].tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(weights[:, 0], logits.amax(-1).sigmoid())


def test_the_plain_router_is_that_of_the_fused_op() -> None:
    from phloem.kernels import reference_experts

    logits = random(30, 8)
    weights, ids = reference_experts.route(logits, 3, True)
    ours = OPS.route(logits, None, RouterSpec(3, renormalise=True))
    assert torch.equal(ours[0], ids)
    assert torch.equal(ours[1], weights)


# Experts


def naive_expert(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
    inner = up @ x
    if not spec.gated:
        acts = {"relu2": lambda v: v.clamp_min(0) ** 2, "silu": F.silu, "gelu_tanh": lambda v: F.gelu(v, "tanh")}
        return down @ acts[spec.activation](inner)
    gate, up = inner.split(len(inner) // 2)
    if spec.activation == "swiglu_clamp":
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
        return down @ ((up + 1) * gate / (1 + torch.exp(-spec.alpha * gate)))
    act = F.silu(gate) if spec.activation == "silu" else 0.5 * gate * (
        1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    )  # fmt: skip
    return down @ (act * up)


@pytest.mark.parametrize(
    "spec",
    [
        ExpertSpec(4),
        ExpertSpec(4, "gelu_tanh"),
        ExpertSpec(4, "swiglu_clamp", limit=0.8),
        ExpertSpec(4, "relu2", gated=False),
        ExpertSpec(4, scale_input=True),
        ExpertSpec(2, first=2),
    ],
)
def test_experts_are_summed_by_weight(spec: ExpertSpec) -> None:
    x, rows = random(7, 6), 10 if spec.gated else 5
    up, down = random(spec.experts, rows, 6, seed=1), random(spec.experts, 6, 5, seed=2)
    ids, weights = OPS.route(random(7, 4, seed=3), None, RouterSpec(2, renormalise=True))
    out = OPS.experts(x, ids, weights, up.flatten(0, 1), down.flatten(0, 1), spec, None)
    expected = torch.zeros(7, 6)
    for token in range(7):
        for choice in range(2):
            expert, weight = int(ids[token, choice]) - spec.first, weights[token, choice]
            if 0 <= expert < spec.experts:
                read = x[token] * weight if spec.scale_input else x[token]
                part = naive_expert(read, up[expert], down[expert], spec)
                expected[token] += part if spec.scale_input else part * weight
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_experts_with_biases_are_gpt_oss_own() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = SimpleNamespace(
        intermediate_size=5,
        num_local_experts=4,
        hidden_size=6,
        swiglu_alpha=1.702,
        swiglu_limit=1.0,
        _experts_implementation="eager",
    )
    theirs: Any = GptOssExperts(config)
    for number, parameter in enumerate(theirs.parameters()):
        parameter.data = random(*parameter.shape, seed=number)
    x, (ids, weights) = random(9, 6, seed=8), OPS.route(random(9, 4, seed=9), None, RouterSpec(2, "chosen_softmax"))
    with torch.no_grad():
        expected = theirs(x, ids.long(), weights)
    pairs, pair_bias = theirs.gate_up_proj.data.transpose(1, 2), theirs.gate_up_proj_bias.data
    up = torch.cat((pairs[:, ::2], pairs[:, 1::2]), 1).flatten(0, 1)
    up_bias = torch.cat((pair_bias[:, ::2], pair_bias[:, 1::2]), 1).flatten()
    down, down_bias = theirs.down_proj.data.transpose(1, 2).flatten(0, 1), theirs.down_proj_bias.data.flatten()
    spec = ExpertSpec(4, "swiglu_clamp", limit=1.0)
    torch.testing.assert_close(OPS.experts(x, ids, weights, up, down, spec, (up_bias, down_bias)), expected)


# Elementwise, norms


def test_elementwise_ops() -> None:
    x, y = random(5, 6), random(5, 6, seed=1)
    torch.testing.assert_close(OPS.mul(x, y)[2, 3], x[2, 3] * y[2, 3])
    torch.testing.assert_close(OPS.sigmoid_mul(x, y), x / (1 + torch.exp(-y)))
    torch.testing.assert_close(OPS.gelu(x), 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    torch.testing.assert_close(OPS.gelu_tanh(x), 0.5 * x * (1 + tanh))
    torch.testing.assert_close(OPS.relu2(x), torch.where(x > 0, x * x, 0.0))
    torch.testing.assert_close(OPS.scale(x, 0.22), x * 0.22)
    torch.testing.assert_close(OPS.clip(x, 0.5), torch.where(x.abs() > 0.5, x.sign() * 0.5, x))
    torch.testing.assert_close(OPS.scale_rows(x, y[:, 0]), torch.diag(y[:, 0]) @ x)


def test_norms() -> None:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    x, gate, weight, bias = random(4, 12), random(4, 12, seed=1), random(12, seed=2), random(12, seed=3)
    torch.testing.assert_close(OPS.layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (12,), weight, bias, 1e-5))
    torch.testing.assert_close(OPS.layer_norm(x, weight, None, 1e-5), F.layer_norm(x, (12,), weight, None, 1e-5))
    for group in (12, 4):
        theirs: Any = MambaRMSNormGated(12, group, 1e-5)
        theirs.weight.data = weight
        torch.testing.assert_close(OPS.gated_rms_norm(x, gate, weight, 1e-5, group, False), theirs(x, gate).detach())
    theirs = Qwen3NextRMSNormGated(12, 1e-5)
    theirs.weight.data = weight
    torch.testing.assert_close(OPS.gated_rms_norm(x, gate, weight, 1e-5, 0, True), theirs(x, gate).detach())


# Positions in three axes


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_by_time_height_and_width(interleaved: bool) -> None:
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    sections = (4, 2, 2)
    positions = torch.tensor([[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])
    inverse = 1.0 / (100.0 ** (torch.arange(0, 16, 2).float() / 16))
    angles = torch.arange(8).float()[:, None] * inverse
    table = torch.stack((angles.cos(), angles.sin()), 1)
    rows, cos_sin = OPS.mrope_table(positions, table, sections, interleaved)
    assert rows.tolist() == list(range(7))
    made = qwen3.Qwen3VLTextRotaryEmbedding if interleaved else qwen2.Qwen2VLRotaryEmbedding
    theirs: Any = made.__new__(made)
    torch.nn.Module.__init__(theirs)
    theirs.inv_freq, theirs.attention_scaling, theirs.mrope_section = inverse, 1.0, list(sections)
    theirs.rope_type = "default"
    cos, sin = theirs(torch.zeros(1), positions[:, None])
    torch.testing.assert_close(cos_sin[:, 0], cos[0, :, :8])
    torch.testing.assert_close(cos_sin[:, 1], sin[0, :, :8])


# Recurrent mixers

STARTS = torch.tensor([0, 5, 6, 9], dtype=torch.int32)


def rows_of() -> list[tuple[int, int, int]]:
    starts = STARTS.tolist()
    return [(row, starts[row], starts[row + 1]) for row in range(3)]


@pytest.mark.parametrize("silu", [False, True])
def test_a_causal_convolution_sees_the_tokens_before(silu: bool) -> None:
    x, weight, bias, state = random(9, 4), random(4, 3, seed=1), random(4, seed=2), random(3, 4, 2, seed=3)
    before = state.clone()
    out, after = OPS.causal_conv(x, weight, bias, state, STARTS, silu)
    assert torch.equal(state, before)
    for row, first, last in rows_of():
        seen = [*state[row].T, *x[first:last]]
        for t in range(last - first):
            value = bias + sum(weight[:, w] * seen[t + w] for w in range(3))
            torch.testing.assert_close(out[first + t], F.silu(value) if silu else value)
        torch.testing.assert_close(after[row], torch.stack(seen[-2:]).T)


def test_a_mamba2_scan_is_attention_with_decay() -> None:
    """The dual form: y_t = C_t h_0 decayed + sum over s <= t of (C_t . B_s) decay(s..t) dt_s x_s, + skip x_t."""
    heads, size, groups, width = 4, 3, 2, 5
    x, dt = random(9, heads, size), random(9, heads, seed=1).exp() * 0.3
    decay, b, c = -random(heads, seed=2).exp(), random(9, groups, width, seed=3), random(9, groups, width, seed=4)
    skip, state = random(heads, seed=5), random(3, heads, size, width, seed=6)
    before = state.clone()
    out, after = OPS.mamba2_scan(x, dt, decay, b, c, skip, state, STARTS)
    assert torch.equal(state, before)
    for row, first, last in rows_of():
        for h in range(heads):
            g, total = h // 2, (dt[first:last, h] * decay[h]).cumsum(0)
            for t in range(last - first):
                y = total[t].exp() * state[row, h] @ c[first + t, g] + skip[h] * x[first + t, h]
                for s in range(t + 1):
                    seen = c[first + t, g] @ b[first + s, g] * (total[t] - total[s]).exp() * dt[first + s, h]
                    y = y + seen * x[first + s, h]
                torch.testing.assert_close(out[first + t, h], y, atol=1e-5, rtol=1e-4)
            end = total[-1].exp() * state[row, h]
            for s in range(last - first):
                more = (total[-1] - total[s]).exp() * dt[first + s, h]
                end = end + more * torch.outer(x[first + s, h], b[first + s, g])
            torch.testing.assert_close(after[row, h], end, atol=1e-5, rtol=1e-4)


def test_a_selective_scan_with_one_decay_for_a_channel_is_mamba2_s() -> None:
    """Each channel a head of one number, whose entries all decay alike."""
    channels, width = 4, 5
    x, dt = random(9, channels), random(9, channels, seed=1).exp() * 0.3
    decay, b, c = -random(channels, seed=2).exp(), random(9, width, seed=3), random(9, width, seed=4)
    skip, state = random(channels, seed=5), random(3, channels, width, seed=6)
    before = state.clone()
    out, after = OPS.selective_scan(x, dt, decay[:, None].expand(-1, width), b, c, skip, state, STARTS)
    assert torch.equal(state, before)
    y, end = OPS.mamba2_scan(x[..., None], dt, decay, b[:, None], c[:, None], skip, state[:, :, None], STARTS)
    torch.testing.assert_close(out, y.squeeze(-1))
    torch.testing.assert_close(after, end.squeeze(2))


def test_the_gated_delta_rule_is_transformers_own() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    heads, keys, values = 2, 4, 6
    q, k = (F.normalize(random(9, heads, keys, seed=s), dim=-1) for s in (0, 1))
    v, decay = random(9, heads, values, seed=2), -random(9, heads, seed=3).abs()
    beta, state = random(9, heads, seed=4).sigmoid(), random(3, heads, keys, values, seed=5)
    before = state.clone()
    out, after = OPS.gated_delta(q, k, v, decay, beta, state, STARTS, keys**-0.5)
    assert torch.equal(state, before)
    for row, first, last in rows_of():
        span = slice(first, last)
        parts = (item[None, span] for item in (q, k, v, decay, beta))
        expected, end = torch_chunk_gated_delta_rule(
            *parts, initial_state=state[row : row + 1], output_final_state=True, use_qk_l2norm_in_kernel=False
        )
        torch.testing.assert_close(out[span], expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(after[row], end[0], atol=1e-5, rtol=1e-4)


def test_steps_in_turn_are_one_long_step() -> None:
    x, weight = random(8, 4), random(4, 3, seed=1)
    start, whole = torch.zeros(1, 4, 2), torch.tensor([0, 8], dtype=torch.int32)
    all_at_once, end = OPS.causal_conv(x, weight, None, start, whole, True)
    state, parts = start, []
    for first, last in ((0, 1), (1, 2), (2, 7), (7, 8)):
        out, state = OPS.causal_conv(x[first:last], weight, None, state, torch.tensor([0, last - first]), True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts), all_at_once)
    torch.testing.assert_close(state, end)


# Sparse attention's indexer


def test_index_scores_and_the_best_of_them() -> None:
    q, k, weights = random(5, 3, 4), random(7, 4, seed=1), random(5, 3, seed=2)
    scores = OPS.index_scores(q, k, weights)
    for t in range(5):
        for key in range(7):
            expected = sum(float(weights[t, h]) * max(0.0, float(q[t, h] @ k[key])) for h in range(3))
            assert float(scores[t, key]) == pytest.approx(expected, abs=1e-5)
    lengths = torch.tensor([1, 2, 4, 7, 7])
    best = OPS.topk_indices(scores, lengths, 3)
    assert best.dtype == torch.int32
    for t, length in enumerate(lengths.tolist()):
        order = sorted(range(length), key=lambda key, t=t: (-float(scores[t, key]), key))[:3]
        assert best[t].tolist() == order + [-1] * (3 - len(order))
    assert OPS.topk_indices(torch.zeros(1, 5), torch.tensor([4]), 2).tolist() == [[0, 1]]
