"""What killed processes leave in memory and on disk goes at the next start; what anybody still uses stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from phloem.launch.child import meeting_place
from phloem.utils import leftovers

MAKES = """
import os, signal, sys, tempfile
from phloem.utils.leftovers import prefix
place = sys.argv[1]
print(tempfile.mkdtemp(prefix=prefix("ranks"), dir=place), flush=True)
print(tempfile.mkstemp(prefix=prefix("weights"), dir=place)[1], flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for processes")
def test_what_a_killed_process_has_left_goes_and_what_is_used_stays(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MAKES, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        made = [[Path(process.stdout.readline().strip()) for _ in range(2)] for process in started if process.stdout]
        (made[0][0] / "told").write_bytes(b"x")
        leftovers.sweep(tmp_path)
        assert all(path.exists() for paths in made for path in paths)
        started[0].send_signal(signal.SIGKILL)
        started[0].wait(20)
        leftovers.sweep(tmp_path)
        assert [[path.exists() for path in paths] for paths in made] == [[False, False], [True, True]]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_another_process_of_the_same_number_is_another_owner(tmp_path: Path) -> None:
    pid, began, space = leftovers.prefix("films").removeprefix("phloem-films-").rstrip("-").split(".")
    mine, other = (tmp_path / f"phloem-films-{pid}.{at}.{space}-x" for at in (began, int(began) + 1))
    foreign = [tmp_path / f"phloem-ranks-{name}x" for name in ("abc", f"4999999.1.{int(space) + 1}-")]
    for path in (mine, other, *foreign):
        path.mkdir()
    leftovers.sweep(tmp_path)
    assert (mine.exists(), other.exists()) == (True, sys.platform != "linux")
    assert all(path.exists() for path in foreign), "who cannot be looked at may live"
    old = time.time() - 2 * leftovers.OLD_SECONDS
    for path in foreign:
        os.utime(path, (old, old))
    leftovers.sweep(tmp_path)
    assert not any(path.exists() for path in foreign)


def test_what_another_user_has_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "phloem-ranks-1.1.1-x", tmp_path / "phloem-ranks-1.1.1-y"
    path.mkdir()
    link.symlink_to(path)
    os.utime(path, (1, 1))
    os.utime(link, (1, 1), follow_symlinks=False)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    leftovers.sweep(tmp_path)
    assert path.exists()
    monkeypatch.undo()
    leftovers.sweep(tmp_path)
    assert not path.exists() and link.is_symlink()


def test_where_ranks_meet_is_named_after_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = tmp_path / f"phloem-ranks-4999999.1.{leftovers._namespace()}-x"  # no process has so large a number
    gone.mkdir()
    place = meeting_place()
    assert place.parent == tmp_path and place.name.startswith(leftovers.prefix("ranks"))
    assert gone.exists() == (sys.platform != "linux")
