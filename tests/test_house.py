"""The rules of docs/architecture.md, read from the source as an AST."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "phloem"
FILES = sorted(SRC.rglob("*.py"))

FLOOR_ROOMS: list[list[str]] = [
    ["core", "utils"],
    ["checkpoint", "platforms", "kernels", "distributed"],
    ["kvcache", "attention", "layers", "quant", "grammar", "text", "multimodal"],
    ["models", "lora"],
    ["speculative", "engine", "rl", "diffusion"],
    ["scheduler", "disagg"],
    ["launch", "client"],
    ["protocol"],
    ["server", "lang", "router", "bench", "training", "llm", "cli", "testing", "__main__", "__init__"],
]
FLOOR = {room: level for level, rooms in enumerate(FLOOR_ROOMS) for room in rooms}
# Arrows inside one floor: the room on the left may import those on the right.
ARROWS = {
    "platforms": {"kernels"},
    "distributed": {"kernels"},
    "attention": {"kvcache", "layers"},
    "layers": {"quant"},
    "text": {"grammar"},
    "lora": {"models"},
    "speculative": {"engine"},
    "rl": {"engine"},
    "scheduler": {"disagg"},
}
# Two rooms that must not see each other although their floors would allow it.
FORBIDDEN = {("scheduler", "engine"), ("models", "attention"), ("scheduler", "models"), ("server", "scheduler")}
VENDORS = ("nvidia", "cuda", "rocm", "hip")
VENDOR_ROOMS = {"platforms", "kernels", "attention"}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    parts = ["phloem", *path.relative_to(SRC).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, tree: ast.Module) -> list[str]:
    """Modules of ours that a file imports at run time, those inside functions included."""
    found: list[str] = []
    typing_only = {id(sub) for node in ast.walk(tree) if is_type_checking(node) for sub in ast.walk(node)}
    known = {module_name(file) for file in FILES}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append(full if full in known else node.module)
    return [name for name in found if name.split(".")[0] == "phloem"]


@pytest.fixture(scope="module")
def graph() -> dict[str, list[str]]:
    return {module_name(path): imports(path, parse(path)) for path in FILES}


def test_imports_keep_to_the_floors(graph: dict[str, list[str]]) -> None:
    wrong = []
    for module, targets in graph.items():
        room = room_of(module)
        assert room in FLOOR, f"{module}: its folder has no floor in tests/test_house.py and docs/architecture.md"
        for target in targets:
            other = room_of(target)
            if other == room or FLOOR[room] == len(FLOOR_ROOMS) - 1 == FLOOR[other]:
                continue
            lower = FLOOR[other] < FLOOR[room]
            same = FLOOR[other] == FLOOR[room] and (other in ARROWS.get(room, set()) or FLOOR[room] == 0)
            if not (lower or same) or (room, other) in FORBIDDEN:
                wrong.append(f"{module} -> {target}")
    assert not wrong, wrong


def test_no_import_circle(graph: dict[str, list[str]]) -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for target in graph.get(module, []):
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_file(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 600, "over 600 lines"
    room = room_of(module_name(path))
    for node in ast.walk(parse(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Global), f"{where}: global statement"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            assert length <= 60 or jitted, f"{where}: {node.name} has {length} lines"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            assert path.name == "config.py" and room == "core", f"{where}: reads the environment"
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith("Mixin"), f"{where}: a mixin"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and room not in VENDOR_ROOMS:
            short = len(node.value) < 20
            assert not (short and node.value.lower() in VENDORS), f"{where}: vendor name {node.value!r}"
