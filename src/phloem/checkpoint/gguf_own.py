"""What a family's file asks of a GGUF file beyond the usual keys (`families.GGUFFacts`), each number checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.families import GGUFFacts
    from phloem.checkpoint.gguf_reader import GGUFFile, GGUFTensor

_AT_ONCE = 256  # rows that are looked at together
LARGEST = 1 << 24  # of a size: buffers of it are made before any tensor is missed


def read_own(config: dict[str, Any], facts: GGUFFacts, gguf: GGUFFile, path: Path) -> None:
    """Put it into `config`.

    Raises:
        ModelLoadError: naming the key or the tensor that is absent, or that is no such number.
    """
    arch = f"{gguf.metadata.get('general.architecture')}"
    for key, source in facts.keys.items():
        name, default = (source, None) if isinstance(source, str) else source
        value, where = gguf.metadata.get(f"{arch}.{name}"), f"{path}: {arch}.{name}"
        if key == "layer_types" and value is not None:
            config[key] = _layer_types(value, config["num_hidden_layers"], where)
        elif value is not None:
            value = plain(value, where)
            if name.endswith("scale") and value == 0:  # elsewhere: not said
                raise ModelLoadError(f"{where} is {value!r}, expected more than 0")
            real = name.endswith(("scale", "epsilon"))
            config[key] = _number(value, default, where, _least(name, default), whole=not real)
        elif isinstance(source, str):
            raise ModelLoadError(f"{path}: its metadata has no {arch}.{name}")
        elif default is not None:
            config[key] = default
    config.update(facts.config | facts.beside.get(arch, {}))
    _check_drafting(config, gguf, path)
    _by_layer(config, facts, gguf, path)
    for key, (first, second) in facts.shares.items():
        whole, count = (_size(gguf, f"{arch}.{name}", path) for name in (first, second))
        if whole % count:
            raise ModelLoadError(f"{path}: {arch}.{first} {whole} is not a multiple of {arch}.{second} {count}")
        config[key] = whole // count
    for key, source in (*facts.rows.items(), *facts.filled.items()):
        name, default = (source, None) if isinstance(source, str) else source
        table = gguf.tensors.get(name)
        if table is None and default is None:
            raise ModelLoadError(f"{path}: has no tensor {name}")
        config[key] = default if table is None else _filled(table) if key in facts.filled else table.shape[0]


def _filled(table: GGUFTensor) -> int:
    """How many rows stand before the zeros at its end, which a converter adds where a table is shorter than the
    vocabulary. All of them where there is nothing else, or where it cannot be told."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = table.raw()
    try:
        if dequantize(rows[-1:].copy(), GGMLQuantizationType[table.kind]).any():
            return len(rows)
    except (KeyError, NotImplementedError):  # the weights are not read either
        return len(rows)
    for end in range(len(rows), 0, -_AT_ONCE):
        start = max(0, end - _AT_ONCE)
        others = (rows[start:end] != rows[-1]).any(1).nonzero()[0]
        if len(others):
            return start + int(others[-1]) + 1
    return len(rows)


def _check_drafting(config: dict[str, Any], gguf: GGUFFile, path: Path) -> None:
    """Layers that are said to draft are left out: none may be one of those that answer."""
    count, drafting = config["num_hidden_layers"], int(config.get("num_nextn_predict_layers") or 0)
    where = f"{path}: {gguf.metadata.get('general.architecture')}.nextn_predict_layers is {drafting}"
    if drafting >= count:
        raise ModelLoadError(f"{where}, but there are {count} layers in all")
    for number in range(count - drafting, count):
        names = [name for name in gguf.tensors if name.startswith(f"blk.{number}.")]
        if names and not any(name.startswith(f"blk.{number}.nextn.") for name in names):
            raise ModelLoadError(f"{where}, but layer {number} of {count} has no tensor blk.{number}.nextn.*")
    if drafting and "layer_types" in config:  # whose pattern goes on
        config["layer_types"] = config["layer_types"][: count - drafting]


def _by_layer(config: dict[str, Any], facts: GGUFFacts, gguf: GGUFFile, path: Path) -> None:
    """What is said by the tensors that layers have, or by one number for each."""
    last = config["num_hidden_layers"] - int(config.get("num_nextn_predict_layers") or 0)
    numbers, tensors = range(last), gguf.tensors
    for key, tensor in facts.flags.items():
        config[key] = any(f"blk.{n}.{tensor}" in tensors for n in numbers)
    for key, tensor in facts.layers_with.items():
        config[key] = [n for n in numbers if f"blk.{n}.{tensor}" in tensors]
    for key, known in facts.kinds.items():
        config[key] = [_kind(known, n, gguf, path) for n in numbers]
    for key, name in facts.lists.items():
        where = f"{gguf.metadata.get('general.architecture')}.{name}"
        value = gguf.metadata.get(where)
        if value is None:
            raise ModelLoadError(f"{path}: its metadata has no {where}")
        listed = isinstance(value, Iterable) and not isinstance(value, str)
        values = [_scalar(item, f"{path}: {where}") for item in (value if listed else [value])]
        values = values if listed else values * config["num_hidden_layers"]
        if len(values) != config["num_hidden_layers"]:
            raise ModelLoadError(f"{path}: {where} has {len(values)} numbers for {config['num_hidden_layers']} layers")
        config[key] = [int(value) if value.is_integer() else value for value in values]


def _kind(known: dict[str, str], number: int, gguf: GGUFFile, path: Path) -> str:
    found = next((kind for tensor, kind in known.items() if f"blk.{number}.{tensor}" in gguf.tensors), None)
    if found is None:
        raise ModelLoadError(f"{path}: layer {number} has none of blk.{number}.{{{', '.join(known)}}}")
    return found


def _size(gguf: GGUFFile, name: str, path: Path) -> int:
    value = gguf.metadata.get(name)
    if value is None:
        raise ModelLoadError(f"{path}: its metadata has no {name}")
    return int(_number(plain(value, f"{path}: {name}"), 0, f"{path}: {name}", least=1))


def _number(value: Any, default: Any, where: str, least: int = 0, *, whole: bool = True) -> Any:
    """A value in the type of its default, where that has one: never a text, never below `least`, never beyond use.
    `whole`: a value without a default is a size, a count or a place."""
    if isinstance(default, str) and isinstance(value, str):
        return value
    if isinstance(value, bool) and not isinstance(default, bool):
        raise ModelLoadError(f"{where} is {value!r}, expected a number")
    if isinstance(value, str) or not math.isfinite(value):
        raise ModelLoadError(f"{where} is {value!r}, expected a number")
    whole = whole if default is None else isinstance(default, int) and not isinstance(default, bool)
    if whole and value != int(value):
        raise ModelLoadError(f"{where} is {value!r}, expected a whole number")
    if value < least or (isinstance(value, int) and value > LARGEST):
        raise ModelLoadError(f"{where} is {value!r}, expected {least} to {LARGEST}")
    return value if default is None else type(default)(value)


def _least(name: str, default: Any) -> int:
    """Sizes of recurrent layers begin at 1."""
    return int(name.startswith("ssm.") and not isinstance(default, bool))


def _layer_types(pattern: Any, count: int, where: str) -> list[str]:
    """Of a flag for each layer, or of n, where every n-th layer sees everything (0: none)."""
    if isinstance(pattern, str) or not isinstance(pattern, int | Iterable):
        raise ModelLoadError(f"{where} is {pattern!r}, expected a whole number or a flag for each layer")
    flags = [not pattern or (n + 1) % pattern != 0 for n in range(count)] if isinstance(pattern, int) else pattern
    return ["sliding_attention" if local else "full_attention" for local in flags]


def plain(value: Any, where: str) -> Any:
    """A number out of a scalar, or out of an array that has one value for every layer."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        values = {_scalar(item, where) for item in value}
        if len(values) != 1:
            raise ModelLoadError(f"{where} differs from layer to layer, which is not supported")
        value = values.pop()
        return int(value) if value.is_integer() else value
    return value


def _scalar(item: Any, where: str) -> float:
    try:
        return float(item)
    except (TypeError, ValueError):
        raise ModelLoadError(f"{where} holds {item!r}, expected numbers") from None
