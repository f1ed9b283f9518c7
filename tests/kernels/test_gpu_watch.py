"""What watches the sections of the GPU check: whatever a section does, the run ends in time, says what happened, keeps
what was found, leaves nothing behind, and goes on. Sections here are small scripts that misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_check
import gpu_plan
import gpu_watch
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
STUB = """
import json, os, signal, subprocess, sys, time
def tell(**what):
    print("@@ " + json.dumps(what), flush=True)
def rest():
    time.sleep(600)
def outlive():
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
what = sys.argv[1]
"""


@pytest.fixture(autouse=True)
def own_temporary_files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
    monkeypatch.setattr(tempfile, "tempdir", None)


def check_of(tmp_path: Path, body: str, *options: str, gib: float = 141.0) -> gpu_check.Check:
    """A run whose sections are this script's."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB + body)
    args = gpu_check.parsed(["--dry-run", "--out", str(tmp_path / "out"), "--pretend-gib", str(gib), *options])
    check = gpu_check.Check(args, [sys.executable, "-S", str(stub)])
    check.report["machine"] = {"memory_gib": gib, "commit": "abc"}
    check.stem = tmp_path / "out" / "gpu-check-test"
    return check


def written(tmp_path: Path) -> dict[str, Any]:
    assert (tmp_path / "out" / "gpu-check-test.md").read_text().startswith("# Dry run")
    return json.loads((tmp_path / "out" / "gpu-check-test.json").read_text())


FAULTS = """
if what == "floors":
    tell(found={"bytes_per_second": 1e12, "flops_16": 1e15, "flops_8": None}, done=True); tell(left_mib=0)
if what == "llama":
    tell(found={"weight_gib": 1.0, "decode": [], "runner": []})
    os.kill(os.getpid(), signal.SIGKILL)
if what == "qwen":
    outlive()
    print("to the error log: it stands here", file=sys.stderr, flush=True)
    rest()
if what == "experts":
    os.kill(os.getpid(), signal.SIGSTOP)
if what == "cold":
    outlive()
    tell(found={}, done=True); tell(left_mib=0)
if what == "peers":
    print("Traceback", "ValueError: no such thing", sep=chr(10), file=sys.stderr)
    sys.exit(3)
if what == "shared":
    tell(error="OutOfMemoryError: 80 GiB"); tell(left_mib=0)
if what == "ranks":
    tell(skipped="missing: msgspec"); tell(left_mib=0)
if what == "transformers":
    tell(error="ImportError"); tell(left_mib=500, found=[])
if what == "switches":
    name = f"/dev/shm/phloem-weights-{os.getpid()}.0.0-test"
    open(name, "w").close()
    tell(found=[], done=True); tell(left_mib=0)
"""


@pytest.mark.slow
def test_what_sections_do_is_told_and_costs_no_other(tmp_path: Path) -> None:
    only = "floors,llama,qwen,experts,cold,peers,shared,switches,ranks,transformers"
    check = check_of(tmp_path, FAULTS, "--only", only, "--limit", "1.5")
    before = gpu_watch.in_memory()
    begun = time.monotonic()
    check.run()
    assert time.monotonic() - begun < 60
    report = written(tmp_path)
    assert report["floors"]["flops_16"] == 1e15 and report["llama"] == {"weight_gib": 1.0, "decode": [], "runner": []}
    errors = report["errors"]
    assert errors["llama"].startswith("killed by SIGKILL")
    assert errors["qwen"].startswith("not done after") and "it stands here" in errors["qwen"]
    assert errors["experts"].startswith("not done after")
    assert errors["peers"].startswith("exit status 3") and "no such thing" in errors["peers"]
    assert errors["shared"] == "OutOfMemoryError: 80 GiB"
    # Ended with the section: an error of one that did well, a note of one that failed anyway.
    assert "sleep(600)" in errors["cold left something behind"] and "sleep(600)" in report["left"]["qwen"]
    assert "phloem-weights" in errors["switches left something behind"]
    assert report["skipped"] == {"ranks": "missing: msgspec", "transformers": "ImportError"}
    assert not {name for name in gpu_watch.in_memory() - before if name.endswith("-test")}
    assert set(report["section_s"]) == set(only.split(","))
    assert all(not gpu_watch.marked(f"{os.getpid()}-{number}") for number in range(12))
    check.close()
    assert not list(check._place.parent.glob(check._place.name))


WORKER = """
assert what == "worker"
started = open(sys.argv[0] + ".starts", "a"); started.write("x"); started.close()
tell(ready=["good", "dies", "hangs", "ends the device", "raises", "wrong", "fine"])
for line in sys.stdin:
    asked = json.loads(line)
    name = asked["name"]
    row = {"name": f"{name} ({asked['dtype']})", "ok": name != "wrong", "error": 0.0, "limit": 1.0, "seconds": 0.1,
           "message": ""}
    if name == "dies":
        print("an illegal address", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        rest()
    if name == "ends the device":
        tell(outcomes=[row], dead="CUDA error"); os._exit(0)
    if name == "raises":
        tell(failed="RuntimeError: no"); continue
    tell(outcomes=[row])
"""


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_kernel_that_ends_its_process_costs_itself_alone(workers: str, tmp_path: Path) -> None:
    check = check_of(tmp_path, WORKER, "--only", "kernels", "--question", "1.5", "--workers", workers)
    check.run()
    report = written(tmp_path)
    rows = {row["name"].split(" (")[0]: row for row in report["kernels"]}
    assert len(rows) == len(report["kernels"]) == 7 and not report["errors"]
    assert len(rows) == len(report["kernels"]) == 7 and not report["errors"]
    assert {name for name, row in rows.items() if row["ok"]} == {"good", "fine"}
    told = {name: row["message"] for name, row in rows.items()}
    assert told["dies"].startswith("killed by SIGSEGV") and "an illegal address" in told["dies"]
    assert told["hangs"].startswith("not done after") and told["raises"] == "RuntimeError: no"
    assert told["ends the device"] == "afterwards the device did no more: CUDA error"
    if workers == "1":
        assert (tmp_path / "stub.py.starts").read_text() == "xxxx"


def test_what_was_told_first_stays_first(tmp_path: Path) -> None:
    body = 'tell(error="an illegal memory access"); print("no context", file=sys.stderr); os._exit(9)'
    check = check_of(tmp_path, body, "--only", "floors")
    check.run()
    told = written(tmp_path)["errors"]["floors"]
    assert told.startswith("an illegal memory access; then: exit status 9") and told.endswith("no context")


def test_a_page_that_cannot_be_made_costs_no_figure(tmp_path: Path) -> None:
    check = check_of(
        tmp_path, "tell(found={'no such': 'thing'}, done=True); tell(left_mib=0)", "--only", "floors,llama"
    )
    check.run()
    report = json.loads((tmp_path / "out" / "gpu-check-test.json").read_text())
    assert report["llama"] == {"no such": "thing"} and not report["errors"]
    assert "no page: KeyError" in (tmp_path / "out" / "gpu-check-test.md").read_text()


def test_workers_that_do_not_start_are_told_once(tmp_path: Path) -> None:
    check = check_of(tmp_path, 'print("no torch", file=sys.stderr); sys.exit(1)', "--only", "kernels,models")
    check.run()
    assert {name: text.split(":")[0] for name, text in written(tmp_path)["errors"].items()} == {
        "kernels": "no worker starts",
        "models": "no worker starts",
    }
    check = check_of(tmp_path, 'tell(missing="No module named msgspec")', "--only", "models")
    check.run()
    assert written(tmp_path)["skipped"] == {"models": "missing: No module named msgspec"}


def test_what_is_not_asked_for_want_of_time_is_counted(tmp_path: Path) -> None:
    slow = 'tell(ready=["a", "b", "c"])\nfor line in sys.stdin:\n    time.sleep(1.2); tell(outcomes=[])'
    check = check_of(tmp_path, slow, "--only", "kernels", "--limit", "1")
    check.run()
    assert written(tmp_path)["errors"] == {"kernels": "2 of 3 were not asked: the time was over"}


def test_the_whole_ends_in_time_whatever_hangs(tmp_path: Path) -> None:
    """Of the time the first section gets what is left but for the ending; the second is skipped, with the reason."""
    check = check_of(tmp_path, "rest()", "--only", "floors,llama", "--seconds", str(gpu_check.ENDING + 2))
    begun = time.monotonic()
    check.run()
    assert time.monotonic() - begun < gpu_check.ENDING + 2
    report = written(tmp_path)
    assert report["errors"]["floors"].startswith("not done after")
    assert report["errors"].get("llama", "not done after").startswith("not done after") or "llama" in report["skipped"]


def test_a_section_for_which_too_little_time_is_left_is_not_begun(tmp_path: Path) -> None:
    check = check_of(
        tmp_path, "tell(found={}, done=True); tell(left_mib=0)", "--only", "floors,cold", "--seconds", "40"
    )
    check.tiny = False
    check.run()
    assert written(tmp_path)["skipped"] == {"cold": "20 s were left, it needs about 130"}
    check.close()


def test_memory_that_does_not_come_back_is_an_error(tmp_path: Path) -> None:
    body = 'tell(free_gib={"floors": 140.0, "llama": 139.5, "qwen": 120.0}[what]); tell(found=[], done=True)'
    check = check_of(tmp_path, body + "; tell(left_mib=0)", "--only", "floors,llama,qwen")
    check.run()
    assert check.report["errors"]["memory before qwen"] == "120.0 GiB are free, 140.0 were"
    assert [name for name in check.report["errors"] if name.startswith("memory")] == ["memory before qwen"]


def test_who_is_asked_to_end_writes_what_there_is_and_leaves_no_process(tmp_path: Path) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(
        STUB + "tell(found={'bytes_per_second': 1e12, 'flops_16': 1e15, 'flops_8': None})\noutlive()\nrest()"
    )
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPTS)!r})
import gpu_check
whole = gpu_check.Check.__init__
gpu_check.Check.__init__ = lambda self, args: whole(self, args, [sys.executable, "-S", {str(stub)!r}])
def machine(self):
    self.report["machine"] = dict(memory_gib=141.0, commit="abc")
    self.stem = self.args.out / "gpu-check-test"
    return 0
gpu_check.Check.machine = machine
sys.exit(gpu_check.main(["--dry-run", "--only", "floors", "--out", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    file, mark = tmp_path / "out" / "gpu-check-test.json", f"{process.pid}-1"
    while not (file.exists() and "floors" in json.loads(file.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert "floors" in json.loads(file.read_text()), "what was found is written though nothing more comes"
    assert gpu_watch.marked(mark)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    report = written(tmp_path)
    assert report["floors"]["flops_16"] == 1e15 and report["errors"]["time"].startswith("ended by SIGTERM")
    assert not gpu_watch.marked(mark)


@pytest.mark.parametrize(
    ("gib", "not_there"),
    [
        (23.6, {"peers", "shared", "qwen", "qwen-fp8", "transformers"}),
        (79.2, set[str]()),
        (139.8, set[str]()),
    ],
)
def test_what_a_card_is_too_small_for_is_told(gib: float, not_there: set[str], tmp_path: Path) -> None:
    check = check_of(tmp_path, "tell(ready=[], found=[], done=True); tell(left_mib=0)", gib=gib)
    check.run()
    assert {name for name, why in written(tmp_path)["skipped"].items() if "this one has" in why} == not_there


# --- the plan


def test_the_plan_fits_its_calls_and_names_every_section() -> None:
    for call in (1, 2, 3):
        names = gpu_plan.of_call(call)
        assert names and sum(gpu_plan.SECTIONS[name].seconds for name in names) <= gpu_plan.CALL_SECONDS
    assert gpu_plan.of_call(1)[0] == "kernels" and "PHLOEM_PDL=off" in gpu_plan.SECTIONS["switches"].what
    assert sum(gpu_plan.WHEELS.values()) * 1000 < gpu_plan.CARRIED
    assert gpu_plan.CALL_SECONDS + 10 < 600
    here = {name.replace("-", "_") for name in gpu_plan.SECTIONS} - {"kernels", "models"}
    source = (SCRIPTS / "gpu_sections.py").read_text()
    assert all(f"    def {name}(self)" in source for name in here)


def test_the_plan_is_told_and_stands_in_the_docs() -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--plan", "--commit", "COMMIT"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "\n".join(gpu_plan.plan()) + "\n"
    page = (SCRIPTS.parent / "docs" / "gpu.md").read_text()
    for name, section in gpu_plan.SECTIONS.items():
        assert f"| {name} | {section.call} | {section.seconds:.0f} | {section.gib:.0f} | {section.what} |" in page
    assert all(f"`{name}`" in page for name in gpu_plan.WHEELS)


def test_sections_are_chosen_by_name_or_beginning(tmp_path: Path) -> None:
    def chosen(*options: str) -> list[str]:
        return gpu_check.wanted(gpu_check.parsed(["--dry-run", "--out", str(tmp_path), *options]))

    assert chosen() == list(gpu_plan.SECTIONS) and chosen("--call", "3") == ["switches", "ranks", "transformers"]
    assert chosen("--only", "llama") == ["llama"] and chosen("--only", "qw, floors") == ["floors", "qwen", "qwen-fp8"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--only", "nonsense"), "no section is 'nonsense'"),
        (("--only", "floors,nonsense"), "no section is 'nonsense'"),
        (("--only", "cold", "--call", "1"), "call 1 has kernels, models"),
        (("--seconds", "-5"), "--seconds: -5.0"),
        (("--limit", "nan"), "--limit: nan"),
        (("--workers", "-1"), "--workers: -1"),
    ],
)
def test_what_would_check_nothing_is_refused(
    options: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.parsed(["--dry-run", "--out", str(tmp_path), *options])
    assert ended.value.code == 2 and why in capsys.readouterr().err


def test_checks_that_there_are_not_are_told(tmp_path: Path) -> None:
    body = """
if what == "worker":
    tell(ready=["norms", "pages"])
    for line in sys.stdin:
        name = json.loads(line)["name"]
        tell(outcomes=[{"name": name, "ok": True, "error": 0.0, "limit": 1.0, "seconds": 0.1, "message": ""}])
"""
    check = check_of(tmp_path, body, "--checks", "pages,nonsense")
    check.section("kernels")
    report = written(tmp_path)
    assert [row["name"] for row in report["kernels"]] == ["pages"]
    assert report["errors"] == {"checks": "unknown: nonsense; known: norms, pages"}


# --- results that cannot be written


def test_a_folder_for_results_that_cannot_be_is_known_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--dry-run", "--only", "floors"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "file" / "out")], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 2 and "results not written" in done.stdout and "== floors" not in done.stdout
    assert not done.stderr


def test_a_disk_that_fills_up_costs_no_section_and_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "tell(found={'bytes_per_second': 1e12, 'flops_16': 1e15, 'flops_8': None}, done=True); tell(left_mib=0)"
    check = check_of(tmp_path, body)
    check.write()
    full, true = [True], Path.write_text

    def write_text(self: Path, text: str) -> int:
        if full[0] and self.suffix == ".part":
            true(self, text[:10])
            raise OSError(28, "No space left on device")
        return true(self, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    check.section("floors")
    assert not list((tmp_path / "out").glob("*.part")) and "floors" not in written(tmp_path)
    found = json.loads(check.where().split("this is the .json: ")[1])
    assert found["floors"]["flops_16"] == 1e15 and "No space left" in found["errors"]["results"]
    assert capsys.readouterr().out.count("No space left") == 1
    full[0] = False  # somebody made room
    check.write()
    assert written(tmp_path)["floors"]["flops_16"] == 1e15 and not written(tmp_path)["errors"]
    assert check.where().endswith(".json, .md")


@pytest.mark.slow
def test_a_script_of_a_section_goes_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies leaves an engine that would keep the memory which the next one is to have."""
    code = f"""
import sys; sys.path[:0] = [{str(SCRIPTS)!r}, {str(SCRIPTS.parent / "src")!r}]
import argparse, json, time, gpu_sections, gpu_watch
from pathlib import Path
gpu_sections.HERE = Path({str(tmp_path)!r})
args = argparse.Namespace(tiny=True, pretend_gib=24.0, until=time.monotonic() + 60, engine_device="", floors="")
told = []
run = gpu_sections.Sections(args, told.append)
for script in ("dies.py", "fails.py", "tells.py"):
    try:
        told.append(run._child(script, "x"))
    except RuntimeError as error:
        told.append(str(error))
print(json.dumps(told))
"""
    start = STUB.replace("time.sleep(600)", "time.sleep(601)") + "outlive()\n"
    (tmp_path / "dies.py").write_text(start + "os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "fails.py").write_text(start + "sys.exit('no memory')")
    (tmp_path / "tells.py").write_text(start + "print('words'); print(json.dumps(dict(ready_s=1.5)))")
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv(gpu_watch.MARK, mark)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    dies, fails, tells = json.loads(done.stdout.splitlines()[-1])
    assert dies.startswith("dies.py: killed by SIGKILL") and fails == "fails.py: exit status 1; no memory"
    assert tells == {"ready_s": 1.5} and not gpu_watch.marked(mark)


def test_what_drivers_and_others_keep_in_shared_memory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_watch, "MEMORY", tmp_path)
    for name in ("old", "cuda.shm.0.1", "psm_1", f"phloem-ranks-{os.getpid()}.1.1-x", "phloem-ranks-999999999.1.1-x"):
        (tmp_path / name).write_text("")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "phloem-ranks-999999998.1.1-y").mkdir()
    gone = ["phloem-ranks-999999998.1.1-y", "phloem-ranks-999999999.1.1-x"]
    assert gpu_watch.forget({"old"}, alone=False) == gone
    assert gpu_watch.forget({"old"}, alone=True) == [f"phloem-ranks-{os.getpid()}.1.1-x", "psm_1"]
    assert gpu_watch.in_memory() == {"old", "cuda.shm.0.1", "a folder"}
