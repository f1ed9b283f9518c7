"""Servers under comparison: how each is started, when it is ready, how much memory its processes hold, how it ends."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from phloem.core.errors import BadRequest, PhloemError
from phloem.utils.cores import available_cores

PHLOEM = "phloem"


@dataclass(frozen=True)
class Peer:
    """One server. `{port}` in the command is the port that it is given; `/health` must answer 200 when it is ready.

    `constraint` builds the request fields that ask for a JSON schema; `model` is the name to ask for.
    """

    name: str
    command: tuple[str, ...]
    model: str = "default"
    constraint: str = "response_format"  # or "json_schema": the field in which the schema goes
    health: str = "/health"

    def schema_fields(self, schema: dict[str, Any]) -> dict[str, Any]:
        if self.constraint == "json_schema":
            return {"json_schema": schema}
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        return {"response_format": form}


@dataclass
class Running:
    """A started server. `peak_bytes` is valid after it ended."""

    url: str
    pid: int
    ready_s: float = 0.0
    peak_bytes: int = 0


def phloem(model: str, arguments: str) -> Peer:
    command = [sys.executable, "-m", "phloem", "serve", model, "--log-level", "warning", *shlex.split(arguments)]
    return Peer(PHLOEM, (*command, "--port", "{port}"), model)


def llama_cpp(binary: str, files: Sequence[str], arguments: str) -> list[Peer]:
    """One peer per GGUF file, with the 64k tokens of KV and the slots that the workloads need."""
    threads = str(available_cores())
    found: list[Peer] = []
    for file in files:
        name = "llama.cpp" if len(files) == 1 else f"llama.cpp {Path(file).stem}"
        command = [binary, "-m", file, "-t", threads, "-tb", threads, "-np", "32", "-c", "65536", "-cb", "-fa", "on"]
        command += ["--no-webui", *shlex.split(arguments), "--host", "127.0.0.1", "--port", "{port}"]
        found.append(Peer(name, tuple(command), constraint="json_schema"))
    return found


def openvino(python: str, model: str, arguments: str) -> Peer:
    script = Path(__file__).with_name("_openvino_server.py")
    command = [python, str(script), "--model", model, "--threads", str(available_cores())]
    return Peer("openvino-genai", (*command, *shlex.split(arguments), "--port", "{port}"))


def vllm(python: str, model: str, arguments: str) -> Peer:
    """vLLM on CPU; its settings that are environment variables are set by `env`."""
    settings = ["VLLM_CPU_KVCACHE_SPACE=2", f"VLLM_CPU_OMP_THREADS_BIND=0-{available_cores() - 1}", "HF_HUB_OFFLINE=1"]
    command = ["env", *settings, python, "-m", "vllm.entrypoints.cli.main", "serve", model, "--dtype", "bfloat16"]
    command += ["--max-model-len", "4096", "--max-num-seqs", "64", *shlex.split(arguments)]
    return Peer("vllm", (*command, "--host", "127.0.0.1", "--port", "{port}"), model)


def other(text: str) -> Peer:
    """`NAME=COMMAND` with `{port}` in the command: any server of the OpenAI API.

    Raises:
        BadRequest: if a part is missing.
    """
    name, equals, command = text.partition("=")
    if not equals or not name or "{port}" not in command:
        raise BadRequest(f"--other takes NAME=COMMAND with {{port}} in the command, not {text!r}")
    return Peer(name, tuple(shlex.split(command)))


def found_program(path: str | None, *names: str) -> str | None:
    """The program that was given, or the first of `names` that is on PATH; None where there is none.

    Raises:
        BadRequest: if the named one is not there.
    """
    if path is None:
        return next((found for name in names if (found := shutil.which(name))), None)
    full = shutil.which(path)
    if full is None:
        raise BadRequest(f"{path!r} is not a program")
    return full


@dataclass
class _Memory:
    """Watches the resident memory of a process and its descendants, in a thread."""

    root: int
    peak: int = 0
    _known: dict[int, psutil.Process] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        turn = 0
        while not self._stop.wait(0.25):
            if turn % 8 == 0:  # looking for new processes costs more than asking the known ones
                self._find()
            self._sample()
            turn += 1

    def _find(self) -> None:
        try:
            root = self._known.setdefault(self.root, psutil.Process(self.root))
            for child in root.children(recursive=True):
                self._known.setdefault(child.pid, child)
        except psutil.Error:
            pass

    def _sample(self) -> None:
        total, highest = 0, 0
        for process in self._known.values():
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
            highest = max(highest, _high_water(process.pid))
        # Samples miss a short peak of one process; the kernel's own mark of it does not.
        self.peak = max(self.peak, total, highest)

    def end(self) -> list[psutil.Process]:
        """Stop watching; gives the processes that still live."""
        self._stop.set()
        self._thread.join()
        self._find()
        self._sample()
        return [process for process in self._known.values() if process.is_running()]


def _high_water(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


@contextmanager
def running(peer: Peer, log: Path, patience: float = 600.0) -> Generator[Running]:
    """Start a server and end it with all its processes; its output goes to `log`.

    Raises:
        PhloemError: if it ends or is not ready within `patience` seconds; the message ends with its last lines.
    """
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in peer.command]
    log.parent.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise PhloemError(f"{peer.name} could not be started: {error}") from None
    memory = _Memory(process.pid)
    server = Running(f"http://127.0.0.1:{port}", process.pid)
    try:
        _wait(process, server.url + peer.health, peer, log, start + patience)
        server.ready_s = perf_counter() - start
        yield server
    finally:
        left = memory.end()
        server.peak_bytes = memory.peak
        _end(process, left)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], url: str, peer: Peer, log: Path, until: float) -> None:
    # Straight to the port: a proxy that is set for this user must not come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        status = process.poll()
        if status is not None:
            raise PhloemError(f"{peer.name} ended with status {status} before it was ready:\n{_tail(log)}")
        if perf_counter() > until:
            raise PhloemError(f"{peer.name} was not ready in time:\n{_tail(log)}")
        try:
            with opener.open(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _end(process: subprocess.Popen[bytes], family: Sequence[psutil.Process]) -> None:
    """Ask the server to stop, then end what is left of the processes that it started."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _kill([item for item in family if item.pid != process.pid])


def children() -> set[psutil.Process]:
    """What this process has started, and all that those have started, as far as they live."""
    return set(psutil.Process().children(recursive=True))


def end_children(but: set[psutil.Process]) -> None:
    """End the `children`, but those that were there before: libraries have some of their own, which their memory
    needs (torch's manager of shared memory: without it, a tensor that goes takes the process with it).
    """
    family = [item for item in children() if item not in but]
    for item in family:
        with suppress(psutil.NoSuchProcess):
            item.terminate()
    _kill(family)


def _kill(family: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=2)
    for item in alive:
        with suppress(psutil.NoSuchProcess):
            item.kill()
    psutil.wait_procs(alive, timeout=5)
