"""One command for a machine with a GPU: is every kernel right on it, and how fast is the engine against its floors?

    python scripts/gpu_check.py                      everything; results under benchmarks/results/
    python scripts/gpu_check.py --plan               what to run in three calls of ten minutes, and what to carry there
    python scripts/gpu_check.py --call 1             one of those
    python scripts/gpu_check.py --only kernels       correctness of the kernels alone
    python scripts/gpu_check.py --dry-run --out DIR  on a CPU, tiny: shows that the script works, and nothing else

It needs torch, Triton, numpy and msgspec, for servers what `--plan` names, for the comparison transformers; what is
missing is said and left out. Weights are random, nothing is downloaded. Each section is a process, ended when its time
is over; each kernel is checked where it can end no other. What is found is written as it is found, and printed where it
cannot be written. Exit status: 0 all right, 1 something is wrong, 2 no GPU, or what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gpu_watch  # noqa: E402
from gpu_page import failures, markdown  # noqa: E402
from gpu_plan import CALL_SECONDS, LIMIT, PEER_SECONDS, SECTIONS, fits, of_call, plan  # noqa: E402
from gpu_watch import Child, Pool, watch  # noqa: E402

ENDING = 20.0  # seconds of the limit that are kept for ending what hangs, and for writing
QUESTION = 90.0  # seconds for one kernel or model: compiling is most of them
WORKERS = max(1, min(6, (os.cpu_count() or 2) // 2))
DRY_SECONDS = 3600.0  # the interpreter takes its time
LOST_GIB = 1.0  # of the device's free memory, between two sections
_MACHINE = """
import json, platform, sys
import torch, triton
found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
if sys.argv[1] == "card":
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} finds no device; --dry-run --out DIR tries the script on a CPU")
        sys.exit(2)
    props = torch.cuda.get_device_properties(0)
    found |= {"gpu": props.name, "memory_gib": props.total_memory / 2**30, "processors": props.multi_processor_count}
    found["free_gib"] = torch.cuda.mem_get_info()[0] / 2**30
print("@@ " + json.dumps(found))
"""


class Check:
    """The run: its clock, its children and what it found."""

    def __init__(self, args: argparse.Namespace, child: list[str] | None = None) -> None:
        self.args = args
        self.tiny: bool = args.dry_run
        self.begun = time.monotonic()
        self.report: dict[str, Any] = {"machine": {}, "dry_run": self.tiny, "skipped": {}, "errors": {}, "left": {}}
        self.report |= {"section_s": {}, "free_gib": {}, "left_mib": {}}
        self._child = child or [sys.executable, str(HERE / "gpu_child.py")]
        self._marks = (f"{os.getpid()}-{number}" for number in itertools.count())
        self._mark = next(self._marks)
        self._place = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self._written, self._lock = 0.0, threading.RLock()
        self.stem: Path | None = None

    @property
    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begun)

    def environment(self, name: str) -> dict[str, str]:
        """With temporary files in a place that goes with the section."""
        place = self._place / name
        place.mkdir(exist_ok=True)
        path = os.pathsep.join(filter(None, (str(HERE.parent / "src"), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "TMPDIR": str(place), "PYTHONPATH": path}

    def start(self, name: str, *arguments: str) -> Child:
        command = [*self._child, *arguments, *(["--tiny"] if self.tiny else [])]
        return Child(command, self._mark, self.environment(name), lambda line: print(line, flush=True))

    def machine(self) -> int:
        """What this runs on; 0, or the exit status where nothing can run."""
        kind = "host" if self.tiny else "card"
        command = [sys.executable, "-c", _MACHINE, kind]
        child = Child(command, self._mark, self.environment("machine"), lambda line: print(line, flush=True))
        why = watch(child, 120.0, self.report["machine"].update)
        if not self.report["machine"]:
            print(f"nothing can be checked here: {why}")
            return 2
        self.report["machine"] |= {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "commit": commit(self.args)}
        if self.tiny:
            self.report["machine"]["memory_gib"] = self.args.pretend_gib
        name = "dry-run" if self.tiny else self.report["machine"]["gpu"].lower().replace(" ", "-")
        when = time.strftime("%Y%m%d-%H%M", time.gmtime())
        self.stem = self.args.out / f"gpu-check-{name}-{when}-{self.report['machine']['commit']}"
        return 0

    def run(self) -> None:
        for name in wanted(self.args):
            self.section(name)
        self.write()

    def section(self, name: str) -> None:
        """Run one section, if the card and the time suffice; what comes of it is noted, and the next one can run."""
        one, needs = SECTIONS[name], SECTIONS[name].seconds * (0.0 if self.tiny else 0.6)
        why = fits(one, self.report["machine"].get("memory_gib", 0.0))
        if not why and self.left - ENDING < needs:
            why = f"{self.left - ENDING:.0f} s were left, it needs about {one.seconds:.0f}"
        if why:
            self.report["skipped"][name] = why
            print(f"== {name}: skipped, {why}", flush=True)
            return
        print(f"== {name}", flush=True)
        begun, memory, self._mark = time.monotonic(), gpu_watch.in_memory(), next(self._marks)
        limit = one.seconds * LIMIT * (5 if self.tiny else 1) + (2 * PEER_SECONDS if name == "peers" else 0.0)
        limit = min(self.left - ENDING, self.args.limit or limit)
        try:
            if name in ("kernels", "models"):
                self._ask(name, limit)
            else:
                self._measure(name, limit)
        except Exception as error:  # of this script itself
            self.report["errors"][name] = f"{type(error).__name__}: {error}"[:1000]
        self._clean(name, memory)
        self.report["section_s"][name] = time.monotonic() - begun
        print(f"  {self.report['section_s'][name]:.1f} s", flush=True)
        self.write()

    def _measure(self, name: str, limit: float) -> None:
        ended: list[dict[str, Any]] = []

        def heard(told: dict[str, Any]) -> None:
            if "found" in told:
                self.report[name] = told["found"]
            if "skipped" in told:
                self.report["skipped"][name] = told["skipped"]
                print(f"  skipped: {told['skipped']}", flush=True)
            if "error" in told:
                self._wrong(name, told)
            if "left_mib" in told:
                self.report["left_mib"][name] = told["left_mib"]
                ended.append(told)
            if "free_gib" in told:
                self._free(name, told["free_gib"])
            self.write(often=True)

        # By the clock of the machine: starting takes a part of it.
        more = ["--until", f"{time.monotonic() + limit - 5:.1f}", "--pretend-gib", str(self.args.pretend_gib)]
        more += ["--floors", json.dumps(self.report["floors"])] if "floors" in self.report else []
        device = self.args.engine_device or ("cpu" if self.tiny else "")
        more += ["--engine-device", device] if device else []
        why = watch(self.start(name, name, *more), limit, heard, silent=lambda: self.write(often=True))
        if why and not ended:
            self._wrong(name, {"error": why})

    def _wrong(self, name: str, told: dict[str, Any]) -> None:
        # What another engine cannot do here is no fault of ours.
        where = "skipped" if name == "transformers" else "errors"
        of = f"{name} {told['of']}" if "of" in told else name
        before = f"{self.report[where][of]}; then: " if of in self.report[where] else ""
        self.report[where][of] = before + told["error"]
        print(f"  WRONG: {told['error']}", flush=True)

    def _free(self, name: str, free: float) -> None:
        """Processes have gone; if less memory is free than before them, it is lost to whatever comes."""
        most = max(self.report["free_gib"].values(), default=free)
        if most - free > LOST_GIB:
            self.report["errors"][f"memory before {name}"] = f"{free:.1f} GiB are free, {most:.1f} were"
        self.report["free_gib"][name] = free

    def _ask(self, name: str, limit: float) -> None:
        """Kernels and models: one question for each and each type, to workers that may die of it."""
        rows: list[dict[str, Any]] = self.report.setdefault(name, [])

        def answered(question: dict[str, Any], answer: dict[str, Any] | str) -> None:
            found = outcomes(question, answer)
            for row in found:
                error = "" if row["error"] is None else f"error {row['error']:.2g} (limit {row['limit']:.2g})"
                print(f"  {'ok' if row['ok'] else 'WRONG':5} {row['name']:44} {error} {row['message']}", flush=True)
            rows.extend(found)
            self.write(often=True)

        until = time.monotonic() + limit
        patience = self.args.question or (600.0 if self.tiny else QUESTION)
        pool = Pool(lambda: self.start(name, "worker", name), self.args.workers, patience, until)
        open_ = pool.run(lambda names: self._questions(name, names), answered)
        if pool.missing:
            self.report["skipped"][name] = pool.broken
        elif pool.broken:
            self.report["errors"][name] = f"no worker starts: {pool.broken}"
        elif open_:
            self.report["errors"][name] = f"{open_} of {open_ + pool.asked} were not asked: the time was over"

    def _questions(self, name: str, names: list[str]) -> list[dict[str, Any]]:
        only = listed(self.args.checks) or names
        if name == "kernels" and (unknown := sorted(set(only) - set(names))):
            self.report["errors"]["checks"] = f"unknown: {', '.join(unknown)}; known: {', '.join(names)}"
            print(f"  WRONG: checks {self.report['errors']['checks']}", flush=True)
        # float32 shows an error of logic that the rounding of bf16 might hide.
        dtypes = ("float32",) if self.tiny else ("bfloat16", "float32")
        return [
            {"kind": name, "name": one, "dtype": dtype, "tiny": self.tiny or (name == "kernels" and dtype == "float32")}
            for dtype in dtypes
            for one in names
            if one in only or name == "models"
        ]

    def _clean(self, name: str, memory: set[str]) -> None:
        """End what a section left running, and remove what it left lying."""
        left = [f"ended {line}" for line in gpu_watch.end(self._mark)]
        left += [f"removed {gpu_watch.MEMORY}/{one}" for one in gpu_watch.forget(memory, alone=not self.tiny)]
        shutil.rmtree(self._place / name, ignore_errors=True)
        if left:
            self.report["left"][name] = "; ".join(left)
            if name not in self.report["errors"]:  # what is killed cannot tidy up
                self.report["errors"][f"{name} left something behind"] = self.report["left"][name][:1000]

    def write(self, often: bool = False) -> None:
        """The report, in two files; `often`: at most once a second. What cannot be written now may be later."""
        with self._lock:
            if self.stem is None or (often and time.monotonic() - self._written < 1.0):
                return
            self._written = time.monotonic()
            self.report["seconds"] = time.monotonic() - self.begun
            before = self.report["errors"].pop("results", "")
            try:
                self.stem.parent.mkdir(parents=True, exist_ok=True)
                for end, text in ((".json", json.dumps(self.report, indent=1) + "\n"), (".md", page(self.report))):
                    self._replace(self.stem.with_name(self.stem.name + end), text)
            except OSError as error:
                self.report["errors"]["results"] = f"not written: {error}"
                if not before:
                    print(f"  WRONG: results not written: {error}", flush=True)

    def _replace(self, file: Path, text: str) -> None:
        part = file.with_name(file.name + ".part")
        try:
            part.write_text(text)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def where(self) -> str:
        """The files of the report, or where there are none the report itself."""
        if "results" in self.report["errors"]:
            return f"results not written, this is the .json: {json.dumps(self.report)}"
        return f"{self.stem}.json, .md"

    def close(self) -> None:
        gpu_watch.end(self._mark, 1.0)
        shutil.rmtree(self._place, ignore_errors=True)


def page(report: dict[str, Any]) -> str:
    """The report for people; what keeps it from being made costs nothing but itself."""
    try:
        return markdown(report)
    except Exception as error:
        return f"# {'Dry run' if report['dry_run'] else 'GPU check'}\n\nno page: {type(error).__name__}: {error}\n"


def outcomes(question: dict[str, Any], answer: dict[str, Any] | str) -> list[dict[str, Any]]:
    """The rows of one question. `answer` is a text where there came none: why."""
    if isinstance(answer, str):
        found, why = [], answer
    else:
        found, why = list(answer.get("outcomes", [])), str(answer.get("failed", ""))
        if "dead" in answer and not why and all(row["ok"] for row in found):
            if found:
                found[-1] |= {"ok": False, "message": f"afterwards the device did no more: {answer['dead']}"}
            else:
                why = f"the device did no more: {answer['dead']}"
    if why:
        name = f"{question['name']} ({question['dtype']})"
        found.append({"name": name, "ok": False, "error": None, "limit": None, "seconds": None, "message": why[:1000]})
    return found


def listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def wanted(args: argparse.Namespace) -> list[str]:
    """Sections by the order of the plan. A section's own name means that one alone, else all that begin so."""
    only = listed(args.only)
    exact = {one for one in only if one in SECTIONS}
    begin = tuple(one for one in only if one not in SECTIONS)
    names = of_call(args.call) if args.call else list(SECTIONS)
    return [name for name in names if not only or name in exact or (begin and name.startswith(begin))]


def commit(args: argparse.Namespace) -> str:
    """Of this checkout, which says where files differ from it; where that cannot be asked, as it was told."""
    if args.commit:
        return args.commit
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["git", "-C", str(HERE), "describe", "--always", "--exclude=*", "--dirty=-changed"]
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return "unknown"


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print what to do with half an hour of a card")
    parser.add_argument("--call", type=int, choices=(1, 2, 3), default=0, help="the sections of one call of the plan")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, under Triton's interpreter")
    parser.add_argument("--only", default="", help=f"sections by prefix, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--checks", default="", help="of the kernels, only these, with commas")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help=f"it has ended by then: {CALL_SECONDS:.0f}, of a dry run {DRY_SECONDS:.0f}",
    )
    parser.add_argument("--limit", type=float, default=0.0, help="seconds for each section; default: by the plan")
    parser.add_argument("--question", type=float, default=0.0, help=f"seconds for a kernel or model: {QUESTION:.0f}")
    parser.add_argument(
        "--workers", type=int, default=0, help=f"that check kernels beside each other: {WORKERS}, dry: 1"
    )
    parser.add_argument("--commit", default="", help="of what is checked, where git cannot be asked")
    parser.add_argument("--engine-device", default="", help="of the engines that are started")
    parser.add_argument("--pretend-gib", type=float, default=141.0, help="the memory of a dry run's card")
    parser.add_argument("--out", type=Path, default=HERE.parent / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if args.dry_run and args.out == parser.get_default("out"):
        parser.error("a dry run needs --out: its numbers must not stand among results")
    for name in ("seconds", "limit", "question", "workers", "pretend_gib"):
        if not (math.isfinite(value := getattr(args, name)) and value >= 0):
            parser.error(f"--{name.replace('_', '-')}: {value} is no size")
    for one in listed(args.only):
        if not any(name.startswith(one) for name in SECTIONS):
            parser.error(f"--only: no section is {one!r}, or begins so: {', '.join(SECTIONS)}")
    if not wanted(args):
        parser.error(f"--only: call {args.call} has {', '.join(of_call(args.call))}")
    args.seconds = args.seconds or (DRY_SECONDS if args.dry_run else CALL_SECONDS)
    args.workers = args.workers or (1 if args.dry_run else WORKERS)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if args.plan:
        print("\n".join(plan(commit(args))))
        return 0
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    check = Check(args)
    atexit.register(check.close)
    # Whoever ends this gets what there is.
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(kind, lambda number, frame: out_of_time(check, f"ended by {signal.Signals(number).name}"))
    if code := check.machine():
        return code
    if not args.dry_run:
        watcher = threading.Timer(check.left + 10.0, out_of_time, (check, "the script itself hangs"))
        watcher.daemon = True
        watcher.start()
    check.write()
    if "results" in check.report["errors"]:  # known before the card's time is spent
        return 2
    check.run()
    wrong = failures(check.report)
    print(page(check.report))
    skipped = f", {len(check.report['skipped'])} skipped" if check.report["skipped"] else ""
    print(f"{check.where()}; " + (f"{len(wrong)} WRONG" if wrong else "all right") + skipped)
    return 1 if wrong else 0


def out_of_time(check: Check, why: str) -> None:
    """What there is by now is written, and everything ends."""
    check.report["errors"]["time"] = f"{why}, {check.args.seconds - check.left:.0f} s after the start"
    check.write()
    print(f"{why}; {check.where()}", flush=True)
    check.close()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
