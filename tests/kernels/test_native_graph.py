"""Recording and replay, the thread pool, and the count of cores."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from native_support import built

from phloem.kernels import native
from phloem.kernels._native_recorder import ALIGN, SLAB, Arena, Space
from phloem.kernels.graph import RecordError, check_replay
from phloem.kernels.ops import Ops
from phloem.platforms.cpu import Platform
from phloem.utils.cores import available_cores, cgroup_quota

pytestmark = pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")


@pytest.fixture(params=[1, 2])
def ops(request: pytest.FixtureRequest) -> Ops:
    return native.table(request.param)


def step(ops: Ops, x: torch.Tensor, weight: torch.Tensor, layers: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    residual = x
    for _ in range(layers):
        h, residual = ops.add_rms_norm(x, residual, weight, 1e-5)
        x = ops.silu_and_mul(ops.add(h, residual).view(len(x), 2, -1).flatten(1))
        x = ops.add(x.view(-1).view(len(h), -1), h[:, : h.shape[1] // 2])
        x = ops.add(residual, torch.broadcast_to(h, residual.shape))
        residual = ops.softcap(residual, 20.0)
    return x, residual


@pytest.mark.parametrize("rows", [1, 40])
def test_replay_equals_eager_bit_for_bit(ops: Ops, rows: int) -> None:
    x, weight = torch.randn(rows, 640), torch.rand(640)
    assert ops.recorder is not None
    graph, results = ops.recorder().record(lambda: step(ops, x, weight))
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        check_replay(graph, results, lambda: step(ops, x, weight))
    # Five layers of six ops live in the buffers of one layer: dead ones are used again.
    assert graph.bytes <= 9 * rows * 640 * 4
    timed = graph.replay_timed()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(timed) == 30 and timed[0][0] == "add_rms_norm" and timed[0][1] == (rows == 1)


def test_steps_of_one_recorder_share_their_buffers(ops: Ops) -> None:
    assert ops.recorder is not None
    recorder, weight = ops.recorder(), torch.rand(640)
    x = {rows: torch.randn(rows, 640) for rows in (40, 8, 60)}
    made = {rows: recorder.record(lambda rows=rows: step(ops, x[rows], weight)) for rows in x}
    large, small, larger = (made[rows][0].bytes for rows in x)
    assert small == 0 and 0 < larger < large  # only what is beyond the largest before it
    for rows in (40, 60, 8, 40):
        check_replay(*made[rows], lambda rows=rows: step(ops, x[rows], weight))
    other, results = ops.recorder().record(lambda: step(ops, x[8], weight))
    made[8][0].replay()
    check_replay(other, results, lambda: step(ops, x[8], weight))


def test_buffers_that_died_join_to_larger_ones() -> None:
    space = Space()
    arena = Arena(space)

    def take(kib: int) -> torch.Tensor:
        return arena.empty((kib, 256), torch.float32)

    a, b, c, d = (take(kib) for kib in (4, 2, 8, 1))
    first, last = a.data_ptr(), d.data_ptr()
    assert first % ALIGN == 0 and arena.bytes == 15 << 10
    del a, c
    assert take(8).data_ptr() == first + (6 << 10) and take(3).data_ptr() == first
    del b
    assert take(6).data_ptr() == first  # what lies before and behind the gap was free
    del d
    assert take(9).data_ptr() == first and arena.bytes == 15 << 10
    e = take(20)
    assert e.data_ptr() == first and arena.bytes == 20 << 10 and last > first
    whole = arena.empty((SLAB + 1,), torch.uint8)  # larger than a slab: one of its own
    assert len(space.slabs) == 2 and whole.numel() == SLAB + 1
    assert Arena(space).empty((8,), torch.float32).data_ptr() == first  # another recording begins anew


def test_check_replay_sees_a_difference(ops: Ops) -> None:
    x = torch.randn(2, 8)
    assert ops.recorder is not None
    graph, result = ops.recorder().record(lambda: ops.add(x, x))
    with pytest.raises(RecordError, match="result 0"):
        check_replay(graph, [result], lambda: [ops.add(x, x) + 1])


@pytest.mark.parametrize(
    "bad", [lambda ops, x: x + 1, lambda ops, x: x.t().contiguous(), lambda ops, x: x.sum().item()]
)
def test_a_step_with_torch_arithmetic_is_refused(ops: Ops, bad) -> None:
    x = torch.randn(3, 8)
    assert ops.recorder is not None
    recorder = ops.recorder()
    with pytest.raises(RecordError, match="torch's aten"):
        recorder.record(lambda: bad(ops, ops.add(x, x)))
    graph, result = recorder.record(lambda: ops.add(x, x))  # and the recorder is usable again
    x.fill_(2)
    graph.replay()
    assert (result == 4).all()


def test_one_recording_at_a_time(ops: Ops) -> None:
    assert ops.recorder is not None
    recorder = ops.recorder()
    with pytest.raises(RecordError, match="already"):
        recorder.record(lambda: recorder.record(lambda: None))


def test_another_thread_computes_undisturbed_while_a_step_is_recorded(ops: Ops) -> None:
    x, seen = torch.randn(4, 64), []

    def step() -> torch.Tensor:
        other = threading.Thread(target=lambda: seen.append(ops.add(x, x)))
        other.start()
        other.join()
        return ops.add(x, x)

    assert ops.recorder is not None
    graph, _ = ops.recorder().record(step)
    assert len(graph.replay_timed()) == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(seen[0], x + x)


def test_many_python_threads_share_the_pool() -> None:
    ops = native.table(2)
    x = torch.randn(64, 1024)
    want, wrong = ops.add(x, x), []

    def work() -> None:
        wrong.extend(1 for _ in range(200) if not torch.equal(ops.add(x, x), want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_pool_changes_size_and_sleeps_when_idle() -> None:
    x = torch.randn(256, 1024)
    for threads in (3, 1, 4, 2):
        ops = native.table(threads)
        assert native.runtime().library.threads() == threads
        assert torch.equal(ops.add(x, x), x + x)
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02
    with pytest.raises(ValueError, match="threads"):
        native.runtime().library.set_threads(0)


def test_the_workers_are_known_to_the_system() -> None:
    for threads in (1, 3, 2):
        native.table(threads)
        ids = native.worker_ids()
        assert len(set(ids)) == threads - 1 and threading.get_native_id() not in ids
        assert all(Path(f"/proc/self/task/{thread}").exists() for thread in ids)


@pytest.mark.skipif(available_cores() < 2 or not hasattr(os, "sched_getaffinity"), reason="one core")
def test_the_thread_that_runs_the_steps_and_its_workers_share_no_core() -> None:
    platform = Platform(available_cores())
    platform.table("native")
    mine = os.sched_getaffinity(0)
    found: list[set[int]] = []

    def steps() -> None:
        platform.begin_steps()
        found.extend(os.sched_getaffinity(thread) for thread in (0, *native.worker_ids()))

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join(20)
    native.table(1)  # ends the bound workers
    assert len(found) == available_cores() and sum(map(len, found)) == len(set().union(*found))
    assert os.sched_getaffinity(0) == mine


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    ops = native.table(2)
    x = torch.randn(256, 1024)
    want = ops.add(x, x)
    child = os.fork()
    if child == 0:
        # numpy compares: torch's own threads, which other tests have started, do not survive a fork.
        os._exit(0 if np.array_equal(ops.add(x, x).numpy(), want.numpy()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calls_check_their_arguments() -> None:
    rt = native.runtime()
    handle = rt.op("add")
    with pytest.raises(TypeError, match="add takes 8 arguments by name, not 0"):
        rt.call(handle, 1)
    with pytest.raises(TypeError, match="takes its arguments by name"):
        rt.call(handle, 1, *range(8))
    with pytest.raises(IndexError):
        rt.call(99999, 1, x=0)
    with pytest.raises(KeyError, match="no native op"):
        rt.op("nothing")
    with pytest.raises(ValueError, match="cannot run level"):
        rt.library.set_level("sparc")


def test_quota_of_a_cgroup(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert cgroup_quota(membership, tmp_path) is None
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota(membership, tmp_path) == 1.5
    legacy = tmp_path / "cpu" / "c"
    legacy.mkdir(parents=True)
    (legacy / "cpu.cfs_quota_us").write_text("50000")
    (legacy / "cpu.cfs_period_us").write_text("100000")
    membership.write_text("3:cpu,cpuacct:/c\n2:memory:/c\n")
    assert cgroup_quota(membership, tmp_path) == 0.5
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
