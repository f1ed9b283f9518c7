"""scripts/counts.py: lines by room, of one checkout or of two."""

from __future__ import annotations

from pathlib import Path

import counts
import pytest


def checkout(folder: Path, files: dict[str, int]) -> Path:
    for name, lines in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * lines)
    return folder


def test_rooms_of_two_checkouts_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkout(tmp_path / "a", {"src/phloem/llm.py": 7, "src/phloem/server/old.py": 500, "tests/test_a.py": 3})
    after = checkout(
        tmp_path / "b",
        {"src/phloem/text/deep/a.py": 20, "src/phloem/text/b.py": 1, "src/phloem/llm.py": 5, "csrc/cpu/a.cpp": 9},
    )
    assert counts.main([str(before), str(after)]) == 0
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()]
    assert rows[2:5] == [["`text/`", "-", "21"], ["root", "7", "5"], ["`server/`", "500", "-"]]
    told = {name: values for name, *values in rows}
    assert told["**whole**"] == ["507", "26"] and told["files"] == ["2", "3"] and told["longest file"] == ["500", "20"]
    assert told["files over 400 lines"] == ["1", "-"]
    assert told["`csrc/`"] == ["-", "9"] and told["`tests/`"] == ["3", "-"]


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="src/phloem"):
        counts.count(tmp_path)
