"""The source read as an AST, for tests/test_house.py: who imports whom, and where."""

from __future__ import annotations

import ast
import gc
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SRC = ROOT / "src" / "phloem"
FILES = sorted(SRC.rglob("*.py"))


@dataclass
class Imports:
    """Modules of ours that a file imports: at its top, inside functions, and for type checkers alone."""

    top: list[str] = field(default_factory=list)
    lazy: list[str] = field(default_factory=list)
    typing: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        return [*self.top, *self.lazy, *self.typing]


def module_name(path: Path) -> str:
    parts = ["phloem", *path.relative_to(SRC).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The folder, or the file beside the folders, that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def short(path: Path) -> str:
    return str(path.relative_to(SRC))


@cache
def parse(path: Path) -> ast.Module:
    # Trees are large and none is garbage: looking for some takes twice as long as the parsing.
    gc.disable()
    try:
        return ast.parse(path.read_text(), str(path))
    finally:
        gc.enable()


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def _known() -> set[str]:
    return {module_name(path) for path in FILES}


def _targets(path: Path, node: ast.AST) -> list[str]:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        assert node.level == 0, f"{path}: relative import"
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        # `from phloem.room import file` imports the file, `from phloem.room.file import name` that file.
        names = [name if name in _known() else node.module for name in full]
    return list(dict.fromkeys(name for name in names if name.split(".")[0] == "phloem"))


@cache
def imports(path: Path) -> Imports:
    found = Imports()

    def visit(node: ast.AST, into: list[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue  # none imports
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, found.lazy)
            elif _is_type_checking(child):
                visit(child, found.typing)
            else:
                into += _targets(path, child)
                visit(child, into)

    visit(parse(path), found.top)
    return found


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches all others of its group (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for target in graph.get(module, []):
            if target not in number:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], number[target])
        if lowest[module] == number[module]:
            at = stack.index(module)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1 or module in graph.get(module, []):
                found.append(sorted(group))

    for module in graph:
        if module not in number:
            visit(module)
    return found


def defines(tree: ast.Module, dotted: str) -> bool:
    """Whether a file has a function or class of that name; `Class.method` looks inside."""
    body: list[ast.stmt] = tree.body
    for name in dotted.split("."):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        found = [node for node in body if isinstance(node, kinds) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of a Markdown page, without its two head lines."""
    lines = text[text.index(heading) :].splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("|"))
    rows: list[list[str]] = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows[2:]
