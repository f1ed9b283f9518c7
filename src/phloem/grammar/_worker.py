"""A child process that compiles grammars with xgrammar under limits on time and memory, and its face in the parent.

Frames both ways: four bytes of length, then msgpack. The child is started at the first use and again after a kill.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import resource
import struct
import subprocess
import sys
import threading
from typing import IO, Any

import msgspec

from phloem.core.errors import BadRequest

_MAX_FRAME = 1 << 30
_START_SECONDS = 180.0  # importing the library takes seconds on a busy machine; not part of a compilation's time


class CompilerProcess:
    """One child; jobs one at a time. Safe to call from several threads."""

    def __init__(self, tokens: list[bytes], vocab_size: int, eos_ids: list[int], memory_limit: int) -> None:
        self._hello = {"tokens": tokens, "vocab_size": vocab_size, "eos_ids": eos_ids, "memory": memory_limit}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def compile(self, kind: str, text: str, whitespace: str, timeout: float) -> str:
        """The compiled grammar as the library's JSON.

        Raises:
            BadRequest: if the grammar is not valid, or compiling it goes over the limits; the child is killed then.
        """
        with self._lock:
            child = self._start()
            answer = self._ask(child, {"kind": kind, "text": text, "whitespace": whitespace}, timeout)
            if answer is None:
                self._kill()
                raise BadRequest(f"the grammar could not be compiled within {timeout:g} s and the memory limit")
        if "error" in answer:
            raise BadRequest(f"the grammar is not usable: {answer['error']}")
        return answer["grammar"]

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._kill()
        command = [sys.executable, "-c", "from phloem.grammar._worker import main; main()"]
        path = "import sys; sys.path[:] = " + repr(sys.path) + "; "
        command[2] = path + command[2]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        if self._ask(self._child, self._hello, _START_SECONDS) is None:
            self._kill()
            raise BadRequest("the grammar compiler did not start")
        return self._child

    def _ask(self, child: subprocess.Popen[bytes], body: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """None where the child died or did not answer in time."""
        timer = threading.Timer(timeout, child.kill)
        timer.daemon = True
        timer.start()
        try:
            assert child.stdin is not None and child.stdout is not None
            write_frame(child.stdin, body)
            return read_frame(child.stdout)
        except OSError:
            return None
        finally:
            timer.cancel()

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def write_frame(pipe: IO[bytes], body: dict[str, Any]) -> None:
    data = msgspec.msgpack.encode(body)
    pipe.write(struct.pack("<I", len(data)) + data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> dict[str, Any] | None:
    head = pipe.read(4)
    if len(head) < 4:
        return None
    length = struct.unpack("<I", head)[0]
    if length > _MAX_FRAME:
        return None
    data = pipe.read(length)
    return msgspec.msgpack.decode(data) if len(data) == length else None


def main() -> None:
    """The child: answer jobs until the pipe ends."""
    hello = read_frame(sys.stdin.buffer)
    if hello is None:
        return
    xgrammar: Any = importlib.import_module("xgrammar")
    info = xgrammar.TokenizerInfo(
        hello["tokens"],
        xgrammar.VocabType.RAW,
        vocab_size=hello["vocab_size"],
        stop_token_ids=hello["eos_ids"],
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    # The limit counts address space, of which the libraries have mapped much already.
    limit = _address_space() + int(hello["memory"])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    write_frame(sys.stdout.buffer, {"ready": True})
    while (job := read_frame(sys.stdin.buffer)) is not None:
        try:
            answer = {"grammar": _compile(xgrammar, compiler, job).serialize_json()}
        except Exception as error:
            spent = isinstance(error, MemoryError) or "bad_alloc" in str(error)
            answer = {"error": "compiling it takes more memory than the limit" if spent else _plain(str(error))}
        write_frame(sys.stdout.buffer, answer)


def _compile(library: Any, compiler: Any, job: dict[str, Any]) -> Any:
    match job["kind"]:
        case "ebnf":
            return compiler.compile_grammar(job["text"])
        case "regex":
            return compiler.compile_regex(job["text"])
        case "structural_tag":
            body = _with_json_style(library, json.loads(job["text"]), job["whitespace"] == "compact")
            return compiler.compile_structural_tag(json.dumps(body, ensure_ascii=False))
        case _:
            raise ValueError(f"unknown kind {job['kind']}")


def _with_json_style(library: Any, node: Any, compact: bool) -> Any:
    """The same format with each JSON schema written out as a grammar: only there can whitespace be ruled out."""
    if isinstance(node, list):
        return [_with_json_style(library, item, compact) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "json_schema" and node.get("style", "json") == "json" and "json_schema" in node:
        style: dict[str, Any] = {"any_whitespace": False, "separators": (",", ":")}
        if not compact:
            style = {"any_whitespace": True, "max_whitespace_cnt": 24}
        grammar = library.Grammar.from_json_schema(json.dumps(node["json_schema"]), **style)
        return {"type": "grammar", "grammar": str(grammar)}
    return {key: _with_json_style(library, value, compact) for key, value in node.items()}


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _plain(message: str) -> str:
    """The library's message without its source place."""
    text = " ".join(message.split())
    marker = text.find("] ")
    text = text[marker + 2 :].split(": ", 1)[-1] if text.startswith("[") and marker > 0 else text
    return re.sub(r"^Check failed: \(.*?\) is (false|true): ", "", text)
