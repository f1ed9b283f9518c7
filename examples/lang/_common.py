"""What every example needs: where to run, how many cases, and how fast it went."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from phloem import lang
from phloem.bench._text import sentences


def run(
    about: str,
    program: lang.Function,
    cases: Callable[[int, int], list[dict[str, Any]]],
    show: Callable[[lang.ProgramState], str],
    count: int = 2,
) -> None:
    """Run a program on its cases, on a server (`--url`) or on an engine in this process, and show what came out."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:30000")
    parser.add_argument("--model", default="demo", help="model to load without --url")
    parser.add_argument("--count", type=int, default=count, help="how many cases to run")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    backend = lang.RuntimeEndpoint(args.url) if args.url else lang.Engine(model_path=args.model)
    try:
        asked = cases(args.count, args.seed)
        begun = time.perf_counter()
        states = program.run_batch(asked, backend=backend, temperature=0)
        seconds = time.perf_counter() - begun
    finally:
        backend.shutdown()
    for state in states:
        print(f"{'=' * 72}\n{state.error() or show(state)}")
    print(f"{'=' * 72}\n{len(asked)} programs in {seconds:.2f} s")


def prose(words: int, skip: int = 0) -> str:
    """About so many words of the documentation that ships with Python, as sentences."""
    found: list[str] = []
    length = 0
    for sentence in sentences()[skip:]:
        found.append(sentence.strip().rstrip(".") + ".")
        length += len(sentence.split())
        if length >= words:
            break
    return " ".join(found)
