"""scripts/count_kernels.py: how an emulator's log is read, and what is said of levels side by side."""

from __future__ import annotations

import count_kernels
import pytest
from count_kernels import Run

ARM = b"""\
----------------
IN: tile_kernel
0x00400a00:  4f00e400  movi     v0.16b, #0
0x00400a04:  4f9ae37d  .byte    0x7d, 0xe3, 0x9a, 0x4f
0x00400a08:  54ffff61  b.ne     #0x400a00

Trace 0: 0x7fc3c6600100 [0000000001009331/0000000000400a00/00000001/00000200] tile_kernel
Trace 0: 0x7fc3c6600100 [0000000001009331/0000000000400a00/00000001/00000200] tile_kernel
----------------
IN: main
0x00400b00:  d65f03c0  ret
Trace 0: 0x7fc3c6600200 [0000000001009331/0000000000400b00/00000001/00000200] main
Trace 0: 0x7fc3c6600100 [0000000001009331/0000000000400a00/00000001/00000200] tile_kernel
"""
# The bytes of a long instruction go on in a line of their own.
X86 = b"""\
IN: tile_kernel
0x00401615:  c4 e2 7d 58 0d 00 00 00  vpbroadcastd (%rip), %ymm1
0x0040161d:  00
0x0040161e:  7e 1d                    jle      0x401636

Trace 0: 0x7fe6d7e3b4c0 [0000000000000000/0000000000401615/1040c0b3/00000200] tile_kernel
"""


def test_a_block_counts_as_often_as_it_ran() -> None:
    found = count_kernels.read(ARM.splitlines(keepends=True))
    assert found.by(0) == {"tile_kernel": 9, "main": 1}
    assert found.by(1) == {"movi": 3, ".byte": 3, "b.ne": 3, "ret": 1}
    assert found.total == 10


def test_an_instruction_of_two_lines_is_one() -> None:
    assert count_kernels.read(X86.splitlines(keepends=True)).by(1) == {"vpbroadcastd": 1, "jle": 1}


def test_a_call_is_what_two_have_more_than_one() -> None:
    one = count_kernels.read(ARM.splitlines(keepends=True))
    two = count_kernels.read((ARM + ARM.split(b"IN: main")[0]).splitlines(keepends=True))
    assert two.less(one).by(0) == {"tile_kernel": 6, "main": 0}


def test_levels_stand_side_by_side_as_shares_of_the_first() -> None:
    runs: dict[tuple[str, str, int], Run] = {}
    for level, often in (("avx2", 1000), ("neon", 1180)):
        runs["Q8_0", level, 32] = Run()
        runs["Q8_0", level, 32].counts["tile_kernel", "mul"] = often
    told = count_kernels.table(runs, ["avx2", "neon"], ["Q8_0"], [32]).splitlines()
    assert told[0] == "| kernel, rows | avx2 | neon |"
    assert told[2] == "| Q8_0, 32 | 1,000 | 1,180 (1.18) |"


@pytest.mark.parametrize("words", [["--levels", "avx3"], ["--what", "Q9"]])
def test_what_is_not_there_is_refused_with_what_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert count_kernels.main(words) == 2
    told = capsys.readouterr().err
    assert words[1] in told and "neon" in told and "Q4_1" in told
