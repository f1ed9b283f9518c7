"""What a client asks for: sampling parameters and how a request ends."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from phloem.core.errors import BadRequest, ModelLoadError

MAX_STOP_STRINGS = 64
MAX_LOGIT_BIAS = 4096


class RequestStatus(enum.Enum):
    """Where a request stands between admission and its last token."""

    WAITING_ON = "waiting_on"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Align(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of a request that hears: where its tokens attend, in place of an answer.

    Rows are the tokens from `start` on but the last; columns the first `states` of what is heard. `heads`: (layer,
    head) of the attention to it that count; `width`: of the median filter over the columns.
    """

    start: int
    states: int
    heads: list[tuple[int, int]]
    width: int = 7


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request ended, in the shape of `meta_info.finish_reason`.

    `type` is `stop` (with `matched`: a token id or a string), `length` (with `length`: tokens generated)
    or `abort` (with `message` and `status_code`, `param`: the field that is at fault, and `code`: why, for programs).
    """

    type: str
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None
    param: str | None = None
    retry_after: int | None = None  # seconds after which it may be asked again
    code: str | None = None


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen and when generation ends. Names and defaults are those of `/generate`."""

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    stop_regex: list[str] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    constraint_name: str | None = None  # what the client called the one of these that is set, where it has another name
    logit_bias: dict[str, float] = {}
    processors: dict[str, dict[str, Any]] = {}  # name in engine/processors -> its parameters
    sampling_seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    def validate(self, vocab_size: int) -> None:
        """Raise `BadRequest` naming the first field whose value cannot be served."""
        for name, low, high, open_low in _RANGES:
            _check_range(name, float(getattr(self, name)), low, high, open_low)
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise BadRequest(f"max_new_tokens must be at least 0, got {self.max_new_tokens}", param="max_new_tokens")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise BadRequest(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens})",
                param="min_new_tokens",
            )
        if self.top_k == 0 or self.top_k < -1:
            raise BadRequest(f"top_k must be -1 (off) or at least 1, got {self.top_k}", param="top_k")
        if len(self.stop) > MAX_STOP_STRINGS or any(not text for text in self.stop):
            raise BadRequest(f"stop takes at most {MAX_STOP_STRINGS} strings, none of them empty", param="stop")
        _check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        self._validate_bias(vocab_size)
        chosen = [name for name in ("json_schema", "regex", "ebnf", "structural_tag") if getattr(self, name)]
        if len(chosen) > 1:
            raise BadRequest(f"only one constraint at a time, got {' and '.join(chosen)}", param=chosen[1])

    def _validate_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise BadRequest(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens", param="logit_bias")
        for key, value in self.logit_bias.items():
            if not key.isascii() or not key.isdigit():
                raise BadRequest(f"logit_bias keys are token ids, got {key!r}", param="logit_bias")
            _check_ids("logit_bias", [int(key)], vocab_size)
            _check_range("logit_bias", value, -100.0, 100.0, False)


# What a model's generation_config.json may recommend, and chat takes for unset fields.
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_LARGEST = 2**63 - 1


def recommended(values: dict[str, Any], vocab_size: int, where: str = "generation_config.json") -> dict[str, Any]:
    """The sampling values of a `generation_config.json`, checked as a client's are, with their exact types.

    Raises:
        ModelLoadError: for a value of another type or out of its range; it names the file and the key.
    """
    found: dict[str, Any] = {}
    for name in RECOMMENDED:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelLoadError(f"{where}: {name} must be a number, got {value!r}")
        if abs(value) > _LARGEST:  # not for NaN, which the ranges refuse
            raise ModelLoadError(f"{where}: {name} is too large")
        if name != "top_k":
            found[name] = float(value)
        elif value % 1 == 0:
            found[name] = int(value) or -1  # transformers writes 0 for "off"
        else:
            raise ModelLoadError(f"{where}: top_k must be a whole number, got {value!r}")
    try:
        SamplingParams(**found).validate(vocab_size)
    except BadRequest as error:
        raise ModelLoadError(f"{where}: {error.message}") from None
    return found


_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("min_new_tokens", 0, 2**31 - 1, False),
    ("temperature", 0.0, 1e6, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
    ("presence_penalty", -2.0, 2.0, False),
    ("repetition_penalty", 0.0, 1e3, True),
    ("n", 1, 128, False),
)


def _check_range(name: str, value: float, low: float, high: float, open_low: bool) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if math.isnan(value) or not inside:
        bracket = "(" if open_low else "["
        raise BadRequest(f"{name} must be in {bracket}{low:g}, {high:g}], got {value:g}", param=name)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise BadRequest(f"{name}: token id {token} is not in [0, {vocab_size})", param=name)
