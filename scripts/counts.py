"""Lines per room, of one checkout or of two side by side.

    python scripts/counts.py [BEFORE] AFTER

A checkout is a folder that holds `src/phloem`. Lines are those of Python files; `csrc` and `tests` are counted beside
them, and how many files are long: where a house grows, it shows there first. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

LONG = 400
NATIVE = (".h", ".cpp", ".c", ".inc")


@dataclass
class Count:
    files: int = 0
    lines: int = 0

    def add(self, path: Path) -> None:
        self.files += 1
        self.lines += len(path.read_text(errors="replace").splitlines())


@dataclass
class Counts:
    """Of one checkout. `rooms`: folder of `src/phloem`, or `root` for what stands beside them."""

    rooms: dict[str, Count] = field(default_factory=dict[str, Count])
    native: Count = field(default_factory=Count)
    tests: Count = field(default_factory=Count)
    largest: int = 0
    long: int = 0

    @property
    def whole(self) -> Count:
        return Count(sum(room.files for room in self.rooms.values()), sum(room.lines for room in self.rooms.values()))


def count(checkout: Path) -> Counts:
    """Raises FileNotFoundError where there is no `src/phloem`."""
    source = checkout / "src" / "phloem"
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder")
    found = Counts()
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).parts
        found.rooms.setdefault(parts[0] if len(parts) > 1 else "root", Count()).add(path)
        lines = len(path.read_text().splitlines())
        found.largest, found.long = max(found.largest, lines), found.long + (lines > LONG)
    for folder, into, endings in (("csrc", found.native, NATIVE), ("tests", found.tests, (".py",))):
        for path in sorted((checkout / folder).rglob("*")):
            if path.suffix in endings:
                into.add(path)
    return found


def table(sides: list[Counts]) -> list[str]:
    """A row for each room, the largest of the last side first; then the whole, and what is beside it."""
    last = sides[-1]
    names = sorted({name for side in sides for name in side.rooms}, key=lambda name: -_lines(last, name))
    heads = ["before", "after"] if len(sides) == 2 else ["lines"]
    rows = [f"| room | {' | '.join(heads)} |", f"| --- |{' --- |' * len(sides)}"]
    rows += [_row(f"`{name}/`" if name != "root" else name, [_lines(side, name) for side in sides]) for name in names]
    rows.append(_row("**whole**", [side.whole.lines for side in sides]))
    rows.append(_row("files", [side.whole.files for side in sides]))
    rows.append(_row("longest file", [side.largest for side in sides]))
    rows.append(_row(f"files over {LONG} lines", [side.long for side in sides]))
    rows.append(_row("`csrc/`", [side.native.lines for side in sides]))
    rows.append(_row("`tests/`", [side.tests.lines for side in sides]))
    return rows


def _lines(side: Counts, room: str) -> int:
    return side.rooms[room].lines if room in side.rooms else 0


def _row(name: str, values: list[int]) -> str:
    return f"| {name} | {' | '.join(f'{value:,}' if value else '-' for value in values)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT", help="one, or the older and the newer")
    options = parser.parse_args(arguments)
    if len(options.checkouts) > 2:
        parser.error("one checkout or two")
    print("\n".join(table([count(path) for path in options.checkouts])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
