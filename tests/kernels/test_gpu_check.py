"""The GPU check runs where there is no GPU as far as it can, and claims nothing; its sections break as told."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_watch
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def _run(*arguments: str, places: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    """`places`: folders of tests/support whose modules its processes find."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **more}
    paths = [*(str(SUPPORT / place) for place in places), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
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
    done = _run("--dry-run", "--only", "floors,llam,qw,transformers", "--out", str(tmp_path))
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
    done = _run("--dry-run", "--only", "shared,peers", "--out", str(tmp_path), places=("peer_stand_ins",))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert list(report["shared"]["engines"]) == ["phloem", "phloem-apart"] and not report["shared"]["skipped"]
    for engine in ("phloem", "vllm", "sglang"):
        rounds = report["peers"]["engines"][engine]["rounds"]
        assert {name: len(rows) for name, rows in rounds.items()} == {"one": 2, "32": 2, "128": 2, "shared": 2}
        rows = [row for rows in rounds.values() for row in rows]
        assert all(row["output_tok_per_s"] > 0 and row["ttft_ms_max"] > 0 and row["unseen"] <= 2 for row in rows)
    assert report["peers"]["interleaved"] and report["shared"]["interleaved"]
    page = next(tmp_path.glob("*.md")).read_text()
    assert "| goal | this engine | best peer |" in page and "another run" not in page
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


# --- faults in true sections, by tests/support/faults_put_in.py


def _broken(tmp_path: Path, only: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """The report of a run in which something breaks, and no process of which is left."""
    before = gpu_watch.in_memory()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import faults_put_in\n")
    arguments = ("--dry-run", "--only", only, "--out", str(tmp_path), *arguments)
    done = _run(*arguments, places=(str(tmp_path / "site"), ".", "peer_stand_ins"), **environment)
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    assert not [one for one in gpu_watch.in_memory() - before if one.endswith("-fault")]
    stem = str(next(tmp_path.glob("*.md")))
    assert Path(stem).read_text().startswith("# Dry run")
    return json.loads(file.read_text())


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("gpu_bench:bench_decode=raise@4", "RuntimeError: a fault was put in"),
        ("gpu_bench:bench_prefill=memory", "out of memory: OutOfMemoryError"),
        ("gpu_bench:bench_pieces=die", "killed by SIGKILL"),
        ("gpu_bench:bench_runner=exit@2", "exit status 7"),
        ("gpu_bench:bench_serving=dead", "an illegal memory access"),
        ("gpu_bench:bench_pieces=hang", "not done after"),
        ("gpu_models:Dummy.fill_cache=stop", "not done after"),
        ("gpu_bench:bench_decode=orphan@1;gpu_bench:bench_prefill=litter", "left something behind"),
    ],
)
def test_a_model_section_that_breaks_keeps_what_it_found(fault: str, why: str, tmp_path: Path) -> None:
    report = _broken(tmp_path, "floors,llama", "--limit", "60", FAULTS=fault)
    told = {name: text for name, text in report["errors"].items() if name.startswith("llama")}
    assert any(why in f"{name}: {text}" for name, text in told.items()), report["errors"]
    assert report["floors"]["flops_16"] > 0 and list(report["errors"]) == list(told)
    assert "fill_cache" in fault or report["llama"]["decode"]  # the rows before the fault
    if "hang" in fault:
        assert "in _break" in told["llama"] and "in _model" in told["llama"]  # where it stood


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("section", "fault", "why"),
    [
        ("cold", "phloem.engine.worker:build=raise", "gpu_cold.py: exit status 1"),
        ("cold", "phloem.engine.worker:build=stop", "gpu_cold.py: not done after"),
        ("cold", "phloem.engine.worker:build=die", "gpu_cold.py: "),
        ("ranks", "phloem.engine.worker:build=hang", "gpu_ranks.py: not done after"),
        ("ranks", "phloem.engine.ranks.parallel:ParallelRunner.__init__=die", "gpu_ranks.py: killed by SIGKILL"),
        ("peers", "phloem.engine.worker:build=die", "phloem did not start"),
    ],
)
def test_a_section_whose_processes_break_says_so(section: str, fault: str, why: str, tmp_path: Path) -> None:
    report = _broken(tmp_path, f"{section},floors", "--limit", "60", FAULTS=fault)
    assert why in report["errors"][section], report["errors"]
    assert report["floors"]["flops_16"] > 0
    if section == "peers":  # the others were compared
        assert report["peers"]["engines"]["vllm"]["rounds"]["shared"] and "phloem" in report["peers"]["skipped"]


def test_kernels_that_break_cost_themselves_alone(tmp_path: Path) -> None:
    faults = "phloem.kernels.triton.pages:select_rows=die;phloem.kernels.triton.tokens:keep_tokens_=raise"
    faults += ";phloem.kernels.triton.quantise:per_token_fp8=hang"
    checks = ("--checks", "pages,tokens,quantise,activations", "--question", "45")
    report = _broken(tmp_path, "kernels", *checks, FAULTS=faults)
    rows = {row["name"].split()[0]: row for row in report["kernels"]}
    assert rows["activations"]["ok"] and len(rows) == 4 and sum(row["ok"] for row in rows.values()) == 1
    assert rows["pages"]["message"].startswith("killed by SIGKILL")
    assert "a fault was put in" in rows["tokens"]["message"] and "not done after" in rows["quantise"]["message"]


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("missing", "skipped", "runs"),
    [
        ("msgspec", {"floors", "llama", "kernels", "peers"}, set[str]()),
        ("fastapi,uvicorn", {"peers"}, {"floors", "llama"}),
        ("gguf,llguidance,vllm,sglang", set[str](), {"floors", "llama", "peers"}),
    ],
)
def test_packages_that_are_missing_are_told(missing: str, skipped: set[str], runs: set[str], tmp_path: Path) -> None:
    report = _broken(tmp_path, "kernels,floors,llama,peers", "--checks", "pages", ABSENT=missing)
    assert set(report["skipped"]) == skipped and not report["errors"]
    assert all("missing" in why and missing.split(",")[0] in why for why in report["skipped"].values())
    assert all(report.get(name) for name in runs)


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
