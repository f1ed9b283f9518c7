"""Which steps of a pipeline may begin while others are on their way."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from phloem.core.batch import Batch, StepOutput
from phloem.engine.ranks.waves import Starts, Waves


class First:
    """A first stage whose steps come back when they are told to."""

    ahead = 1

    def __init__(self) -> None:
        self.busy = 0.0
        self.coming: list[Future[tuple[torch.Tensor, torch.Tensor]]] = []
        self.handed: list[tuple[str, torch.Tensor]] = []

    def start(self, step: Any, kind: Any) -> Future[tuple[torch.Tensor, torch.Tensor]]:
        self.busy += 0.5
        self.coming.append(Future())
        return self.coming[-1]

    def landed(self, coming: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return coming.result()

    def hand(self, kind: Any, found: torch.Tensor) -> None:
        self.handed.append((kind, found))


class Chooser:
    def __init__(self, first: First) -> None:
        self._first = first

    def run(self, choice: Any) -> Any:
        tokens = self._first.handed[-1][1].numpy()

        class Here:
            def wait(self) -> list[np.ndarray[Any, Any]]:
                return [tokens, np.zeros(len(tokens), bool)]

        return Here()


class Easy:
    """Slots of rows that want their most likely token."""

    easy = np.ones(8, bool)


class Last:
    down = None


class Masks:
    def begin(self, slots: Any, wanted: Any) -> None:
        del slots, wanted


def batch(step: int, slots: list[int], **more: Any) -> Batch:
    rows = len(slots)
    one = np.ones(rows, np.int32)
    values: dict[str, Any] = {
        "query_lens": one, "prefix_lens": one * 4, "input_ids": one * 9, "outputs": one.copy(), **more
    }  # fmt: skip
    return Batch(step=step, slots=np.array(slots, np.int32), tables=(np.zeros((rows, 2), np.int32),), **values)


def waves() -> tuple[Waves, First]:
    first: Any = First()
    parts: Any = (Easy(), Masks(), Last(), Chooser(first))
    return Waves(first, lambda batch, wanted: None, *parts), first  # pyright: ignore


def test_steps_of_other_rows_begin_and_tokens_come_in_order() -> None:
    made, first = waves()
    assert isinstance(first, Starts) and made.most == 2
    one, two = batch(1, [0, 2]), batch(2, [1, 3])
    assert not made.waits(one)
    flights = [made.begin(one, 0.0)]
    assert not made.waits(two) and made.waits(batch(2, [2, 3])), "its token is still to come"
    flights.append(made.begin(two, 0.0))
    assert [flight.ready() for flight in flights] == [False, False]
    for number, coming in enumerate(first.coming):
        coming.set_result((torch.zeros(2, 4), torch.tensor([10 + number, 20 + number])))
    found: list[StepOutput] = [flight.land() for flight in flights]
    assert [output.tokens.tolist() for output in found] == [[10, 20], [11, 21]]
    assert [output.stage_seconds for output in found] == [0.5, 0.5]
    assert [output.counts.tolist() for output in found] == [[1, 1], [1, 1]]
    assert not made.waits(one)


def test_what_asks_the_head_apart_is_no_wave_and_waits() -> None:
    made, _ = waves()
    none = np.zeros(1, np.int32)
    scored = batch(2, [5], prompt_targets={0: np.array([3], np.int32)})
    assert made.takes(batch(1, [0])) and made.takes(batch(1, [0], outputs=none)) and not made.takes(scored)
    made.begin(batch(1, [0]), 0.0)
    assert made.waits(scored)
    assert not made.waits(batch(2, [5], outputs=none)), "a chunk goes on behind it"


def test_a_chunk_lands_when_all_stages_have_it() -> None:
    made, first = waves()
    none = np.zeros(1, np.int32)
    flight = made.begin(batch(1, [5], outputs=none), 0.0)
    assert not made.waits(batch(2, [5], outputs=none)), "the next one goes on behind it"
    first.coming[0].set_result((torch.zeros(0, 4), torch.zeros(0)))
    output = flight.land()
    assert output.counts.tolist() == [0] and not len(output.tokens) and not first.handed


def test_what_fails_on_its_way_fails_its_own_step() -> None:
    made, first = waves()
    flight = made.begin(batch(1, [0]), 0.0)
    first.coming[0].set_exception(RuntimeError("a stage has gone"))
    try:
        flight.land()
    except RuntimeError as error:
        assert "a stage has gone" in str(error)
    else:
        raise AssertionError("it landed")
    assert not made.waits(batch(2, [0]))
