"""Pickled weights as records of what they say: nothing is imported, built or called, whatever a client sends.

This is no unpickler with a list of what is allowed: operations that make numbers, strings, lists, tuples and dicts do
so, and every object or call becomes a `Made` that holds its name and its arguments. Names are those of the few that
torch's and SGLang's senders write; everything else is refused by name.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

from phloem.core.errors import BadRequest

MOST_OPERATIONS = 2_000_000
_REDUCTIONS = "torch.multiprocessing.reductions"
_SGLANG = ("sglang.srt.model_executor", "sglang.srt.weight_sync", "sglang.srt.utils", "sglang.srt")
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8", "int8", "int16", "int32",
    "int64", "bool",
)  # fmt: skip
KNOWN = {
    *((_REDUCTIONS, f"rebuild_{name}") for name in ("tensor", "typed_storage", "storage_filename", "storage_empty")),
    *((_REDUCTIONS, f"rebuild_{name}") for name in ("storage_fd", "cuda_tensor")),
    ("multiprocessing.resource_sharer", "DupFd"),
    ("torch", "Tensor"),
    ("torch", "Size"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("torch.nn.parameter", "Parameter"),
    *(("torch", name) for name in DTYPES),
    *((f"{_SGLANG[0]}.model_runner", name) for name in ("LocalSerializedTensor", "FlattenedTensorMetadata")),
    (f"{_SGLANG[0]}.model_runner_components.weight_updater", "LocalSerializedTensor"),
    (f"{_SGLANG[1]}.tensor_bucket", "FlattenedTensorMetadata"),
    *((f"{where}.patch_torch", "_rebuild_cuda_tensor_modified") for where in _SGLANG[2:]),
}


@dataclass(frozen=True, slots=True)
class Named:
    """A name that stands in a payload: of a class, a function or a type of numbers."""

    name: str


@dataclass(slots=True)
class Made:
    """What would be the result of calling `name`; `state` is what would be set on it."""

    name: str
    args: tuple[Any, ...]
    state: dict[str, Any] | None = None


MOST_DIMENSIONS = 8


def count_in(found: Any) -> int:
    """A number from 0 on. Raises BadRequest."""
    if type(found) is not int or not 0 <= found < 1 << 48:
        raise BadRequest("the payload has a size that is no number from 0 on")
    return found


def shape_in(found: Any) -> tuple[int, ...]:
    """A shape, or strides. Raises BadRequest."""
    sizes = found.args[0] if isinstance(found, Made) and found.name == "Size" and len(found.args) == 1 else found
    if not isinstance(sizes, tuple | list) or len(sizes) > MOST_DIMENSIONS:
        raise BadRequest("the payload has a tensor without a shape")
    return tuple(count_in(size) for size in sizes)


_VALUES: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_GIVEN = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def records(data: bytes) -> Any:
    """What a pickle says.

    Raises:
        BadRequest: it is none, or holds an operation or a name that weights have no need of.
    """
    machine = _Machine()
    try:
        for number, (code, arg, _) in enumerate(pickletools.genops(data)):
            if number > MOST_OPERATIONS:
                raise BadRequest("the payload has too many parts")
            if code.name == "STOP":
                return machine.pop()
            machine.step(code.name, arg)
    except BadRequest:
        raise
    except Exception as error:
        raise BadRequest(f"the payload is no pickle of weights: {type(error).__name__}: {str(error)[:200]}") from None
    raise BadRequest("the payload is no pickle of weights: it has no end")


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks under marks
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def step(self, name: str, arg: Any) -> None:
        if name in _GIVEN:
            self._stack.append(arg)
        elif name in _VALUES:
            self._stack.append(_VALUES[name])
        elif name in _TUPLES:
            self._stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memo[len(self._memo) if name == "MEMOIZE" else arg] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[arg])
        elif name not in ("PROTO", "FRAME"):
            found = _OPERATIONS.get(name)
            if found is None:
                raise BadRequest(f"the payload has an operation that weights have no need of: {name}")
            found(self)

    def _to_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def empty_list(self) -> None:
        self._stack.append([])

    def empty_dict(self) -> None:
        self._stack.append({})

    def tuple(self) -> None:
        found = self._to_mark()
        self._stack.append(tuple(found))

    def append(self) -> None:
        self._extend([self.pop()])

    def appends(self) -> None:
        self._extend(self._to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise BadRequest("the payload appends to what is no list")
        target += items

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self._to_mark())

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise BadRequest("the payload sets items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise BadRequest("the payload has a dict with a key that is no text")
            target[key] = value

    def name(self) -> None:
        name, module = self.pop(), self.pop()
        if (module, name) not in KNOWN:
            raise BadRequest(f"the payload names {str(module)[:100]}.{str(name)[:100]}, which no weights have")
        self._stack.append(Named(name))

    def call(self) -> None:
        args, what = self.pop(), self.pop()
        if not isinstance(what, Named) or not isinstance(args, tuple):
            raise BadRequest("the payload calls what has no name")
        self._stack.append(Made(what.name, args))

    def build(self) -> None:
        state, what = self.pop(), self._stack[-1]
        if not isinstance(what, Made) or not isinstance(state, dict):
            raise BadRequest("the payload sets the state of what has none")
        what.state = state


_OPERATIONS = {
    "MARK": _Machine.mark,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_DICT": _Machine.empty_dict,
    "TUPLE": _Machine.tuple,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
}
