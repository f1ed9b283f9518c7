"""The rotation that a GGUF file's metadata asks for, as `rope_parameters` of a config.json.

Meaning of the keys: the GGUF specification, and llama.cpp where that says more. A scaling without a type is linear;
`attn_factor` multiplies what YaRN makes of the factor anyway.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.gguf_keys import head_size
from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from phloem.checkpoint.families import GGUFFacts
    from phloem.checkpoint.gguf_reader import GGUFFile

_TYPE, _FACTOR, _OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
_LENGTH, _ATTENTION = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
_FAST, _SLOW, _EXTRA = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor"
_COUNT, _GROWN = "rope.dimension_count", "rope.scaling.yarn_log_multiplier"
READ = {_TYPE, _FACTOR, _OLD_FACTOR, _LENGTH, _ATTENTION, _FAST, _SLOW, _EXTRA, _COUNT}


def read_rope(gguf: GGUFFile, config: dict[str, Any], facts: GGUFFacts, path: Path) -> dict[str, Any]:
    """Keys for `config`: `rope_parameters` and `partial_rotary_factor`, where they are not the usual ones.

    Raises:
        ModelLoadError: for a scaling that is not known, or that is not known together with another.
    """
    prefix = f"{gguf.metadata.get('general.architecture')}."
    get = {key: _checked(key, gguf.metadata.get(prefix + key), f"{path}: {prefix}{key}") for key in READ}
    found = _partial(get[_COUNT], config, facts, f"{path}: {prefix}{_COUNT}")
    divisors = gguf.tensors.get("rope_freqs.weight")
    rope = _scaling(get, config, f"{path}: {prefix}")
    if rope.get("rope_type") == "yarn":
        rope |= facts.config.get("yarn", {})
        grown = gguf.metadata.get(prefix + _GROWN) if _GROWN in rope_keys(facts, rope) else None
        if grown:
            # A tenth of it, which is what the scale grows by for each e-fold of the length.
            rope |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10.0 * float(grown), 6))
    if divisors is not None:
        if rope and rope["rope_type"] != "linear":
            raise ModelLoadError(f"{path}: rope_freqs.weight beside {prefix}{_TYPE} {rope['rope_type']!r} is not known")
        factor = rope.get("factor", 1.0)
        # Llama 3's scaling is stored as a tensor of divisors, one per frequency.
        values = [float(item) * factor for item in divisors.raw().view("<f4").reshape(-1)]
        rope = {"rope_type": "divisors", "divisors": values}
    return {**found, "rope_parameters": rope} if rope else found


def _checked(key: str, value: Any, where: str) -> Any:
    right = isinstance(value, str) if key == _TYPE else isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not right or (key != _TYPE and not math.isfinite(value))):
        raise ModelLoadError(f"{where} is {value!r}, expected a {'name' if key == _TYPE else 'number'}")
    return value


def rope_keys(facts: GGUFFacts, rope: Mapping[str, Any]) -> set[str]:
    """What is read for a family; the scale that grows with the length is known for latent attention
    and YaRN alone."""
    known = "kv_lora_rank" in facts.keys and rope.get("rope_type") == "yarn"
    return READ | ({_GROWN} if known else set())


def _partial(count: Any, config: dict[str, Any], facts: GGUFFacts, where: str) -> dict[str, Any]:
    """The share of each head that turns."""
    size = head_size(config)
    if count is None or count == size:
        return {}
    if not 0 < count < size or count % 2 or (facts.turned and not facts.unscaled):
        raise ModelLoadError(f"{where} is {count}, but a head has {size} dimensions: this share is not supported")
    share = count / size
    # Readers round down: the share must not come out one lower.
    return {"partial_rotary_factor": share if int(size * share) == count else math.nextafter(share, 2.0)}


def _scaling(get: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, Any]:
    kind = get[_TYPE] or "linear"
    factor = get[_FACTOR] if get[_FACTOR] is not None else get[_OLD_FACTOR]
    factor = float(factor or 1.0) if kind != "none" else 1.0
    attention = float(1.0 if get[_ATTENTION] is None else get[_ATTENTION])
    extra = get[_EXTRA]
    if kind not in ("none", "linear", "yarn"):
        raise ModelLoadError(f"{where}{_TYPE} {kind!r} is not known; known: none, linear, yarn")
    yarn = kind == "yarn"
    if extra is not None and extra >= 0 and extra != float(yarn):
        raise ModelLoadError(f"{where}{_EXTRA} {extra} is not supported beside {_TYPE} {kind!r}")
    if attention != 1.0 and not yarn:
        raise ModelLoadError(f"{where}{_ATTENTION} {attention} is not supported beside {_TYPE} {kind!r}")
    if not yarn:
        return {} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": get[_LENGTH] or config["max_position_embeddings"],
        "beta_fast": get[_FAST],
        "beta_slow": get[_SLOW],
    }
    if attention != 1.0:
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return {key: value for key, value in rope.items() if value is not None}
