"""`phloem bench footprint`: reading /proc, what counts once, and how full the pool gets."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from phloem.bench import footprint
from phloem.bench._text import Texts
from phloem.core.errors import BadRequest
from phloem.testing.byte_tokenizer import ByteTokenizer
from phloem.testing.checkpoints import tiny_checkpoint

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SMAPS = """\
00400000-00500000 r-xp 00000000 fe:00 1234                               /lib/torch/lib/libtorch_cpu.so
Size:               1024 kB
Rss:                 100 kB
Pss:                  50 kB
Pss_Dirty:            10 kB
00500000-00600000 rw-p 00000000 fe:00 1234                               /lib/torch/lib/libtorch_cpu.so
Rss:                  20 kB
Pss:                  20 kB
7f0000000000-7f0000100000 rw-p 00000000 00:00 0\x20
Rss:                 300 kB
Pss:                 300 kB
7f0000200000-7f0000300000 rw-p 00000000 00:00 0                          [heap]
Rss:                   7 kB
Pss:                   7 kB
7f0000400000-7f0000500000 r--s 00000000 fe:00 99                         /models/a model.gguf
Rss:                  40 kB
Pss:                  20 kB
"""


def test_mappings_are_summed_by_path() -> None:
    assert footprint.mappings(SMAPS) == {
        "/lib/torch/lib/libtorch_cpu.so": (120 * 1024, 70 * 1024),
        "": (300 * 1024, 300 * 1024),
        "[heap]": (7 * 1024, 7 * 1024),
        "/models/a model.gguf": (40 * 1024, 20 * 1024),
    }


def test_a_file_that_two_processes_map_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SMAPS.replace("Rss:                 100 kB", "Rss:                 140 kB")
    texts = {"/proc/1/smaps": SMAPS, "/proc/2/smaps": other}
    monkeypatch.setattr(Path, "read_text", lambda self: texts[str(self)])
    monkeypatch.setattr(footprint, "_name", str)
    found = footprint.memory_of([1, 2])
    assert found["rss"] == (467 + 507) * 1024 and found["pss"] == 2 * 397 * 1024
    assert found["parts"] == {
        "anonymous": 600 * 1024,
        "torch's libraries": 160 * 1024,
        "model file": 40 * 1024,
        "heap": 14 * 1024,
    }
    assert found["resident"] == 814 * 1024
    assert [process["rss"] for process in found["processes"]] == [467 * 1024, 507 * 1024]


@linux
def test_this_process() -> None:
    block = bytearray(os.urandom(1 << 20)) * 32
    found = footprint.memory_of([os.getpid()])
    assert len(block) < found["parts"]["anonymous"] + found["parts"].get("heap", 0) < found["resident"] <= found["rss"]
    before = footprint.processor_seconds([os.getpid()])
    begun = time.process_time()
    while time.process_time() - begun < 0.1:
        pass
    assert 0.05 < footprint.processor_seconds([os.getpid()]) - before < 5
    assert footprint.family(os.getpid())[0] == os.getpid()


@linux
def test_threads_that_ended_keep_their_time() -> None:
    def work() -> None:
        begun = time.thread_time()
        while time.thread_time() - begun < 0.1:
            pass

    thread = threading.Thread(target=work)
    before = footprint.processor_seconds([os.getpid()])
    thread.start()
    thread.join()
    assert footprint.processor_seconds([os.getpid()]) - before >= 0.07


def test_filling_prompts_are_together_more_than_the_pool() -> None:
    load = footprint.filling(Texts(ByteTokenizer(), 1), 9000)
    lengths = [len(ByteTokenizer().encode(session.turns[0].text)) for session in load.sessions]
    assert sum(lengths) > 9000 and len({session.turns[0].text for session in load.sessions}) == len(load.sessions)


def test_refuses_senseless_sizes() -> None:
    for flags in (["--kv-tokens", "100"], ["--idle", "0"]):
        with pytest.raises(BadRequest, match=flags[0]):
            footprint.main(flags)


@linux
@pytest.mark.slow
def test_a_server_from_start_to_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model", max_position_embeddings=4096)
    flags = ["--model", str(model), "--kv-tokens", "12288", "--idle", "1"]
    assert footprint.main([*flags, "--limit-gb", "0.01", "--output", str(tmp_path / "footprint.jsonl")]) == 1
    assert "KV pool full" in capsys.readouterr().out
    assert len((tmp_path / "footprint.jsonl").read_text().splitlines()) == 5
