"""scripts/count_step.py: how a file of callgrind's is read."""

from __future__ import annotations

import count_step

SPACE = "phl::avx2::(anonymous namespace)::"
FILE = f"""\
desc: Trigger: Client Request: decode, 1 row
events: Ir

ob=(1) /site/phloem/kernels/_cpu.abi3.so
fl=(1) ???
fn=(1) void {SPACE}small_block<{SPACE}Quantised<4, 32>, 1, true>(unsigned char const*)
0 700
fn=(2) {SPACE}linear({SPACE}LinearArgs const&, phl::Team&)
0 40
cfn=(1)
calls=3 0
* 700
+3 5
cfn=(3) phl::Team::wait_for_all()
calls=2 0
0 90
fn=(3)
-1 90
fn=(4) {SPACE}rms_norm({SPACE}NormArgs const&, phl::Team&)
0 11
fn=(5) {SPACE}softcap({SPACE}CapArgs const&, phl::Team&)
0 6
ob=(2) /usr/bin/python3.11
fn=(6) _PyEval_EvalFrameDefault
0 1000
cob=(3) /site/torch/lib/libtorch_cpu.so
cfn=(7) at::add
calls=1 0
0 300
ob=(3)
fn=(7)
0 300
ob=(4) /lib/libc.so.6
fn=(8) memcpy
0 9
"""


def test_a_function_is_counted_once_and_by_what_it_is_for() -> None:
    found = count_step.by_kind(FILE)
    assert +found == {
        "products of linear layers, unpacking in registers": 700,
        "linear layers, the rest: loops, activation, results": 45,
        "threads and the recorded step": 90,
        "norms": 11,
        count_step.KERNELS: 6,
        "Python": 1000,
        "torch": 300,
        count_step.OTHERS: 9,
        "barriers": 2,
    }


def test_a_table_has_shares_of_the_whole_and_leaves_out_what_no_step_has() -> None:
    told = count_step.table({"decode": count_step.by_kind(FILE)}).splitlines()
    assert told[0] == "| thousands of instructions | decode |"
    assert "| norms | 0 (0.5%) |" in told and "| all | 2 |" in told and "| times that a thread waited | 2 |" in told
    assert not any("screen" in line for line in told)


def test_kinds_of_kernels_by_their_names() -> None:
    place = "/site/_cpu.abi3.so"
    named = {
        f"void {SPACE}run_tile<{SPACE}Quantised<4> >(long)::{{lambda(auto:1, long)#1}}::operator()<1>": "linear layers",
        f"void {SPACE}attend<signed char>({SPACE}AttentionArgs const&, phl::Team&)": "attention",
        f"{SPACE}run_rope_write_kv_int8(void const*, phl::Team&)": "rotation",
        f"{SPACE}prepare_row({SPACE}Input const&, long)": "rows normed",
        f"void {SPACE}unpack_block<{SPACE}Quantised<4> >(unsigned char const*)": "weights unpacked",
        f"void {SPACE}screen_block<2, false>(unsigned char const*, long)": "screen",
    }
    for function, kind in named.items():
        assert count_step.kind_of(function, place).startswith(kind), function
