"""`phloem bench speculation`: what it makes of turns, and prompts that enter as one row."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phloem.bench._spec_texts import Asked, aligned
from phloem.bench.speculation import Turn, Turns, _record, _table, in_flight


def turn(seconds: float, *answers: list[int]) -> Turn:
    counts: dict[str, Any] = {"spec_verify_ct": 2, "spec_num_correct_drafts": 1, "spec_num_proposed_drafts": 4}
    return Turn(seconds, [{"output_ids": ids, "meta_info": counts} for ids in answers])


def test_a_ratio_is_of_all_time_beside_both_plain_sides(capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = [1, 2, 3], [4, 5], [4, 6]
    turns = [
        Turns(turn(1.0, a, b), turn(0.5, a, b), turn(2.0, a, b)),
        Turns(turn(1.0, a, b), turn(1.0, a, c), turn(2.0, a, b)),
    ]
    found = _record("quote", 2, turns)
    assert found["speed_up"] == pytest.approx((6.0 / 20) / (1.5 / 10)) and found["speed_ups"] == [3.0, 1.5]
    assert found["error"] == pytest.approx(0.75) and found["plain_beside_plain"] == pytest.approx(0.5)
    assert found["accept_length"] == 1.5 and found["accept_rate"] == 0.25
    assert not found["same"] and (found["other_answers"], found["plain_other_answers"], found["answers"]) == (1, 0, 4)
    assert _record("quote", 2, turns[:1])["same"] and _record("quote", 2, turns[:1])["error"] is None
    _table([found])
    assert "2.00x+-0.75" in (said := capsys.readouterr().out) and "NO: 1 of 4, plain 0" in said
    assert "not the same twice" not in said


def test_of_a_prompt_whole_pages_and_one_token_are_left() -> None:
    asked = Asked([list(range(100, 100 + count)) for count in (17, 31, 33, 48, 9)], [{}] * 5)
    found = aligned(asked, 16)
    assert [len(prompt) for prompt in found.prompts] == [17, 17, 33, 33, 9]
    for before, after in zip(asked.prompts, found.prompts, strict=True):
        assert after[:2] == before[:2] and after[-9:] == before[-9:]


def test_where_a_request_has_ended_the_next_begins() -> None:
    class Engine:
        running, most, order = 0, 0, list[int]()

        async def async_generate(self, input_ids: list[int], sampling_params: dict[str, Any]) -> dict[str, Any]:
            self.running += 1
            self.most = max(self.most, self.running)
            self.order.append(input_ids[0])
            for _ in range(sampling_params["max_new_tokens"]):
                await asyncio.sleep(0)
            self.running -= 1
            return {"output_ids": input_ids}

    engine, lengths = Engine(), (40, 1, 1, 1, 1)
    asked = Asked([[number] for number in range(5)], [{"max_new_tokens": length} for length in lengths])
    found = asyncio.run(in_flight(engine, asked, 2))
    assert [one["output_ids"] for one in found] == asked.prompts
    assert engine.most == 2 and engine.order == [0, 1, 2, 3, 4]
