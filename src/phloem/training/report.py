"""What a training tells: JSON lines, a plot of them, and bars on the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.core.errors import PhloemError
from phloem.utils import plots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

METRICS = "metrics.jsonl"
PLOT = "training.png"


class Metrics:
    """`metrics.jsonl`: lines with `loss` every few steps, with `accept_length` of looks at held-out prompts."""

    def __init__(self, folder: Path, since: int) -> None:
        """`since`: lines of later steps are forgotten, as they will be written again; -1: all."""
        self._path = folder / METRICS
        kept = [line for line in read_metrics(folder) if line["step"] <= since]
        self._write("w", kept)

    def add(self, line: dict[str, Any]) -> None:
        self._write("a", [line])

    def _write(self, mode: str, lines: Sequence[dict[str, Any]]) -> None:
        try:
            with self._path.open(mode) as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise PhloemError(f"{self._path} cannot be written: {error.strerror}") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines so far; one that was cut off is left out."""
    found: list[dict[str, Any]] = []
    path = folder / METRICS
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def plot(folder: Path) -> Path | None:
    """Loss, accuracy of each round and accept length over the steps, as a PNG. None: nothing was learned yet.

    Raises:
        PhloemError: matplotlib is not installed, or the file cannot be written.
    """
    lines = read_metrics(folder)
    steps, looks = [one for one in lines if "loss" in one], [one for one in lines if "accept_length" in one]
    if not steps:
        return None
    pyplot = plots.pyplot()

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    at = [one["step"] for one in steps]
    left.plot(at, [one["loss"] for one in steps], color="#2b6cb0")
    left.set(title="loss", xlabel="step", ylabel="weighted, of all rounds or places")
    for depth in range(len(steps[-1]["accuracy"])):
        middle.plot(at, [one["accuracy"][depth] for one in steps], label=f"{depth}", alpha=0.8)
    middle.set(title="accuracy by round, or by place of a block", xlabel="step", ylabel="share of right tokens")
    middle.legend(fontsize=8)
    right.plot([one["step"] for one in looks], [one["accept_length"] for one in looks], marker="o", color="#d9822b")
    right.set(title="held-out prompts", xlabel="step", ylabel="accept length: tokens a step")
    figure.tight_layout()
    try:
        figure.savefig(folder / PLOT, dpi=110)
    except OSError as error:
        raise PhloemError(f"{folder / PLOT} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
    return folder / PLOT


class Bars:
    """What is done and how far, on standard error; lines of text where that is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns: tuple[Any, ...] = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, name: str) -> Callable[..., None]:
        """A bar; call it with (done, of all, words)."""
        task = self._bars.add_task(name, total=None, told="")

        def told(done: int, total: int, words: str = "") -> None:
            self._bars.update(task, completed=done, total=total, told=words)
            if done >= total:
                self._bars.update(task, visible=False)

        return told

    def say(self, line: str) -> None:
        if self._bars.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bars.console.print(line, highlight=False, markup=False)
