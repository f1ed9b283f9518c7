"""Compile every Triton kernel ahead of time, without a GPU, and report what each takes.

    python scripts/triton_compile.py [--targets sm_90,gfx942] [--quick] [--only TEXT] [--json FILE]

For each distinct launch of `triton_cases.py`: registers, stack (spills) and shared memory on each target. It fails on
any compile error, and where a kernel needs more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from phloem.kernels.triton._device import AHEAD  # noqa: E402
from phloem.platforms._facts import float8_of  # noqa: E402

# backend, architecture, warp size, shared memory per block in bytes, float8 type (None: has none)
TARGETS: dict[str, tuple[GPUTarget, int, torch.dtype | None]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024, None),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024, torch.float8_e4m3fn),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024, torch.float8_e4m3fn),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024, float8_of("gfx942")),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160 * 1024, float8_of("gfx950")),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64 * 1024, None),
}
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
}


# Instructions that a kernel may not reach before it has waited; its parameters and shared memory are its own.
_TOUCHES = re.compile(r"(@!?%p\d+\s+)?(ld\.(?!param|shared)|st\.(?!shared)|cp\.|atom|red\.|bra|ret|exit|call)")


@dataclass(frozen=True)
class Launch:
    """One distinct specialisation of a kernel, picklable: the kernel by module and name."""

    case: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...] = ()  # of the first launch of this form


@dataclass
class Result:
    """What compiling a launch for a target gave; `error` says why it failed."""

    target: str
    case: str
    kernel: str
    registers: int | None = None
    stack: int | None = None  # bytes a thread: spilled registers and local arrays
    shared: int | None = None
    warps: int | None = None
    early: bool = False  # launched before the kernel ahead of it has ended
    error: str | None = None
    notes: list[str] = field(default_factory=list)


def record(cases: Sequence[Any], name: str) -> list[Launch]:
    """Run the cases as on that target, with launching replaced by taking notes. Identical launches are kept once."""
    target, _, float8 = TARGETS[name]
    seen: dict[tuple[Any, ...], Launch] = {}
    current = ""

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = replace(_describe(current, self, args, kwargs), grid=tuple(grid))
        seen.setdefault(
            (launch.module, launch.kernel, launch.signature, launch.constants, launch.aligned, launch.options), launch
        )

    before = JITFunction.run, torch.version.hip, AHEAD.capability
    JITFunction.run = note  # type: ignore[method-assign]
    torch.version.hip = "7" if target.backend == "hip" else None
    AHEAD.capability = int(target.arch) if target.backend == "cuda" else 0
    try:
        for case in cases:
            current = case.name
            if not case.float8 or float8 is not None:
                case.run(float8)
    finally:
        JITFunction.run, torch.version.hip, AHEAD.capability = before  # type: ignore[method-assign]
    return list(seen.values())


def _describe(case: str, kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = list(inspect.signature(kernel.fn).parameters)
    options = {key: value for key, value in kwargs.items() if key not in names}
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in names}).arguments
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    aligned: list[int] = []
    for place, param in enumerate(kernel.params):
        value = bound[param.name]
        kind = _kind(value)
        # As at a real launch: the integer 1 becomes a constant, multiples of 16 and tensors are known to be aligned,
        # but for integers that change from step to step.
        if param.is_constexpr or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
            continue
        signature.append((param.name, kind))
        if isinstance(value, torch.Tensor) or (
            isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
        ):
            aligned.append(place)
    return Launch(
        case,
        kernel.module,
        kernel.fn.__name__,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        tuple(sorted(options.items())),
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compiled_for(target: GPUTarget, launch: Launch) -> Any:
    """What Triton makes of a launch; raises what Triton raises."""
    kernel = getattr(__import__(launch.module, fromlist=["x"]), launch.kernel)
    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def compile_one(work: tuple[str, Launch]) -> Result:
    """Compile one launch for one target; never raises."""
    name, launch = work
    target, shared_limit, _ = TARGETS[name]
    result = Result(name, launch.case, launch.kernel)
    try:
        compiled = compiled_for(target, launch)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}".strip()
        return result
    result.shared = int(compiled.metadata.shared)
    result.warps = int(compiled.metadata.num_warps)
    if result.shared > shared_limit:
        result.error = f"needs {result.shared} bytes of shared memory, {name} has {shared_limit}"
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        result.registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        result.stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    else:
        result.registers, result.stack = cubin_usage(compiled.asm["cubin"])
        result.early = bool(compiled.metadata.launch_pdl)
        result.error = result.error or early_fault(compiled.asm["ptx"], result.early)
    return result


def early_fault(ptx: str, early: bool) -> str | None:
    """What is wrong with the waiting of a kernel that is launched early: it must wait for the one ahead of it before it
    reads or writes memory and before it branches or ends. One that is not launched early need not wait."""
    if not early:
        return None
    for line in ptx.splitlines():
        text = line.split("//")[0].strip()
        if text.startswith("griddepcontrol.wait"):
            return None if "griddepcontrol.launch_dependents" in ptx else "never lets the next kernel start"
        if _TOUCHES.match(text):
            return f"launched early, and before it waits: {text}"
    return "launched early, and never waits"


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else None


def cubin_usage(cubin: bytes) -> tuple[int | None, int | None]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def run(targets: Sequence[str], quick: bool = False, only: str = "", processes: int | None = None) -> list[Result]:
    """Compile for each target; results in the order of the cases."""
    from triton_cases import cases

    chosen = [case for case in cases() if (case.quick or not quick) and only.lower() in case.name.lower()]
    work = [(name, launch) for name in targets for launch in record(chosen, name)]
    with multiprocessing.get_context("spawn").Pool(processes or len(os.sched_getaffinity(0))) as pool:
        return pool.map(compile_one, work, chunksize=1)


def all_kernels() -> set[str]:
    """Names of the kernels that are launched from the host, read from the kernel files."""
    folder = Path(__file__).parent.parent / "src" / "phloem" / "kernels" / "triton"
    return {name for file in folder.glob("*.py") for name in re.findall(r"^ +(_\w+)\[", file.read_text(), re.M)}


def table(results: Sequence[Result]) -> str:
    lines = [f"{'target':8} {'kernel':18} {'regs':>4} {'stack':>6} {'shared':>7} {'warps':>5}  case"]
    for r in results:
        numbers = [str(v) if v is not None else "-" for v in (r.registers, r.stack, r.shared, r.warps)]
        lines.append(
            f"{r.target:8} {r.kernel:18} {numbers[0]:>4} {numbers[1]:>6} {numbers[2]:>7} {numbers[3]:>5}  {r.case}"
        )
        if r.error:
            lines.append(f"    FAILED: {r.error[:2000]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--quick", action="store_true", help="the reduced set that the test suite compiles")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int)
    args = parser.parse_args()
    unknown = [name for name in args.targets.split(",") if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}; known: {', '.join(TARGETS)}")
    results = run(args.targets.split(","), args.quick, args.only, args.processes)
    print(table(results))
    failed = [r for r in results if r.error]
    missing = sorted(all_kernels() - {r.kernel for r in results}) if not (args.quick or args.only) else []
    if missing:
        print("FAILED: no case launches", ", ".join(missing))
    spilled = sum(1 for r in results if r.stack)
    print(f"{len(results)} compiled with Triton {triton.__version__}, {spilled} with a stack, {len(failed)} failed")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
