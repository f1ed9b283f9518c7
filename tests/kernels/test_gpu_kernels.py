"""Every kernel, and each way in which models launch it, has a check for a machine with a GPU; checks notice errors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def _python(code: str, **environment: str) -> str:
    paths = os.pathsep.join(map(str, (SCRIPTS, SCRIPTS.parent / "src")))
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**known, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LAUNCHED = """
import torch, gpu_kernels, triton_compile as compiling
from triton.runtime.jit import JITFunction
from triton_cases import cases
from phloem.kernels.triton._device import AHEAD

def kinds(launch):  # what tells ways of a kernel apart that a model chooses between, not sizes
    return tuple((n, v) for n, v in launch.constants if n != "PDL" and (isinstance(v, bool) or n in ("SCALED", "KIND")))

wanted = {}
for launch in compiling.record(cases(), "sm_90"):
    wanted.setdefault((launch.kernel, kinds(launch)), launch.case)
seen = set()
def note(self, *args, grid, warmup, **more):
    launch = compiling._describe("", self, args, more)
    seen.add((launch.kernel, kinds(launch)))
JITFunction.run, AHEAD.capability = note, 90
# What no kernel writes is zeros: numbers of experts, keys and tokens that there are.
torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros
others = gpu_kernels.beside()
kernels = gpu_kernels.Kernels(torch.device("cpu"), torch.bfloat16, True)
for name in gpu_kernels.names():
    try:
        with torch.inference_mode():
            others[name](kernels) if name in others else getattr(kernels, name)()
    except (RuntimeError, IndexError) as error:
        print(name, type(error).__name__, error)
print(sorted(compiling.all_kernels() - {kernel for kernel, _ in seen}))
print([(case, *way) for way, case in wanted.items() if way not in seen and way[0] not in gpu_kernels.UNCHECKED])
"""


@pytest.mark.slow
def test_every_kernel_and_each_way_of_it_has_a_check() -> None:
    """If not: add a check to `gpu_kernels_*.py`, or name the kernel in `gpu_kernels.UNCHECKED`, with the reason."""
    kernels, ways = _python(LAUNCHED).strip().splitlines()[-2:]
    assert kernels == "[]" and ways == "[]", f"without a check: {kernels}; launched by models otherwise: {ways}"


@pytest.mark.slow
def test_checks_notice_errors() -> None:
    """A kernel that is wrong, raises, or leaves its output unwritten is told."""
    code = """
import gpu_kernels, torch
from phloem.kernels.triton import activation, pages
activation.silu_and_mul = lambda x: torch.empty(x.shape[0], x.shape[1] // 2)
pages.select_rows = lambda x, index: 1 / 0
found = gpu_kernels.run(torch.device("cpu"), torch.float32, True, "activations,pages,tokens")
rows = {row.name.split()[0]: row for row in found}
assert not rows["activations"].ok and "#0: inf" in rows["activations"].message, rows
assert not rows["pages"].ok and "ZeroDivisionError" in rows["pages"].message, rows
assert rows["tokens"].ok and len(rows) == 3, rows
"""
    _python(code, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_checks_beside_are_found_and_run() -> None:
    code = """
import gpu_kernels
assert len(set(gpu_kernels.names())) == len(gpu_kernels.names())
assert {"convolution", "routers", "norms"} <= set(gpu_kernels.names())
assert gpu_kernels.ROUNDED["rope_float8"] and gpu_kernels.ROUNDED_TINY["rope_float8"] == 0.15
import torch
found = gpu_kernels.run(torch.device("cpu"), torch.float32, True, "routers,convolution")
assert [row.ok for row in found] == [True, True], found
"""
    _python(code, TRITON_INTERPRET="1")
