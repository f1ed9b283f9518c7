"""Which of several kernels this process has chosen by trying them, for whoever tells of it (`/server_info`); and what
the environment says of kernels, for which there is no option."""

from __future__ import annotations

from phloem.core.config import environment_of
from phloem.core.errors import ConfigError

SWITCHES = {"on": True, "1": True, "off": False, "0": False}
_chosen: dict[str, dict[str, str]] = {}


def note(what: str, which: str, why: str) -> None:
    """Of this work, that kernel; a later note of the same work replaces the one before."""
    _chosen[what] = {"kernel": which, "why": why}


def told() -> dict[str, dict[str, str]]:
    """For each work that there was a choice for: the kernel, and why."""
    return {what: dict(one) for what, one in _chosen.items()}


def switched_on(name: str) -> bool:
    """Whether a variable of the environment leaves on what is on by default; for what no option names.

    Raises:
        ConfigError: if it is neither on nor off.
    """
    asked = environment_of(name)
    if asked is not None and asked not in SWITCHES:
        raise ConfigError(f"{name}: {asked!r:.40} is not one of {', '.join(SWITCHES)}")
    return asked is None or SWITCHES[asked]
