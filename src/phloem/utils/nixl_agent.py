"""An agent of NIXL that any thread may call. https://github.com/ai-dynamo/nixl"""

from __future__ import annotations

from typing import Any


def agent(name: str, backend: str) -> Any:
    """With this one of NIXL's plug-ins.

    Raises:
        ImportError: it is not installed, or older than 1.2.
        Exception: whatever NIXL raises where it cannot have the plug-in.
    """
    from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t  # pyright: ignore[reportMissingImports]

    # Left alone it locks nothing, and two threads that register memory at once end the process.
    strict: Any = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    config: Any = nixl_agent_config(backends=[backend], sync_mode=strict)
    return nixl_agent(name, config)
