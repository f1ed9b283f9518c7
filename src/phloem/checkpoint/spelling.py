"""One spelling for the settings that config.json files spell in several ways, with transformers' order of precedence.

Where two spellings say different things, and transformers would drop one of them to a default or to whichever it reads
last, the file is refused with both names.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LOG = logging.getLogger("phloem.checkpoint")

# Pairs of names for one number. Whichever is there is given both names; two that differ are refused.
_SAME = (
    ("num_local_experts", "num_experts"),
    ("num_experts_per_tok", "experts_per_token"),
    ("sliding_window_pattern", "_sliding_window_pattern"),
)
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")
_BASE = 10000.0


def text_part(whole: dict[str, Any]) -> dict[str, Any]:
    """The language model's keys of a config.json: those of `text_config` before those around it, and no nulls."""
    outer = {key: value for key, value in whole.items() if value is not None}
    inner = outer.get("text_config")
    if not isinstance(inner, dict):
        return outer
    text = {key: value for key, value in cast("dict[str, Any]", inner).items() if value is not None}
    # The two levels may spell a setting in different ways: the inner one counts, however it is spelled.
    for names in (("dtype", "torch_dtype"), _ROPE_KEYS, *_SAME):
        if any(name in text for name in names):
            outer = {key: value for key, value in outer.items() if key not in names}
    return {**outer, **text}


def with_layers(whole: dict[str, Any]) -> dict[str, Any]:
    """A config.json of vLLM's speculators, which keeps what its layers are in `transformer_layer_config`, as one."""
    inner = whole.get("transformer_layer_config")
    if "speculators_model_type" not in whole or not isinstance(inner, dict):
        return whole
    layers = {key: value for key, value in cast("dict[str, Any]", inner).items() if value is not None}
    layers.pop("architectures", None)
    return {**whole, **layers}


def one_spelling(
    config: dict[str, Any], defaults: dict[str, Any], path: Path, names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The same settings under one name each: `dtype`, and all of a rotation's scaling in `rope_parameters`.

    Args:
        config: keys that the file has, without nulls.
        defaults: what the family's files leave out.
        path: the file, for messages.
        names: the usual name of a setting -> what this family calls it.

    Raises:
        ModelLoadError: for two spellings that contradict each other, with both names.
    """
    found = dict(config)
    other = found.pop("torch_dtype", None)
    if other is not None:
        found.setdefault("dtype", other)
        _note(path, "torch_dtype", other, "dtype", found["dtype"])
    for first, second in (*_SAME, *(names or {}).items()):
        if first in found and second in found and found[first] != found[second]:
            raise ModelLoadError(
                f"{path}: {first} is {found[first]!r} and {second} is {found[second]!r}, but they are one setting"
            )
        for name, alias in ((first, second), (second, first)):
            if name in found:
                found.setdefault(alias, found[name])
    rope = _rope(found, defaults, path)
    found.pop("rope_scaling", None)
    if rope:
        found["rope_parameters"] = rope
    return found


def _note(path: Path, loser: str, lost: Any, winner: str, counts: Any) -> None:
    if lost != counts:
        LOG.warning("%s: %s is %s and %s is %s, which counts", path, loser, lost, winner, counts)


def _object(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path}: {key} is {found!r}, expected an object")
    return {name: value for name, value in cast("dict[str, Any]", found).items() if value is not None}


def _nested(rope: dict[str, Any]) -> bool:
    """Whether it has an object for each type of layer."""
    return any(isinstance(value, dict) for value in rope.values())


def _rope(config: dict[str, Any], defaults: dict[str, Any], path: Path) -> dict[str, Any]:
    """What `rope_parameters` and `rope_scaling` say together: the second takes the place of the first, or, where the
    first has an object for each type of layer, is put into that of the global layers."""
    given, added = _object(config, "rope_parameters", path), _object(config, "rope_scaling", path)
    if added and _nested(given) and not _nested(added):
        whole = _typed(given.get("full_attention") or {})
        found = {**given, "full_attention": {**whole, **_typed(added)}}
    else:
        if added and not _nested(given):
            _keep_base(given, added, {**defaults, **config}, path)
        found = added or given
    if _nested(found):
        return {name: _typed(value) if isinstance(value, dict) else value for name, value in found.items()}
    found = _typed(found)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in found and name in config:
            _note(path, name, config[name], f"{name} of {'rope_scaling' if added else 'rope_parameters'}", found[name])
    # Beside the scaling, where Phi-3 has it, the trained length counts before the one inside.
    if (
        found
        and found.get("rope_type") in ("llama3", "yarn", "longrope")
        and "original_max_position_embeddings" in config
    ):
        found["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return found


def _typed(rope: dict[str, Any]) -> dict[str, Any]:
    """With `rope_type` for the older name `type`."""
    found = {key: value for key, value in rope.items() if key != "type" and value is not None}
    if "type" in rope:
        found.setdefault("rope_type", rope["type"])
    return found


def _keep_base(given: dict[str, Any], added: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Refuse a `rope_scaling` that takes the place of `rope_parameters` and so loses its base or its share."""
    for name, default in (("rope_theta", _BASE), ("partial_rotary_factor", 1.0)):
        if name not in given or name in added:
            continue
        counts = config.get(name, default)
        if counts != given[name]:
            raise ModelLoadError(
                f"{path}: rope_scaling takes the place of rope_parameters, whose {name} is {given[name]}, and then "
                f"{name} would be {counts}: write {name} into rope_scaling, or the scaling into rope_parameters"
            )
