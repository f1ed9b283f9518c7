"""What `phloem serve` does beside the engine process that it has begun: reads the options, and serves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from phloem.cli._options import parse
from phloem.core.errors import PhloemError
from phloem.core.nodes import Nodes
from phloem.launch import early, node
from phloem.launch.nodes import dismiss
from phloem.launch.replicas import engine_of
from phloem.server import start

if TYPE_CHECKING:
    from phloem.core.config import Config

DESCRIPTION = "Serve a model behind the OpenAI API and the native API, by default on 127.0.0.1."


def run(argv: list[str]) -> int:
    config, _ = parse("serve", argv, description=DESCRIPTION)
    if _leads(config):
        return start.run(config, lambda: engine_of(config), partial(dismiss, config))
    early.close()  # this node starts ranks alone
    return node.run(config)


def _leads(config: Config) -> bool:
    """Whether this is node 0, or the only one. Raises ConfigError, of a further node once node 0 knows."""
    try:
        return Nodes.of(config).rank == 0
    except PhloemError as error:
        early.close()
        if config.nodes.node_rank:
            node.tell_lead(config, error.message)
        raise
