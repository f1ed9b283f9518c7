"""Measure: serving, offline, scheduler, kernels, and more."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

BENCHMARKS: Registry[Callable[[list[str]], int]] = Registry("phloem.bench", "benchmark", "main")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: phloem bench NAME [options]\n\nbenchmarks: " + ", ".join(BENCHMARKS.names()))
        print("phloem bench NAME --help tells a benchmark's options.")
        return 0 if argv else 2
    status = BENCHMARKS.get(argv[0])(argv[1:])
    sys.stdout.flush()
    return status
