"""Writes a module in which every plug-in is handed to its registry; `make check` runs the type checker on it.

    python scripts/plugin_types.py build/plugin_types.py

Registries are found in the source, plug-ins by reading their folders.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from phloem.utils.registry import Registry

SRC = Path(__file__).parent.parent / "src"


def registries() -> list[tuple[str, str]]:
    """(module, name) of every registry that a module defines."""
    found: list[tuple[str, str]] = []
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                registry = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "Registry"
                # A registry of anything at all has nothing to compare with.
                if registry and ast.unparse(node.annotation) != "Registry[Any]":
                    found.append((module, node.target.id))
    return found


def written() -> str:
    lines = ["# Written by scripts/plugin_types.py.", ""]
    calls: list[str] = []
    for at, (module, name) in enumerate(registries()):
        registry: Registry[object] = getattr(importlib.import_module(module), name)
        lines.append(f"from {module} import {name} as r{at}")
        for number, plugin in enumerate(registry.names()):
            lines.append(f"from {registry.package}.{plugin} import {registry.symbol} as p{at}_{number}")
            calls.append(f"r{at}.accept(p{at}_{number})  # {registry.package}.{plugin}")
    return "\n".join([*lines, "", *calls, ""])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(written())
    print(f"{out}: {out.read_text().count('.accept(')} plug-ins")
