"""How a model of diffusion that draws its canvas anew fills it (DiffusionGemma).

A canvas begins as tokens drawn at random. Each pass says a token for every place; those about which the model is
surest are taken, the others are drawn at random again, so that no place is ever settled. The canvas is done when what
the model thinks likeliest has not changed and it is sure of all of it, or after so many passes; the likeliest tokens
are the answer (the entropy bound is Ben-Hamu et al.'s, 2025). Known tokens see those before them, a canvas's all.
Legend: C places of a canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.denoising import PARAM
from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

RENOISE = "Gemma4Renoise"
_LIMITS: dict[str, tuple[float, float]] = {
    "canvas_length": (1, 4096),
    "max_denoising_steps": (1, 4096),
    "entropy_bound": (0.0, 1e6),
    "t_min": (0.0, 100.0),
    "t_max": (1e-3, 100.0),
    "stability_threshold": (0, 64),
    "confidence_threshold": (0.0, 1e6),
}
_WHOLE = ("canvas_length", "max_denoising_steps", "stability_threshold")


@dataclass(frozen=True)
class Renoising:
    """The settings, by the names that the checkpoint's generation_config.json gives them."""

    canvas_length: int
    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    algorithm: str = RENOISE

    @property
    def unit(self) -> int:
        """Known tokens that are computed together: a canvas begins at any position."""
        return 1

    @property
    def canvas(self) -> int:
        """Places of a canvas."""
        return self.canvas_length

    def heat(self, passes: int) -> float:
        """What logits are divided by, after so many passes."""
        left = (self.max_denoising_steps - passes) / self.max_denoising_steps
        return self.t_min + (self.t_max - self.t_min) * left

    def accepted(self, entropy_C: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which places keep what was drawn there: those of the least entropy, while what stands before them sums up to
        the bound at most."""
        order = np.argsort(entropy_C, kind="stable")
        ranked = entropy_C[order]
        found = np.zeros(len(entropy_C), np.bool_)
        found[order] = np.cumsum(ranked, dtype=np.float32) - ranked <= self.entropy_bound
        return found

    def sure(self, entropy_C: NDArray[np.float32]) -> bool:
        """Whether the model is sure of the whole canvas."""
        return float(entropy_C.mean()) < self.confidence_threshold


def renoising(
    algorithm: str | None, settings: Mapping[str, Any], canvas: int, recommended: Mapping[str, Any]
) -> Renoising:
    """Of a checkpoint with such canvases; `settings` are those of `--dllm-algorithm-config`, `recommended` what its
    generation_config.json says.

    Raises:
        ConfigError: another algorithm, an unknown setting, or a value out of its range.
    """
    if algorithm not in (None, RENOISE):
        raise ConfigError(f"dllm_algorithm: {algorithm!r}; known for this model: {RENOISE}", param="dllm_algorithm")
    unknown = sorted(str(key)[:100] for key in settings if key not in _LIMITS)
    if unknown:
        raise ConfigError(f"{PARAM}: {', '.join(unknown)} not known here; known: {', '.join(_LIMITS)}", param=PARAM)
    sampler = recommended.get("sampler_config")
    said = {**recommended, **sampler} if isinstance(sampler, dict) else recommended
    known = {name: said[name] for name in _LIMITS if name != "canvas_length" and said.get(name) is not None}
    found = Renoising(
        **{
            "canvas_length": _number("canvas_length", canvas, "config.json"),
            **{name: _number(name, value, "generation_config.json") for name, value in known.items()},
            **{name: _number(name, value, PARAM) for name, value in settings.items()},
        }
    )
    if found.t_max <= found.t_min:
        raise ConfigError(f"{PARAM}: t_max is {found.t_max}, expected more than t_min {found.t_min}", param=PARAM)
    return found


def _number(name: str, value: Any, where: str) -> Any:
    low, high = _LIMITS[name]
    kind = int if name in _WHOLE else int | float
    if isinstance(value, bool) or not isinstance(value, kind):
        what = "whole number" if name in _WHOLE else "number"
        raise ConfigError(f"{where}: {name} is {value!r:.100}, expected a {what}", param=PARAM)
    if not low <= value <= high:
        raise ConfigError(f"{where}: {name} is {value}, expected {low:g} to {high:g}", param=PARAM)
    return value
