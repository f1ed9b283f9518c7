"""Whether answers can tell which experts computed their tokens (`enable_return_routed_experts`), and what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.kvcache.routes import Routes, group_of
from phloem.layers.context import Chosen

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.core.memory import Group
    from phloem.kvcache.pool import KVPool

NAME = "enable_return_routed_experts"


def chosen_of(config: Config, checkpoint: Checkpoint) -> Chosen | None:
    """For the model's layers to note in; None: it is not asked for, and costs nothing.

    Raises:
        ConfigError: the model or its ranks cannot tell.
    """
    if not config.runtime.enable_return_routed_experts:
        return None
    if checkpoint.chosen.impl != "phloem":
        raise ConfigError(f"{NAME}: this model's code is transformers', which does not tell", param=NAME)
    for name, size in (("tp_size", config.runtime.tp_size), ("pp_size", config.runtime.pp_size)):
        if size > 1:
            raise ConfigError(f"{NAME}: not with {name} above 1", param=NAME)
    return Chosen()


def check_told(chosen: Chosen, groups: tuple[Group, ...], model_type: str) -> tuple[int, bool]:
    """The group of `group_of`, of a model that was built with this. Raises ConfigError: it has no experts, or no
    pages."""
    if not chosen.sizes:
        raise ConfigError(f"{NAME}: {model_type} has no experts", param=NAME)
    group = group_of(groups)
    if group is None:
        raise ConfigError(f"{NAME}: no layer of this model keeps its tokens in pages", param=NAME)
    return group


def keep_beside(pool: KVPool, chosen: Chosen | None, checkpoint: Checkpoint, decisions: list[Decision]) -> None:
    """Give the pool a place for what the layers note.

    Raises:
        ConfigError: the model has no experts, or no pages.
    """
    if chosen is None:
        return
    group = check_told(chosen, pool.groups, checkpoint.model_type)
    stated = checkpoint.config.get("num_hidden_layers") or len(checkpoint.config.get("layers_block_type") or ())
    layers = max(int(stated), max(chosen.sizes) + 1)
    k = max(chosen.sizes.values())
    pool.routes = Routes(chosen.notes, layers, k, group, pool.num_pages[group[0]], pool.page_size)
    size = pool.routes.values_SEk.nbytes
    why = f"experts of every token beside its page: {size / 2**20:.1f} MiB; routers and experts are two ops"
    decisions.append(Decision("routed_experts", f"{layers} x {k}", why))
