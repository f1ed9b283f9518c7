"""The `phloem` command. A file in this folder is a command; each has `main(argv) -> int` and a one-line docstring."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phloem.core.errors import PhloemError
from phloem.utils import machine
from phloem.utils.registry import Registry
from phloem.utils.say import mute

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS: Registry[Callable[[list[str]], int]] = Registry("phloem.cli", "command", "main")
_ORDER = ("serve", "run", "chat", "generate", "transcribe", "bench", "quantize", "train_draft", "doctor")


def _summary(name: str) -> str:
    """A command's first docstring line, read without importing it."""
    spec = importlib.util.find_spec(f"phloem.cli.{name}")
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return text.splitlines()[0] if text else ""


def usage() -> str:
    names = COMMANDS.names()
    names = [*(n for n in _ORDER if n in names), *(n for n in names if n not in _ORDER)]
    lines = [f"  {name.replace('_', '-'):<11} {_summary(name)}" for name in names]
    return "\n".join(
        [
            "usage: phloem COMMAND [options]",
            "",
            "A serving engine for language models.",
            "",
            *lines,
            "",
            "phloem COMMAND --help tells a command's options; phloem --version the version.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point. Expected errors end with one line and status 1 (2 for a wrong command), never with a trace."""
    args = sys.argv[1:] if argv is None else argv
    command = f"phloem {args[0]}" if args else "phloem"
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except PhloemError as error:
        return _fail(command, error.message, 2 if args[0].replace("-", "_") not in COMMANDS.names() else 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        mute()  # whoever read our output has enough of it; nothing more may be flushed there at exit
        return 141
    except (OSError, MemoryError, RuntimeError, ImportError, SystemError) as error:
        reason = machine.exhausted(error)
        if reason is None:
            raise
        return _fail(command, reason, 1)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"phloem {version('phloem')}")
        return 0
    return COMMANDS.get(args[0].replace("-", "_"))(args[1:])


def _fail(command: str, reason: str, status: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        mute()
    print(f"{command}: {reason}", file=sys.stderr)
    return status
