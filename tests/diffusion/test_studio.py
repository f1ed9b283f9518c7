"""The engine of pictures on a painter without a model: joins, cancels, failures, memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from phloem.bench import images
from phloem.core.errors import BadRequest, PhloemError
from phloem.core.messages import Draw, FromEngine, Painted
from phloem.diffusion.conditions import Conditions
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import Family, as_bytes
from phloem.testing.painter import ToyPainter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.diffusion.family import Row


class Told(list[FromEngine]):
    def done(self, key: str) -> Painted:
        (found,) = [told for told in self if isinstance(told, Painted) and told.id == key and told.done]
        return found

    def pixels(self, key: str) -> bytes:
        assert not self.done(key).error, self.done(key).error
        return self.done(key).pixels


def draw(key: str, prompt: str = "a leaf", **fields: Any) -> Draw:
    return Draw(id=key, prompt=prompt, seed=fields.pop("seed", 1), **fields)


def studio(painter: ToyPainter | None = None, **settings: Any) -> tuple[Studio, Told]:
    told = Told()
    return Studio(painter or ToyPainter(), Settings(settings.pop("budget", 1000), **settings), told.append), told


def finish(made: Studio) -> None:
    while made.step():
        pass
    assert not made.jobs


MIXED = [
    draw("a", "a red leaf", seed=1, steps=3),
    draw("b", "a root", seed=2, steps=7, guidance=1.0),
    draw("c", "a tree with many words", seed=3, steps=5, negative="rain"),
]


def test_pictures_that_join_between_steps_come_out_as_alone() -> None:
    alone: dict[str, bytes] = {}
    for one in MIXED:
        made, told = studio()
        made.submit(one)
        finish(made)
        alone[one.id] = told.pixels(one.id)
    painter = ToyPainter()
    made, told = studio(painter)
    for one in MIXED:
        made.submit(one)
        for _ in range(3):
            made.step()
    finish(made)
    assert {one.id: told.pixels(one.id) for one in MIXED} == alone
    assert max(painter.batches) >= 3  # they have shared steps
    assert len({*alone.values()}) == 3


def test_a_seed_gives_the_same_picture_in_any_company_and_another_seed_another() -> None:
    made, told = studio()
    for key, seed in (("a", 5), ("b", 6), ("c", 5)):
        made.submit(draw(key, seed=seed))
    finish(made)
    assert told.pixels("a") == told.pixels("c") != told.pixels("b")


def test_one_that_is_cancelled_between_steps_is_answered_no_more_and_the_others_finish() -> None:
    made, told = studio()
    for key in "ab":
        made.submit(draw(key, steps=6))
    for _ in range(4):
        made.step()
    before = len([one for one in told if isinstance(one, Painted) and one.id == "a"])
    assert before > 0
    made.abort("a")
    finish(made)
    assert len([one for one in told if isinstance(one, Painted) and one.id == "a"]) == before
    assert told.pixels("b")


def test_a_row_that_breaks_the_step_ends_alone_and_no_step_counts_twice() -> None:
    made, told = studio()
    reference, expected = studio()
    for one in MIXED:
        made.submit(one)
        reference.submit(one)
    made.submit(draw("x", "a broken leaf"))
    finish(made)
    finish(reference)
    assert told.done("x").status == 500 and "broken" in told.done("x").error
    for one in MIXED:
        assert told.pixels(one.id) == expected.pixels(one.id)


def test_without_memory_for_a_step_smaller_ones_give_the_same_pictures() -> None:
    painter = ToyPainter(memory=40)  # two rows of 4 x 4, and not three
    made, told = studio(painter)
    reference, expected = studio()
    for one in MIXED:
        made.submit(one)
        reference.submit(one)
    finish(made)
    finish(reference)
    assert made.out_of_memory > 0 and max(painter.batches) == 2
    for one in MIXED:
        assert told.pixels(one.id) == expected.pixels(one.id)


def test_a_picture_that_is_too_large_alone_is_answered_507() -> None:
    made, told = studio(ToyPainter(memory=100))
    made.submit(draw("a", width=32, height=32))
    made.submit(draw("b"))
    finish(made)
    assert told.done("a").status == 507 and "32x32" in told.done("a").error
    assert told.pixels("b")


def test_what_gives_no_numbers_or_cannot_be_read_says_why() -> None:
    made, told = studio()
    for key, prompt in (("a", "nan"), ("b", "unreadable"), ("c", "a leaf")):
        made.submit(draw(key, prompt))
    finish(made)
    assert "no numbers" in told.done("a").error
    assert "encode" in told.done("b").error and told.done("b").status == 500
    assert told.pixels("c")


def test_what_the_model_does_not_take_is_refused_at_once_with_its_field() -> None:
    made, told = studio()
    made.submit(draw("a", true_cfg=2.0))
    made.submit(draw("b", steps=0))
    made.submit(draw("c", width=100, height=1000))
    made.submit(draw("d", film=True))
    assert [told.done(key).param for key in "abcd"] == ["true_cfg_scale", "num_inference_steps", "size", "model"]
    assert {told.done(key).status for key in "abcd"} == {400}
    assert told.done("d").code == "wrong_task"
    assert not made.step()


def test_a_full_queue_is_answered_503() -> None:
    made, told = studio(most=3, most_waiting=2)  # those in work do not wait
    for key in "abcdef":
        made.submit(draw(key))
    assert told.done("f").status == 503 and told.done("f").error.startswith("2 pictures are waiting")
    finish(made)
    assert [told.done(key).error for key in "abcde"] == [""] * 5


def test_previews_come_in_their_order_and_the_picture_last() -> None:
    made, told = studio()
    made.submit(draw("a", steps=8, previews=3))
    finish(made)
    shown = [(one.step, one.preview) for one in told if isinstance(one, Painted) and one.pixels]
    assert shown == [(2, 0), (4, 1), (6, 2), (8, -1)]
    sizes = {(one.width, one.height, len(one.pixels)) for one in told if isinstance(one, Painted) and one.pixels}
    assert sizes == {(4, 4, 48)}


def test_a_prompt_is_encoded_once_however_many_pictures_it_makes() -> None:
    painter = ToyPainter()
    made, told = studio(painter)
    for at in range(4):
        made.submit(draw(str(at), "a leaf", seed=at, negative="rain"))
    finish(made)
    assert sorted(painter.encoded) == ["a leaf", "rain"]
    assert told.done("3").text_tokens == 2


def test_the_oldest_prompts_are_forgotten_and_the_empty_one_never() -> None:
    painter = ToyPainter()
    held = Conditions(lambda text, _: painter.encode(text), max_bytes=8)
    for text in ("", "a", "b", "a", "", "b"):
        held.of(text)
    assert painter.encoded.count("") == 1
    assert painter.encoded == ["", "a", "b", "a", "b"]


def test_sizes_share_a_step_where_the_family_takes_lists() -> None:
    for mixed, expected in ((False, 2), (True, 4)):
        painter = ToyPainter(mixed_sizes=mixed)
        made, told = studio(painter)
        made.submit(draw("a", width=4, height=4))
        made.submit(draw("b", width=8, height=4))
        finish(made)
        assert max(painter.batches) == expected
        assert np.frombuffer(told.pixels("b"), np.uint8).size == 8 * 4 * 3


def test_alone_each_picture_has_steps_of_its_own() -> None:
    painter = ToyPainter()
    made, _ = studio(painter, alone=True)
    for one in MIXED:
        made.submit(one)
    finish(made)
    assert set(painter.batches) == {1, 2}  # with guidance, the two rows of one picture


class NoHostMemory(ToyPainter):
    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        if any(row.width > 16 for row in rows):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return super().forward(rows)


def test_an_allocator_of_host_memory_that_gives_up_is_no_memory_too() -> None:
    made, told = studio(NoHostMemory())
    made.submit(draw("a", width=32, height=32))
    made.submit(draw("b"))
    finish(made)
    assert told.done("a").status == 507 and "more memory" in told.done("a").error and made.out_of_memory == 1
    assert told.pixels("b")


def test_pixels_that_are_no_numbers_are_no_picture_and_no_preview_is_made_of_them() -> None:
    with pytest.raises(PhloemError, match="no numbers"):
        as_bytes(np.array([[[0.5, np.nan, 1.0]]], np.float32))
    assert as_bytes(np.array([[[0.0, 0.5, 1.0]]], np.float32)).tolist() == [[[0, 128, 255]]]
    made, told = studio()
    made.submit(draw("a", "nan", previews=3))
    finish(made)
    shown = [one for one in told if isinstance(one, Painted) and one.pixels]
    assert not shown and "no numbers" in told.done("a").error


def test_schedules_of_all_sizes_and_steps_that_clients_ask_for_are_not_kept_for_ever() -> None:
    scheduler = SimpleNamespace(sigmas=[1.0, 0.0], timesteps=[1000.0])
    some: Any = SimpleNamespace(_schedules={}, scheduler=scheduler, _set_schedule=lambda steps, tokens: None)
    for steps in range(1000):
        assert Family.schedule(some, steps, 16) == ([1.0, 0.0], [1000.0])
    assert 0 < len(some._schedules) <= 256


def test_a_measurement_of_nothing_is_refused_before_anything_is_made() -> None:
    for argv in (["--size", "abc"], ["--requests", "0"], ["--rounds", "0"], ["--rate", "-1"], ["--rate", "nan"]):
        with pytest.raises(BadRequest):
            images.main(argv)
