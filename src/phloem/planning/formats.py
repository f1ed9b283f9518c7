"""How many bits the weights of a checkpoint take, matrix by matrix, and what they are multiplied as."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from phloem.checkpoint.quant_config import StoredFormat
    from phloem.planning.machines import Kind


@dataclass(frozen=True)
class Format:
    """`bits` of a weight, its scales and zero points with it."""

    name: str
    bits: float
    kind: Kind


# Integers of few bits are widened before they are multiplied; int8 here is weights alone.
FORMATS = {
    item.name: item
    for item in (
        Format("bf16", 16, "bf16"),
        Format("fp32", 32, "bf16"),
        Format("fp8", 8, "fp8"),
        Format("int8", 8.125, "bf16"),
        Format("int4", 4.25, "bf16"),
        Format("mxfp4", 4.25, "fp4"),
        Format("nvfp4", 4.5, "fp4"),
    )
}
_PLAIN = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}


def named(name: str, param: str = "quantization") -> Format:
    """Raises ConfigError with the names that there are."""
    if name not in FORMATS:
        raise ConfigError(f"{param} {name!r:.80} is not known; known: {', '.join(FORMATS)}", param=param)
    return FORMATS[name]


@dataclass(frozen=True)
class Formats:
    """`matrix` and `expert`: of layers' matrices and of routed experts; `other`: of all that is never quantised.

    `kept`: patterns of tensor names that a checkpoint leaves in the plain type.
    """

    matrix: Format
    expert: Format
    other: Format
    kept: tuple[str, ...] = ()

    def of(self, name: str, *, expert: bool) -> Format:
        """Of a matrix in a layer, by its name in the checkpoint."""
        stem = name.removesuffix(".weight")
        if any(_matches(pattern, stem) for pattern in self.kept):
            return self.other
        return self.expert if expert else self.matrix


def _matches(pattern: str, stem: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], stem) is not None
    if "*" in pattern:
        return fnmatch.fnmatch(stem, pattern)
    return stem == pattern or stem.endswith(f".{pattern}") or f"{pattern}." in f"{stem}."


def formats(
    config: dict[str, Any], stored: StoredFormat | None, matrix: str | None = None, expert: str | None = None
) -> Formats:
    """What a checkpoint's configuration says, or what is asked for instead.

    Raises:
        ConfigError: a format whose bits are not known here, or an unknown name.
    """
    plain = FORMATS[_PLAIN.get(str(config.get("dtype", "bfloat16")).removeprefix("torch."), "bf16")]
    if matrix is not None or stored is None:
        of_all = plain if matrix is None else named(matrix)
        return Formats(of_all, of_all if expert is None else named(expert, "expert_quantization"), plain)
    found = _stored(stored)
    experts = found if expert is None else named(expert, "expert_quantization")
    only_experts = stored.method == "mxfp4"
    return Formats(plain if only_experts else found, experts, plain, _kept(stored.config))


def _stored(stored: StoredFormat) -> Format:
    """One format for all that is quantised: where groups differ, the first one counts."""
    config, method = stored.config, stored.method
    if method in ("fp8", "fbgemm_fp8"):
        return FORMATS["fp8"]
    if method == "mxfp4":
        return FORMATS["mxfp4"]
    if method == "modelopt":
        algorithm = str(config.get("quant_algo", "")).upper()
        return FORMATS["nvfp4" if "FP4" in algorithm else "fp8"]
    if method == "bitsandbytes":
        return FORMATS["int4" if config.get("load_in_4bit") else "int8"]
    if method == "compressed-tensors":
        return _group(config)
    bits = config.get("bits", config.get("w_bit"))
    if isinstance(bits, int):
        size = config.get("group_size", config.get("q_group_size", 128))
        return Format(f"int{bits}", bits + (16 + bits) / size if isinstance(size, int) and size > 0 else bits, "bf16")
    raise ConfigError(
        f"{stored.where}: how many bits {method!r} takes is not known here; name it with --quantization",
        param="quantization",
    )


def _group(config: dict[str, Any]) -> Format:
    groups = cast("dict[str, Any]", config.get("config_groups") or {})
    for group in groups.values():
        weights = cast("dict[str, Any]", group.get("weights") or {}) if isinstance(group, dict) else {}
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if not isinstance(bits, int):
            continue
        if weights.get("type") == "float":
            return FORMATS["fp8"] if bits == 8 else FORMATS["nvfp4" if size == 16 else "mxfp4"]
        both = bool(cast("dict[str, Any]", group).get("input_activations"))
        scales = 16 / size if isinstance(size, int) and size > 0 else 0.0
        # Integer products of 8 bits run as fast as those of fp8 where there are such units.
        return Format(f"int{bits}", bits + scales, "fp8" if both and bits == 8 else "bf16")
    raise ConfigError(
        "compressed-tensors without config_groups: name its bits with --quantization", param="quantization"
    )


def _kept(config: dict[str, Any]) -> tuple[str, ...]:
    found: list[str] = []
    for key in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules"):
        items = config.get(key)
        found += [str(item) for item in cast("list[Any]", items)] if isinstance(items, list) else []
    return tuple(found)
