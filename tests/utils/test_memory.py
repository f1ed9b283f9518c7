"""Memory given back to the system: the allocator's, and when an engine that has nothing to do asks for it."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phloem.core.messages import Heartbeat
from phloem.launch.rest import REST, Resting
from phloem.utils import memory


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_rests_once_for_each_time_without_work(clock: Clock) -> None:
    calls: list[float] = []
    resting = Resting(lambda: calls.append(clock.now), clock)

    def pass_time(seconds: int, step: int, busy: float = 0.0) -> int:
        for _ in range(seconds):
            clock.now += 1.0
            resting(Heartbeat(step=step, busy_seconds=busy))
        return len(calls)

    assert pass_time(2, 0) == 0
    assert pass_time(20, 0) == 1 and calls[0] - 100 <= REST + 2
    assert pass_time(1, 7) == 1  # work, and then not yet long enough without
    assert pass_time(2, 7) == 1
    assert pass_time(20, 7) == 2
    assert pass_time(1, 8) == 2
    assert pass_time(20, 8, busy=1.0) == 2  # one long step is no rest
    for step in range(9, 40):
        assert pass_time(1, step) == 2


def test_trimming_leaves_what_is_in_use() -> None:
    blocks = [bytearray(b"x" * 200_000) for _ in range(50)]
    del blocks[::2]
    memory.trim()
    assert all(block == b"x" * 200_000 for block in blocks)


@pytest.mark.parametrize("nbytes", [1, 4096, memory.HUGE - 1, memory.HUGE, memory.HUGE + 1, 5 * memory.HUGE + 12345])
def test_zeros_are_whole_and_writable(nbytes: int) -> None:
    block = memory.zeros(nbytes)
    assert block.nbytes == nbytes and not block.any() and block.ctypes.data % 64 == 0
    block[-1] = block[0] = 7
    assert block[-1] == block[0] == 7


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_the_rest_behind_whole_huge_pages_costs_what_it_is() -> None:
    block = memory.zeros(3 * memory.HUGE + 100_000)
    before = resident(block)
    block[:] = 1
    assert 3 * memory.HUGE < resident(block) - before < 3 * memory.HUGE + 2 * 100_000


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_libraries_are_released_and_work_as_before() -> None:
    # In a process of its own: where this one has not loaded everything yet is no matter then.
    code = """
import pathlib, re, sqlite3, ssl, threading
import numpy as np
from phloem.utils import memory

def clean(pattern):
    found = re.findall(r"r-[-x]p .*" + pattern + r".*\\n(?:\\w+: .*\\n)*?Rss: +(\\d+)", SMAPS.read_text())
    return sum(map(int, found))

SMAPS = pathlib.Path("/proc/self/smaps")
started = threading.Event()
threading.Thread(target=lambda: (started.set(), threading.Event().wait()), daemon=True).start()
started.wait()
x = np.arange(64.0).reshape(8, 8)
want, before = np.linalg.eigvals(x @ x), clean("multiarray")
released = memory.release_libraries()
after = clean("multiarray")
assert released > 4 << 20 and 0 <= after < before / 2, (released, before, after)
assert np.array_equal(np.linalg.eigvals(x @ x), want)
assert sqlite3.connect(":memory:").execute("select 6 * 7").fetchone() == (42,)
ssl.create_default_context()
assert memory.release_libraries() < released
print("as before")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "as before\n", done.stderr


def test_what_a_process_has_written_to_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, given = "", []
    cases = [
        ("r-xp", "/usr/lib/libx.so.6", 40, 0, 0),
        ("r--p", "/usr/lib/libx.so.6", 8, 4, 0),  # relocated
        ("r--p", "/usr/lib/liby.so", 8, 0, 4),  # relocated and swapped out
        ("rw-p", "/usr/lib/libx.so.6", 8, 0, 0),
        ("r--p", "/models/model.gguf", 8, 0, 0),
        ("r--s", "/usr/lib/libz.so", 8, 0, 0),
        ("r-xp", "/usr/lib/libz.so", 0, 0, 0),
        ("r-xp", "", 8, 0, 0),
        ("r--p", "/usr/bin/python3.12", 16, 0, 0),
    ]
    for number, (rights, path, rss, anonymous, swap) in enumerate(cases, 1):
        text += f"{number}000-{number}800 {rights} 00000000 fd:00 77 {path:>40}\n"
        text += f"Rss: {rss:12} kB\nPss: 1 kB\nAnonymous: {anonymous:6} kB\nSwap: {swap:11} kB\nVmFlags: rd mr\n"
    (tmp_path / "smaps").write_text(text)

    class Library:
        def madvise(self, start: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
            given.append((start.value, size.value, advice))
            return 0

    monkeypatch.setattr(memory, "_libc", Library)
    assert memory.release_libraries(tmp_path / "smaps") == 56 << 10
    assert given == [(0x1000, 0x800, mmap.MADV_DONTNEED), (0x9000, 0x800, mmap.MADV_DONTNEED)]
    assert memory.release_libraries(tmp_path / "none") == 0


def resident(block: memory.Bytes) -> int:
    """Bytes with memory of the mappings that hold a block (which may hold more)."""
    start, end = block.ctypes.data, block.ctypes.data + block.nbytes
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            inside = int(head[1], 16) < end and int(head[2], 16) > start
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_are_kept_for_the_next_ones() -> None:
    """In a process of its own: the second round of the same large blocks takes no page faults."""
    code = (
        "import ctypes, resource\nfrom phloem.utils import memory\nassert memory.keep_freed()\n"
        "libc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(4):\n"
        "        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(20 << 20)))\n"
        "        libc.memset(block, 1, ctypes.c_size_t(20 << 20)); libc.free(block)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(faults())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000, done.stdout  # 4 * 20 MiB are 20,480 pages
