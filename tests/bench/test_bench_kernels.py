"""`bench kernels`: the level it runs at and why, the weights' type, and what cannot be measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from phloem.bench import kernels
from phloem.core.errors import BadRequest, ConfigError
from phloem.kernels import native

SMALL = ["--hidden", "64", "--heads", "1", "--kv-heads", "1", "--intermediate", "96", "--vocab", "256"]
ONCE = [*SMALL, "--threads", "1", "--turns", "1", "--only", "linear down"]


@pytest.fixture
def _level() -> Iterator[None]:
    try:
        native.runtime()
    except native.Unavailable as error:
        pytest.skip(str(error))
    yield
    native.use_level(None)
    native.runtime().library.set_level(None)


@pytest.mark.slow
@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("kind", ["Q5_0", "Q6_K"])
def test_it_says_which_level_it_measures_and_why(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHLOEM_CPU_LEVEL", "portable")
    output = tmp_path / "kernels.jsonl"
    kernels.main([*ONCE, "--weights", kind, "--output", str(output)])
    assert "cpu_level portable: as the environment's PHLOEM_CPU_LEVEL asks" in capsys.readouterr().out
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert {record["level"] for record in records} == {"portable"}
    names = [record["kernel"] for record in records if "kernel" in record]
    assert names == [f"linear down {kind} {rows} rows" for rows in (1, 8, 32, 256, 1024)]


@pytest.mark.usefixtures("_level")
def test_types_and_levels_that_there_are_not() -> None:
    with pytest.raises(BadRequest, match="weights: 'Q9' is not one of Q4_0, Q4_1"):
        kernels.main(["--weights", "Q9"])
    missing = next(name for name in ("neon", "avx2") if name not in native.runtime().library.levels())
    with pytest.raises(ConfigError, match=f"not {missing}"):
        kernels.main(["--cpu-level", missing])
