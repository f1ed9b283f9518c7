"""Which quantised format a checkpoint says it is in, wherever it says so, and whether a file of quant/ reads it.

A file of quant/ names the `quant_method`s that it reads as a literal, `QUANT_METHODS`, taken from its source text: the
process that checks a model path imports no torch.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from phloem.checkpoint.kv_scheme import only_kv
from phloem.core.errors import ModelLoadError

_FOLDER = Path(__file__).parents[1] / "quant"
# Formats that are known and not read: what to do about them.
_REMEDIES = {
    "hqq": "save the model dequantised, or as GPTQ or compressed-tensors",
    "torchao": "save the model dequantised (model.dequantize()), or as compressed-tensors",
    "quark": "export it as compressed-tensors",
    "w4afp8": "take the compressed-tensors form of the checkpoint",
    "aqlm": "take a GPTQ, AWQ or compressed-tensors form of the checkpoint",
    "eetq": "load the 16-bit checkpoint with --quantization int8",
    "quanto": "load the 16-bit checkpoint with --quantization int8 or int4",
}


@dataclass(frozen=True)
class StoredFormat:
    """The format of a checkpoint's weights. `file`: of quant/; `config`: the checkpoint's own words."""

    method: str
    file: str
    config: dict[str, Any]
    where: str


@cache
def readers() -> dict[str, str]:
    """`quant_method` -> the file of quant/ that reads it."""
    found: dict[str, str] = {}
    for path in sorted(_FOLDER.glob("[a-z]*.py")):
        for node in ast.parse(path.read_text("utf-8"), str(path)).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QUANT_METHODS":
                found |= dict.fromkeys(ast.literal_eval(node.value), path.stem)
    return found


def quantization_said(whole: dict[str, Any], path: Path) -> tuple[dict[str, Any], str] | None:
    """What is said of the weights' format, and where: in config.json, or the files that ModelOpt, AutoGPTQ and AutoAWQ
    write beside it. Raises ModelLoadError for what is no object of JSON."""
    text = whole.get("text_config")
    for source in (whole, cast("dict[str, Any]", text) if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if source.get(key):
                return _object(source[key], f"{path}: {key}"), f"{path}: {key}"
    modelopt = path.parent / "hf_quant_config.json"
    if modelopt.exists():
        said = _read(modelopt).get("quantization")
        return ({**said, "quant_method": "modelopt"}, f"{modelopt}: quantization") if said else None
    for name in ("quantize_config.json", "quant_config.json"):
        if (path.parent / name).exists():
            said = _read(path.parent / name)
            return {"quant_method": "awq" if "w_bit" in said else "gptq", **said}, str(path.parent / name)
    return None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where} is {value!r}, expected an object")
    return cast("dict[str, Any]", value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return _object(json.loads(path.read_text("utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from None


def stored_format(said: tuple[dict[str, Any], str] | None) -> StoredFormat | None:
    """The format to read; None: weights are plain.

    Raises:
        ModelLoadError: for a format that no file of quant/ reads, with the ones that are read, and the remedy.
    """
    if said is None:
        return None
    config, where = said
    method, algorithm = str(config.get("quant_method", "unknown")), config.get("quant_algo")
    plain = method == "modelopt" and not algorithm and not config.get("quantized_layers")
    if plain or only_kv(config):
        return None
    file = readers().get(method)
    if file is None:
        remedy = f"; {_REMEDIES[method]}" if method in _REMEDIES else ""
        raise ModelLoadError(f"{where} {method!r} is not supported{remedy}; read are {', '.join(sorted(readers()))}")
    return StoredFormat(method, file, config, where)
