"""By what weights are known: copies are alike, siblings are not, and all parts of a model count."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phloem.checkpoint import fingerprint as prints
from phloem.checkpoint.fingerprint import fingerprint, weight_files


def made(*files: Path, **values: Any) -> Any:
    return SimpleNamespace(path=files[0].parent, files=files, gguf=None, **values)


def test_copies_are_alike_and_one_changed_byte_of_a_small_file_is_seen(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "w.safetensors", tmp_path / "b" / "w.safetensors"
    for path in (one, other):
        path.parent.mkdir()
    one.write_bytes(bytes(range(256)) * 300)
    shutil.copy(one, other)
    assert fingerprint(made(one)) == fingerprint(made(other))
    for at in (0, 40_000, 76_799):
        data = bytearray(one.read_bytes())
        data[at] ^= 1
        other.write_bytes(data)
        assert fingerprint(made(one)) != fingerprint(made(other)), at


def test_of_large_files_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prints, "SAMPLES", 8)
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(1 << 20))
    before = fingerprint(made(path))
    with path.open("r+b") as file:  # a matrix of an eighth of all
        file.seek(300_000)
        file.write(b"\1" * (1 << 17))
    assert fingerprint(made(path)) != before


def test_all_parts_of_a_gguf_file_count(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for path in parts:
        path.write_bytes(b"x" * 100)
    checkpoint: Any = SimpleNamespace(path=parts[0], files=(), gguf=SimpleNamespace(metadata={"split.count": 2}))
    assert weight_files(checkpoint) == tuple(parts)
    before = fingerprint(checkpoint)
    parts[1].write_bytes(b"x" * 99 + b"y")
    assert fingerprint(checkpoint) != before
