"""Rotary position embedding (Su et al., 2021) and the ways in which checkpoints stretch it."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Rotation

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext

SCALINGS = (
    "default", "linear", "dynamic", "ntk_alpha", "llama3", "yarn", "longrope", "proportional", "mrope", "divisors"
)  # fmt: skip
LOG = logging.getLogger("phloem.layers")


@dataclass(frozen=True)
class RopeSpec:
    """One kind of rotation. `scaling` holds the checkpoint's own keys; its `rope_type` is one of SCALINGS.

    `sections`: how many pairs turn by time, by height and by width, where positions have all three; see
    `Ops.mrope_table`.
    """

    rotary_size: int  # how many of a head's leading dimensions turn
    base: float
    scaling: tuple[tuple[str, Any], ...] = ()
    interleaved: bool = False  # neighbours are paired, not halves
    sections: tuple[int, ...] = ()
    sections_interleaved: bool = False

    def get(self, key: str, default: Any = None) -> Any:
        value = dict(self.scaling).get(key)
        return default if value is None else value


def rope_spec(
    config: dict[str, Any], head_size: int, layer_type: str | None = None, *, interleaved: bool = False
) -> RopeSpec:
    """The rotation that a config.json asks for, in the old spelling (`rope_theta`, `rope_scaling`) or the new one
    (`rope_parameters`, perhaps one per layer type).

    Raises:
        ModelLoadError: for a scaling that is not in SCALINGS.
    """
    found: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if layer_type is not None and isinstance(found.get(layer_type), dict):
        found = found[layer_type]
    base = _above_zero("rope_theta", found.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in SCALINGS:
        raise ModelLoadError(f"unknown rope_type {kind!r}; known: {', '.join(SCALINGS)}")
    share = float(found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    size = head_size if kind == "proportional" else int(head_size * share)
    if kind in ("dynamic", "ntk_alpha") and found.get("alpha"):
        base, kind = base * float(found["alpha"]) ** (size / (size - 2)), "default"
    scaling = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    scaling = {**scaling, "rope_type": kind}
    # `dynamic` stretches only beyond the trained length, which is also the longest context that we serve.
    if kind in ("default", "dynamic", "mrope"):
        scaling = {}
    elif kind == "longrope":
        scaling = _longrope_keys(config, scaling)
    elif config.get("max_position_embeddings"):
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        if kind == "yarn" and scaling.get("factor") is None:
            scaling["factor"] = config["max_position_embeddings"] / scaling["original_max_position_embeddings"]
    if kind in ("linear", "llama3", "yarn") and scaling.get("factor") is None:
        raise ModelLoadError(f"rope scaling {kind!r} lacks its factor, expected a number above 0")
    if kind in ("linear", "llama3", "yarn"):
        _above_zero(f"the factor of rope_type {kind!r}", scaling.get("factor"))
    sections = tuple(found.get("mrope_section") or ())
    return RopeSpec(
        size, base, tuple(sorted(scaling.items())), interleaved, sections, bool(found.get("mrope_interleaved", False))
    )


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ModelLoadError(f"{name} is {value!r}, expected a number above 0")
    return float(value)


def _longrope_keys(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Published files keep the original length beside `rope_scaling`, and the factor as a ratio of two lengths."""
    longest = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    original = original or longest
    scaling["original_max_position_embeddings"] = original
    if scaling.get("factor") is None and longest and original:
        scaling["factor"] = longest / original
    return scaling


def inverse_frequencies(spec: RopeSpec, context: int = 0) -> tuple[Tensor, float]:
    """(radians per token [rotary / 2] float32, factor on cos and sin). `context`: the longest that is served."""
    exponent = torch.arange(0, spec.rotary_size, 2, dtype=torch.int64).float() / spec.rotary_size
    inverse = 1.0 / (spec.base**exponent)
    kind = spec.get("rope_type", "default")
    try:
        if kind == "linear":
            return inverse / spec.get("factor"), 1.0
        if kind == "divisors":
            return inverse / torch.tensor(spec.get("divisors"), dtype=torch.float32), 1.0
        if kind == "llama3":
            return _llama3(spec, inverse), 1.0
        if kind == "yarn":
            return _yarn(spec, inverse)
        if kind == "longrope":
            return _longrope(spec, context)
        if kind == "proportional":
            turning = int(spec.get("partial_rotary_factor", 1.0) * spec.rotary_size // 2)
            inverse[turning:] = 0.0  # the other pairs stand still
            return inverse / spec.get("factor", 1.0), 1.0
    except (TypeError, RuntimeError, ValueError, ArithmeticError) as error:
        raise ModelLoadError(f"rope scaling {kind!r} lacks a number or has a wrong one: {error}") from None
    return inverse, 1.0


def longrope_factors(spec: RopeSpec, context: int) -> str:
    """Which list divides the frequencies, for the whole life of a server: switching by the longest position of a
    batch, as some do, would make cached keys depend on their neighbours."""
    return "long_factor" if context > spec.get("original_max_position_embeddings") else "short_factor"


def _longrope(spec: RopeSpec, context: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., 2024)."""
    factors = torch.tensor(spec.get(longrope_factors(spec, context)), dtype=torch.float32)
    exponent = torch.arange(0, spec.rotary_size, 2, dtype=torch.int64).float() / spec.rotary_size
    scale, factor = spec.get("attention_factor"), spec.get("factor", 1.0)
    if scale is None:
        original = spec.get("original_max_position_embeddings")
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (factors * spec.base**exponent), float(scale)


def _llama3(spec: RopeSpec, inverse: Tensor) -> Tensor:
    """Llama 3.1: slow frequencies are divided by the factor, fast ones kept, those between blended."""
    factor, low, high = spec.get("factor"), spec.get("low_freq_factor"), spec.get("high_freq_factor")
    turns = spec.get("original_max_position_embeddings") * inverse / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inverse / factor + blend * inverse


def _yarn(spec: RopeSpec, inverse: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023), with the bounds' names of its reference code."""
    original = spec.get("original_max_position_embeddings")
    factor = spec.get("factor")

    def bound(rotations: float) -> float:
        return spec.rotary_size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(spec.base))

    low, high = bound(spec.get("beta_fast", 32)), bound(spec.get("beta_slow", 1))
    if spec.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_size - 1)
    steps = torch.arange(spec.rotary_size // 2, dtype=torch.float32)
    ramp = ((steps - low) / ((high - low) or 0.001)).clamp(0, 1)

    def strength(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = spec.get("attention_factor")
    if scale is None:
        both = spec.get("mscale", 0.0), spec.get("mscale_all_dim", 0.0)
        scale = strength(both[0]) / strength(both[1]) if all(both) else strength(1.0)
    return inverse / factor * ramp + inverse * (1 - ramp), float(scale)


class Rope:
    """A table of cos and sin for every position. The step's attention applies it: see `AttentionStep`."""

    def __init__(self, ctx: BuildContext, spec: RopeSpec, max_positions: int) -> None:
        inverse, scale = inverse_frequencies(spec, max_positions)
        if spec.get("rope_type") == "longrope":
            LOG.info(
                "longrope: %s for every position, because %d tokens of context are served and the model began with %d",
                longrope_factors(spec, max_positions), max_positions, spec.get("original_max_position_embeddings"),
            )  # fmt: skip
        angles = torch.arange(max_positions, dtype=torch.int64).float()[:, None] * inverse
        table = torch.empty(max_positions, 2, len(inverse))  # [positions, 2, rotary / 2] float32
        torch.cos(angles, out=table[:, 0])
        torch.sin(angles, out=table[:, 1])
        self.ops, self.spec = ctx.ops, spec
        self.cos_sin = (table if scale == 1.0 else table.mul_(scale)).to(ctx.device)

    def at(
        self, positions: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0
    ) -> Rotation:
        """The rotation of a step's tokens at positions [T] or [3, T]; with norm weights, heads are normalised first."""
        cos_sin, spec = self.cos_sin, self.spec
        if spec.sections and positions.ndim == 2:
            positions, cos_sin = self.ops.mrope_table(positions, cos_sin, spec.sections, spec.sections_interleaved)
        return Rotation(positions, cos_sin, spec.interleaved, q_norm, k_norm, eps)
