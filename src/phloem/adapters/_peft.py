"""A PEFT folder as it is: adapter_config.json and adapter_model.safetensors. Whatever it asks for that is not served is
refused by name; nothing is left out in silence.

Legend: r rank, N inputs, M outputs of the adapted layer.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from phloem.adapters._stored import Stored, digest, stored
from phloem.core.errors import BadRequest
from phloem.quant._source import LARGEST, out_of_range

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future

    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG = 16 << 20  # bytes
LARGEST_SCALE = 1e9  # of an alpha: products beyond are no numbers any more
LARGEST_RANK = 1 << 16
PATTERN_SECONDS = 2.0  # that the patterns of one adapter may take; usual ones take microseconds
# Settings that change what is computed, and are not served: each with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_qalora": (False,),
    "use_bdlora": (False, {}),
    "alora_invocation_tokens": ([],),
    "layer_replication": ([],),
    "arrow_config": ({},),
}
# Ways to begin a training that take something out of the base's weights: what is left belongs to that base alone.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NAME = r"(?:\.(?!weight$)[^.]+)?"  # in memory PEFT has the adapter's name here
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("down", re.compile(rf"\.lora_A{_NAME}\.weight$")),
    ("up", re.compile(rf"\.lora_B{_NAME}\.weight$")),
    ("up_bias", re.compile(rf"\.lora_B{_NAME}\.bias$")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")),
    ("tokens", re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?$")),
    ("embedding", re.compile(r"\.lora_embedding_[AB](?:\.[^.]+)?$")),
    ("bias", re.compile(r"(?:\.base_layer)?\.bias$")),
    ("whole", re.compile(r"(?:\.modules_to_save(?:\.[^.]+)?)?\.weight$")),
)
_USUAL = {".lora_A.weight": "down", ".lora_B.weight": "up"}


@dataclass(slots=True)
class Module:
    """What an adapter says of one module, as the file has it."""

    down: Tensor | None = None  # [r, N]
    up: Tensor | None = None  # [M, r]
    up_bias: Tensor | None = None  # [M] added behind `up`, scaled as it is
    magnitude: Tensor | None = None  # [M] DoRA
    bias: Tensor | None = None  # [M] in place of the base's
    embedding: dict[str, Tensor] = field(default_factory=dict)  # A [r, V], B [H, r]
    whole: Tensor | None = None  # in place of the base's weight
    tokens: Tensor | None = None  # [n, H] in place of the rows of `trainable_token_indices`
    scale: float = 1.0

    @property
    def empty(self) -> bool:
        """Nothing is left of it."""
        parts = self.down, self.up, self.up_bias, self.magnitude, self.bias, self.whole, self.tokens
        return all(part is None for part in parts) and not self.embedding


@dataclass(slots=True)
class AdapterFile:
    """One adapter, read."""

    path: Path
    base: str  # the base that it says it was trained on; "": it does not
    modules: dict[str, Module]
    fan_in_fan_out: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    digest: Future[str] | None = None  # of the tensors' file; None: it came without a folder

    @property
    def content(self) -> str:
        """By what it is known from others, wherever its folder is. Raises OSError."""
        return "" if self.digest is None else _known(self.config, self.digest.result())

    @property
    def rank(self) -> int:
        """The largest of its modules'."""
        return max((len(m.down) for m in self.modules.values() if m.down is not None), default=0)


def refuse(path: Path | str, why: str) -> BadRequest:
    return BadRequest(f"adapter {path}: {why}", param="lora_path", code="bad_adapter")


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, checked.

    Raises:
        BadRequest: there is none, it is no LoRA, or it asks for what is not served.
    """
    file = path / CONFIG
    try:
        if file.exists() and not file.is_file():  # a pipe would never end
            raise refuse(path, f"{CONFIG} is no file")
        if file.stat().st_size > LARGEST_CONFIG:
            raise refuse(path, f"{CONFIG} has more than {LARGEST_CONFIG} bytes")
        config = json.loads(file.read_text())
    except OSError as error:
        raise refuse(path, f"{CONFIG}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise refuse(path, f"{CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise refuse(path, f"{CONFIG} is not an object")
    check_config(path, config)
    return config


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Raises BadRequest: it is no LoRA, or asks for what is not served."""
    if not isinstance(config, dict):  # pyright: ignore[reportUnnecessaryIsInstance] - of a caller in Python
        raise refuse(path, f"its config must be a dict, got {config!r:.80}")
    kind = config.get("peft_type")
    if kind not in ("LORA", None):
        raise refuse(path, f"peft_type {kind!r} is not served: LORA alone is")
    for name, harmless in _REFUSED.items():
        value = config.get(name)
        if value is not None and value not in harmless:
            raise refuse(path, f"{name} ({value!r:.80}) is not served")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASE):
        raise refuse(
            path, f"init_lora_weights {begun!r} took a part out of the base's weights: convert it to a plain LoRA"
        )
    if not _whole(config.get("r")):
        raise refuse(path, f"r must be a whole number above 0, at most {LARGEST_RANK}, got {config.get('r')!r:.80}")
    if not _finite(config.get("lora_alpha", 8)):
        raise refuse(path, f"lora_alpha must be a number, got {config['lora_alpha']!r:.80}")
    for name, fits, what in (("rank_pattern", _whole, "whole numbers above 0"), ("alpha_pattern", _finite, "numbers")):
        table = config.get(name) or {}
        if not isinstance(table, dict) or not all(fits(value) for value in table.values()):
            raise refuse(path, f"{name} must map names to {what}, got {table!r:.80}")
        for key in table:
            try:
                _ending(key)
            except (re.error, regex.error, RecursionError, OverflowError) as error:
                raise refuse(path, f"{name}: {key!r:.80} is no regular expression: {error}") from None
    _check_names(path, config)


def _check_names(path: Path, config: dict[str, Any]) -> None:
    """Lists of modules, parameters and tokens."""
    for name in ("modules_to_save", "target_parameters"):
        value = config.get(name) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise refuse(path, f"{name} must be a list of names, got {value!r:.80}")
    tokens = config.get("trainable_token_indices") or []
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    if not all(isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids) for ids in lists):
        raise refuse(path, f"trainable_token_indices must be token ids, or map names to them, got {tokens!r:.80}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_RANK


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -LARGEST_SCALE <= value <= LARGEST_SCALE  # NaN is neither


def content(path: Path) -> str:
    """By what an adapter is known from others, wherever its folder is. Raises BadRequest, OSError."""
    return _known(read_config(path), digest(path / WEIGHTS))


def _known(config: dict[str, Any], digest: str) -> str:
    settings = {name: value for name, value in config.items() if name != "base_model_name_or_path"}
    return f"{json.dumps(settings, sort_keys=True)} {digest}"


def alone_in(path: Path) -> list[str]:
    """Tensors of a file that ranks do not share out, by its header; of a file that is none nothing is said here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path / WEIGHTS), framework="pt", device="cpu") as found:
            names = sorted(found.keys())
    except (SafetensorError, OSError):
        return []
    return [name for name in names if _kind(name)[0] in ("embedding", "whole", "tokens", "magnitude")]


def read(path: Path) -> AdapterFile:
    """Raises BadRequest for what is missing, contradicts itself, or is not known."""
    if not os.path.isdir(path):  # that of Path raises for a name that is too long
        raise refuse(f"{path!s:.200}", "there is no such folder")
    config = read_config(path)
    found = _stored(path)
    adapter = assembled(path, config, found.tensors, sound=found.sound)
    adapter.digest = found.digest
    return adapter


def assembled(
    path: Path, config: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], *, sound: bool = False
) -> AdapterFile:
    """An adapter of a config that was checked and of tensors as PEFT names them. Raises BadRequest.

    `sound`: their numbers have been looked at.
    """
    modules = _modules(path, tensors, sound)
    if not modules:
        raise refuse(path, f"{WEIGHTS} holds no tensors")
    until = time.monotonic() + PATTERN_SECONDS
    for name, module in modules.items():
        if (module.down is None) != (module.up is None):
            missing = "lora_A" if module.down is None else "lora_B"
            raise refuse(path, f"{name} has no {missing}")
        if module.magnitude is not None and module.down is None:
            raise refuse(path, f"{name} has a lora_magnitude_vector alone")
        if module.down is not None and module.up is not None:
            module.scale = _scale(path, config, name, module.down, module.up, until)
        if module.embedding:
            if set(module.embedding) != {"A", "B"}:
                raise refuse(path, f"{name} has but one of lora_embedding_A and lora_embedding_B")
            module.scale = _scale(path, config, name, module.embedding["A"], module.embedding["B"], until)
    if config.get("use_dora") and not any(m.magnitude is not None for m in modules.values()):
        raise refuse(path, "use_dora is set, and no lora_magnitude_vector is there")
    base = config.get("base_model_name_or_path")
    named = base if isinstance(base, str) else ""
    return AdapterFile(path, named, modules, bool(config.get("fan_in_fan_out")), config)


def _stored(path: Path) -> Stored:
    from safetensors import SafetensorError

    file = path / WEIGHTS
    if not file.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        why = "adapter_model.bin holds pickled objects, which are never read: save it as safetensors" if pickled else ""
        raise refuse(path, why or f"there is no {WEIGHTS}")
    try:
        return stored(file)
    except (SafetensorError, OSError) as error:
        raise refuse(path, f"{WEIGHTS}: {error}") from None
    except KeyError as error:
        raise refuse(path, f"{WEIGHTS} holds values of type {error}, which torch does not have") from None


def _modules(path: Path, tensors: Iterable[tuple[str, Tensor]], sound: bool) -> dict[str, Module]:
    found: dict[str, Module] = {}
    unknown: list[str] = []
    taken: dict[tuple[str, str], str] = {}  # what of which module -> the tensor that said it
    for key, tensor in tensors:
        kind, name = _kind(key)
        if kind is None:
            unknown.append(key)
            continue
        what = kind if kind != "embedding" else "A" if ".lora_embedding_A" in key else "B"
        if (name, what) in taken:
            raise refuse(path, f"{taken[name, what]} and {key} say the same")
        taken[name, what] = key
        if not tensor.is_floating_point() or tensor.ndim not in (1, 2):
            raise refuse(path, f"{key}: {tensor.dtype} {list(tensor.shape)} is not of an adapter")
        if not sound and out_of_range(tensor):
            raise refuse(path, f"{key} has values that are no finite numbers, or beyond {LARGEST:g}")
        if kind == "embedding":
            found.setdefault(name, Module()).embedding[what] = tensor
        else:
            setattr(found.setdefault(name, Module()), kind, tensor)
    if unknown:
        raise refuse(path, f"{len(unknown)} tensors are not known: {some(unknown)}")
    return found


def check_finite(path: Path, name: str, *tensors: Tensor | None) -> None:
    """Raises BadRequest: numbers of the file are none any more as they are kept, in another type and with the scale."""
    if any(out_of_range(tensor) for tensor in tensors if tensor is not None):
        raise refuse(
            path, f"{name} has values that are too large for the type that it is kept in, or beyond {LARGEST:g}"
        )


def _kind(key: str) -> tuple[str | None, str]:
    """What a tensor is, and of which module."""
    name = key.removeprefix("base_model.model.")
    for ending, kind in _USUAL.items():  # nearly all are
        if name.endswith(ending) and ".lora_" not in name[: -len(ending)]:
            return kind, name[: -len(ending)]
    for kind, pattern in _KINDS:
        match = pattern.search(name)
        if match and ".lora_" not in name[: match.start()]:
            module = name[: match.start()]
            # Additions to several parameters of one module are nested: each has a name of its own.
            return kind, module if kind in ("down", "up") else module.removesuffix(".base_layer")
    return None, name


def _scale(path: Path, config: dict[str, Any], name: str, down: Tensor, up: Tensor, until: float) -> float:
    """s of s B A, with the ranks compared."""
    try:
        rank = _pattern(config.get("rank_pattern"), name, config["r"], until)
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8), until)
    except TimeoutError:
        raise refuse(path, f"rank_pattern or alpha_pattern takes too long to be compared with {name!r:.80}") from None
    fits = down.ndim == 2 and up.ndim == 2 and down.shape[0] == up.shape[1] and down.is_floating_point()
    if not fits or down.shape[0] != rank:
        _check_ranks(path, config, name, down, up, rank)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_ranks(path: Path, config: dict[str, Any], name: str, down: Tensor, up: Tensor, rank: int) -> None:
    """Raises BadRequest unless they are stacked: then each expert has that rank."""
    shapes = f"lora_A {list(down.shape)}, lora_B {list(up.shape)}"
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.is_floating_point():
        raise refuse(path, f"{name}: {shapes} do not fit together")
    stacked = bool(config.get("target_parameters")) and down.shape[0] % rank == 0  # a rank for each expert
    if down.shape[0] != rank and not stacked:
        raise refuse(path, f"{name}: {shapes}, but {CONFIG} says rank {rank}")


def _pattern(patterns: Any, name: str, default: Any, until: float) -> Any:
    """Of a table from regular expressions to values, that of the first one that ends the module's name. Raises
    TimeoutError at `until`, in seconds of the monotonic clock: a few characters can ask for centuries, and all other
    threads go on meanwhile."""
    for key, value in (patterns or {}).items():
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if _ending(key).match(name, concurrent=True, timeout=left):
            return value
    return default


@lru_cache(maxsize=256)
def _ending(pattern: str) -> regex.Pattern[str]:
    """Finds names that end in it, as PEFT does. Raises re.error where PEFT could not read it, regex.error."""
    whole = rf"(?:.*\.)?(?:{pattern})$"
    re.compile(whole)
    return regex.compile(whole)


def token_ids(file: AdapterFile, name: str, rows: Tensor, most: int) -> list[int]:
    """The tokens whose rows of a vocabulary of `most` an adapter has trained by themselves (`trainable_token_indices`).

    Raises:
        BadRequest: they are not as many as there are rows, or not of the vocabulary.
    """
    told = file.config.get("trainable_token_indices")
    if isinstance(told, dict):
        keys = [key for key in told if name == key or name.endswith(f".{key}")]
        told = told[keys[0]] if keys else None
    ids: list[int] = told or []
    if rows.ndim != 2 or len(ids) != rows.shape[0] or len(set(ids)) != len(ids) or not all(0 <= n < most for n in ids):
        why = f"{rows.shape[0]} rows of {name}, but trainable_token_indices has not as many tokens below {most}"
        raise refuse(file.path, why)
    return ids


def some(items: list[str], limit: int = 8) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
