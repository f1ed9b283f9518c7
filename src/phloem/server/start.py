"""The first moments of a server: the port is taken and the engine started before anything large is imported here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from phloem.core.config import log_format
from phloem.core.errors import ConfigError, PhloemError
from phloem.server.videos.folder import FilmFolder
from phloem.utils import garbage, log, machine, tracing
from phloem.utils.sockets import bind

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from phloem.core.config import Config
    from phloem.core.messages import EngineLink


MIN_FILES = 64  # what a server opens for itself, and a few connections


def run(
    config: Config, start_engine: Callable[[], EngineLink], refused: Callable[[str], None] = lambda why: None
) -> int:
    """Serve until a signal; returns the process's exit status. `refused`: told why there is no start, by what the
    engine has nothing to do with.

    Raises:
        PhloemError: the configuration or the checkpoint is wrong; no port was opened.
    """
    began = time.perf_counter()
    log.configure(config.server.log_level, form=log_format())
    try:
        films, sock = _prepared(config)
        engine = start_engine()
    except PhloemError as error:
        refused(error.message)
        raise
    # Half a second of imports, while the engine process imports torch.
    with garbage.left_alone():
        from phloem.server import supervisor

    return supervisor.run(config, engine, sock, start_engine, began, films, refused)


def _prepared(config: Config) -> tuple[FilmFolder | None, socket.socket]:
    """Where films are kept, and the port, bound: a taken one is told at once; nobody can connect before it listens."""
    if config.server.otlp_traces_endpoint:
        tracing.check(config.server.otlp_traces_endpoint)
    files = machine.open_files()
    if files is not None and files < MIN_FILES:
        raise ConfigError(f"the system allows this process {files} open files, {MIN_FILES} are the least: `ulimit -n`")
    films = None if config.images.video_output_path is None else FilmFolder(config.images.video_output_path)
    return films, bind(config.server.host, config.server.port)
