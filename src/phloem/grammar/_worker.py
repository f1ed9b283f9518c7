"""A child process that compiles grammars with xgrammar under limits on time and memory, and its face in the parent."""

from __future__ import annotations

import importlib
import json
import re
import threading
from typing import Any

from phloem.core.errors import BadRequest
from phloem.utils.confined import Confined, hello, serve

_MOST_SECONDS = 3600  # of a job whose parent has gone


class CompilerProcess:
    """One child; jobs one at a time. Safe to call from several threads."""

    def __init__(self, tokens: list[bytes], vocab_size: int, eos_ids: list[int], memory_limit: int) -> None:
        about = {"tokens": tokens, "vocab_size": vocab_size, "eos_ids": eos_ids, "memory": memory_limit}
        self._child = Confined("phloem.grammar._worker", about)
        self._lock = threading.Lock()

    def compile(self, kind: str, text: str, whitespace: str, timeout: float) -> str:
        """The compiled grammar as the library's JSON.

        Raises:
            BadRequest: if the grammar is not valid, or compiling it goes over the limits; the child is killed then.
        """
        with self._lock:
            if not self._child.start():
                raise BadRequest("the grammar compiler did not start")
            answer = self._child.ask({"kind": kind, "text": text, "whitespace": whitespace}, timeout)
            if answer is None:
                raise BadRequest(f"the grammar could not be compiled within {timeout:g} s and the memory limit")
        if "error" in answer:
            raise BadRequest(f"the grammar is not usable: {answer['error']}")
        return answer["grammar"]

    def close(self) -> None:
        with self._lock:
            self._child.close()


def main() -> None:
    """The child."""
    about = hello()
    if about is None:
        return
    xgrammar: Any = importlib.import_module("xgrammar")
    info = xgrammar.TokenizerInfo(
        about["tokens"],
        xgrammar.VocabType.RAW,
        vocab_size=about["vocab_size"],
        stop_token_ids=about["eos_ids"],
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"grammar": _compile(xgrammar, compiler, job).serialize_json()}
        except Exception as error:
            spent = isinstance(error, MemoryError) or "bad_alloc" in str(error)
            return {"error": "compiling it takes more memory than the limit" if spent else _plain(str(error))}

    serve(answer, int(about["memory"]), _MOST_SECONDS)


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


def _plain(message: str) -> str:
    """The library's message without its source place."""
    text = " ".join(message.split())
    marker = text.find("] ")
    text = text[marker + 2 :].split(": ", 1)[-1] if text.startswith("[") and marker > 0 else text
    return re.sub(r"^Check failed: \(.*?\) is (false|true): ", "", text)
