"""Serve a model over HTTP."""

from __future__ import annotations

from phloem.launch import early
from phloem.utils import garbage, machine


def main(argv: list[str]) -> int:
    machine.allow_open_files()  # the engine's limit is what ours is now
    if not {"-h", "--help"} & set(argv):
        early.begin()
    try:
        with garbage.left_alone():
            from phloem.cli import _serving
        return _serving.run(argv)
    finally:
        early.close()
