"""Work an adapter into a model's weights: phloem merge BASE ADAPTER OUT."""

from __future__ import annotations

import argparse
from pathlib import Path

from phloem.adapters._merge import merge
from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError


def main(argv: list[str]) -> int:
    """Write a checkpoint that needs no adapter. Raises PhloemError for what is wrong; nothing is left behind then."""
    parser = argparse.ArgumentParser(prog="phloem merge", description=__doc__)
    parser.add_argument("base", help="the model: a folder or hub id of a safetensors checkpoint")
    parser.add_argument("adapter", type=Path, help="the adapter's folder, as PEFT writes it")
    parser.add_argument("out", type=Path, help="a new folder for the merged checkpoint")
    args = parser.parse_args(argv)
    try:
        changed = merge(describe(args.base), args.adapter, args.out, lambda line: print(line, flush=True))
    except OSError as error:
        raise ModelLoadError(f"{args.out}: {error.strerror or error}") from None
    print(f"{args.out}: {changed} tensors changed")
    return 0
