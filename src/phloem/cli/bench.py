"""Measure: serving, offline, scheduler, kernels, and more."""

from __future__ import annotations

import sys

from phloem.utils.registry import Registry

BENCHMARKS = Registry("phloem.bench", "benchmark")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: phloem bench NAME [options]\n\nbenchmarks: " + ", ".join(BENCHMARKS.names()))
        print("phloem bench NAME --help tells a benchmark's options.")
        return 0 if argv else 2
    status = BENCHMARKS.module(argv[0]).main(argv[1:])
    sys.stdout.flush()
    return status
