"""Python names the arguments of native ops as the library exports them, and reads its constants."""

from __future__ import annotations

import ast
import ctypes
from pathlib import Path

import pytest
import torch
from linear_cases import needs_native

import phloem
from phloem.kernels import _native_recurrent, native
from phloem.kernels._native_runtime import Runtime, Unavailable, _agreed

pytestmark = needs_native
SOURCES = Path(phloem.__file__).parent


def calls() -> list[tuple[str, frozenset[str]]]:
    """(where, names of the arguments) of every native call in the source."""
    found: list[tuple[str, frozenset[str]]] = []
    for path in [*(SOURCES / "kernels").glob("*native*.py"), SOURCES / "bench" / "kernels.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("call", "ask"):
                where = f"{path.name}:{node.lineno}"
                names = frozenset(keyword.arg or "" for keyword in node.keywords)
                # One call serves all recurrent ops; what each passes is listed by `_KINDS`.
                if "" in names:
                    assert path.name == "_native_recurrent.py", f"{where}: ** hides names"
                elif names:
                    found.append((where, names))
    return found + [(name, kind.fields) for name, kind in _native_recurrent._KINDS.items()]


def test_every_call_in_the_source_names_all_arguments_of_an_op() -> None:
    exported = {frozenset(fields) for _, _, _, fields in native.runtime().library.ops()}
    wrong = [where for where, names in calls() if names not in exported]
    assert not wrong and len(calls()) > 25


def test_levels_of_an_op_take_the_same_arguments() -> None:
    seen: dict[str, tuple[str, list[str]]] = {}
    for name, level, kinds, fields in native.runtime().library.ops():
        assert len(kinds) == len(fields) == len(set(fields)) and set(kinds) <= set("pid")
        assert seen.setdefault(name, (kinds, fields)) == (kinds, fields), (name, level)


def test_wrong_names_are_refused_and_right_ones_may_come_in_any_order() -> None:
    rt = native.runtime()
    add = rt.op("add")
    x, out = torch.arange(6.0), torch.zeros(6)
    with pytest.raises(TypeError, match="add takes 8 arguments by name, not 1"):
        rt.call(add, 0, x=x.data_ptr())
    at = x.data_ptr()
    with pytest.raises(TypeError, match="add has no argument 'z'"):
        rt.call(add, 0, x=at, y=at, z=at, rows=1, n=6, x_stride=6, y_stride=6, out_stride=6)
    with pytest.raises(TypeError, match="by name"):
        rt.call(add, 0, at, at, at, 1, 6, 6, 6, 6)
    rt.call(add, 0, out_stride=6, n=6, rows=1, out=out.data_ptr(), y=at, x=at, y_stride=6, x_stride=6)
    assert torch.equal(out, 2 * x)


def test_more_places_than_are_remembered_still_find_their_slots() -> None:
    rt = native.runtime()
    add = rt.op("add")
    x, out = torch.arange(3.0), torch.zeros(3)
    for turn in range(100):
        given = {"x": x.data_ptr(), "y": x.data_ptr(), "out": out.data_ptr(), "rows": 1, "n": 3}
        given |= {"x_stride": 3, "y_stride": 3, "out_stride": 3}
        names = list(given)
        names = names[turn % 8 :] + names[: turn % 8]
        out.zero_()
        rt.call(add, 0, **{name: given[name] for name in names})
        assert torch.equal(out, 2 * x)


def test_asking_is_never_recorded() -> None:
    rt, found = native.runtime(), ctypes.c_int64()
    ops = native.table(1)
    assert ops.recorder is not None

    def step() -> torch.Tensor:
        rt.library.ask(rt.op("attention_scratch"), head_size=64, group=3, floats=ctypes.addressof(found))
        return ops.add(x, x)

    x = torch.ones(2, 4)
    graph, _ = ops.recorder().record(step)
    assert [call[0] for call in graph.calls()] == ["add"] and found.value > 64  # pyright: ignore


def test_constants_must_agree_between_levels() -> None:
    assert _agreed([("a", "portable", 1), ("a", "avx2", 1), ("b", "avx2", 2)]) == {"a": 1, "b": 2}
    with pytest.raises(Unavailable, match="disagree on a: 1, and 2 for avx2"):
        _agreed([("a", "portable", 1), ("a", "avx2", 2)])
    rt = native.runtime()
    assert rt.constant("attention.kSplitTokens") > 0 and rt.constant("sample.kMaxVocab") >= 1 << 20
    with pytest.raises(KeyError):
        rt.constant("attention.kNothing")


def test_an_older_library_is_refused_and_another_one_warned_about() -> None:
    class Older:
        def call(self) -> None: ...

    with pytest.raises(Unavailable, match="older build"):
        Runtime(Older())  # pyright: ignore[reportArgumentType]

    class Other(Older):
        def built_from(self) -> str:
            return "other"

        def constants(self) -> list[tuple[str, str, int]]:
            return []

    with pytest.warns(UserWarning, match="other sources"):
        Runtime(Other())  # pyright: ignore[reportArgumentType]
