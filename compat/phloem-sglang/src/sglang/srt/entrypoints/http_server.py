"""The server: `launch_server` in a process of its own, or `app` over an engine in this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from phloem.core.config import Config
from phloem.launch.process import EngineProcess
from phloem.server import start
from phloem.server.app import create_app
from sglang._missing import missing
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager
from sglang.srt.server_args import PortArgs, ServerArgs

__all__ = ["Engine", "PortArgs", "ServerArgs"]
_launch_subprocesses = Engine._launch_subprocesses


def launch_server(server_args: ServerArgs, *_: Any, **__: Any) -> None:
    """Serve until a signal: what `phloem serve` does. For a process of its own.

    Raises:
        phloem.core.errors.PhloemError: a setting or the checkpoint is wrong.
        SystemExit: the engine is gone for good.
    """
    config = Config.from_flat({"log_level": "info", **server_args.settings()})
    status = start.run(config, lambda: EngineProcess(config))
    if status:
        raise SystemExit(status)


@dataclass
class _GlobalState:
    tokenizer_manager: TokenizerManager
    template_manager: Any
    scheduler_info: dict[str, Any]


class _Served:
    """The state that `app` serves, and Phloem's app over its engine."""

    def __init__(self) -> None:
        self.state: _GlobalState | None = None
        self._app: Any = None

    def set(self, state: _GlobalState) -> None:
        self.state, self._app = state, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Phloem's app lives in its engine's loop: what it receives and sends crosses over."""
        if self.state is None:
            raise RuntimeError("set_global_state has not been called: there is no engine to serve")
        engine, mine = self.state.tokenizer_manager.engine, asyncio.get_running_loop()
        if self._app is None:
            self._app = create_app(engine._client, engine.config, engine.info)

        async def theirs(work: Any) -> Any:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, mine))

        served = self._app(scope, lambda: theirs(receive()), lambda message: theirs(send(message)))
        await asyncio.wrap_future(engine._door.start(served))


_served = _Served()
app = FastAPI(title="Phloem under the names of sglang", openapi_url=None, docs_url=None, redoc_url=None)
app.mount("", _served)


def set_global_state(global_state: _GlobalState) -> None:
    """What `app` serves from now on."""
    _served.set(global_state)


def get_global_state() -> _GlobalState | None:
    return _served.state


def _execute_server_warmup(server_args: ServerArgs, *_: Any, **__: Any) -> bool:
    """Whether the engine of `app` is up: it has been warmed before it was there."""
    if _served.state is None:
        return False
    _served.state.tokenizer_manager.server_status = ServerStatus.Up
    return True


def _setup_and_run_http_server(
    server_args: ServerArgs,
    tokenizer_manager: TokenizerManager,
    template_manager: Any,
    port_args: Any = None,
    scheduler_info: Any = None,
    execute_warmup_func: Callable[..., Any] = _execute_server_warmup,
    launch_callback: Callable[[], None] | None = None,
    **_: Any,
) -> None:
    """Serve `app` over this engine, until a signal."""
    found = scheduler_info if isinstance(scheduler_info, dict) else tokenizer_manager.engine.scheduler_info
    set_global_state(_GlobalState(tokenizer_manager, template_manager, found))
    execute_warmup_func(server_args)
    if launch_callback is not None:
        launch_callback()
    uvicorn.run(app, host=server_args.host, port=server_args.port, log_level="warning")


__getattr__ = missing(__name__)
