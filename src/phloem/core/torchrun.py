"""Which node this is, as torchrun and other launchers say in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phloem.core.errors import ConfigError


def as_torchrun_says(values: dict[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """Add which node this is and where the first one listens, where options leave that out and the environment has it.

    A server of one rank that torchrun starts is none of several nodes: it is left alone.

    Raises:
        ConfigError: torchrun has started several processes on a node, or as many nodes as options do not say; or the
            environment has a part of what it must say, or no numbers where these belong.
    """
    nodes = values.get("nnodes") or 1
    started = "TORCHELASTIC_RUN_ID" in env
    ranks = int(values.get("tp_size") or 1) * int(values.get("pp_size") or 1)
    world = _number("WORLD_SIZE", env) if started and ranks > 1 else _number("WORLD_SIZE", env, 1, strict=False)
    if started and ranks > 1 and world < 1:
        raise ConfigError(f"WORLD_SIZE: {world} must be above 0", param="WORLD_SIZE")
    if nodes == 1 and not (started and world > 1 and ranks > 1):
        return values
    if started:
        if env.get("LOCAL_WORLD_SIZE") not in (None, "1"):
            why = f"torchrun has started {env['LOCAL_WORLD_SIZE']} processes on a node, where one starts the others"
            raise ConfigError(f"nnodes: {why}: --nproc-per-node 1", param="nnodes")
        if nodes not in (1, world):
            raise ConfigError(f"nnodes {nodes}: torchrun has started {world} nodes", param="nnodes")
        nodes = world
    found: dict[str, Any] = {"nnodes": nodes}
    if values.get("node_rank") is None:
        # A number that nobody can read must not make this node 0, which every node is that says nothing.
        names = ("NODE_RANK", "GROUP_RANK", *(["RANK"] if world == nodes else []))
        said = next((name for name in names if env.get(name)), None)
        if said is None and started:
            _number("GROUP_RANK", env)
        found["node_rank"] = None if said is None else _number(said, env)
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if values.get("dist_init_addr") is None and (host or port or started):
        if not host:
            beside = "MASTER_PORT is" if port else "other variables of torchrun are"
            raise ConfigError(f"MASTER_ADDR: it is not set, and {beside}", param="dist_init_addr")
        # At the port itself torchrun listens.
        its = _number("MASTER_PORT", env) + (env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        found["dist_init_addr"] = f"[{host}]:{its}" if ":" in host else f"{host}:{its}"
    return {**values, **found}


def _number(name: str, env: Mapping[str, str], default: int = 0, *, strict: bool = True) -> int:
    """Raises ConfigError where it is not set, or no number, unless a default may stand for that."""
    said = env.get(name, "")
    try:
        return int(said)
    except ValueError:
        if not strict:
            return default
        what = f"{said!r} is no number" if said else "it is not set, and other variables of torchrun are"
        raise ConfigError(f"{name}: {what}", param=name) from None
