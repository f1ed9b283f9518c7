"""The perplexity benchmark: how it cuts its text, and that it runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phloem.bench import accuracy
from phloem.core.errors import BadRequest


def test_windows_are_whole() -> None:
    assert accuracy.cut(list(range(10)), 9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_refuses_senseless_sizes() -> None:
    with pytest.raises(BadRequest, match="window"):
        accuracy.main(["--window", "1"])
    with pytest.raises(BadRequest, match="tokens"):
        accuracy.main(["--tokens", "100", "--window", "512"])


@pytest.mark.slow
def test_quantised_activations_cost_little(tmp_path: Path) -> None:
    output = tmp_path / "accuracy.jsonl"
    sizes = ["--tokens", "2048", "--window", "256", "--max-total-tokens", "8192", "--limit", "1.5"]
    assert accuracy.main([*sizes, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["served"]["tokens"] == record["plain"]["tokens"] == 8 * 255
    assert 5 < record["plain"]["perplexity"] < 60
