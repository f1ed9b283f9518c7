"""torch as the engine's process imports it: what is left out comes when somebody wants it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phloem.launch import lean

# A package that is built as torch is: METAS last, with PARTS behind it; `diffusers` uses it.
STAND_IN = {
    "torch/__init__.py": "import inspect\nWHERE = inspect.getframeinfo(inspect.currentframe())\n"
    "for module in list(__import__('sys').modules.values()): hasattr(module, '__file__')\n"
    "from torch import _meta_registrations\n",
    "torch/_meta_registrations.py": "import torch._decomp\nREAL = True\n",
    "torch/_decomp.py": "import torch._meta_registrations\ntorch.times = [*vars(torch).get('times', []), 1]\n",
    "torch/eager.py": "from torch._meta_registrations import REAL\n",
    "diffusers.py": "import sys\nREADY = hasattr(sys.modules.get('torch._meta_registrations'), 'REAL')\n",
}
BEGIN = "import sys; sys.path.insert(0, {folder!r})\nfrom phloem.launch import lean\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in STAND_IN.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def said(code: str, folder: Path) -> list[str]:
    found = subprocess.run(
        [sys.executable, "-c", BEGIN.format(folder=str(folder)) + code], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def test_it_is_left_out_and_comes_before_who_uses_it(folder: Path) -> None:
    code = """
with lean.imports():
    import torch
print(lean.METAS in sys.modules, hasattr(torch, "_meta_registrations"), torch.WHERE.lineno, torch.WHERE.code_context)
import diffusers
print(diffusers.READY, torch._meta_registrations.REAL)
"""
    assert said(code, folder) == ["False", "False", "2", "None", "True", "True"]


def test_a_part_is_loaded_once_and_behind_it(folder: Path) -> None:
    code = """
with lean.imports():
    import torch
from torch import _decomp
print(torch._meta_registrations.REAL, _decomp is sys.modules["torch._decomp"], len(torch.times))
print(_decomp.__spec__.origin == _decomp.__file__)
"""
    assert said(code, folder) == ["True", "True", "1", "True"]


@pytest.mark.parametrize("wanted", ["import torch.eager", "import torch._decomp"])
def test_who_wants_it_meanwhile_gets_it(wanted: str, folder: Path) -> None:
    code = f"""
with lean.imports():
    import torch
    {wanted}
print(torch._meta_registrations.REAL, sys.modules[lean.METAS] is torch._meta_registrations)
"""
    assert said(code, folder) == ["True", "True"]


def test_a_process_that_has_torch_keeps_it_as_it_is() -> None:
    import torch

    before = sys.modules[lean.METAS]
    with lean.imports():
        assert sys.modules[lean.METAS] is before
    assert torch._meta_registrations is before and not any(isinstance(each, lean._Ahead) for each in sys.meta_path)


@pytest.mark.slow
def test_torch_itself(tmp_path: Path) -> None:
    code = """
with lean.imports():
    import torch
print(lean.METAS in sys.modules, (torch.ones(2) + 1).sum().item())
compiled = torch.compile(lambda x: x * 2, backend="eager")
print(compiled(torch.ones(1)).item(), lean.METAS in sys.modules)
from torch._refs import fft
ids = torch.zeros(2, dtype=torch.long, device="meta")
import torch._meta_registrations
print(torch.ones(3, device="meta").index_select(0, ids).numel())
"""
    assert said(code, tmp_path) == ["False", "4.0", "2.0", "True", "2"]
