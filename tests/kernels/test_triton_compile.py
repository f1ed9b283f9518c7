"""Kernels compile ahead of time for GPUs that are not here. All of them: scripts/triton_compile.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "triton_compile.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The script must be able to compile although its caller interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


def test_quick_set_compiles_for_nvidia_and_amd(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = _run("--quick", "--targets", "sm_90,gfx942", "--json", str(report))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    results = json.loads(report.read_text())
    kernels = {(r["target"], r["kernel"]) for r in results}
    assert {("sm_90", "_attention"), ("gfx942", "_attention"), ("sm_90", "_sample"), ("gfx942", "_grouped")} <= kernels
    assert all(r["registers"] and r["shared"] is not None for r in results)
    # What a decode step chains is launched early; each waits before it touches memory, or the script fails.
    early = {r["kernel"] for r in results if r["early"]}
    assert {
        "_attention",
        "_join_splits",
        "_rms_norm",
        "_rope_kv",
        "_route_and_sort",
        "_grouped",
        "_sum_choices",
    } <= early
    assert not [r for r in results if r["early"] and r["target"] != "sm_90"]
    walks = [r for r in results if r["kernel"] == "_walk_grouped"]
    assert len(walks) == 6 and {r["target"] for r in walks} == {"sm_90"} and not any(r["stack"] for r in walks)


def counted(code: str) -> list[int]:
    """The numbers that a process beside this one, which compiles, prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_tiles_of_many_rows_are_brought_by_descriptors_and_multiplied_in_the_pipes_for_it(target: str) -> None:
    """Loads of the tensor memory accelerator, tensor cores that read shared memory, and launches that wait."""
    code = (
        "import triton, triton_compile as c; from triton.compiler import ASTSource; from triton_cases import cases;"
        "import phloem.kernels.triton.many as many;"
        f"target = c.TARGETS['{target}'][0];"
        f"found = [l for l in c.record([x for x in cases() if x.name == 'MoE, 4096 tokens'], '{target}')"
        " if l.kernel == '_walk_grouped'][-1];"
        "attrs = {(n,): [['tt.divisibility', 16]] for n in found.aligned};"
        "source = ASTSource(many._walk_grouped, dict(found.signature), dict(found.constants), attrs);"
        "ptx = triton.compile(source, target=target, options=dict(found.options)).asm['ptx'];"
        "print(*(ptx.count(x) for x in ('cp.async.bulk.tensor', 'wgmma.mma_async', 'tcgen05.mma', 'griddepcontrol')))"
    )
    loads, hopper, blackwell, waits = counted(code)
    assert loads >= 2 and waits == 2 and (hopper if target == "sm_90" else blackwell) > 0


@pytest.mark.parametrize("case", ["gpt-oss experts in mxfp4, 4096 tokens", "MoE, int4, 64 tokens"])
def test_widened_weights_go_from_registers_to_the_tensor_cores(case: str) -> None:
    """On Hopper the first operand of every product is registers, not the descriptor of shared memory; what is read is
    copied in the background, and nothing is spilled."""
    code = (
        "import re, triton, triton_compile as c; from triton.compiler import ASTSource; from triton_cases import cases;"
        "import phloem.kernels.triton.grouped as grouped;"
        f"chosen = [x for x in cases() if x.name == {case!r}];"
        "found = [l for l in c.record(chosen, 'sm_90') if l.kernel == '_grouped_any'];"
        "attrs = [{(n,): [['tt.divisibility', 16]] for n in l.aligned} for l in found];"
        "sources = [ASTSource(grouped._grouped_any, dict(l.signature), dict(l.constants), a)"
        " for l, a in zip(found, attrs)];"
        "made = [triton.compile(s, target=c.TARGETS['sm_90'][0], options=dict(l.options))"
        " for s, l in zip(sources, found)];"
        "text = ''.join(m.asm['ptx'] for m in made);"
        "every = re.findall(r'wgmma.mma_async[^;]*;', text);"
        "mine = [x for x in every if re.search(r'\\}, *\\{', x)];"
        "stack = sum(c.cubin_usage(m.asm['cubin'])[1] for m in made);"
        "print(len(made), len(every), len(mine), text.count('cp.async.cg.shared'), stack)"
    )
    kernels, products, from_registers, copies, stack = counted(code)
    assert kernels == 2 and products == from_registers > 8 and copies > 8 and stack == 0


def test_the_switch_turns_early_launches_off() -> None:
    code = (
        "import triton_compile as c; from triton_cases import cases;"
        "print(sum('launch_pdl' in dict(l.options) for l in c.record([x for x in cases() if x.quick], 'sm_90')))"
    )
    for asked, early in (("off", False), ("on", True)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PHLOEM_PDL": asked},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (int(done.stdout) > 10) == early and (int(done.stdout) == 0) != early


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (
            [
                "ld.param.b64 %rd1, [x];",
                "mov.u32 %r1, %ctaid.x;",
                "griddepcontrol.wait;",
                "ld.global.b32 {%r2}, [%rd1];",
            ],
            None,
        ),
        (["@%p1 ld.global.b32 { %r2 }, [ %rd1 + 0 ];", "griddepcontrol.wait;"], "before it waits: @%p1 ld.global"),
        (["@%p4 bra $L__BB0_2;", "griddepcontrol.wait;"], "before it waits: @%p4 bra"),
        (["st.global.b32 [%rd1], %r2;", "griddepcontrol.wait;"], "before it waits: st.global"),
        (["ld.shared.b32 %r2, [global_smem];", "griddepcontrol.wait;"], None),
        (["ret;"], "before it waits: ret"),
        (["mov.u32 %r1, %r2;"], "never waits"),
    ],
)
def test_a_kernel_that_does_not_wait_first_is_found(lines: list[str], fault: str | None) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    from triton_compile import early_fault

    ptx = "\n".join(["// a comment: ret", *lines, "griddepcontrol.launch_dependents;"])
    found = early_fault(ptx, True)
    assert found is None if fault is None else fault in str(found)
    assert early_fault(ptx, False) is None


def test_a_kernel_that_never_lets_the_next_one_start_is_found() -> None:
    from triton_compile import early_fault

    assert "never lets" in str(early_fault("griddepcontrol.wait;", True))


def test_every_kernel_is_among_the_cases() -> None:
    """A kernel that no case launches would never be compiled."""
    code = (
        "import triton_compile as c; from triton_cases import cases;"
        "print(sorted(c.all_kernels() - {l.kernel for l in c.record(cases(), 'sm_90')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_errors_fail_the_script() -> None:
    done = _run("--targets", "sm_12345")
    assert done.returncode == 2 and "known: sm_80" in done.stderr
