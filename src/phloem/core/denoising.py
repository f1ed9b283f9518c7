"""What is asked of a language model of diffusion: how it fills a block, and what its requests cannot have.

Such a model writes block after block. A block begins as a *canvas* of mask tokens, behind what the prompt has of it.
Each pass says for every masked place a token and how likely that is; some of them are accepted and never change again.
A block without masks is done: its tokens are known, and those of the next one are asked for (Arriola et al., 2025, and
the decoders of SDAR and LLaDA 2.0). A model whose tokens see the *whole* text, masks to its end included, fills it
block after block too, but nothing can be kept of it: every pass computes all (Nie et al., 2025: LLaDA; Ye et al.,
2025: Dream).
Legend: n masked places of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from phloem.core.messages import Submit

USUAL = "LowConfidence"
THRESHOLD = 0.95
WHOLE = 1 << 30  # positions of a block that holds every text
USUAL_ANSWER = 128  # tokens of an answer, where a text is seen whole and nobody says how long it is
# Whose name says that it accepts by confidence, a fixed number of the best, or a fixed number from the left.
ALGORITHMS = (USUAL, "low_confidence_dynamic", "low_confidence_static", "sequential")
_NOT_HERE = {
    "JointThreshold": "edits accepted tokens",
    "JointThresholdInDel": "inserts and deletes tokens",
    "Gemma4Renoise": "draws the canvas anew, as DiffusionGemma does",
    "entropy_bounded": "accepts by entropy",
}
_KEYS = {"threshold": float, "steps": int, "denoising_steps": int, "block_size": int, "mask_id": int}
PARAM = "dllm_algorithm_config"


@dataclass(frozen=True)
class Denoising:
    """How blocks are filled. `steps`: passes in which a block is filled at most; each accepts its share of places."""

    block: int
    mask: int
    algorithm: str = USUAL
    threshold: float = THRESHOLD
    steps: int = 0  # 0: as many as the block has places
    whole: bool = False  # tokens see the whole text; blocks are those of the answer
    shifted: bool = False  # what stands at a place is said at the one before it

    @property
    def canvas(self) -> int:
        """Places of a canvas: the positions of a block that sees itself both ways."""
        return WHOLE if self.whole else self.block

    @property
    def unit(self) -> int:
        """Known tokens that are computed together."""
        return self.canvas

    def quota(self, number: int) -> int:
        """Places that pass `number` of a block, from 0 on, accepts at least."""
        steps = self.steps or self.block
        return max(1, self.block // steps + (number < self.block % steps))

    def accepted(self, confidence_n: NDArray[np.float32], number: int) -> NDArray[np.bool_]:
        """Which of the masked places are accepted in pass `number`, from left to right; at least one of them is."""
        least = min(self.quota(number), len(confidence_n))
        found = np.zeros(len(confidence_n), np.bool_)
        if self.algorithm == "sequential":
            found[:least] = True
            return found
        if self.algorithm != "low_confidence_static":
            found = confidence_n > self.threshold
        if found.sum() < least:
            found[np.argsort(-confidence_n, kind="stable")[:least]] = True
        return found


def denoising(
    algorithm: str | None,
    settings: Mapping[str, Any],
    block: int,
    mask: int,
    vocab: int,
    *,
    whole: bool = False,
    shifted: bool = False,
) -> Denoising:
    """Of a model whose checkpoint says `block` and `mask`; `settings` are those of `--dllm-algorithm-config`.

    Raises:
        ConfigError: an algorithm that is not served, an unknown setting, or a value out of its range.
    """
    name = USUAL if algorithm is None else algorithm
    if name not in ALGORITHMS:
        why = f" (it {_NOT_HERE[name]}, which is not served here)" if name in _NOT_HERE else ""
        raise ConfigError(f"dllm_algorithm: {name!r}{why}; known: {', '.join(ALGORITHMS)}", param="dllm_algorithm")
    unknown = sorted(str(key)[:100] for key in settings if key not in _KEYS)
    if unknown:
        raise ConfigError(f"{PARAM}: {', '.join(unknown)} not known here; known: {', '.join(_KEYS)}", param=PARAM)
    if "steps" in settings and "denoising_steps" in settings:
        raise ConfigError(f"{PARAM}: steps and denoising_steps are one setting: give one of them", param=PARAM)
    values: dict[str, Any] = {key: _number(key, value) for key, value in settings.items()}
    found = Denoising(
        block=values.get("block_size", block),
        mask=values.get("mask_id", mask),
        algorithm=name,
        threshold=values.get("threshold", THRESHOLD),
        steps=values.get("steps", values.get("denoising_steps", 0)),
        whole=whole,
        shifted=shifted,
    )
    _within("block_size", found.block, 1, 4096)
    _within("steps", found.steps, 0, found.block)
    _within("threshold", found.threshold, 0.0, 1.0)
    _within("mask_id", found.mask, 0, vocab - 1)
    return found


def _number(key: str, value: Any) -> Any:
    whole = _KEYS[key] is int
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ConfigError(f"{PARAM}: {key} is {value!r}, expected a {'whole ' if whole else ''}number", param=PARAM)
    return value


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{PARAM}: {key} is {value}, expected {low} to {high}", param=PARAM)


def check(submit: Submit) -> None:
    """Raise BadRequest for what has no meaning, or no exact one, where places are filled out of their order."""
    params = submit.sampling
    constraint = next((name for name in _CONSTRAINTS if getattr(params, name)), None)
    if constraint is not None:
        _refuse(params.constraint_name or constraint, "a grammar follows a text from left to right")
    if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0:
        names = ("frequency_penalty", "presence_penalty", "repetition_penalty")
        usual = (0.0, 0.0, 1.0)
        name = next(name for name, value in zip(names, usual, strict=True) if getattr(params, name) != value)
        _refuse(name, "penalties follow from the tokens before a place, which may not be known yet")
    if params.logit_bias:
        _refuse("logit_bias", "logits are taken as the model gives them")
    if params.processors:
        _refuse("custom_logit_processor", "processors look at the tokens before a place, which may not be known yet")
    if params.min_new_tokens:
        _refuse("min_new_tokens", "an end of the text may be accepted before what precedes it")
    if params.max_new_tokens == 0:
        _refuse("max_new_tokens", "a prompt alone has no log probabilities: it must be at least 1")
    if submit.logprob_start >= 0 and submit.return_logprob:
        _refuse("logprob_start_len", "log probabilities are those of places that are filled: a prompt has none")
    if submit.return_hidden:
        _refuse("return_hidden_states", "a token comes of several passes, each with states of its own")
    if submit.return_routed:
        _refuse("return_routed_experts", "a token comes of several passes, each with experts of its own")


_CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")


def _refuse(param: str, why: str) -> None:
    raise BadRequest(f"{param}: this model writes by diffusion: {why}", param=param, code="not_supported")
