"""What is drawn next: pure, without a model."""

from __future__ import annotations

import pytest

from phloem.core.errors import BadRequest
from phloem.core.messages import Draw
from phloem.diffusion.queue import POLICIES, Item, Shares, next_item
from phloem.diffusion.request import Facts, Guidance, Job, Stage, preview_steps

FACTS = Facts("toy", 16, 512, 512, 20, 3.5, 1 << 20)


def job(number: int, stage: Stage = Stage.DENOISE, tokens: int = 100, steps: int = 10, **more: object) -> Job:
    made = Job(Draw(id=str(number), prompt="", seed=0), number, 64, 64, steps, Guidance(), tokens, stage)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def ids(item: Item | None) -> list[str]:
    return [] if item is None else [one.id for one in item.jobs]


def test_decode_comes_before_encode_and_encode_before_the_next_step() -> None:
    jobs = [job(1), job(2, Stage.ENCODE), job(3, Stage.DECODE), job(4, Stage.DECODE)]
    found = next_item(jobs, 1000, "fcfs", 8)
    assert found is not None and (found.stage, ids(found)) == (Stage.DECODE, ["3"])
    found = next_item(jobs[:2], 1000, "fcfs", 8)
    assert found is not None and (found.stage, ids(found)) == (Stage.ENCODE, ["2"])
    assert next_item([], 1000, "fcfs", 8) is None


def test_no_more_are_encoded_than_may_run() -> None:
    jobs = [job(1), job(2), job(3, Stage.ENCODE)]
    found = next_item(jobs, 1000, "fcfs", 2)
    assert found is not None and (found.stage, ids(found)) == (Stage.DENOISE, ["1", "2"])


def test_a_step_is_filled_to_the_budget_and_takes_the_first_whatever_it_has() -> None:
    jobs = [job(1), job(2, tokens=150), job(3), job(4)]
    assert ids(next_item(jobs, 310, "fcfs", 8)) == ["1", "2"]
    assert ids(next_item(jobs, 210, "fcfs", 8)) == ["1", "3"]
    assert ids(next_item(jobs, 0, "fcfs", 8)) == ["1"]


def test_only_pictures_of_one_key_share_a_step_and_one_that_failed_is_tried_alone() -> None:
    assert ids(next_item([job(1, key="a"), job(2, key="b"), job(3, key="a")], 1000, "fcfs", 8)) == ["1", "3"]
    assert ids(next_item([job(1, alone=True), job(2)], 1000, "fcfs", 8)) == ["1"]
    assert ids(next_item([job(1), job(2, alone=True), job(3)], 1000, "fcfs", 8)) == ["1", "3"]


def test_the_shortest_first_is_that_with_the_fewest_tokens_left() -> None:
    jobs = [job(1, steps=50), job(2, steps=4), job(3, steps=50, step=48)]
    assert ids(next_item(jobs, 0, "shortest", 8)) == ["3"]
    assert ids(next_item(jobs, 0, "fcfs", 8)) == ["1"]
    assert set(POLICIES) == {"fcfs", "shortest", "fair"}


def test_clients_get_equal_parts_however_many_pictures_they_ask_for() -> None:
    shares, done = Shares(), dict.fromkeys("abc", 0)
    jobs = [job(number, steps=1000, draw=Draw(id=f"a{number}", prompt="", seed=0, client="a")) for number in range(6)]
    jobs.append(job(6, steps=1000, tokens=200, draw=Draw(id="b", prompt="", seed=0, client="b")))

    def steps(count: int) -> None:
        for _ in range(count):
            shares.rank(jobs)
            item = next_item(jobs, 0, "fair", 8)
            assert item is not None
            shares.charge(item)
            for one in item.jobs:
                one.step += 1
                done[one.draw.client] += one.tokens

    steps(30)
    assert abs(done["a"] - done["b"]) <= 200 and jobs[0].step == 20  # the oldest of each client
    jobs.append(job(7, steps=1000, draw=Draw(id="c", prompt="", seed=0, client="c")))
    before = dict(done)
    steps(40)  # who comes later begins where the others stand: nothing is caught up
    shares_of = [done[name] - before[name] for name in "abc"]
    assert max(shares_of) - min(shares_of) <= 200
    del jobs[6:]
    steps(3)
    assert done["a"] > before["a"]


def test_previews_are_spread_over_the_steps_and_never_the_last() -> None:
    assert preview_steps(20, 3) == {5: 0, 10: 1, 15: 2}
    assert preview_steps(50, 1) == {25: 0}
    assert preview_steps(2, 3) == {1: 0}
    assert preview_steps(1, 3) == {}
    assert preview_steps(9, 0) == {}


@pytest.mark.parametrize(
    ("width", "height", "says"),
    [(500, 512, "multiples of 16"), (16384, 16384, "pixels"), (32768, 16, "16384"), (-16, 512, "multiples")],
)
def test_sizes_off_the_grid_and_bombs_are_refused(width: int, height: int, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        FACTS.size(Draw(id="a", prompt="", seed=0, width=width, height=height))
    assert caught.value.param == "size"


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(BadRequest) as caught:
        FACTS.count(Draw(id="a", prompt="", seed=0, steps=steps))
    assert caught.value.param == "num_inference_steps"
