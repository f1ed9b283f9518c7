"""Slots are found wherever a layer keeps them."""

from __future__ import annotations

from typing import Any

from phloem.layers.weight import Cut, Layer, Weight


def slot(name: str) -> Weight:
    return Weight((name,), ((2, 3),), "matrix")


class Inner(Layer):
    def __init__(self, name: str) -> None:
        self.weight = slot(name)


class Outer(Layer):
    def __init__(self) -> None:
        self.first = slot("a")
        self.listed = [Inner("b"), Inner("c")]
        self.tupled: tuple[Any, ...] = (slot("d"), (Inner("e"),))
        self.named = {"x": Inner("f"), "y": [slot("g")]}
        self.again = self.first
        self.other = (1, "text", None)


def test_in_lists_tuples_and_dicts_each_once() -> None:
    assert [weight.names[0] for weight in Outer().weights()] == ["a", "b", "c", "d", "e", "f", "g"]


def test_shares_of_parts_stand_behind_each_other() -> None:
    weight = Weight(("q", "k"), ((8, 6), (4, 6)), "matrix")
    weight.cuts = ((Cut(0, 1, 4), Cut(1, 0, 2)), (Cut(0, 1, 2),))
    assert weight.spans(0) == ((2, 4), (0, 3))
    assert [weight.local(0), weight.local(1)] == [(2, 3), (2, 6)]
    assert [weight.rows(0), weight.rows(1)] == [slice(0, 2), slice(2, 4)]
