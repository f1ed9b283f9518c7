"""From a GGUF file's metadata to config.json's keys, for the families that Phloem serves.

Source: the key names of the GGUF specification and the tensors that llama.cpp's converter writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.families import DENSE, GROWN, MOST_LAYERS, NORMED, SIGMOID, SPARSE, UNSCALED, gguf_families
from phloem.checkpoint.gguf_keys import check_unread
from phloem.checkpoint.gguf_own import LARGEST, plain, read_own
from phloem.checkpoint.gguf_rope import read_rope, rope_keys
from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.families import Family
    from phloem.checkpoint.gguf_reader import GGUFFile

# config.json key -> metadata key under the architecture's prefix
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}
_NEEDED = ("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads")
_REAL = ("rms_norm_eps", "rope_theta")
_MULTIPLIERS = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
_BIASES = {"attention_bias": "attn_q", "attention_out_bias": "attn_output", "mlp_bias": "ffn_up"}


def translate_metadata(gguf: GGUFFile, path: Path) -> dict[str, Any]:
    """A config.json's worth of keys.

    Raises:
        ModelLoadError: if the architecture is unknown or a needed key or tensor is absent.
    """
    arch = str(gguf.metadata.get("general.architecture"))
    families = gguf_families(arch)
    own = _served_as(gguf, arch)
    facts = families[own].gguf if own in families else None
    if facts is None:
        known = ", ".join(sorted(gguf_families()))
        raise ModelLoadError(
            f"{path}: unknown GGUF architecture {arch!r}; known: {known}; serve the safetensors checkpoint of this "
            "model instead"
        )
    config: dict[str, Any] = {"model_type": families[own].name, "architectures": [facts.hf_class]}
    config["hidden_act"] = "silu"
    for key, source in KEYS.items():
        if key not in facts.lists and source not in facts.lists.values():
            value = _usual(gguf, key, source, families[own], path)
            config |= {} if value is None else {key: value}
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{path}: has no tensor token_embd.weight")
    config["vocab_size"] = int(embedding.shape[0])
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    for key, tensor in _BIASES.items():
        config[key] = any(f"blk.0.{name}.bias" in gguf.tensors for name in (tensor, tensor.replace("_q", "_qkv")))
    config["lm_head_bias"] = "output.bias" in gguf.tensors
    pooling = gguf.metadata.get(f"{arch}.pooling_type")
    config |= {"pooling_type": pooling} if isinstance(pooling, int) else {}
    read_own(config, facts, gguf, path)
    config |= _special(gguf, path)
    latent = _latent(config, gguf, arch, path) if "kv_lora_rank" in facts.keys else set[str]()
    # Layers that draft are counted among the others, and stand behind them.
    config["num_hidden_layers"] -= int(config.get("num_nextn_predict_layers", 0))
    config.update(read_rope(gguf, config, facts, path))
    read = {
        *KEYS.values(),
        *rope_keys(facts, config.get("rope_parameters", {})),
        *latent,
        *(item if isinstance(item, str) else item[0] for item in facts.keys.values()),
        *facts.lists.values(),
        *facts.unheeded,
        *(name for pair in facts.shares.values() for name in pair),
    }
    check_unread(gguf.metadata, arch, read, config, path)
    return config


def _special(gguf: GGUFFile, path: Path) -> dict[str, int]:
    """Tokens that have a role, by their keys in config.json."""
    found: dict[str, int] = {}
    for key in ("bos", "eos", "padding", "mask"):
        token = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is None:
            continue
        right = isinstance(token, int | float) and not isinstance(token, bool) and token % 1 == 0
        if not right or not 0 <= token < 1 << 32:
            raise ModelLoadError(f"{path}: tokenizer.ggml.{key}_token_id is {token!r:.60}, expected a token id")
        found[f"{key.replace('padding', 'pad')}_token_id"] = int(token)
    return found


def _usual(gguf: GGUFFile, key: str, source: str, served: Family, path: Path) -> Any:
    """The value of one of `KEYS`; None: the file does not say it, or 0 for what the family does without.

    Raises:
        ModelLoadError: for one that is needed and not there, and for one that is no size.
    """
    where = f"{gguf.metadata.get('general.architecture')}.{source}"
    value, kinds = gguf.metadata.get(where), served.gguf is not None and served.gguf.kinds
    if value is None:
        if key in _NEEDED and (key in served.needs or key in _NEEDED[:2]):
            raise ModelLoadError(f"{path}: its metadata has no {where}")
        return None
    if isinstance(value, Iterable) and not isinstance(value, str):
        # 0: a layer that does not attend, or has no such block.
        dropped = key == "num_key_value_heads" or (key == "intermediate_size" and kinds)
        value = [item for item in value if item or not dropped]
        if dropped and not value:
            return None
    value = plain(value, f"{path}: {where}")
    if value == 0 and key not in (*served.needs, *_NEEDED[:2], *_REAL):
        return None
    right = isinstance(value, int | float) if key in _REAL else isinstance(value, int)
    if not right or isinstance(value, bool) or not 0 < value <= (sys.float_info.max if key in _REAL else LARGEST):
        kind = "number above 0" if key in _REAL else f"whole number from 1 to {LARGEST}"
        raise ModelLoadError(f"{path}: {where} is {value!r}, expected a {kind}")
    if key == "num_hidden_layers" and value > MOST_LAYERS:  # each would be looked for before any tensor is missed
        raise ModelLoadError(f"{path}: {where} is {value}, expected at most {MOST_LAYERS}")
    return value


def _served_as(gguf: GGUFFile, arch: str) -> str:
    """Of an architecture that several families share: the entry of the one whose files look so."""
    told = (
        (SPARSE, _says(gguf, f"{arch}.expert_count")),
        (DENSE, not _says(gguf, f"{arch}.expert_count")),
        (SIGMOID, _scores_by_sigmoid(gguf, arch)),
        (GROWN, _says(gguf, f"{arch}.attention.temperature_scale")),
        (NORMED, _says(gguf, f"{arch}.ssm.dt_b_c_rms")),
        (UNSCALED, _says(gguf, f"{arch}.rope.scaling.finetuned") and not _multiplies(gguf, arch)),
    )
    return next((arch + kind for kind, there in told if there and arch + kind in gguf_families(arch)), arch)


def _says(gguf: GGUFFile, key: str) -> bool:
    value = gguf.metadata.get(key)
    return isinstance(value, int | float) and bool(value)


def _multiplies(gguf: GGUFFile, arch: str) -> bool:
    return any(_says(gguf, f"{arch}.{name}") for name in _MULTIPLIERS)


def _scores_by_sigmoid(gguf: GGUFFile, arch: str) -> bool:
    """Files that are older than the key have the correction that only such routers know."""
    key = f"{arch}.expert_gating_func"
    if _says(gguf, key):
        return gguf.metadata[key] == 2
    return any(name.endswith(".exp_probs_b.bias") for name in gguf.tensors)


def _latent(config: dict[str, Any], gguf: GGUFFile, arch: str, path: Path) -> set[str]:
    """Sizes of latent attention into `config`; the keys that were read.

    Today's converters give the sizes of the absorbed form, whose one key head is the latent, and those of the heads
    under keys of their own; older ones only those of the heads.
    """
    names = ("attention.key_length", "attention.value_length")
    sizes: list[int] = []
    for name in names:
        found = [f"{arch}.{key}" for key in (f"{name}_mla", name)]
        key = next((key for key in found if gguf.metadata.get(key) is not None), None)
        if key is None:
            raise ModelLoadError(f"{path}: its metadata has no {arch}.{name}")
        size = plain(gguf.metadata[key], f"{path}: {key}")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= LARGEST:
            raise ModelLoadError(f"{path}: {key} is {size!r}, expected a whole number from 1 to {LARGEST}")
        sizes.append(size)
    whole, value = sizes
    config["qk_nope_head_dim"], config["v_head_dim"] = whole - config["qk_rope_head_dim"], value
    if config["qk_nope_head_dim"] <= 0:
        raise ModelLoadError(
            f"{path}: {arch}.{names[0]} {whole} leaves nothing beside {arch}.rope.dimension_count "
            f"{config['qk_rope_head_dim']}"
        )
    config["num_key_value_heads"] = config["num_attention_heads"]
    return {*names, *(f"{name}_mla" for name in names)}
