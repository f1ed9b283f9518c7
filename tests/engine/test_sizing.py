"""The KV pool by a measured step: a platform with memory of its own, pretended over the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phloem import platforms
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.core.memory import Group, MemorySpec, Paged, State, groups_of
from phloem.core.resolve import GIB, Decision
from phloem.engine import worker
from phloem.engine.choices import sizing
from phloem.engine.choices.shares import Load, Shares, running_pages, shares
from phloem.engine.choices.sizing import step_shapes
from phloem.kernels.ops import Ops
from phloem.kvcache.pool import KVPool
from phloem.platforms import _measure, cpu
from phloem.testing.checkpoints import tiny_checkpoint

MIB = 2**20


class Board(cpu.Platform):
    """A device of 1 GiB; the largest step takes 100 MiB of it."""

    name = "board"
    default_chunk, default_running_requests = 96, 5

    def __init__(self, total: int = GIB, peak: int = 100 * MIB) -> None:
        super().__init__(1)
        self.total, self.peak = total, peak
        self.free = total - 200 * MIB  # somebody else has something
        self.measured = 0

    def memory(self) -> tuple[int, int]:
        return self.free, self.total

    def reserve(self) -> int:
        return 50 * MIB

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        return Ops(), "plain"

    def attention_backends(self) -> list[str]:
        return ["reference"]

    def measure(self, work: Callable[[], None]) -> int:  # type: ignore[override]
        self.measured += 1
        work()
        return self.peak


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def build(tiny: Path, board: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> worker.Built:
    chosen = board, Decision("device", "board", "a test")
    monkeypatch.setattr(platforms, "choose", lambda device, threads, compiles: chosen)
    config = Config.from_flat({"model_path": str(tiny), "dtype": "float32", **settings})
    built = worker.build(config, describe(str(tiny)), lambda phase, seconds: None)
    built.runner.close()
    return built


def decision(built: worker.Built, name: str) -> Decision:
    return next(item for item in built.decisions if item.name == name)


def test_the_pool_gets_what_the_measured_step_leaves(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    forward = sizing.run_forward

    def spy(model: Any, backend: Any, pool: Any, inputs: Any, index: Any) -> Any:
        assert int(inputs.rows()[0].page_table.max()) == 0 and pool.num_pages == (2,)
        steps.append((len(inputs.input_ids), len(inputs.logit_index)))
        return forward(model, backend, pool, inputs, index)

    monkeypatch.setattr(sizing, "run_forward", spy)
    board = Board()
    built = build(tiny, board, monkeypatch)
    each = built.info["kv_bytes_per_token"]
    assert steps == [(96, 5), (96, 1)] and board.measured == 1
    rest = board.free - 100 * MIB - 50 * MIB
    assert built.max_total_tokens == (rest // each - 16) // 16 * 16
    assert built.runner.num_pages == (built.max_total_tokens // 16 + 1,)
    assert built.runner.pool.nbytes <= rest
    memory = decision(built, "memory")
    assert memory.value == "1.0 GiB"
    for part in ("weights", "activations 0.10 GiB (steps of 96 tokens, 5 rows)", "graphs up to 0.00", "reserve 0.05"):
        assert part in memory.reason
    assert f"({built.max_total_tokens} tokens of {each} bytes)" in memory.reason


def test_a_limit_of_the_user_wins(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(tiny, Board(), monkeypatch, max_total_tokens=320).max_total_tokens == 320


def test_too_little_for_one_request_is_a_clear_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    board.free = 150 * MIB + 100_000
    with pytest.raises(ConfigError, match=r"one request of context_length 512 needs .* set context_length to at most"):
        build(tiny, board, monkeypatch)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried 3 GiB\nadvice"), MemoryError()])
def test_a_largest_step_that_does_not_fit_is_a_clear_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(sizing, "run_forward", fail)
    with pytest.raises(ConfigError, match=r"steps of 96 tokens, 5 rows do not fit .*: lower chunked_prefill_size"):
        build(tiny, Board(), monkeypatch)


def test_on_a_cpu_nothing_is_run_and_the_form_is_the_same(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "run_forward", lambda *args: pytest.fail("a step was run"))
    built = build(tiny, cpu.Platform(1), monkeypatch, kv_memory="8MiB")
    told = decision(built, "memory").reason
    assert told.startswith("weights 0.00 GiB, KV 0.01 GiB (") and "not measured" in told


@pytest.mark.parametrize(
    ("chunk", "running", "context", "expected"),
    [
        (10, 4, 100, [[3, 3, 2, 2], [10]]),
        (3, 8, 100, [[1, 1, 1], [3]]),
        (100, 2, 30, [[30, 30], [30]]),
    ],
)
def test_step_shapes(chunk: int, running: int, context: int, expected: list[list[int]]) -> None:
    assert step_shapes(chunk, running, context) == expected


def test_the_peak_is_read_between_two_empty_caches() -> None:
    class Api:
        calls: list[str] = []
        reserved, peak = 1000, 5000

        def __getattr__(self, name: str) -> Any:
            return lambda *device: self.calls.append(name)

        def memory_reserved(self, device: Any) -> int:
            return self.reserved

        def max_memory_reserved(self, device: Any) -> int:
            return self.peak

    api = Api()
    assert _measure.peak_of(api, torch.device("cpu"), lambda: api.calls.append("work")) == 4000
    assert api.calls == [
        *("synchronize", "empty_cache", "reset_peak_memory_stats", "work", "synchronize", "empty_cache"),
    ]


LOAD = Load(running=4, chunk=64, context=4096)
HYBRID: list[MemorySpec] = [
    Paged(2, 16, 16),
    Paged(2, 16, 16, window=128),
    Paged(2, 16, 16, window=128),
    State((((4, 8, 8), "float32"),)),
]


def ways(memory: list[MemorySpec], load: Load = LOAD) -> list[Shares]:
    return shares(memory, groups_of(memory), torch.bfloat16, 16, load)


def test_one_group_is_divided_as_it_ever_was() -> None:
    (way,) = ways([Paged(2, 16, 16), Paged(1, 8, 8)])
    assert way.fixed_bytes == 0 and way.bytes_per_token == (2 * 32 + 16) * 2
    assert way.num_pages(1600) == (101,) and not way.decisions(1600)


@pytest.mark.parametrize("tokens", [1600, 16_000, 160_000])
def test_no_division_takes_more_bytes_than_it_says(tokens: int) -> None:
    for way in ways(HYBRID):
        counts = way.num_pages(tokens)
        pool = KVPool(HYBRID, counts, 16, torch.bfloat16, torch.device("cpu"))
        scratch = sum(way.unit_bytes)
        assert pool.nbytes - scratch <= way.fixed_bytes + tokens * way.bytes_per_token


def test_windows_and_states_suffice_for_all_that_runs() -> None:
    capped, whole = ways(HYBRID)[1], ways(HYBRID)[0]
    full, window, states = whole.num_pages(160_000)
    assert full == 10_001 and states - 1 >= 3 * 4
    # Each row has its window and the chunk of a step; two steps may be in flight.
    assert window - 1 >= running_pages(Group("pages", 128, ()), 16, LOAD) + 10_000 // 4
    assert running_pages(Group("pages", 128, ()), 16, LOAD) * 16 >= 4 * (127 + 16) + 2 * 64
    assert capped.num_pages(160_000)[1] == full
    assert whole.num_pages(320)[1] <= whole.num_pages(320)[0]


def test_every_group_says_what_it_got_and_why() -> None:
    told = {decision.name: decision for decision in ways(HYBRID)[0].decisions(160_000)}
    assert set(told) == {"window_128", "states"}
    assert "2 layers" in told["window_128"].reason and "1 cached for each 4" in told["window_128"].reason
    # 4 x 8 x 8 float32 numbers are as much as 8 tokens of the layer that keeps all.
    assert "8 that requests write" in told["states"].reason and "memory of 8 tokens" in told["states"].reason
    assert "as many as of the rest" in ways(HYBRID)[1].decisions(1600)[0].reason


def test_a_model_of_states_alone_gets_slots_for_all_that_runs_and_as_many_snapshots() -> None:
    (way,) = ways([HYBRID[3]])
    assert way.num_pages(10_000) == (17,) and way.bytes_per_token == 1
    assert way.decisions(10_000)[0].reason.startswith("slots")


def test_windows_make_room_for_more_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = tiny_checkpoint("gemma3", tmp_path / "gemma3")
    board = Board()
    settings = {"max_running_requests": 2, "chunked_prefill_size": 32, "page_size": 4}
    built = build(gemma, board, monkeypatch, **settings)
    pool = built.runner.pool
    full, window = pool.num_pages
    assert built.max_total_tokens == (full - 1) * 4 and window < full / 2
    assert pool.nbytes <= board.free - 150 * MIB + sum(pool.nbytes // count for count in pool.num_pages)
    assert "for what runs" in next(item for item in built.decisions if item.name.startswith("window_")).reason
