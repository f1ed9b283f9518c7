"""`phloem bench experts`: what a step of a sparse model reads, and that the figures fit together."""

from __future__ import annotations

import pytest
from linear_cases import needs_native

from phloem.bench import experts
from phloem.core.errors import BadRequest


@needs_native
@pytest.mark.slow
def test_a_tiny_model_is_made_and_measured() -> None:
    options = experts.Options(
        layers=2, of_layers=4, hidden=64, experts=8, chosen=2, inner=64, vocabulary=2048, batch=2, context=16, steps=4,
        turns=1,
    )  # fmt: skip
    found = experts.measure(options)
    size = found["step_bytes"]
    # Two rows choose 7 of 16 experts on average; each has 5 bits a weight, with its scales and minima.
    each = 3 * 64 * 64 * 5 // 8
    assert size["experts"] == pytest.approx(2 * 8 * each * 7 / 16, rel=0.01)
    assert found["floor_ms"] == pytest.approx(sum(size.values()) / found["read_gb_per_s"] / 1e6)
    assert found["of_floor"] > 0 and found["ops"].keys() >= {"moe", "linear"}
    assert found["whole_tok_per_s"] == pytest.approx(found["tok_per_s"] / 2)


@pytest.mark.parametrize("option", ["--layers", "--of-layers"])
def test_nothing_is_measured_of_no_layers(option: str) -> None:
    with pytest.raises(BadRequest, match="at least 1"):
        experts.main([option, "0"])
