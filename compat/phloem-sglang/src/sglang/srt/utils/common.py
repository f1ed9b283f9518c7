"""Small things that callers import from the runtime."""

from __future__ import annotations

import os
import resource
import signal
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from sglang._missing import log, missing


def kill_process_tree(parent_pid: int | None, include_parent: bool = True, skip_pid: int | None = None) -> None:
    """End a process's children, and itself. None: of this process, which then ends too if it is included."""
    pid = os.getpid() if parent_pid is None else parent_pid
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    for child in parent.children(recursive=True):
        if child.pid != skip_pid:
            _kill(child)
    if include_parent and pid != skip_pid:
        _kill(parent)


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def assert_pkg_version(pkg: str, min_version: str, message: str) -> None:
    """Raises RuntimeError: the package is not there, or older."""
    try:
        found = version(pkg)
    except PackageNotFoundError:
        raise RuntimeError(f"{pkg} is not installed, {min_version} is the least: {message}") from None
    if _numbers(found) < _numbers(min_version):
        raise RuntimeError(f"{pkg} {found} is installed, {min_version} is the least: {message}")


def _numbers(text: str) -> list[int]:
    return [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:4]]


def is_cuda() -> bool:
    return torch.cuda.is_available() and torch.version.cuda is not None


def is_hip() -> bool:
    return torch.version.hip is not None


def is_npu() -> bool:
    return False


def get_bool_env_var(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).strip().lower() in ("true", "1")


def set_ulimit(target_soft_limit: int = 65535) -> None:
    """Let this process open more files, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = target_soft_limit if hard == resource.RLIM_INFINITY else min(target_soft_limit, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def set_prometheus_multiproc_dir() -> None:
    log.info("metrics are of one process: there is no directory to share")


def add_prometheus_middleware(app: Any) -> None:
    log.info("/metrics is served anyway")


__getattr__ = missing(__name__)
