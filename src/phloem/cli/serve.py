"""Serve a model over HTTP."""

from __future__ import annotations

from phloem.cli._options import parse

DESCRIPTION = "Serve a model behind the OpenAI API and the native API, by default on 127.0.0.1."


def main(argv: list[str]) -> int:
    from phloem.launch import EngineProcess
    from phloem.server import supervisor

    config, _ = parse("serve", argv, description=DESCRIPTION)
    # Started before anything else here is imported: it has torch to import and weights to load meanwhile.
    return supervisor.run(config, lambda: EngineProcess(config))
