"""The GPU check runs where there is no GPU as far as it can, and claims nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = _run()
    assert done.returncode == 2 and "no GPU" in done.stdout


def test_a_dry_run_never_writes_among_the_results() -> None:
    done = _run("--dry-run")
    assert done.returncode == 2 and "needs --out" in done.stderr


def test_dry_run_measures_and_reports(tmp_path: Path) -> None:
    done = _run("--dry-run", "--only", "floors,llama,qwen,transformers", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert report["dry_run"] and not report["errors"]
    for name in ("llama", "llama-fp8", "qwen", "qwen-fp8"):
        assert [row["rows"] for row in report[name]["decode"]] == [1, 2]
        assert all(row["floor_ms"] > 0 for row in report[name]["decode"])
    for name in ("llama", "qwen"):
        assert [row["tokens"] for row in report[name]["pieces"]] == [16, 40]
    assert all(row["pieces_ms"] > 0 for row in report["llama"]["pieces"])
    assert report["llama"]["serving"]["failed"] == 0 and report["llama"]["serving"]["output_tok_per_s"] > 0
    assert report["transformers"][0]["rows"] == 2
    page = next(tmp_path.glob("*.md")).read_text()
    assert page.startswith("# Dry run on a CPU: the numbers mean nothing") and "## qwen-fp8" in page
    assert "| prefill tokens | eager ms | in pieces ms |" in page


def test_kernels_of_many_rows_are_checked_and_timed_beside_each_other(tmp_path: Path) -> None:
    done = _run("--dry-run", "--only", "kernels,experts", "--checks", "moe_many", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert [row["name"] for row in report["kernels"]] == ["moe_many (float32)"] and report["kernels"][0]["ok"]
    for rows in report["experts"].values():
        kernels = rows[0]["kernels"]
        assert len(kernels) >= 3 and all(one["ms"] > 0 for one in kernels.values()) and "a tile a program" in kernels
    assert "| float8 | 66 | a tile a program |" in next(tmp_path.glob("*.md")).read_text()


def test_several_ranks_are_run_beside_one(tmp_path: Path) -> None:
    """On a CPU by its own means: what is shown is that the section runs, ends, and compares."""
    done = _run("--dry-run", "--only", "ranks", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())["ranks"]
    assert found["one"]["ratio"] > 0 and found["two"]["same_tokens"] and found["two"]["lost_after_s"] < 30
    assert "## Several ranks" in next(tmp_path.glob("*.md")).read_text()


def test_the_cold_start_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    done = _run("--dry-run", "--only", "cold", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    cold = json.loads(file.read_text())["cold"]
    assert list(cold) == ["first start", "second start"]
    for one in cold.values():
        assert one["ready_s"] > 0 and len(one["rounds"]) == 2 and one["cold_over_warm"] > 0
        assert all(row["output_tok_per_s"] > 0 and row["ttft_ms_max"] > 0 for row in one["rounds"])
    assert "## Cold start" in next(tmp_path.glob("*.md")).read_text()


def test_servers_are_compared_under_the_same_requests(tmp_path: Path) -> None:
    done = _run("--dry-run", "--only", "shared,peers", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert list(report["shared"]["engines"]) == ["phloem", "phloem-apart"] and not report["shared"]["skipped"]
    rounds = report["peers"]["engines"]["phloem"]["rounds"]
    assert {name: len(rows) for name, rows in rounds.items()} == {"one": 2, "32": 2, "128": 2, "shared": 2}
    assert all(row["output_tok_per_s"] > 0 and row["ttft_ms_max"] > 0 for rows in rounds.values() for row in rows)
    page = next(tmp_path.glob("*.md")).read_text()
    assert "## A shared prefix of 2,048 tokens" in page and "| shared | phloem-apart |" in page


def test_every_token_is_counted_and_sizes_follow_the_memory() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import gpu_bench, gpu_models
from types import SimpleNamespace as message
plain = gpu_bench.Plain()
assert plain.names(message(rows=["a", "b"], plain=[1, 2])) == ["a", "b"]
assert plain.names(message(rows=None, plain=[3, 4])) == ["a", "b"]
assert plain.names(message(rows=["b"], plain=[5])) == ["b"] and plain.names(message(rows=None, plain=[])) == []
GIB = 2**30
fits = lambda gib, config: gpu_bench.fitting(config, gib * GIB, 2, (1, 8, 32, 128, 256), 1024, 2)
assert fits(140, gpu_models.LLAMA_8B) == [1, 8, 32, 128, 256]
assert fits(79, gpu_models.LLAMA_8B) == [1, 8, 32, 128, 256] and fits(24, gpu_models.LLAMA_8B) == [1, 8]
assert fits(140, gpu_models.QWEN3_30B_A3B)[-1] == 256 and fits(79, gpu_models.QWEN3_30B_A3B)[-1] == 128
assert fits(40, gpu_models.QWEN3_30B_A3B) == []
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_a_section_leaves_behind_and_a_run_that_hangs_are_errors(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
import gpu_check, torch
args = gpu_check.argparse.Namespace(dry_run=True, only="", seconds=5.0, out=gpu_check.Path({str(tmp_path)!r}))
check = gpu_check.Check(args)
check.device = torch.device("cuda")
left = [0]
torch.cuda.empty_cache = lambda: None
torch.cuda.memory_allocated = lambda device: left[0]
check._leave_nothing("first")
left[0] = 1 << 30
check._leave_nothing("second")
assert list(check.report["errors"]) == ["second left memory behind"]
gpu_check.out_of_time(check)
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "out of time" in done.stdout, done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    assert "time" in json.loads(file.read_text())["errors"]


def test_kernel_checks_notice_errors(tmp_path: Path) -> None:
    """A kernel that is wrong, raises, or leaves its output unwritten is reported, and the exit status is 1."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import os; os.environ["TRITON_INTERPRET"] = "1"
import gpu_check, torch
from phloem.kernels.triton import activation, pages
activation.silu_and_mul = lambda x: torch.empty(x.shape[0], x.shape[1] // 2)
pages.select_rows = lambda x, index: 1 / 0
some = ["--only", "kernels", "--checks", "activations,pages,lora"]
sys.exit(gpu_check.main(["--dry-run", "--out", {str(tmp_path)!r}, *some]))
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent / "src"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = tmp_path.glob("*.json")
    rows = {row["name"].split()[0]: row for row in json.loads(file.read_text())["kernels"]}
    assert not rows["activations"]["ok"] and "#0: inf" in rows["activations"]["message"]
    assert not rows["pages"]["ok"] and "ZeroDivisionError" in rows["pages"]["message"]
    assert rows["lora"]["ok"]


def test_floors_are_counted_right() -> None:
    """Llama-3.1-8B: 7.5 G parameters are read a step besides the embedding, 131,072 bytes of KV a token."""
    code = """
import sys
from gpu_models import LLAMA_8B, QWEN3_30B_A3B, decode_work, prefill_flops
work = decode_work(LLAMA_8B, 1, 1024, 2, 2)
assert abs(work.weight_bytes / 2 - 7.504e9) < 2e6, work
assert work.kv_bytes == 1024 * 131072
assert abs(work.flops - (2 * 7.504e9 + 4 * 32 * 32 * 128 * 1024)) < 4e6
few, many = (decode_work(QWEN3_30B_A3B, rows, 1, 2, 2).weight_bytes / 2 for rows in (1, 10000))
assert abs(few - 3.04e9) < 5e7 and abs(many - 30.2e9) < 2e8, (few, many)
assert abs(prefill_flops(LLAMA_8B, 4096) / 4096 / (2 * 6.98e9) - 1) < 0.08
"""
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPTS}{os.pathsep}{SCRIPTS.parent / 'src'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
