"""The wheel: made without torch, for every Linux since glibc 2.28, and served from in an environment of its own."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from native_support import built
from served import Server

from phloem.testing.checkpoints import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="wheels of Linux are made on Linux"),
    pytest.mark.skipif(not built(), reason="no native library here: there is no compiler"),
    pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="auditwheel is not installed"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of this tree; what its library is linked from was compiled when the tree was installed."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / "scripts" / "build_wheels.py"), "--out", str(out), "--no-sdist"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


def test_it_is_of_any_python_since_3_11_and_any_linux_since_glibc_2_28(wheel: Path) -> None:
    assert re.fullmatch(rf"phloem-[\d.]+-cp311-abi3-(\w+\.)*manylinux_2_28_{platform.machine()}\.whl", wheel.name)
    assert wheel.stat().st_size < 16e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        assert b"Requires-Dist: torch>=2.11" in archive.read(metadata)
    assert "phloem/kernels/_cpu.abi3.so" in names
    assert any(name.startswith("phloem/server/playground/") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/")) or name.endswith((".cpp", ".pyc"))]


def test_it_serves_where_nothing_of_the_source_tree_is(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    place = next(home.glob("lib/python*/site-packages"))
    # What it depends on is lent by this environment; `.pth` files in it are not followed, so the wheel's code is found.
    (place / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ask = "import json, phloem; from phloem.kernels.native import runtime as rt; "
    ask += "print(json.dumps([phloem.__file__, rt().library.levels()]))"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    file, levels = json.loads(told)
    assert Path(file).is_relative_to(home)
    assert levels[0] == "portable"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    server = Server(tiny_checkpoint("llama", tmp_path / "model")).wait_ready()
    try:
        answer = server.generate("hello")
        assert answer.status_code == 200, answer.text
        assert answer.json()["meta_info"]["completion_tokens"] == 4
        assert not [line for line in server.lines if "reference ops" in line]
    finally:
        server.close()
