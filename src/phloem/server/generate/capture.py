"""`spec_capture` of `/generate`: hidden states of a prompt, for trainers of heads that draft (docs/draft-training.md).

As SpecForge asks for it: `store_id`, `sample_id`, `gen`, `replace`, `features` (our name to the one in the store) and
`passthrough` (tensors that are kept beside them). Its `auth_token` is not compared with anything: --api-key guards.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from phloem.core.errors import BadRequest
from phloem.server.routes.control import refused

if TYPE_CHECKING:
    from phloem.client.request import GenerateRequest
    from phloem.protocol.generate.body import GenerateBody
    from phloem.server.door import Door

SECONDS = 600.0  # behind a long step, on a slow disk
_KINDS: dict[str, type] = {
    "store_id": str, "sample_id": str, "gen": int, "replace": bool, "features": dict, "passthrough": list,
    "auth_token": str,
}  # fmt: skip
PASSED = ("int64", "int32", "float32", "bool")
MOST_PASSED = 8  # tensors
MOST_NUMBERS = 1 << 17  # of one
_OTHERS = "spec_capture: {}"


def check_capture(body: GenerateBody, asked: GenerateRequest) -> list[dict[str, Any]]:
    """What is wanted of each prompt. Raises BadRequest."""
    if body.stream or any(item.ids is None or item.sampling.n != 1 for item in asked.items):
        raise BadRequest("spec_capture goes with input_ids, n 1, and no stream", param="spec_capture")
    given = body.spec_capture if isinstance(body.spec_capture, list) else [body.spec_capture or {}]
    if len(given) != len(asked.items):
        raise BadRequest(f"spec_capture: {len(given)} for {len(asked.items)} prompts", param="spec_capture")
    for one in given:
        for key, value in one.items():
            kind = _KINDS.get(key)
            if kind is None and value:
                raise BadRequest(_OTHERS.format(f"{key} is not known here"), param=f"spec_capture.{key}")
            if kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
                raise BadRequest(_OTHERS.format(f"{key}: expected {kind.__name__}"), param=f"spec_capture.{key}")
        if not -(1 << 63) <= int(one.get("gen") or 0) < 1 << 63:  # it travels to the engine as 64 bits
            raise BadRequest(_OTHERS.format("gen: more than 64 bits"), param="spec_capture.gen")
        names = cast("dict[str, Any]", one.get("features") or {})
        if not all(isinstance(name, str) and name for name in names.values()):
            raise BadRequest(_OTHERS.format("features: expected names"), param="spec_capture.features")
        one["passthrough"] = [_passed(item) for item in _few(one.get("passthrough"))]
    return given


def _few(given: list[Any] | None) -> list[Any]:
    if given and len(given) > MOST_PASSED:
        raise BadRequest(_OTHERS.format(f"passthrough: at most {MOST_PASSED}"), param="spec_capture.passthrough")
    return given or []


def _passed(given: Any) -> dict[str, Any]:
    """A tensor that is kept beside the states. Raises BadRequest."""
    item = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    data, shape = item.get("data"), item.get("shape")
    numbers = cast("list[Any]", data) if isinstance(data, list) else []
    sizes = cast("list[Any]", shape) if isinstance(shape, list) else []
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    fits = whole and 0 < len(sizes) <= 8 and len(numbers) <= MOST_NUMBERS and math.prod(sizes) == len(numbers)
    known = isinstance(item.get("name"), str) and item.get("dtype") in PASSED
    held = all(isinstance(number, int | float) and abs(number) < 1 << 63 for number in numbers)  # as it travels
    if not (fits and known and held):
        kinds = ", ".join(PASSED)
        why = f"passthrough: expected name, dtype ({kinds}), shape, and data of at most {MOST_NUMBERS} numbers"
        raise BadRequest(_OTHERS.format(why), param="spec_capture.passthrough")
    return {key: item[key] for key in ("name", "data", "shape", "dtype")}


async def add_captured(
    door: Door, wanted: list[dict[str, Any]], asked: GenerateRequest, answers: list[dict[str, Any]]
) -> None:
    """Capture, and say in each answer's `meta_info` what was written where."""
    texts = [list(item.ids or ()) for item in asked.items]
    reply = await door.client.control("capture", SECONDS, texts=texts, asked=wanted)
    refused(reply)
    for answer, one in zip(answers, reply.data["captured"], strict=True):
        answer["meta_info"]["spec_capture"] = one
