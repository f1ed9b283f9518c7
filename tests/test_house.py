"""The rules of docs/architecture.md, read from the source as an AST.

What is known to be wrong is listed by name, with the room that owes the repair. A list here may only grow shorter: what
is mended must leave it, and what is new must not enter.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house import FILES, ROOT, SRC, circles, defines, imports, module_name, parse, room_of, short, table

FLOOR_ROOMS: list[list[str]] = [
    ["core", "utils"],
    ["checkpoint", "platforms", "kernels", "distributed"],
    ["kvcache", "attention", "layers", "quant", "grammar", "text", "multimodal"],
    ["models", "adapters"],
    ["speculation", "engine", "rl", "diffusion"],
    ["scheduler", "disagg"],
    ["launch", "client"],
    ["protocol"],
    [
        *("server", "lang", "router", "bench", "training", "llm", "administration", "cli", "testing"),
        *("planning", "simulation"),
        *("__main__", "__init__"),
    ],
]
FLOOR = {room: level for level, rooms in enumerate(FLOOR_ROOMS) for room in rooms}
# Arrows inside one floor: the room on the left may import those on the right.
ARROWS = {
    "platforms": {"kernels"},
    "distributed": {"kernels"},
    "attention": {"kvcache", "layers"},
    "layers": {"quant"},
    "text": {"grammar"},
    "speculation": {"engine"},
    "rl": {"engine"},
    "diffusion": {"engine"},
    "scheduler": {"disagg"},
}
# Two rooms that must not see each other although their floors would allow it.
FORBIDDEN = {
    ("scheduler", "engine"),
    ("models", "attention"),
    ("scheduler", "models"),
    ("server", "scheduler"),
    ("server", "launch"),
    ("llm", "server"),
    ("lang", "server"),
}

# Imports inside functions: why this one is not at the top.
LAZY = {
    "__init__.py -> phloem.llm": "`import phloem` and --help wait for no torch; an Engine does",
    "attention/triton.py -> phloem.kernels.triton.attention": "Triton need not be installed",
    "attention/triton.py -> phloem.kernels.triton.invariant": "Triton need not be installed",
    "attention/triton.py -> phloem.kernels.triton.rope": "Triton need not be installed",
    "platforms/cuda.py -> phloem.kernels.triton.table": "Triton need not be installed",
    "cli/serve.py -> phloem.cli._serving": "half a second of options, while the engine process imports torch",
    "launch/__main__.py -> phloem.launch.core": "seconds of torch, behind the first sign of life",
    "server/start.py -> phloem.server.supervisor": "half a second, while the engine process imports torch",
    "text/vocabulary.py -> phloem.text.template": "the engine process needs Jinja for few models alone",
    "text/vocabulary.py -> phloem.text.tokenizer": "and a tokenizer once a request is constrained",
}

# Imports for type checkers that run against the floors -> the room that owes the repair.
KNOWN_ARROWS: dict[str, str] = {}
# Files that know each other's types -> the room that owes the repair.
KNOWN_CIRCLES = {
    ("phloem.kernels._native_screen", "phloem.kernels.native_linear"): "kernels",
}

# `getattr` with a default and `hasattr` on our own objects are holes in a protocol: file, attribute -> room.
HOLES = {
    "models/_index.py 'nbytes'": "kernels",
    "quant/_groups.py 'workers'": "quant",
    "bench/_floors.py 'forms'": "kernels",
    "bench/kernels.py 'native'": "kernels",
    "bench/kernels.py 'nbytes'": "kernels",
    "bench/step.py 'replay_timed'": "kernels",
}
# The same on what is not ours, or where the name is the point.
FOREIGN = {
    "checkpoint/gguf_reader.py 'MADV_DONTNEED'": "Linux",
    "diffusion/models/__init__.py pictures.class_name": "diffusers' classes",
    "diffusion/models/__init__.py 'requires_grad_'": "a part of a pipeline may be a tokenizer",
    "diffusion/models/__init__.py 'vae'": "pipelines without a VAE",
    "multimodal/_video.py 'strerror'": "PyAV's errors",
    "diffusion/lora.py 'lora_state_dict'": "pipelines without a reader of adapters",
    "diffusion/models/__init__.py 'enable_tiling'": "VAEs without tiles",
    "diffusion/models/_whole.py 'default_sample_size'": "pipelines of any kind",
    "diffusion/models/_whole.py 'unet'": "pipelines of any kind",
    "diffusion/models/_whole.py 'transformer'": "pipelines of any kind",
    "diffusion/models/_whole.py 'config'": "pipelines of any kind",
    "diffusion/models/_whole.py 'sample_size'": "pipelines of any kind",
    "diffusion/models/_whole.py name": "pipelines of any kind",
    "kernels/graph_cuda.py '_construct_storage_from_data_pointer'": "a private part of torch",
    "kernels/npu.py name": "a torch_npu without some fused op",
    "kernels/triton/_base.py name": "a torch without some float8 type",
    "kernels/triton/vendor.py 'scaled_mm'": "a torch without it",
    "kernels/triton/_device.py 'gpu_subslice_count'": "Intel's torch",
    "lang/backends/__init__.py '_lang_backend'": "kept at the caller's engine",
    "lang/backends/__init__.py 'generate'": "anything that answers",
    "lang/backends/__init__.py 'async_generate'": "anything that answers",
    "lang/backends/_base.py 'save'": "a picture of any library",
    "lang/backends/anthropic.py 'cache_read_input_tokens'": "the client library's versions",
    "lang/backends/openai.py 'prompt_tokens_details'": "servers that leave it out",
    "lang/backends/openai.py 'cached_tokens'": "servers that leave it out",
    "lang/backends/openai.py 'logprobs'": "servers that leave it out",
    "lang/ir.py 'model_json_schema'": "pydantic, not imported",
    "lang/ir.py '__name__'": "any type",
    "protocol/structured.py name": "bodies have these fields or not",
    "protocol/structured.py 'extra_body'": "bodies have this field or not",
    "scheduler/control.py f'_do_{call.name}'": "a command's name is its method's",
    "server/errors.py 'errors'": "FastAPI's error",
    "server/messages/convert.py name": "one body's fields in another",
    "server/serve.py '__self__'": "uvicorn's cycle",
    "server/serve.py 'flow'": "uvicorn's cycle",
    "server/serve.py 'write_paused'": "uvicorn's cycle",
    "server/serve.py part": "uvicorn's cycle",
    "utils/cores.py 'sched_getaffinity'": "Linux",
    "utils/cores.py 'sched_setaffinity'": "Linux",
    "utils/memory.py 'MAP_PRIVATE'": "Unix",
    "utils/memory.py 'MADV_HUGEPAGE'": "Linux",
    "utils/memory.py 'MADV_DONTNEED'": "Linux",
    "utils/memory.py 'malloc_trim'": "glibc",
}

VENDORS = ("nvidia", "cuda", "rocm", "hip")
VENDOR_ROOMS = {"platforms", "kernels", "attention"}
KNOWN_VENDOR_WORDS: dict[str, str] = {}
# Files that ask what kind of device this is: how often -> the room that owes a fact of the platform instead.
DEVICE_TYPE: dict[str, int] = {}


def compare(found: set[str], known: set[str], what: str) -> None:
    """New ones fail, and so do mended ones that are still listed."""
    assert not found - known, f"{what}, not allowed: {sorted(found - known)}"
    assert not known - found, f"{what}, mended: take off the list in tests/test_house.py: {sorted(known - found)}"


def goes_down(room: str, other: str) -> bool:
    if (room, other) in FORBIDDEN:
        return False
    if other == room or FLOOR[room] == len(FLOOR_ROOMS) - 1 == FLOOR[other]:
        return True
    same = FLOOR[other] == FLOOR[room] and (other in ARROWS.get(room, set()) or FLOOR[room] == 0)
    return FLOOR[other] < FLOOR[room] or same


def test_imports_keep_to_the_floors() -> None:
    at_run_time: list[str] = []
    for_types: set[str] = set()
    for path in FILES:
        room, found = room_of(module_name(path)), imports(path)
        assert room in FLOOR, f"{short(path)}: its folder has no floor in tests/test_house.py and docs/architecture.md"
        at_run_time += [f"{short(path)} -> {to}" for to in found.top + found.lazy if not goes_down(room, room_of(to))]
        for_types |= {f"{short(path)} -> {to}" for to in found.typing if not goes_down(room, room_of(to))}
    assert not at_run_time, at_run_time
    compare(for_types, set(KNOWN_ARROWS), "imports for types against the floors")


def test_no_import_circle() -> None:
    run_time = {module_name(path): imports(path).top + imports(path).lazy for path in FILES}
    assert not circles(run_time)
    found = {" ".join(circle) for circle in circles({module_name(path): imports(path).all for path in FILES})}
    compare(found, {" ".join(sorted(circle)) for circle in KNOWN_CIRCLES}, "circles of files by their types")


def test_imports_inside_functions_are_few_and_have_reasons() -> None:
    found = {f"{short(path)} -> {name}" for path in FILES for name in imports(path).lazy}
    compare(found, set(LAZY), "imports inside functions")
    assert len(LAZY) <= 10


@pytest.mark.parametrize(
    ("module", "unseen"),
    [
        ("phloem.launch.core", {"server", "protocol", "client"}),
        ("phloem.launch.__main__", {"server"}),
        ("phloem.llm", {"server"}),
    ],
)
def test_the_engine_stands_without_the_server(module: str, unseen: set[str]) -> None:
    graph = {module_name(path): imports(path).top + imports(path).lazy for path in FILES}
    reached, ahead = set[str](), [module]
    while ahead:
        found = ahead.pop()
        if found not in reached:
            reached.add(found)
            ahead += graph.get(found, [])
    assert len(reached) > 50 and not {name for name in reached if room_of(name) in unseen}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        pytest.param(
            "phloem.launch.core",
            ["phloem.client", "phloem.multimodal", "fastapi", "jinja2", "tokenizers"],
            marks=pytest.mark.slow,
        ),
        pytest.param("phloem.llm", ["phloem.server", "fastapi", "uvicorn", "starlette"], marks=pytest.mark.slow),
        ("phloem.cli.serve", ["torch", "numpy", "asyncio", "tyro", "phloem.client"]),
        ("phloem.cli._serving", ["torch", "numpy.fft", "fastapi", "phloem.server.supervisor"]),
        ("phloem.server.supervisor", ["torch", "phloem.engine.runner", "phloem.kernels", "phloem.launch.core"]),
        ("phloem.launch.__main__", ["torch", "phloem.engine"]),
        pytest.param("phloem.cli.router", ["torch", "fastapi", "phloem.launch", "zmq"], marks=pytest.mark.slow),
        ("phloem.cli", ["torch", "numpy", "msgspec", "tyro"]),
        ("phloem", ["torch", "numpy", "phloem.llm"]),
    ],
)
def test_a_process_imports_nothing_that_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import {module}, sys; print(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SRC.parent)
    assert done.stdout.split() == []


def calls_with_a_default(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asks = (node.func.id, len(node.args)) in (("getattr", 3), ("hasattr", 2))
            if asks:
                found.add(f"{short(path)} {ast.unparse(node.args[1])}")
    return found


def test_protocols_have_no_holes() -> None:
    found = {name for path in FILES for name in calls_with_a_default(path)}
    compare(found, {*HOLES, *FOREIGN}, "getattr with a default, hasattr")


def test_what_kind_of_device_this_is_only_platforms_kernels_and_attention_ask() -> None:
    found: dict[str, int] = {}
    for path in FILES:
        if room_of(module_name(path)) in VENDOR_ROOMS:
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr == "type" and "device" in ast.unparse(node.value):
                found[short(path)] = found.get(short(path), 0) + 1
    over = {name: count for name, count in found.items() if count > DEVICE_TYPE.get(name, 0)}
    assert not over, f"asks for device.type: {over}"
    mended = {name: count for name, count in DEVICE_TYPE.items() if count > found.get(name, 0)}
    assert not mended, f"mended: lower the counts in tests/test_house.py: {mended}"


def names_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return [node.arg or ""] if isinstance(node, ast.arg | ast.keyword) else []


def test_no_vendor_in_a_name_above_platforms_kernels_and_attention() -> None:
    found: set[str] = set()
    for path in FILES:
        if room_of(module_name(path)) in VENDOR_ROOMS:
            continue
        for node in ast.walk(parse(path)):
            for name in names_in(node):
                words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")
                found |= {f"{short(path)} {name}" for vendor in VENDORS if vendor in words}
    compare(found, set(KNOWN_VENDOR_WORDS), "vendors in names")


@pytest.mark.parametrize("path", FILES, ids=short)
def test_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600, "over 600 lines"
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
            plain = len(node.value) < 20
            assert not (plain and node.value.lower() in VENDORS), f"{where}: vendor name {node.value!r}"


# The page


PAGE = (ROOT / "docs" / "architecture.md").read_text()


def ceilings() -> dict[str, int]:
    """Room -> most lines, from the page's table of rooms; what stands beside the folders is `root`."""
    found: dict[str, int] = {}
    for folder, lines, *_ in table(PAGE, "## The rooms"):
        if lines.replace(",", "").isdigit():
            found[folder.strip("`/")] = int(lines.replace(",", ""))
    return found


@pytest.mark.parametrize(
    "room", sorted({room_of(module_name(path)) for path in FILES if path.parent != SRC} | {"root"})
)
def test_rooms_keep_under_their_ceilings(room: str) -> None:
    """A ceiling is raised in a commit that says why."""
    files = [path for path in FILES if (short(path).split("/")[0] if path.parent != SRC else "root") == room]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert room in ceilings(), f"{room}/ has no row in docs/architecture.md"
    assert lines <= ceilings()[room], f"{room}/ has {lines} lines"


def test_the_hops_on_the_page_exist() -> None:
    rows = table(PAGE, "## A request in eight hops")
    assert len(rows) == 8
    for _, place, *_ in rows:
        file, name = place.strip("`").split(":")
        path = SRC / file
        assert path.exists(), f"{file} is on the page and not in the house"
        assert defines(parse(path), name), f"{place} is on the page and not in the house"


def test_every_file_named_on_the_page_exists() -> None:
    named = {name for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)", PAGE) if "<" not in name}
    gone = {name for name in named if not (SRC / name).exists() and not (ROOT / name).exists()}
    assert not gone, gone


def test_every_file_of_a_room_is_there() -> None:
    """Names without a folder, in the row of a room."""
    gone: set[str] = set()
    for room, _, files, *_ in table(PAGE, "## The rooms"):
        folder = SRC / room.strip("`/")
        if folder.is_dir():
            names = set(re.findall(r"`(\w+\.py)`", files))
            gone |= {f"{room} {name}" for name in names - {path.name for path in folder.rglob("*.py")}}
    assert not gone, gone


def test_no_two_files_of_tests_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}, "pytest imports them by their names alone"
