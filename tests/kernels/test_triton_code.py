"""What is read of machine code (scripts/triton_sass.py), and what the kernels of few rows must not have in theirs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
LOOPS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0020*/              @!P0 BRA 0x0 ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.64 R16, desc[UR4][R2.64+0x10] ;
        /*0050*/                   F2F.BF16.F16 R10, R8 ;
        /*0060*/                   F2FP.F16.E4M3.UNPACK_B R12, R9 ;
        /*0070*/                   LDG.E.U16 R18, desc[UR4][R2.64+0x20] ;
        /*0080*/               @P1 BRA 0x30 ;
        /*0090*/                   STL [R1], R10 ;
        /*00a0*/                   BRA 0xa0;
"""


@pytest.fixture
def sass(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("triton_sass")


def test_the_main_loop_is_the_one_that_loads_most(sass: Any) -> None:
    loop = sass.main_loop(sass.parse(LOOPS))
    assert [each.address for each in loop] == list(range(0x30, 0x90, 0x10))
    code = sass.Code(32, 0, loop=loop)
    assert code.loop_bytes(128) == 128 * (16 + 8 + 2)
    assert (code.slots, code.slow) == (3 + 8 + 2 + 1, 1)


def test_bytes_are_under_way_until_they_are_used(sass: Any) -> None:
    code = sass.Code(32, 0, loop=sass.main_loop(sass.parse(LOOPS)))
    # When the first 16 bytes are used 8 more are under way; of those words two of four are never used, and stay.
    assert sass.under_way(code, "", 32) == 32 * (16 + 8 + 2)
    staged = "%a = ttg.local_alloc : () -> !ttg.memdesc<3x16x128xbf16, #shared, #smem, mutable>"
    assert sass.under_way(sass.Code(32, 0), staged, 128) == 2 * 16 * 128 * 2


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"), [(32, 0, 4, 16), (255, 0, 4, 2), (64, 70_000, 4, 3), (128, 0, 8, 2)]
)
def test_blocks_that_a_multiprocessor_holds(sass: Any, registers: int, shared: int, warps: int, blocks: int) -> None:
    assert sass.resident(registers, shared, warps) == blocks


@pytest.mark.slow
def test_few_rows_on_float8_neither_convert_slowly_nor_load_narrowly() -> None:
    code = (
        "import triton_code as c;"
        "some = [s for s in c.steps([1]) if s.name in ('llama, 1: o, rows', 'qwen, 1: experts, float8')];"
        "found = [c.read((s, each)) for s in some for each in c.record([c.Case(s.name, s.run)], c.TARGET)];"
        "widest = [max(r.code.loads | r.code.copies) for r in found];"
        "print(*(f'{r.kernel},{r.code.slow},{r.code.spilled},{wide},{r.floor / r.bound:.2f}'"
        " for r, wide in zip(found, widest) if r.floor))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(",") for line in done.stdout.split()]
    assert [row[0] for row in rows] == ["_gemm_few", "_few_up", "_few_down"]
    assert all(row[1:4] == ["0", "0", "16"] and float(row[4]) > 0.8 for row in rows), rows
