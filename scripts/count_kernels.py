"""Count the instructions of the native kernels at levels of x86 and of Arm, side by side, by emulators.

    python scripts/count_kernels.py [--levels avx2,neon,i8mm] [--rows 1,4,32] [--what Q4_1,Q8_0,Q6_K,bf16,attention]
                                    [--profile]

One linear layer (512 inputs, 256 features), or attention of rows of one token over int8 pages (8 heads of 64 over 2 kv
heads, 256 tokens each), by one thread; both sides compiled with the flags of a wheel. The emulators (Debian: qemu-user,
and g++-aarch64-linux-gnu) log every block of instructions that they run, so that counts are exact, the same on every
machine and however busy it is; a call is two calls less one. Counts are not times: an instruction may take one cycle
here and four there. Prints a table in Markdown; with --profile also which functions and instructions.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CSRC, BUILD = ROOT / "csrc" / "cpu", ROOT / "build" / "counts"
LAYOUTS = {"Q4_0": 0, "Q4_1": 1, "Q5_0": 2, "Q5_1": 3, "Q8_0": 4, "Q2_K": 5, "Q3_K": 6, "Q4_K": 7, "Q5_K": 8, "Q6_K": 9,
           "IQ4_NL": 10, "bf16": 11, "f16": 12, "f32": 13, "Q8_0 split": 14}  # fmt: skip
# What the program is asked for: a kernel and a number, a layout or how many tokens are cached.
WHAT = {name: ("linear", layout) for name, layout in LAYOUTS.items()} | {"attention": ("attention", 256)}
X86 = ("avx2",)
ARM = ("neon", "i8mm")
ONCE = ("pool.cpp", "registry.cpp", "linear_pack.cpp", "each/rope.cpp")


@dataclass(frozen=True)
class Machine:
    """How programs for one kind of processor are made and run."""

    name: str
    compiler: str
    emulator: tuple[str, ...]
    levels: tuple[str, ...]


MACHINES = (
    Machine("x86_64", "g++", ("qemu-x86_64", "-cpu", "max"), X86),
    Machine("aarch64", "aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", "max"), ARM),
)


@dataclass
class Run:
    """Instructions that a program ran, by (function, mnemonic)."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def less(self, other: Run) -> Run:
        found = Run()
        found.counts = self.counts.copy()
        found.counts.subtract(other.counts)
        return found

    def by(self, part: int) -> Counter[str]:
        """Of each function (part 0) or mnemonic (1)."""
        found: Counter[str] = Counter()
        for key, number in self.counts.items():
            found[key[part]] += number
        return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", default="avx2,neon,i8mm")
    parser.add_argument("--rows", default="1,4,32")
    parser.add_argument("--what", default="Q4_1,Q8_0,Q6_K,bf16,attention")
    parser.add_argument("--profile", action="store_true", help="functions and instructions, most first")
    options = parser.parse_args(argv)
    levels, kinds = options.levels.split(","), options.what.split(",")
    rows = [int(number) for number in options.rows.split(",")]
    unknown = [level for level in levels if level not in X86 + ARM] + [name for name in kinds if name not in WHAT]
    if unknown:
        known = f"levels: {', '.join(X86 + ARM)}; what: {', '.join(WHAT)}"
        print(f"not known: {', '.join(unknown)} ({known})", file=sys.stderr)
        return 2
    machines = [machine for machine in MACHINES if any(level in machine.levels for level in levels)]
    missing = [
        name for machine in machines for name in (machine.compiler, machine.emulator[0]) if not shutil.which(name)
    ]
    if missing or platform.machine() != "x86_64":
        print(f"needs an x86-64 machine and {', '.join(missing) or 'its compiler'} (Debian: qemu-user, "
              "g++-aarch64-linux-gnu)", file=sys.stderr)  # fmt: skip
        return 1
    programs = {machine.name: program_for(machine) for machine in machines}
    found: dict[tuple[str, str, int], Run] = {}
    for kind in kinds:
        for number in rows:
            for machine in machines:
                for level in (level for level in levels if level in machine.levels):
                    found[kind, level, number] = one_call(machine, programs[machine.name], level, kind, number)
    print(table(found, levels, kinds, rows))
    if options.profile:
        for (kind, level, number), run in found.items():
            print(f"\n{kind}, {number} rows, {level}: {run.total:,}\n{profile(run)}")
    return 0


# ---- programs ------------------------------------------------------------------------------------------------------


def build_flags() -> ModuleType:
    """`setup.py` as a module: its flags, without running it."""
    source = (ROOT / "setup.py").read_text().rsplit("\nsetup(", 1)[0]
    module = ModuleType("phloem_setup")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile(source, "setup.py", "exec"), module.__dict__)
    return module


def program_for(machine: Machine) -> Path:
    """Compiles what has changed, and links."""
    setup = build_flags()
    folder = BUILD / machine.name
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(CSRC / name, "portable") for name in ONCE] + [(Path(__file__).with_suffix(".cpp"), "portable")]
    for level in machine.levels:
        whole = [CSRC / "each" / name for name in ("linear.cpp", "attention.cpp")]
        jobs += [(path, level) for path in ([CSRC / level / "linear.cpp"] if level in setup.PARTIAL else whole)]
    newest = max(path.stat().st_mtime for path in (*CSRC.rglob("*.h"), *CSRC.glob("each/*.cpp"), ROOT / "setup.py"))

    def build(job: tuple[Path, str]) -> Path:
        source, level = job
        target = folder / f"{source.stem}.{level}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, source.stat().st_mtime):
            command = [machine.compiler, *setup.COMMON, *setup.LEVELS[level], "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as workers:
        objects = [str(path) for path in workers.map(build, jobs)]
    program = folder / "program"
    subprocess.run([machine.compiler, *objects, "-static", "-pthread", "-o", str(program)], check=True)
    return program


# ---- counting ------------------------------------------------------------------------------------------------------

# A block's instructions as the emulator lists them once, and a line for each time that it runs the block.
INSTRUCTION = re.compile(rb"0x[0-9a-f]+:  [0-9a-f ]+? {2,}([a-z.]\S*)")
RAN = re.compile(rb"Trace \d+: 0x[0-9a-f]+ \[[0-9a-f]+/([0-9a-f]+)/")


def one_call(machine: Machine, program: Path, level: str, kind: str, rows: int) -> Run:
    both = [counted(machine, program, level, kind, rows, calls) for calls in (2, 1)]
    return both[0].less(both[1])


def counted(machine: Machine, program: Path, level: str, kind: str, rows: int, calls: int) -> Run:
    kernel, number = WHAT[kind]
    command = [*machine.emulator, "-d", "in_asm,exec,nochain", str(program), level, kernel]
    with subprocess.Popen([*command, str(number), str(rows), str(calls)], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        found = read(process.stderr)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return found


def read(log: Iterable[bytes]) -> Run:
    """What an emulator's log says: a block is listed when it is met, and named each time that it runs."""
    blocks: dict[bytes, tuple[str, list[str]]] = {}
    times: Counter[bytes] = Counter()
    function, listed = "", list[str]()
    for line in log:
        if line.startswith(b"Trace"):
            ran = RAN.match(line)
            assert ran is not None, line
            if listed:
                blocks[ran[1]] = function, listed
                listed = []
            times[ran[1]] += 1
        elif line.startswith(b"0x"):
            instruction = INSTRUCTION.match(line)
            if instruction is not None:  # else the rest of a long one
                listed.append(instruction[1].decode())
        elif line.startswith(b"IN:"):
            function, listed = line[3:].strip().decode(), []
    found = Run()
    for block, number in times.items():
        function, listed = blocks[block]
        for mnemonic, often in Counter(listed).items():
            found.counts[function, mnemonic] += often * number
    return found


# ---- tables --------------------------------------------------------------------------------------------------------


def table(found: dict[tuple[str, str, int], Run], levels: list[str], kinds: list[str], rows: list[int]) -> str:
    """Counts, and behind them how often the first level's."""
    lines = [f"| kernel, rows | {' | '.join(levels)} |", f"| --- |{' --- |' * len(levels)}"]
    for kind in kinds:
        for number in rows:
            totals = [found[kind, level, number].total for level in levels]
            cells = [f"{totals[0]:,}"] + [f"{total:,} ({total / totals[0]:.2f})" for total in totals[1:]]
            lines.append(f"| {kind}, {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def profile(run: Run) -> str:
    names = run.by(0)
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    lines: list[str] = []
    for (name, number), plain in sorted(zip(names.items(), shown.splitlines(), strict=True), key=lambda of: -of[0][1]):
        if number > run.total / 100:
            mine = Counter({key[1]: count for key, count in run.counts.items() if key[0] == name})
            most = ", ".join(f"{mnemonic} {count:,}" for mnemonic, count in mine.most_common(14))
            lines.append(f"  {number:>10,} {plain[:110]}\n             {most}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
