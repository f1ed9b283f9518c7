"""What `phloem serve` does beside the engine process that it has begun: reads the options, and serves."""

from __future__ import annotations

from phloem.cli._options import parse
from phloem.core.nodes import Nodes
from phloem.launch import early, node
from phloem.launch.replicas import engine_of
from phloem.server import start

DESCRIPTION = "Serve a model behind the OpenAI API and the native API, by default on 127.0.0.1."


def run(argv: list[str]) -> int:
    config, _ = parse("serve", argv, description=DESCRIPTION)
    if Nodes.of(config).rank:
        early.close()  # this node starts ranks alone
        return node.run(config)
    return start.run(config, lambda: engine_of(config))
