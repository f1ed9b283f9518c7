"""From a GGUF file's metadata to config.json's keys, for the families that Phloem serves.

Source: the key names of the GGUF specification and the tensors that llama.cpp's converter writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.families import SIGMOID, SPARSE, gguf_families
from phloem.checkpoint.gguf_keys import check_unread
from phloem.checkpoint.gguf_rope import read_rope, rope_keys
from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.families import GGUFFacts
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


def translate_metadata(gguf: GGUFFile, path: Path) -> dict[str, Any]:
    """A config.json's worth of keys.

    Raises:
        ModelLoadError: if the architecture is unknown or a needed key or tensor is absent.
    """
    arch = str(gguf.metadata.get("general.architecture"))
    families = gguf_families()
    own = _served_as(gguf, arch)
    facts = families[own].gguf if own in families else None
    if facts is None:
        raise ModelLoadError(f"{path}: unknown GGUF architecture {arch!r}; known: {', '.join(sorted(families))}")
    config: dict[str, Any] = {"model_type": families[own].name, "architectures": [facts.hf_class]}
    config["hidden_act"] = "silu"
    for key, source in KEYS.items():
        value = gguf.metadata.get(f"{arch}.{source}")
        if value is not None:
            if key == "num_key_value_heads" and isinstance(value, Iterable):
                value = [item for item in value if item]  # 0: a layer that does not attend
                if not value:
                    continue
            config[key] = _plain(value, f"{path}: {arch}.{source}")
        elif key in _NEEDED:
            raise ModelLoadError(f"{path}: its metadata has no {arch}.{source}")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{path}: has no tensor token_embd.weight")
    config["vocab_size"] = int(embedding.shape[0])
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    config["attention_out_bias"] = "blk.0.attn_output.bias" in gguf.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    for key in ("bos", "eos", "padding"):
        token = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{key.replace('padding', 'pad')}_token_id"] = int(token)
    _own(config, facts, gguf, path)
    latent = _latent(config, gguf, arch, path) if "kv_lora_rank" in facts.keys else set[str]()
    # Layers that draft are counted among the others, and stand behind them.
    config["num_hidden_layers"] -= int(config.get("num_nextn_predict_layers", 0))
    config.update(read_rope(gguf, config, facts, path))
    read = {
        *KEYS.values(),
        *rope_keys(facts, config.get("rope_parameters", {})),
        *latent,
        *(item if isinstance(item, str) else item[0] for item in facts.keys.values()),
    }
    check_unread(gguf.metadata, arch, read, config, path)
    return config


def _served_as(gguf: GGUFFile, arch: str) -> str:
    """Of an architecture that several families share: the entry of the one whose files look so."""
    told = ((SPARSE, bool(gguf.metadata.get(f"{arch}.expert_count"))), (SIGMOID, _scores_by_sigmoid(gguf, arch)))
    return next((arch + kind for kind, there in told if there and arch + kind in gguf_families()), arch)


def _scores_by_sigmoid(gguf: GGUFFile, arch: str) -> bool:
    """Files that are older than the key have the correction that only such routers know."""
    scores = gguf.metadata.get(f"{arch}.expert_gating_func")
    return scores == 2 if scores else any(name.endswith(".exp_probs_b.bias") for name in gguf.tensors)


def _latent(config: dict[str, Any], gguf: GGUFFile, arch: str, path: Path) -> set[str]:
    """Sizes of latent attention into `config`; the keys that were read.

    Today's converters give the sizes of the absorbed form, whose one key head is the latent, and those of the heads
    under keys of their own; older ones only those of the heads.
    """
    names = ("attention.key_length", "attention.value_length")
    sizes = [gguf.metadata.get(f"{arch}.{name}_mla") or gguf.metadata.get(f"{arch}.{name}") for name in names]
    for name, size in zip(names, sizes, strict=True):
        if not size:
            raise ModelLoadError(f"{path}: its metadata has no {arch}.{name}")
    whole, value = (_plain(size, f"{path}: {arch}.{name}") for name, size in zip(names, sizes, strict=True))
    config["qk_nope_head_dim"], config["v_head_dim"] = whole - config["qk_rope_head_dim"], value
    if config["qk_nope_head_dim"] <= 0:
        raise ModelLoadError(
            f"{path}: {arch}.{names[0]} {whole} leaves nothing beside {arch}.rope.dimension_count "
            f"{config['qk_rope_head_dim']}"
        )
    config["num_key_value_heads"] = config["num_attention_heads"]
    return {*names, *(f"{name}_mla" for name in names)}


def _own(config: dict[str, Any], facts: GGUFFacts, gguf: GGUFFile, path: Path) -> None:
    """What the family's file says beyond the usual keys."""
    for key, source in facts.keys.items():
        name, default = (source, None) if isinstance(source, str) else source
        value = gguf.metadata.get(f"{facts.architecture}.{name}")
        if key == "layer_types" and value is not None:
            config[key] = _layer_types(value, config["num_hidden_layers"])
        elif value is not None:
            value = _plain(value, f"{path}: {facts.architecture}.{name}")
            config[key] = value if default is None else type(default)(value)
        elif isinstance(source, str):
            raise ModelLoadError(f"{path}: its metadata has no {facts.architecture}.{name}")
        elif default is not None:
            config[key] = default
    config.update(facts.config)
    for key, tensor in facts.flags.items():
        config[key] = f"blk.0.{tensor}" in gguf.tensors
    for key, tensor in facts.layers_with.items():
        config[key] = [n for n in range(config["num_hidden_layers"]) if f"blk.{n}.{tensor}" in gguf.tensors]


def _layer_types(pattern: Any, count: int) -> list[str]:
    """Of a flag for each layer, or of n, where every n-th layer sees everything (0: none)."""
    flags = pattern if isinstance(pattern, Iterable) else [not pattern or (n + 1) % pattern != 0 for n in range(count)]
    return ["sliding_attention" if local else "full_attention" for local in flags]


def _plain(value: Any, where: str) -> Any:
    """A number out of a scalar, or out of an array that has one value for every layer."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        values = {float(item) for item in value}
        if len(values) != 1:
            raise ModelLoadError(f"{where} differs from layer to layer, which is not supported")
        value = values.pop()
        return int(value) if value.is_integer() else value
    return value
