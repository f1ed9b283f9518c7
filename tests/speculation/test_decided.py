"""Whether an engine drafts is decided once, before its steps are sized: recordings' rows follow from it."""

from __future__ import annotations

from typing import Any

import pytest

from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.engine import worker
from phloem.engine.drafts import drafted
from phloem.engine.drafts.drafted import Place
from phloem.engine.recorded import choice
from phloem.kernels.ops import Ops
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint("llama", tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize(
    ("options", "row_bits", "drafter", "rows"),
    [
        ({}, True, "suffix", 24),
        ({}, False, "none", 3),
        ({"speculative_algorithm": "none"}, True, "none", 3),
        ({"speculative_algorithm": "suffix", "speculative_num_steps": 6}, True, "suffix", 7),
        ({"enable_lora": True, "max_lora_rank": 4}, True, "none", 3),
        ({"disaggregation_mode": "decode"}, True, "none", 3),
        ({"disable_speculative_adaptive": True}, True, "none", 3),
    ],
)
def test_steps_have_rows_for_drafts_where_there_are_drafts(
    options: dict[str, Any], row_bits: bool, drafter: str, rows: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`row_bits`: as of the native table, or of one whose rows may differ in their last bits."""
    table, sized = Ops(row_bits=row_bits), list[int]()
    monkeypatch.setattr("phloem.platforms.cpu.Platform.table", lambda *_, **__: (table, "the test's"))
    real = choice.choose

    def choose(runtime: Any, place: Any, most: int, *more: Any) -> Any:
        sized.append(most)
        return real(runtime, place, most, *more)

    monkeypatch.setattr(choice, "choose", choose)
    config = Config.from_flat({"model_path": path, "max_running_requests": 3, "max_total_tokens": 512, **options})
    built = worker.build(config, describe(path), lambda name, seconds: None)
    built.runner.close()
    assert (built.drafter, sized) == (drafter, [rows])
    assert [d.value for d in built.decisions if d.name == "speculative_algorithm"] == [drafter]


def test_what_is_promised_of_drafts_is_said_exactly() -> None:
    config = Config.from_flat({"model_path": "nowhere"})
    bits = drafted.decide(config, Place()).decision.reason
    assert "tokens and hidden states are those of plain decoding, to the bit, and log probabilities to 1e-5" in bits
    asked = Config.from_flat({"model_path": "nowhere", "speculative_algorithm": "suffix"})
    close = drafted.decide(asked, Place(row_bits=False)).decision.reason
    assert "to the bit" not in close and "the same tokens as plain decoding but where two are as likely" in close


def test_a_drafter_that_cannot_serve_is_refused_by_name() -> None:
    asked = Config.from_flat({"model_path": "nowhere", "speculative_algorithm": "suffix"})
    with pytest.raises(ConfigError, match="suffix cannot serve this model: for a reason"):
        drafted.decide(asked, Place(why="for a reason"))
    with pytest.raises(ConfigError, match="on the host alone"):
        drafted.decide(asked, Place(cuts_back=False))
