"""Files for `--init-expert-location` as strangers may write them: counts, or an error that names the file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from phloem.core.errors import ConfigError
from phloem.engine.ranks import counts


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.made,)


@pytest.mark.parametrize("plain", [False, True], ids=["as torch saves it", "as pickle does"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, *, plain: bool) -> None:
    file, hostile = tmp_path / "counts.pt", {"logical_count": Hostile(tmp_path / "ran")}
    file.write_bytes(pickle.dumps(hostile, protocol=2)) if plain else torch.save(hostile, file)
    with pytest.raises(ConfigError, match=r"counts\.pt: it holds other things than tensors") as found:
        counts.read_counts(str(file))
    assert "weights_only" not in found.value.message and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["[[1" + "0" * 400 + ", 1]]", "[[1e30, 1]]", "[[NaN, 1]]", "[[1e999]]", "[[-1]]", "[[]]", "[" * 100_000, ""]
)
def test_a_text_without_counts_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "counts.json").write_text(text)
    with pytest.raises(ConfigError, match=r"init_expert_location: .*counts\.json: ") as found:
        counts.read_counts(str(tmp_path / "counts.json"))
    assert found.value.param == "init_expert_location"


@pytest.mark.parametrize(
    "data",
    [
        torch.ones(2, 3),
        [1],
        {"logical_count": torch.zeros(1).expand(10**6, 10**6)},
        {"logical_count": torch.ones(2, 3, device="meta")},
        {"other": torch.ones(2, 3)},
        b"\x80\x02junkjunk" * 20,
    ],
    ids=["a tensor", "a list", "a view far larger than its file", "no values", "another name", "junk"],
)
def test_a_tensor_file_without_counts_is_refused_by_name(tmp_path: Path, data: object) -> None:
    file = tmp_path / "counts.pt"
    file.write_bytes(data) if isinstance(data, bytes) else torch.save(data, file)
    with pytest.raises(ConfigError, match=r"init_expert_location: .*counts\.pt: "):
        counts.read_counts(str(file))


def test_counts_of_any_type_are_read_and_passes_are_summed(tmp_path: Path) -> None:
    file = str(tmp_path / "counts.pt")
    other = torch.ones(1, dtype=torch.bfloat16)
    torch.save({"logical_count": torch.ones(4, 2, 3, dtype=torch.bfloat16, requires_grad=True), "more": other}, file)
    assert counts.read_counts(file).tolist() == [[4, 4, 4], [4, 4, 4]]
