"""Numbers of a schema as an engine can hold them: exactly, or narrowed inward, never changed.

The engines keep numbers as doubles. What a double cannot hold is refused with its path where it is a value, and moved
inward where it is a bound, so that everything that is generated stays valid. An engine reads a double as the integer it
is, or as the shortest decimal that means it: a bound is safe only where both lie inside.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Number = int | float

EXACT = 2**53  # every integer up to here is a double
LAST_INTEGER = 2**63 - 1024  # the largest double that the engines take for an integer
LAST_NUMBER = 9e18  # the largest bound of other numbers that they take
LEAST_NUMBER = 1e-30  # their patterns of smaller bounds nest too deeply
MAX_EXPONENT = 400  # beyond, a literal is not written out
MAX_COUNT = 2**31 - 1
MAX_FACTOR = 100_000  # of multipleOf, its decimal point left out: the automaton has as many states
MAX_LISTED = 1024  # values of a range that no double can bound

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "format", "$comment", "deprecated"})
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


class Rounded(float):
    """A number that a double cannot hold, and as which it was written; encoders need `as_double` for it."""

    text: str

    def __new__(cls, value: float, text: str) -> Rounded:
        made = super().__new__(cls, value)
        made.text = text
        return made


def read_number(text: str) -> Number:
    """A JSON literal with a fraction or an exponent: an integer where it means one, so that comparing is exact."""
    exact = Decimal(text)
    if not exact:
        return 0
    if abs(exact.adjusted()) > MAX_EXPONENT:
        return Rounded(math.copysign(0.0 if exact.adjusted() < 0 else 1e308, exact), text)
    if exact == exact.to_integral_value():
        return int(exact)
    value = float(text)
    return value if Decimal(repr(value)) == exact else Rounded(value, text)


def read_float(text: str) -> float:
    """A JSON literal of a request body: a float also where it means an integer, with its text where it was rounded."""
    exact = read_number(text)
    if isinstance(exact, Rounded):
        return exact
    value = float(text)
    return value if value == exact else Rounded(value, text)


def as_double(value: Any) -> float:
    """For encoders (`enc_hook`), which know no kinds of float."""
    if isinstance(value, Rounded):
        return float(value)
    raise TypeError(f"a {type(value).__name__} cannot be written")


def all_doubles(value: Any) -> Any:
    """The same value without what was written of its numbers."""
    if isinstance(value, dict):
        return {key: all_doubles(item) for key, item in value.items()}
    if isinstance(value, list):
        return [all_doubles(item) for item in value]
    return float(value) if isinstance(value, Rounded) else value


def write_exact(value: Any) -> str:
    """A value as JSON, numbers that were rounded when they were read as they were written."""
    texts: dict[str, str] = {}
    mark = uuid.uuid4().hex

    def marked(item: Any) -> Any:
        if isinstance(item, Rounded):
            texts[f"{mark}{len(texts)}"] = item.text
            return f"{mark}{len(texts) - 1}"
        if isinstance(item, dict):
            return {key: marked(part) for key, part in item.items()}
        return [marked(part) for part in item] if isinstance(item, list) else item

    if not _has_rounded(value):
        return json.dumps(value, ensure_ascii=False)
    written = json.dumps(marked(value), ensure_ascii=False)
    return re.sub(f'"({mark}[0-9]+)"', lambda found: texts[found[1]], written)


def _has_rounded(value: Any) -> bool:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Rounded):
            return True
        if isinstance(item, (dict, list)):
            stack.extend(item.values() if isinstance(item, dict) else item)
    return False


def rounded_at(value: Any, path: str) -> tuple[str, str] | None:
    """Path and text of a number inside a value that was rounded when it was read."""
    if isinstance(value, Rounded):
        return path, value.text
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
    return next((found for key, item in parts if (found := rounded_at(item, f"{path}/{key}"))), None)


def is_double(value: int) -> bool:
    """Whether an integer is a double that the engines write as the integer it is."""
    return abs(value) <= LAST_INTEGER and int(float(value)) == value


def is_64_bits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def big_at(value: Any, path: str, held: Callable[[int], bool] = is_double) -> tuple[str, str] | None:
    """Path and text of an integer inside a value that an engine, which knows those that are `held`, would change."""
    if isinstance(value, int) and not isinstance(value, bool):
        return None if held(value) else (path, str(value))
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
    return next((found for key, item in parts if (found := big_at(item, f"{path}/{key}", held))), None)


def narrow(nodes: list[tuple[str, Any]]) -> None:
    """Move the bounds of these schemas inward to what the engines hold, in place. They are all that one grammar has.

    Raises:
        BadRequest: naming the path, where nothing is left then although something was, or a count is beyond all text.
    """
    _factors(nodes)
    for path, node in nodes:
        if isinstance(node, dict):
            _counts(node, path)
            if any(_far(node.get(key)) for key in _BOUNDS):
                _range(node, path)


def _far(value: Any) -> bool:
    """Whether a bound is one of those that the engines round or do not take."""
    return value is not None and (abs(value) > EXACT or 0 < abs(value) < LEAST_NUMBER)


def _factors(nodes: list[tuple[str, Any]]) -> None:
    """Schemas that hold together ask for a common multiple: then that is bounded."""
    common = 1
    together = any(isinstance(node, dict) and "allOf" in node for _, node in nodes)
    for path, node in nodes:
        if isinstance(node, dict) and "multipleOf" in node:
            factor = _factor(node["multipleOf"])
            common = math.lcm(common, factor) if together else factor
            if common > MAX_FACTOR:
                raise BadRequest(f"{path}/multipleOf: {node['multipleOf']} has too many digits: at most {MAX_FACTOR}")


def _factor(value: Number) -> int:
    exact = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
    return int(exact.scaleb(-min(0, int(exact.as_tuple().exponent))))


def _counts(node: dict[str, Any], path: str) -> None:
    for what in ("Length", "Items", "Properties", "Contains"):
        low, high = node.get(f"min{what}", 0), node.get(f"max{what}")
        if low > MAX_COUNT:
            raise BadRequest(f"{path}/min{what}: {low} is more than any answer holds")
        if high is not None and high > MAX_COUNT:
            node[f"max{what}"] = MAX_COUNT


def _range(node: dict[str, Any], path: str) -> None:
    kinds = node.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    whole = "integer" in kinds and "number" not in kinds
    before = {key: node[key] for key in _BOUNDS if key in node}
    try:
        moved = {key: _inward(value, key, whole) if _far(value) else value for key, value in before.items()}
    except _Beyond as error:
        raise BadRequest(f"{path}/{error}: numbers beyond it cannot be held exactly") from None
    low = max((moved[key] for key in _BOUNDS[:2] if key in moved), default=-math.inf)
    high = min((moved[key] for key in _BOUNDS[2:] if key in moved), default=math.inf)
    opened = moved.get("exclusiveMinimum") == low or moved.get("exclusiveMaximum") == high
    if low < high or (low == high and not opened):
        node.update(moved)
        return
    values = _between(before) if kinds == ["integer"] and set(node) <= {"type", *_BOUNDS, *ANNOTATIONS} else []
    if not values:
        at = next(key for key, value in before.items() if _far(value))
        raise BadRequest(f"{path}/{at}: no number between these bounds can be held exactly")
    for key in before:
        del node[key]
    node["enum"] = values


def _between(bounds: dict[str, Number]) -> list[int]:
    """The integers of a range that no doubles can bound: there are few."""
    lows = [math.ceil(bounds["minimum"])] if "minimum" in bounds else []
    lows += [math.floor(bounds["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in bounds else []
    highs = [math.floor(bounds["maximum"])] if "maximum" in bounds else []
    highs += [math.ceil(bounds["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in bounds else []
    if not lows or not highs or min(highs) - max(lows) >= MAX_LISTED:
        return []
    return list(range(max(lows), min(highs) + 1))


class _Beyond(Exception):
    """The name of a bound beyond which no engine goes."""


def _inward(value: Number, key: str, whole: bool) -> Number:
    """The nearest bound that is no wider and is held exactly."""
    if key.endswith("inimum"):
        return -_lower(-value, key, whole)
    return _lower(value, key, whole)


def _lower(value: Number, key: str, whole: bool) -> Number:
    most: Number = LAST_INTEGER if whole else LAST_NUMBER
    if value < -most:
        raise _Beyond(key)
    if value > most:
        return most
    if abs(value) < LEAST_NUMBER:
        return 0 if value > 0 else -LEAST_NUMBER
    exact = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
    held = float(value)
    while max(Decimal(held), Decimal(repr(held))) > exact:
        held = math.nextafter(held, -math.inf)
    return math.floor(held) if whole else held


def big_in(node: dict[str, Any], path: str, held: Callable[[int], bool] = is_double) -> tuple[str, str] | None:
    """Path and text of an integer in `const` or `enum` that an engine would change."""
    values = ((node.get(key), f"{path}/{key}") for key in ("const", "enum"))
    return next((found for value, place in values if (found := big_at(value, place, held))), None)
