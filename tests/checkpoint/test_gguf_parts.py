"""GGUF files in several parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from phloem.checkpoint.describe import describe
from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.core.errors import ModelLoadError
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    return tiny_gguf(tiny_checkpoint("llama", path / "hf"), path / "tiny.gguf")


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    first = tiny_gguf(whole.parent / "hf", tmp_path / "tiny.gguf", part=10)
    found = sorted(first.parent.glob("*.gguf"))
    assert len(found) == 3 and first == found[0]
    return found


def test_any_part_and_the_folder_stand_for_all(whole: Path, parts: list[Path]) -> None:
    one = describe(str(whole))
    assert one.gguf is not None
    for path in (*parts, parts[0].parent):
        found = describe(str(path))
        assert found.gguf is not None
        assert (found.path, found.name, found.tokenizer_path) == (parts[0], "tiny", parts[0])
        assert (found.config, found.eos_ids) == (one.config, one.eos_ids)
        assert found.gguf.tensors.keys() == one.gguf.tensors.keys()
        for name, tensor in one.gguf.tensors.items():
            assert found.gguf.tensors[name].raw().tobytes() == tensor.raw().tobytes()
        found.gguf.release()


def test_a_part_that_is_not_there_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    for path in (parts[0], parts[2], parts[0].parent):
        with pytest.raises(ModelLoadError, match=r"tiny-00002-of-00003.gguf: missing \(3 parts"):
            describe(str(path))


def test_the_first_part_is_needed(parts: list[Path]) -> None:
    parts[0].unlink()
    with pytest.raises(ModelLoadError, match=r"tiny-00001-of-00003.gguf: cannot be read"):
        describe(str(parts[1]))


def test_parts_must_be_of_one_model_and_in_order(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ModelLoadError, match=r"tiny-00003-of-00003.gguf: says that it is part 1 of 3, not 2 of 3"):
        GGUFFile.open(parts[0])


def test_a_renamed_part_says_what_it_lacks(parts: list[Path]) -> None:
    alone = parts[0].rename(parts[0].with_name("tiny.gguf"))
    with pytest.raises(ModelLoadError, match=r"tiny.gguf: one of 3 parts, whose names must end in -00001-of-00003"):
        describe(str(alone))


def test_a_folder_of_several_models_names_them(whole: Path, parts: list[Path]) -> None:
    shutil.copy(whole, parts[0].parent / "other.gguf")
    with pytest.raises(ModelLoadError, match=r"several models .* one of other.gguf, tiny-00001-of-00003.gguf"):
        describe(str(parts[0].parent))
    assert describe(str(parts[0].parent / "other.gguf")).name == "other"
