"""Tokens that end an answer, by their text and by the tokenizer's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phloem.checkpoint.describe import describe
from phloem.checkpoint.ends import ids_by_text, tokenizer_end
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf


def test_a_gguf_file_that_names_another_end_stops_at_the_turns_too(tmp_path: Path) -> None:
    """The chat template of the tiny checkpoint ends turns with <|im_end|>, token 3."""
    source = tiny_checkpoint("llama", tmp_path / "hf")
    with pytest.MonkeyPatch.context() as patch:
        import gguf

        add = gguf.GGUFWriter.add_eos_token_id
        patch.setattr(gguf.GGUFWriter, "add_eos_token_id", lambda writer, _: add(writer, 1))
        file = tiny_gguf(source, tmp_path / "tiny.gguf")
    assert describe(str(file)).eos_ids == (1, 3)


@pytest.mark.parametrize("text", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<turn|>"])
def test_ends_are_known_by_text(text: str) -> None:
    assert ids_by_text(["a", "</think>", text, "<|im_start|>", "<|user|>"]) == [2]


def test_a_part_of_an_answer_is_no_end() -> None:
    assert ids_by_text(["<|end|>", "<|return|>", "<|call|>", "<|start|>"]) == [1, 2]
    assert ids_by_text([]) == []


def directory(path: Path, eos: Any, files: dict[str, Any]) -> Path:
    tiny_checkpoint("llama", path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": eos, **files.pop("config", {})}))
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("eos", ["<|im_start|>", {"content": "<|im_start|>", "special": True}])
def test_a_tokenizers_own_end_counts_beside_the_configurations(tmp_path: Path, eos: Any) -> None:
    path = directory(tmp_path, eos, {})
    assert tokenizer_end(path) == [2]
    assert describe(str(path)).eos_ids == (3, 2)
    other = tmp_path / "plain"
    tiny_checkpoint("llama", other)
    assert describe(str(other)).eos_ids == (3,)
    assert describe(str(other), tokenizer_path=str(path / "tokenizer.json")).eos_ids == (3, 2)


def test_where_the_id_of_an_end_may_stand(tmp_path: Path) -> None:
    decoder = {"added_tokens_decoder": {"7": {"content": "<stop>"}}}
    assert tokenizer_end(directory(tmp_path / "a", "<stop>", {"config": decoder})) == [7]
    assert tokenizer_end(directory(tmp_path / "b", "<stop>", {"added_tokens.json": {"<stop>": 8}})) == [8]
    assert tokenizer_end(directory(tmp_path / "c", "<nowhere>", {})) == []
    roles = {"special_tokens_map.json": {"eos_token": "<|bos|>"}}
    assert tokenizer_end(directory(tmp_path / "d", None, roles)) == [1]
    (tmp_path / "d" / "tokenizer.json").write_text("{")
    assert tokenizer_end(tmp_path / "d") == []


def test_an_end_that_the_model_cannot_write_is_none(tmp_path: Path) -> None:
    decoder = {"added_tokens_decoder": {"70000": {"content": "<stop>"}}}
    path = directory(tmp_path, "<stop>", {"config": decoder})
    assert describe(str(path)).eos_ids == (3,)
