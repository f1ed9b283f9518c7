"""What a step cache of pictures is asked for with, in requests and settings."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from phloem.core.errors import BadRequest

MOST_STEPS = 1000
MOST = sys.float_info.max  # of a number: JSON's integers may be longer
DEGREES = 5  # of a rescaling polynomial: four and the constant


class StepCaching(msgspec.Struct, frozen=True):
    """Blocks of a step that are left out, and when.

    `threshold`: below it they are; 0: never. `first` and `last`: blocks that are computed in each step. `warmup`: steps
    at the beginning that are computed; `in_a_row`: most that are not, 0: no bound. `coefficients`: TeaCache's
    polynomial, the highest power first; empty: the family's.
    """

    kind: str = "first_block"
    threshold: float = 0.0
    first: int = 1
    last: int = 0
    warmup: int = 0
    in_a_row: int = 0
    coefficients: tuple[float, ...] = ()


NONE = StepCaching()
# Where nothing else is said; the thresholds are moderate ones of those that the methods' authors name.
KINDS = {
    "first_block": StepCaching("first_block", 0.08),
    "teacache": StepCaching("teacache", 0.25, first=0, warmup=1),
    "dbcache": StepCaching("dbcache", 0.12, warmup=4, in_a_row=3),
}
NAMES = {
    "threshold": "threshold",
    "fn_compute_blocks": "first",
    "bn_compute_blocks": "last",
    "max_warmup_steps": "warmup",
    "max_continuous_cached_steps": "in_a_row",
    "coefficients": "coefficients",
}
OF_KIND = {
    "first_block": {"threshold"},
    "teacache": {"threshold", "max_warmup_steps", "max_continuous_cached_steps", "coefficients"},
    "dbcache": set(NAMES) - {"coefficients"},
}


def step_caching(kind: str, options: dict[str, Any], where: str = "cache") -> StepCaching:
    """`options`: by the names of requests. Raises BadRequest: it names the field."""
    if kind == "none":
        for name in options:
            raise BadRequest(f"{where}.{name}: kind none has no fields", param=f"{where}.{name}")
        return NONE
    if kind not in KINDS:
        raise BadRequest(f"{where}: kind is {kind!r:.40}, not one of {', '.join(KINDS)}, none", param=where)
    for name, value in options.items():
        at = f"{where}.{name}"
        if name not in NAMES:
            raise BadRequest(f"{at}: not one of kind, {', '.join(NAMES)}", param=at)
        if name not in OF_KIND[kind]:
            raise BadRequest(f"{at}: {kind} has {', '.join(sorted(OF_KIND[kind]))}", param=at)
        _check(at, name, value)
    given = {NAMES[name]: tuple(value) if name == "coefficients" else value for name, value in options.items()}
    return msgspec.structs.replace(KINDS[kind], **given)


def parsed(text: str, where: str) -> StepCaching:
    """A threshold of first-block caching, `KIND`, `KIND:THRESHOLD`, or JSON as requests have it. Raises BadRequest."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{where}: not JSON: {error}", param=where) from None
        return step_caching(str(found.pop("kind", "first_block")), found, where)
    kind, colon, threshold = text.partition(":")
    if not colon and kind not in (*KINDS, "none"):
        kind, colon, threshold = "first_block", ":", kind
    try:
        return step_caching(kind, {"threshold": float(threshold)} if colon else {}, where)
    except ValueError:
        usual = "0.08, teacache:0.25, or JSON"
        raise BadRequest(f"{where}: {text!r:.80} is not a step cache, such as {usual}", param=where) from None


def _check(at: str, name: str, value: Any) -> None:
    if name == "coefficients":
        numbers = isinstance(value, list | tuple) and all(
            isinstance(one, int | float) and not isinstance(one, bool) and -MOST <= one <= MOST for one in value
        )
        if not numbers or len(value) != DEGREES:
            raise BadRequest(f"{at}: {DEGREES} numbers, the highest power first", param=at)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{at}: {value!r:.40} is no number", param=at)
    least, most = (0, 1) if name == "threshold" else (0, MOST_STEPS)
    if name == "fn_compute_blocks":
        least = 1
    if not least <= value <= most or (name != "threshold" and int(value) != value):
        raise BadRequest(f"{at}: {value} is not in {least} to {most}", param=at)
