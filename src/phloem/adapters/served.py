"""Whether adapters are served, how many and how large: from the settings and the machine, with the reasons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.adapters._peft import alone_in, read_config, refuse, some
from phloem.adapters._sites import Sites
from phloem.core.adapters import adapter_spec
from phloem.core.errors import BadRequest, ConfigError
from phloem.core.resolve import Decision

if TYPE_CHECKING:
    import torch

    from phloem.core.adapters import AdapterSpec
    from phloem.core.config import LoraConfig
    from phloem.kernels.ops import Ops

# Of a host's stacks only what adapters fill is ever taken; a device's are taken whole.
HOST_ENTRIES, DEVICE_ENTRIES = 64, 8
HOST_RANK, DEVICE_RANK = 64, 16


def specs(config: LoraConfig) -> list[AdapterSpec]:
    """The adapters to start with. Raises ConfigError: two have one name."""
    found = [adapter_spec(text) for text in config.lora_paths or []]
    names = [spec.name for spec in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"lora_paths: several adapters are called {twice[0]!r}", param="lora_paths")
    return found


def enabled(config: LoraConfig) -> bool:
    return config.enable_lora or bool(config.lora_paths)


def check(config: LoraConfig, *, several: bool) -> None:
    """What files of adapters to start with say of themselves, before anything is loaded. `several`: the model is shared
    out among ranks.

    Raises:
        ConfigError: one cannot be read, is of too high a rank, or has what one rank alone serves.
    """
    for spec in specs(config):
        rank, most = _rank(spec), config.max_lora_rank
        if most is not None and rank > most:
            why = f"its rank is {rank}, at most {most} is served (max_lora_rank)"
            raise ConfigError(refuse(Path(spec.path), why).message, param="lora_paths")
        alone = alone_in(Path(spec.path)) if several else []
        if alone:
            why = f"{some(alone)}: whole matrices, DoRA, and additions to embeddings are served by one rank alone"
            raise ConfigError(refuse(Path(spec.path), why).message, param="lora_paths")


def sites(
    config: LoraConfig, model: Any, ops: Ops, dtype: torch.dtype, on_host: bool, decisions: list[Decision]
) -> Sites | None:
    """The model's layers made ready for adapters; None: none are served.

    Raises:
        ConfigError: the model takes none, or one that is given is of too high a rank, or no adapter.
    """
    if not enabled(config):
        return None
    entries, rank, how, why = sizes(config, on_host)
    made = Sites(model, ops, dtype, entries, rank)
    kept = str(made.dtype).removeprefix("torch.")
    decisions.append(Decision("max_lora_rank", rank, why))
    decisions.append(Decision("max_loaded_loras", entries, f"{how}; kept in {kept}"))
    return made


def sizes(config: LoraConfig, on_host: bool) -> tuple[int, int, str, str]:
    """(How many adapters there may be at a time, the largest rank of one, and why each).

    Raises:
        ConfigError: one that is given is none.
    """
    given = specs(config)
    ranks = [_rank(spec) for spec in given]
    usual = HOST_RANK if on_host else DEVICE_RANK
    rank, why = config.max_lora_rank, "as asked"
    if rank is None:
        rank, why = max([usual, *ranks]), "the largest of those given" if max([0, *ranks]) > usual else "the default"
    entries, how = config.max_loaded_loras, "as asked"
    if entries is None:
        usual = HOST_ENTRIES if on_host else DEVICE_ENTRIES
        entries, how = max(usual, len(given)), "one for each that was given" if len(given) > usual else "the default"
    return entries, rank, how, why


def _rank(spec: AdapterSpec) -> int:
    try:
        config = read_config(Path(spec.path))
    except BadRequest as error:
        raise ConfigError(error.message, param="lora_paths") from None
    patterns = config.get("rank_pattern") or {}
    return max([config["r"], *(value for value in patterns.values() if isinstance(value, int))])
