"""Train a head (EAGLE-3) or a drafter (DFlash) for a model: phloem train-draft MODEL --train-data-path FILE."""

from __future__ import annotations

from pathlib import Path

from phloem.cli._options import parse_own, read_yaml, take_config
from phloem.training.options import Options, from_file
from phloem.training.report import Bars
from phloem.training.run import train
from phloem.utils import log

DESCRIPTION = (
    "Train an EAGLE-3 head or a DFlash drafter (--method) for a model, on text that it reads or writes itself, and "
    "write checkpoints that servers load with --speculative-algorithm EAGLE3 or DFLASH and "
    "--speculative-draft-model-path. The model may stand first without its name; --config FILE reads YAML, and flags "
    "win over it."
)


def main(argv: list[str]) -> int:
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv[:1] = ["--target-model-path", argv[0]]
    path = take_config(argv)
    default = Options() if path is None else from_file(read_yaml(Path(path)), Path(path))
    options = parse_own("train-draft", argv, Options, DESCRIPTION, default)
    log.configure("warning")
    with Bars() as bars:
        try:
            return train(options, bars)
        except KeyboardInterrupt:
            bars.say(f"ended at once: what was under way is lost; whole files in {options.output_dir} stay")
            raise
