"""Which graphics card a rank has: one of its own, of those that its process sees, in the machine's order of ranks.

The first rank's is `base_gpu_id`, each further one's `gpu_id_step` behind it. Replicas of a machine follow each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem import platforms
from phloem.core.errors import ConfigError
from phloem.core.nodes import Nodes
from phloem.distributed.choose import choose
from phloem.distributed.nccl import Nccl
from phloem.engine.ranks.unshared import option_of

if TYPE_CHECKING:
    from phloem.core.config import Config


def card_of(config: Config, rank: int) -> int:
    """The number of a rank's card on its machine."""
    runtime = config.runtime
    return (runtime.base_gpu_id or 0) + rank % Nodes.of(config).each * runtime.gpu_id_step


def refuse(config: Config) -> None:
    """Raises ConfigError where this machine's ranks have no card each, or ask for what hosts alone can tell."""
    runtime = config.runtime
    several = runtime.tp_size * runtime.pp_size > 1
    told = runtime.base_gpu_id is not None or runtime.gpu_id_step != 1 or runtime.tp_comm == Nccl.name
    if not several and not told:
        return  # the one that the process has
    name = platforms.named(runtime.device)
    kind = platforms.cards_of(name)
    if kind is None:
        _refuse_numbers(config, name)
        # What replicas are given says nothing where they share one device.
        if runtime.base_gpu_id is not None and runtime.dp_size == 1 and not platforms.facts_of(name).on_host:
            raise ConfigError(f"base_gpu_id: {name} devices are not chosen by number here", param="base_gpu_id")
        return
    if several and config.schedule.enable_dynamic_chunking:
        why = f"how long a stage computes is not known to the host on {name}"
        raise ConfigError(f"enable_dynamic_chunking: {why}", param="enable_dynamic_chunking")
    if config.nodes.use_ray:
        why = f"Ray hides {name} devices from what it starts: start each node by hand, with --node-rank"
        raise ConfigError(f"use_ray: {why}", param="use_ray")
    available, why = platforms.AVAILABLE.get(name)()
    if not available:
        raise ConfigError(f"device {name!r} is not available: {why}", param="device")
    _check(config, kind.cards())


def _refuse_numbers(config: Config, name: str) -> None:
    """Raises ConfigError for what says something of graphics cards alone, where there are none."""
    runtime = config.runtime
    if runtime.tp_comm == Nccl.name:
        choose(runtime.tp_comm, meets=platforms.facts_of(name).meets)
    asked = {"base_gpu_id": runtime.base_gpu_id or 0, "gpu_id_step": runtime.gpu_id_step - 1}
    option = next((option for option, more in asked.items() if more), "")
    # Replicas on one machine are all given a number.
    if option and platforms.facts_of(name).on_host and (runtime.dp_size == 1 or option != "base_gpu_id"):
        raise ConfigError(f"{option}: it numbers graphics cards, and this runs on {name}: leave it out", param=option)


def _check(config: Config, there: int) -> None:
    count, runtime = Nodes.of(config).each, config.runtime
    needed = card_of(config, count - 1) + 1
    if needed <= there:
        return
    option, size = option_of(config)
    each = "a card" if count == 1 else f"{count} cards"
    placed = f"from number {runtime.base_gpu_id or 0} on (base_gpu_id)"
    placed += f", {runtime.gpu_id_step} apart (gpu_id_step)" if count > 1 and runtime.gpu_id_step > 1 else ""
    of = f"{option} {size}" if size > 1 or runtime.dp_size == 1 else f"dp_size {runtime.dp_size}"
    seen = "1 is" if there == 1 else f"{there} are"
    need = "needs" if count == 1 else "need"
    why = f"{each} {placed} {need} {needed} of this machine's, and {seen} visible (CUDA_VISIBLE_DEVICES)"
    raise ConfigError(f"{of}: {why}", param=option)


def take(config: Config, rank: int) -> torch.device:
    """The device of a rank, which is the calling thread's from now on where it is a card of its own.

    Raises:
        ConfigError: there is no such card.
    """
    alone = config.runtime.tp_size * config.runtime.pp_size == 1
    if alone and config.runtime.base_gpu_id is None:
        return torch.device("cpu")
    kind = platforms.cards_of(platforms.named(config.runtime.device))
    if kind is None:
        return torch.device("cpu")
    _check(config, kind.cards())
    return kind.take(card_of(config, rank))
