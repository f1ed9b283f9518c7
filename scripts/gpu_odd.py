"""For scripts/gpu_kernels.py: experts of any kind, weights of 4 bits, and routers that score the chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels import reference_experts as experts_ref
from phloem.kernels import reference_models as models
from phloem.kernels.specs import ExpertSpec, RouterSpec

if TYPE_CHECKING:
    from gpu_kernels import Kernels

Pairs = list[tuple[Tensor, Tensor]]


def narrow(kernels: Kernels, kind: str, count: int, rows: int, columns: int) -> Any:
    """Random weights of 4 bits of so many experts: integers in groups of 128 or 32, or floats."""
    from phloem.kernels.triton import nibbles
    from phloem.kernels.triton.gemm_int import pack_int4
    from phloem.kernels.triton.weights import Int4Experts, Mxfp4Weight

    codes, group = kernels.ints(0, 16, count * rows, columns), min(columns, 128) if kind == "int4" else 32
    shape = count, columns // group, rows
    if kind == "mxfp4":
        return Mxfp4Weight(nibbles.pack_mxfp4(codes), kernels.ints(118, 123, *shape).to(torch.uint8), kernels.dtype)
    scale = (kernels.randn(*shape).float().abs() / 8 + 0.02) * columns**-0.5
    zero = kernels.ints(0, 16, *shape).half() if kind == "int4, zero points" else None
    return Int4Experts(pack_int4(codes, group), scale.half(), zero, kernels.dtype)


def experts_any(kernels: Kernels) -> Pairs:
    """Clamped ones with biases, ones without a gate (some elsewhere), and ones whose weights scale their input."""
    from phloem.kernels.triton import moe

    count, width, inner, k = (4, 64, 48, 2) if kernels.tiny else (32, 1032, 376, 4)
    specs = [
        ExpertSpec(count, "swiglu_clamp", limit=1.5), ExpertSpec(count, "relu2", gated=False, first=1),
        ExpertSpec(count, scale_input=True),
    ]  # fmt: skip
    pairs: Pairs = []
    for spec in specs:
        rows = count * inner * (2 if spec.gated else 1)
        up = kernels.randn(rows, width, by=width**-0.5)
        down, biases = kernels.randn(count * width, inner, by=inner**-0.5), None
        if spec.activation == "swiglu_clamp":
            biases = kernels.randn(rows).float(), kernels.randn(count * width).float()
        for tokens in (1, 9) if kernels.tiny else (1, 40, 2000):
            x, ids = kernels.randn(tokens, width), kernels.ints(0, count, tokens, k).int()
            weights = kernels.randn(tokens, k).float().abs()
            got = moe.experts_op(x, ids, weights, up, down, spec, biases)
            pairs.append((got, models.experts(x.float(), ids, weights, up.float(), down.float(), spec, biases)))
    return pairs


def experts_4bit(kernels: Kernels) -> Pairs:
    """Routed by the op, and as gpt-oss has them: of few rows an expert and of many."""
    from phloem.kernels.triton import moe
    from phloem.kernels.triton.weights import widened

    count, width, inner, k = (4, 64, 64, 2) if kernels.tiny else (32, 1024, 384, 4)
    spec, pairs = ExpertSpec(count, "swiglu_clamp"), Pairs()
    for kind in ("int4", "int4, zero points", "mxfp4"):
        up, down = narrow(kernels, kind, count, 2 * inner, width), narrow(kernels, kind, count, width, inner)
        dense = widened(up).float(), widened(down).float()
        biases = kernels.randn(count * 2 * inner).float(), kernels.randn(count * width).float()
        for tokens in (2, 9) if kernels.tiny else (1, 4, 40, 400, 2000):
            x, logits = kernels.randn(tokens, width), kernels.randn(tokens, count, by=2)
            pairs.append((moe.moe(x, logits, up, down, k, True), experts_ref.moe(x.float(), logits, *dense, k, True)))
            weights, ids = experts_ref.route(logits, k, True)
            got = moe.experts_op(x, ids, weights, up, down, spec, biases)
            pairs.append((got, models.experts(x.float(), ids, weights, *dense, spec, biases)))
    return pairs


def gemm_mxfp4(kernels: Kernels) -> Pairs:
    from phloem.kernels.triton import gemm_mxfp4
    from phloem.kernels.triton.weights import widened

    features, outputs = (288, 70) if kernels.tiny else (2880, 1500)
    weight, bias, pairs = narrow(kernels, "mxfp4", 1, outputs, features), kernels.randn(outputs), Pairs()
    for tokens in (1, 20) if kernels.tiny else (1, 33, 500):
        x = kernels.randn(tokens, features)
        got = gemm_mxfp4.mxfp4_gemm(x, weight.packed, weight.scale, bias)
        pairs.append((got, F.linear(x.float(), widened(weight).float(), bias.float())))
    return pairs


def late_router(kernels: Kernels) -> Pairs:
    from phloem.kernels.triton import route

    pairs, logits = Pairs(), kernels.randn(33, 32, by=3)
    for spec in (RouterSpec(4, "chosen_softmax"), RouterSpec(1, "chosen_sigmoid")):
        got, want = route.route_op(logits, None, spec), models.route(logits, None, spec)
        pairs += [(got[0], want[0]), (got[1], want[1])]
    return pairs
