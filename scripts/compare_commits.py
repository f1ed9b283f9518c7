"""Measure two versions side by side on this machine, in alternating runs: medians, and ratios B/A.

    python scripts/compare_commits.py v1 WORKTREE                 # a commit against this checkout as it lies here
    python scripts/compare_commits.py HEAD~5 HEAD --only W1,W3 --rounds 5
    python scripts/compare_commits.py /path/of/a/checkout HEAD --quick --tokens

A and B are each a commit (anything git understands), the folder of a checkout with its native library built, or the
word WORKTREE. Commits get git worktrees in a temporary folder, which are removed in the end, and native libraries:
copied from this checkout, from --library or from the other side where csrc/ and setup.py are the same, compiled else.

In each round each side starts a server (ready time, memory), is asked the workloads by `phloem bench serving` and
`phloem bench structured` of this checkout, so that the client is the same for both, and then runs its own
`phloem bench offline`. Who comes first changes from round to round. Neighbours on a shared machine disturb: trust
ratios of several rounds, and the column that has those of single rounds, more than any figure.

Workloads: W1 one stream, W2 long prompts one at a time (prefill, TTFT), W3 32 streams in flight, W4 shared prefixes,
W5 conversations, W6 structured output; ready, memory; offline: the engine in process, without HTTP.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compare_report import METRICS, SERVED, WORKLOADS, Sample, figures, rows, table
from golden_record import compare, level

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 3600  # seconds for one benchmark
QUICK: dict[str, list[str]] = {
    "serving": [
        *("--requests", "2", "--concurrency", "4", "--input-len", "96", "--output-len", "16"),
        *("--groups", "2", "--turns", "2"),
    ],
    "structured": ["--concurrency", "2", "--input-len", "16", "--output-len", "16"],
    "offline": ["--requests", "2", "--input-len", "96", "--output-len", "16"],
}
FULL: dict[str, list[str]] = {
    "serving": [],
    "structured": ["--concurrency", "8", "--input-len", "32", "--output-len", "128"],
    "offline": [],
}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# The two sides


@dataclass
class Side:
    """One version: a folder with its source, and what git says of it."""

    name: str  # A or B
    spec: str
    folder: Path
    commit: str = ""
    changed: bool = False  # tracked files differ from the commit
    library: str = ""  # where the native library came from

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder / "src")}

    def about(self) -> dict[str, Any]:
        """For the JSON: no path of this machine."""
        return {"spec": self.spec, "commit": self.commit, "changed": self.changed, "library": self.library}


def kind_of(spec: str) -> str:
    """`worktree`, `folder` or `commit`."""
    if spec == "WORKTREE":
        return "worktree"
    return "folder" if (Path(spec) / "src" / "phloem").is_dir() else "commit"


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def side(name: str, spec: str, folder: Path) -> Generator[Side]:
    """A side whose source lies ready; a commit's worktree is removed in the end."""
    kind = kind_of(spec)
    if kind != "commit":
        place = ROOT if kind == "worktree" else Path(spec).resolve()
        changed = bool(git(place, "status", "--porcelain", "--untracked-files=no"))
        yield Side(name, spec, place, git(place, "rev-parse", "HEAD"), changed)
        return
    commit = git(ROOT, "rev-parse", "--verify", f"{spec}^{{commit}}")
    place = folder / name.lower()
    git(ROOT, "worktree", "add", "--detach", str(place), commit)
    try:
        yield Side(name, spec, place, commit)
    finally:
        git(ROOT, "worktree", "remove", "--force", str(place))


# The native library


def sources(folder: Path) -> list[Path]:
    return [folder / "setup.py", *sorted(path for path in (folder / "csrc").rglob("*") if path.is_file())]


def digest(folder: Path) -> str:
    """Of all that a native library is made of."""
    sums = hashlib.sha256()
    for path in sources(folder):
        sums.update(f"{path.relative_to(folder)}\0".encode())
        sums.update(path.read_bytes())
    return sums.hexdigest()


def library_of(folder: Path) -> Path | None:
    return next(iter(sorted((folder / "src" / "phloem").rglob("_cpu*.so"))), None)


def up_to_date(folder: Path) -> bool:
    """Whether there is a library that is not older than its sources."""
    found = library_of(folder)
    return found is not None and found.stat().st_mtime >= max(path.stat().st_mtime for path in sources(folder))


def provide_library(one: Side, donors: Sequence[Path]) -> None:
    """See that a side has a native library: its own, a copy of a donor's with the same sources, or a new one."""
    if library_of(one.folder):
        one.library = "its own" if up_to_date(one.folder) else "its own, older than its sources"
        say(f"{one.name}: the native library is {one.library}")
        return
    if kind_of(one.spec) != "commit":
        raise SystemExit(f"{one.name}: {one.folder} lacks the native library: python setup.py build_ext --inplace")
    wanted = digest(one.folder)
    for donor in donors:
        found = library_of(donor)
        if found and up_to_date(donor) and digest(donor) == wanted:
            shutil.copy2(found, one.folder / found.relative_to(donor))
            one.library = "copied: the sources are the same"
            say(f"{one.name}: native library copied, the sources are the same")
            return
    say(f"{one.name}: compiling the native library (minutes)")
    begun = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=one.folder, capture_output=True, text=True, check=False)
    if library_of(one.folder) is None:
        raise SystemExit(f"{one.name}: the native library was not built:\n{(done.stdout + done.stderr)[-2000:]}")
    one.library = "compiled"
    say(f"{one.name}: compiled in {time.perf_counter() - begun:.0f} s")


def donors_of(given: Path | None, sides: Sequence[Side]) -> list[Path]:
    """Checkouts that may lend a library: that of --library, this one, the sides'."""
    found = [ROOT, *(one.folder for one in sides)]
    if given is None:
        return found
    place = next((parent for parent in given.resolve().parents if (parent / "csrc").is_dir()), None)
    if place is None or library_of(place) != given.resolve():
        raise SystemExit(f"--library: {given} must lie where it was built: its checkout tells what it was made of")
    return [place, *found]


def check_import(one: Side) -> None:
    """The side's own package is what its processes import; its modules are compiled, so that no run does that."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(one.folder / "src" / "phloem")], check=False)
    command = [sys.executable, "-c", "import phloem; print(phloem.__file__)"]
    done = subprocess.run(command, env=one.environment(), cwd="/", capture_output=True, text=True, check=False)
    place = Path(done.stdout.strip() or ".").resolve()
    if one.folder.resolve() not in place.parents:
        raise SystemExit(f"{one.name}: phloem is imported from {place}, not from {one.folder}: {done.stderr[-500:]}")


# Measuring


class Bench:
    """Runs benchmarks and servers of the sides; `folder` takes their files."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.sizes = QUICK if options.quick else FULL

    def round(self, one: Side, number: int) -> Sample:
        """All that is wanted of one side, once."""
        found: Sample = {}
        served = [name for name in self.options.only if name != "offline"]
        if served:
            with self._server(one) as (url, pid, ready):
                found |= {"ready_s": ready, "ready_mb": resident(pid)}
                found |= self._ask(one, url, number)
                found["after_mb"] = resident(pid)
        if "offline" in self.options.only:
            names = "single,prefill,throughput,shared-prefix"
            arguments = ["--workload", names, "--model-path", self.options.model, *self.options.server_args.split()]
            found |= self._run("offline", arguments, one, number, one.folder)
        return {name: value for name, value in found.items() if METRICS[name].workload in self.options.only}

    def _ask(self, one: Side, url: str, number: int) -> Sample:
        model = self.options.model
        common = ["--url", url, "--model", model, "--tokenizer", model]
        names = [SERVED[name] for name in self.options.only if name in SERVED]
        found: Sample = {}
        if names:
            found |= self._run("serving", [*common, "--workload", ",".join(names)], one, number, ROOT)
        if "W6" in self.options.only:
            found |= self._run("structured", [*common, "--rounds", "1"], one, number, ROOT)
        return found

    def _run(self, name: str, arguments: list[str], one: Side, number: int, source: Path) -> Sample:
        output = self.folder / f"{one.name}-{number}-{name}.jsonl"
        command = [sys.executable, "-m", "phloem", "bench", name, *arguments, *self.sizes[name]]
        command += ["--seed", str(number + 1), "--output", str(output)]
        environment = {**os.environ, "PYTHONPATH": str(source / "src")}
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        if done.returncode:
            raise SystemExit(f"{one.name}: phloem bench {name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return figures(name, [json.loads(line) for line in output.read_text().splitlines()])

    @contextmanager
    def _server(self, one: Side) -> Generator[tuple[str, int, float]]:
        """(address, process id, seconds until it was ready) of a server of a side."""
        command = [sys.executable, "-m", "phloem", "serve", self.options.model, "--port", "0", "--log-level", "warning"]
        command += self.options.server_args.split()
        log = self.folder / f"{one.name}-server.log"
        begun = time.perf_counter()
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, env=one.environment(), cwd=self.folder, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = re.search(r"at (http://\S+)$", line.strip())
                if found:
                    yield found.group(1), process.pid, time.perf_counter() - begun
                    return
            raise SystemExit(f"{one.name}: the server did not start:\n{log.read_text()[-3000:]}")
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def resident(pid: int) -> float:
    """MB that a process and its descendants hold: proportional shares where the system tells them, else RSS."""
    import psutil

    root = psutil.Process(pid)
    full = [process.memory_full_info() for process in (root, *root.children(recursive=True))]
    return sum(getattr(found, "pss", 0) or found.rss for found in full) / 1e6


def compare_tokens(sides: Sequence[Side], folder: Path, models: str | None) -> list[str]:
    """Differences of what both sides say with native ops."""
    kept: list[dict[str, Any]] = []
    for one in sides:
        say(f"{one.name}: tokens of the golden cases, native ops (minutes)")
        out = folder / f"{one.name}-tokens.json"
        command = [sys.executable, str(ROOT / "scripts" / "golden_tokens.py"), "--ops", "native", "--out", str(out)]
        command += ["--models", models] if models else []
        done = subprocess.run(command, env=one.environment(), cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{one.name}: golden_tokens.py failed:\n{done.stderr[-3000:]}")
        kept.append(json.loads(out.read_text())["levels"][level()])
    first, second = kept
    return compare(first, {"B": second})[0] + [f"{name}: not said by B" for name in first.keys() - second.keys()]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, checked. `only` comes as a list of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="commit, folder of a checkout, or WORKTREE")
    parser.add_argument("b", metavar="B", help="the same; ratios are B/A")
    parser.add_argument("--rounds", type=int, help="runs of each side; default: 3, with --quick 1")
    parser.add_argument(
        "--only", default=",".join(WORKLOADS), help="what to measure, with commas; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="tiny workloads: shows that it runs, figures say little")
    parser.add_argument("--tokens", action="store_true", help="also compare what both say (scripts/golden_tokens.py)")
    parser.add_argument("--token-models", help="models of --tokens, with commas; default: all of golden_tokens.py")
    parser.add_argument("--model", default="demo", help="model to serve; default: %(default)s")
    parser.add_argument("--server-args", default="", help="further settings of servers and engines, as one string")
    parser.add_argument("--library", type=Path, help="built native library, in a checkout of the sources it is made of")
    parser.add_argument("--out", type=Path, help="JSON file; default: one named by date in build/comparisons")
    options = parser.parse_args(argv)
    options.only = [name for name in options.only.split(",") if name]
    unknown = [name for name in options.only if name not in WORKLOADS]
    if unknown:
        parser.error(f"--only: unknown {unknown[0]!r}; known: {', '.join(WORKLOADS)}")
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not options.only and not options.tokens:
        parser.error("nothing to do: --only is empty and --tokens is not given")
    return options


def order(sides: Sequence[Side], number: int) -> list[Side]:
    """Who comes first changes from round to round."""
    return list(sides) if number % 2 == 0 else list(sides)[::-1]


def context() -> dict[str, Any]:
    """Where and when."""
    name = ""
    if Path("/proc/cpuinfo").exists():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = named[0].split(":", 1)[1].strip() if named else ""
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"date": date, "processor": name, "instruction_set": level(), "cores": len(os.sched_getaffinity(0))}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    tokens: list[str] | None = None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="compare-")))
        sides = [stack.enter_context(side(name, spec, folder)) for name, spec in (("A", options.a), ("B", options.b))]
        for one in sides:
            provide_library(one, donors_of(options.library, sides))
            check_import(one)
        samples: dict[str, list[Sample]] = {one.name: [] for one in sides}
        bench = Bench(options, folder)
        for number in range(options.rounds if options.only else 0):
            for one in order(sides, number):
                begun = time.perf_counter()
                samples[one.name].append(bench.round(one, number))
                say(f"round {number + 1} of {options.rounds}, {one.name}: {time.perf_counter() - begun:.0f} s")
        if options.tokens:
            tokens = compare_tokens(sides, folder, options.token_models)
    found = rows(samples["A"], samples["B"])
    record = {**context(), "rounds": options.rounds, "quick": options.quick, "model": options.model}
    record |= {"server_args": options.server_args, "sides": {one.name: one.about() for one in sides}}
    record |= {"rows": [{**asdict(row), "verdict": row.verdict} for row in found], "samples": samples, "tokens": tokens}
    stamp = record["date"].replace(":", "").replace("-", "")
    out = options.out or ROOT / "build" / "comparisons" / f"{stamp}-{sides[0].commit[:7]}-{sides[1].commit[:7]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    both = [f"{one.name} = {one.spec} ({one.commit[:7]}{', changed' if one.changed else ''})" for one in sides]
    title = f"{', '.join(both)}; {record['processor']}, {record['instruction_set']}, {options.rounds} rounds"
    print(table(found, title) if found else title)
    if tokens is not None:
        print("\n".join(tokens[:20]) if tokens else "tokens: the same")
    print(f"written to {out}")
    return int(bool(tokens))


if __name__ == "__main__":
    sys.exit(main())
