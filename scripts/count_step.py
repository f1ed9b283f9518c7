"""Count the instructions of a model's steps on this processor, by what they are for.

    python scripts/count_step.py [MODEL] [--rows 1,32] [--context 256] [--prefill 256] [--cpu-level avx2]

Valgrind's callgrind counts (Debian: valgrind, whose headers and a C compiler it needs as well): the same number in
every run, however busy the machine is. A whole step is counted, from `Runner.launch` to its tokens: native kernels,
Python and torch. Valgrind has no AVX-512, so that the best level is AVX2's. One thread unless --threads says otherwise:
threads that wait for each other spin, and instructions are then no measure; the number of barriers still is. Prints a
table in Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HELPER = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""
# What functions of the kernels are for, the first that fits; then what the rest of a process is.
KINDS = [
    ("products of linear layers, unpacking in registers", r"::(small_block|tile_kernel|byte_kernel|dense_kernel)<"),
    ("screen of the head", r"::screen_block<|::linear_argmax_screened\("),
    ("weights unpacked for many rows", r"::(unpack_block|bytes_of_block)<"),
    ("rows normed and quantised", r"::prepare_row\("),
    ("linear layers, the rest: loops, activation, results", r"::(run_(blocks|small|tile|dense)\b|(run_)?linear\w*\()"),
    ("attention, its softmax included", r"attend|attention|::(stream|block|int8|share)_task|::(stream|block|tile)<"),
    ("rotation, keys and values written", r"rope|write_kv"),
    ("norms", r"norm"),
    ("threads and the recorded step", r"Team::|run_region|run_step|Graph::|work_loop"),
]
OBJECTS = [("Python", r"python"), ("torch", r"torch|c10|gomp|mkl|dnnl"), ("numpy", r"numpy|openblas")]
KERNELS, OTHERS = "kernels, all others", "the system's libraries"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rows", default="1,32", help="rows of the decode steps")
    parser.add_argument("--context", type=int, default=256, help="tokens that each of them has")
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prefill step; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-level", default="avx2")
    parser.add_argument("--helper", help=argparse.SUPPRESS)  # given to the process that is counted
    options = parser.parse_args(argv)
    if options.helper:
        counted(options)
        return 0
    if shutil.which("valgrind") is None or shutil.which("cc") is None:
        print("valgrind and a C compiler are needed (Debian: valgrind, gcc)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        found = count(Path(folder), argv)
    print(table(found))
    return 0


def count(folder: Path, argv: list[str]) -> dict[str, Counter[str]]:
    """Runs this script under callgrind: the instructions of each step by kind."""
    source, helper = folder / "helper.c", folder / "helper.so"
    source.write_text(HELPER)
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(helper)], check=True)
    out = f"--callgrind-out-file={folder / 'out'}"
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet", out, sys.executable, __file__, *argv]
    subprocess.run([*command, "--helper", str(helper)], check=True)
    steps: dict[str, Counter[str]] = {}
    for path in sorted(folder.glob("out.*"), key=lambda path: int(path.suffix[1:])):
        text = path.read_text()
        named = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        if named is not None:
            steps[named[1]] = by_kind(text)
    return steps


def counted(options: argparse.Namespace) -> None:
    """The steps, each once it has been recorded; only what lies between `begin` and `end` is counted."""
    from phloem.bench import step
    from phloem.checkpoint.describe import describe
    from phloem.core.config import Config
    from phloem.engine import worker
    from phloem.engine.runner import ModelRunner

    helper = ctypes.CDLL(options.helper)
    rows = [int(number) for number in options.rows.split(",")]
    length = max(options.context + step.WARM + 2, options.prefill)
    settings = {
        "model_path": options.model, "device": "cpu", "threads": options.threads, "cpu_level": options.cpu_level,
        "max_running_requests": max(rows), "max_total_tokens": max(rows) * (length // 16 + 2) * 16,
        "chunked_prefill_size": max(options.prefill, 256),
    }  # fmt: skip
    config = Config.from_flat(settings)
    built = worker.build(config, describe(config.model.model_path), lambda phase, seconds: None)
    runner = built.runner
    assert isinstance(runner, ModelRunner)
    try:
        for batch in rows:
            decode = step.DecodeSteps(runner, step.Options(batch=batch, context=options.context, steps=1))
            decode.run(0, step.WARM)
            helper.begin()
            decode.run(step.WARM, 1)
            helper.end(f"decode, {batch} row{'s' * (batch > 1)}".encode())
        for number in range(2 if options.prefill else 0):
            step._prefill_once(runner, options.prefill, number)  # pyright: ignore[reportPrivateUsage]
        if options.prefill:
            helper.begin()
            step._prefill_once(runner, options.prefill, 2)  # pyright: ignore[reportPrivateUsage]
            helper.end(f"prefill of {options.prefill}".encode())
    finally:
        runner.close()


def by_kind(text: str) -> Counter[str]:
    """Instructions of a callgrind file by kind; under "barriers" how often threads waited for each other."""
    found: Counter[str] = Counter()
    names: dict[str, str] = {}

    def name(part: str) -> str:
        """A name as callgrind shortens it: "(7) what" the first time, "(7)" from then on."""
        number, _, full = part.partition(" ")
        return names.setdefault(space + number, full)

    kind, place, space, called, waits = OTHERS, "", "", False, False
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key in ("ob", "cob"):
            space = "ob"
            full = name(value)
            place = full if key == "ob" else place
        elif key in ("fn", "cfn"):
            space = "fn"
            full = name(value)
            if key == "fn":
                kind = kind_of(full, place)
            else:
                waits = "Team::wait_for_all" in full
        elif key == "calls":
            called = True
            found["barriers"] += int(value.split()[0]) if waits else 0
        elif line and (line[0].isdigit() or line[0] in "+-*"):
            if not called:  # the line behind `calls` is what the call took
                found[kind] += int(line.split()[-1])
            called = False
    return found


def kind_of(function: str, place: str) -> str:
    if not Path(place).name.startswith("_cpu."):
        return next((kind for kind, pattern in OBJECTS if re.search(pattern, place)), OTHERS)
    return next((kind for kind, pattern in KINDS if re.search(pattern, function)), KERNELS)


def table(steps: dict[str, Counter[str]]) -> str:
    kinds = [kind for kind, _ in KINDS] + [KERNELS] + [kind for kind, _ in OBJECTS] + [OTHERS]
    whole = {name: sum(step[kind] for kind in kinds) for name, step in steps.items()}
    lines = [f"| thousands of instructions | {' | '.join(steps)} |", f"| --- |{' --- |' * len(steps)}"]
    for kind in kinds:
        if any(step[kind] for step in steps.values()):
            cells = [f"{step[kind] / 1e3:,.0f} ({step[kind] / whole[name]:.1%})" for name, step in steps.items()]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(f'{total / 1e3:,.0f}' for total in whole.values())} |")
    if any(step["barriers"] for step in steps.values()):
        lines.append(f"| times that a thread waited | {' | '.join(str(step['barriers']) for step in steps.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
