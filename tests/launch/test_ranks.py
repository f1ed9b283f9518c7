"""Several ranks under one scheduler: by threads what they answer, by processes how they start, serve and end."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loads import answers, load
from native_support import built
from served import Server, check_folders_gone, eventually, gone, ranks_of, shared_folders
from share_support import SIZES, ThreadRanks, checkpoint, planned

from phloem import Engine
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError, EngineDead, ModelLoadError
from phloem.distributed.comm import Threads
from phloem.distributed.shm import SharedMemory
from phloem.engine.ranks.parallel import Chosen, Go, Plan
from phloem.engine.ranks.stages import Together
from phloem.engine.recorded import choice
from phloem.launch.child import Child, watch
from phloem.launch.core import EngineCore
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.utils.leftovers import sweep

SMALL: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048, "log_level": "warning"}
DRAFTS: dict[str, Any] = {"speculative_algorithm": "suffix", "disable_speculative_adaptive": True}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")


@pytest.mark.some(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {"tp_size": 2}),
        ("qwen3_next", {"tp_size": 2, "ep_size": 2}),
        ("gemma3_text", {"tp_size": 4}),
        ("llama", {"pp_size": 2}),
        ("qwen3_next", {"pp_size": 2, "tp_size": 2}),
        ("deepseek_v3", {"pp_size": 2, "tp_size": 2, "ep_size": 2}),
        ("llama", {"tp_size": 2, "attn_dp_size": 2}),
        ("qwen3_moe", {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2}),
        ("deepseek_v3", {"tp_size": 4, "attn_dp_size": 2, "ep_size": 2}),
        ("llama", {"tp_size": 2, **DRAFTS}),
        ("qwen3_moe", {"tp_size": 2, "ep_size": 2, **DRAFTS}),
        ("gemma3_text", {"tp_size": 2, **DRAFTS, "speculative_algorithm": "ngram"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{key[:2]}{size}" for key, size in value.items()),
)
def test_ranks_answer_as_one_does(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """With prefix hits, chunks, preemption, grammars, penalties and log probabilities."""
    path = str(checkpoint(name, tmp_path))
    options: dict[str, Any] = {
        "model_path": path, "dtype": "float32", "ops": "reference", "max_total_tokens": 160, "page_size": 8,
        "context_length": 128, "chunked_prefill_size": 16, "max_running_requests": 4, "debug_invariants": True,
        "random_seed": 1, "threads": 1,
    }  # fmt: skip
    one = EngineCore(Config.from_flat(options), describe(path), lambda message: None)
    try:
        expected = answers(one, load())
    finally:
        one.close()
    config = Config.from_flat({**options, **sizes})
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        found = answers(core, load())
        assert core.scheduler.cache.most_pages == one.scheduler.cache.total_pages
    finally:
        core.close()
    for key, (tokens, values, _) in expected.items():
        assert found[key][0] == tokens and len(tokens) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
    assert expected["q1"][1]
    said = [type(told) for told in ranks.told]
    assert said.count(Plan) >= said.count(Go) > 20
    kinds = {told.kind for told in ranks.told if isinstance(told, Chosen)}
    assert kinds | {told.head for told in ranks.told if isinstance(told, Go)} - {""} == {"logits", "greedy"}
    apart = sum(count > 1 for name, count in sizes.items() if name in ("pp_size", "attn_dp_size"))
    assert apart or said.count(Chosen) < said.count(Go) / 2, "most heads need no word of their own"
    decisions = {name: (value, why) for name, value, why in core.info["decisions"]}
    assert decisions["tp_size"][0] == sizes.get("tp_size", 1)
    verified = sum(int((batch.outputs > 1).any()) for batch in planned(ranks.told))
    assert verified > 1 if "speculative_algorithm" in sizes else not verified
    assert any("p_size" in why for name, (_, why) in decisions.items() if "graph" in name), decisions


@pytest.mark.slow
@pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")
def test_stages_have_the_bits_of_one_rank_where_those_are_promised(tmp_path: Path) -> None:
    path = str(tiny_checkpoint("llama", tmp_path, num_hidden_layers=4))
    options: dict[str, Any] = {
        "model_path": path, "enable_deterministic_inference": True, "max_total_tokens": 320, "page_size": 16,
        "context_length": 128, "chunked_prefill_size": 16, "max_running_requests": 4, "random_seed": 1, "threads": 1,
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for size in (1, 2):
        config = Config.from_flat({**options, "pp_size": size})
        ranks = None if size == 1 else ThreadRanks(config, describe(path))
        core = EngineCore(config, describe(path), lambda message: None, ranks)
        asked = load()
        for submit in asked:
            submit.return_logprob, submit.logprob_start = True, 0
        try:
            found.append(answers(core, asked))
        finally:
            core.close()
    assert found[0] == found[1] and len(found[0]["q1"][1]) > 5 and len(found[0]["q1"][2]) > 5


@pytest.mark.slow
@pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")
@pytest.mark.parametrize(
    ("name", "size", "which"),
    [("llama", 2, "all"), ("llama", 2, "rank 0"), ("qwen3_moe", 4, "all"), ("qwen3", 2, "all")],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_recorded_steps_of_ranks_answer_as_one_rank_does(
    name: str, size: int, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefills, mixed and decode steps, by ranks in threads that meet as processes do; whether the others' steps are
    recorded too is their own matter."""
    monkeypatch.setattr(Threads, "group", partial(shared_memory, tmp_path))
    made, choose, only = list[Any](), choice.among_ranks, threading.Lock()

    def among(config: Config, whole: Any, *rest: Any) -> Any:
        found = choose(config, whole, *rest)
        if found is None or (which != "all" and whole.comm.rank):
            return None
        record = found.graphs._make

        def one_at_a_time(tokens: int) -> Any:
            with only:  # of one process
                return record(tokens)

        found.graphs._make = one_at_a_time
        made.append(found)
        return found

    monkeypatch.setattr(choice, "among_ranks", among)
    path = str(checkpoint(name, tmp_path / "model"))
    options: dict[str, Any] = {
        "model_path": path, "dtype": "float32", "max_total_tokens": 320, "page_size": 16, "context_length": 128,
        "chunked_prefill_size": 16, "max_running_requests": 4, "debug_invariants": True, "random_seed": 1, "threads": 1,
    }  # fmt: skip
    one = EngineCore(Config.from_flat(options), describe(path), lambda message: None)
    try:
        expected = answers(one, load())
    finally:
        one.close()
    config = Config.from_flat({**options, "tp_size": size})
    core = EngineCore(config, describe(path), lambda message: None, ThreadRanks(config, describe(path)))
    try:
        found = answers(core, load())
    finally:
        core.close()
    for key, (tokens, values, _) in expected.items():
        assert found[key][0] == tokens and len(tokens) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
    assert len(made) == (size if which == "all" else 1)
    for steps in made:
        assert steps.graphs.facts()["recorded"] == 1 and not steps.graphs.given_up, steps.graphs.describe()
    decisions = {name: (value, why) for name, value, why in core.info["decisions"]}
    assert decisions["rank_steps"][0] == "recorded" and "sums included" in decisions["rank_steps"][1]


# Sizes, the rank that has no memory, and the op table.
STARVED: list[tuple[dict[str, int], int, str | None]] = [
    ({"tp_size": 4}, 0, "reference"),
    ({"tp_size": 4}, 1, None),
    ({"pp_size": 2}, 1, "reference"),
    ({"pp_size": 2, "tp_size": 2}, 3, "reference"),
    ({"tp_size": 4, "attn_dp_size": 2}, 0, "reference"),
    ({"tp_size": 4}, 2, None),
    ({"pp_size": 2}, 0, "reference"),
    ({"pp_size": 3}, 1, "reference"),
    ({"pp_size": 2, "tp_size": 2}, 1, "reference"),
    ({"pp_size": 2, "tp_size": 2}, 2, None),
    ({"tp_size": 4, "attn_cp_size": 2}, 3, "reference"),
]


def starved_name(case: tuple[dict[str, int], int, str | None]) -> str:
    sizes, rank, ops = case
    return "-".join([*(f"{key[:-5]}{size}" for key, size in sizes.items()), f"rank{rank}", str(ops)])


@pytest.mark.some(5)
@pytest.mark.parametrize("starved", STARVED, ids=starved_name)
@pytest.mark.slow
@pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")
def test_a_step_without_memory_on_one_rank_is_undone_on_all(
    starved: tuple[dict[str, int], int, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several times, in the middle of a layer and in the head: with fewer tokens the steps run again, and nobody's
    answer is another one."""
    sizes, starving, ops = starved
    monkeypatch.setattr(Threads, "group", partial(shared_memory, tmp_path))
    path = str(tiny_checkpoint("llama", tmp_path / "model", **SIZES, num_hidden_layers=6))
    options: dict[str, Any] = {
        "model_path": path, "dtype": "float32", "ops": ops, "max_total_tokens": 320, "page_size": 16, "threads": 1,
        "context_length": 128, "chunked_prefill_size": 16, "max_running_requests": 4, "debug_invariants": True,
        "random_seed": 1, "disable_step_graph": True,
    }  # fmt: skip
    one = EngineCore(Config.from_flat(options), describe(path), lambda message: None)
    try:
        expected = answers(one, load())
    finally:
        one.close()
    starve(monkeypatch, starving)
    config = Config.from_flat({**options, **sizes})
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        found = answers(core, load())
        assert core.scheduler.meter.out_of_memory >= 2
    finally:
        core.close()
    assert ranks.error is None
    assert max(one.undone for one in ranks.told if isinstance(one, Go)) >= 2
    for key, (tokens, values, _) in expected.items():
        assert found[key][0] == tokens and len(tokens) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key


def starve(monkeypatch: pytest.MonkeyPatch, starving: int) -> None:
    """This rank has no memory now and then, in the middle of a layer and in the head."""
    steps: dict[tuple[int, str], int] = {}
    failed = [0]
    forward, headed, ended = Together.forward, Together.headed, Together._ended

    def starves(rank: int, what: str, every: int) -> None:
        steps[rank, what] = steps.get((rank, what), 0) + 1
        if rank == starving and steps[rank, what] % every == 0 and sum(steps.values()) - failed[-1] > 4 * len(steps):
            failed.append(sum(steps.values()))  # never twice in a row: a request alone would end by that
            raise MemoryError("not enough memory")

    def late(whole: Any, step: Any) -> Any:
        """Behind some of the sums of a step."""
        layer, rank = whole.model.layers[whole.model.stage.last - 1 if whole.staged else 1], whole.rank
        feed = layer.feed

        def hungry(*args: Any) -> Any:
            starves(rank, "layer", 9)
            return feed(*args)

        layer.feed = hungry
        try:
            return forward(whole, step)
        finally:
            layer.feed = feed

    def head(whole: Any, *args: Any) -> Any:
        starves(whole.rank, "head", 7)
        return headed(whole, *args)

    monkeypatch.setattr(Together, "forward", late)

    def last(whole: Any, *args: Any) -> Any:
        starves(whole.rank, "head", 7)
        return ended(whole, *args)

    monkeypatch.setattr(Together, "headed", head)
    monkeypatch.setattr(Together, "_ended", last)


def shared_memory(folder: Path, size: int, timeout: float = 60.0) -> list[Any]:
    """As `Threads.group`, of ends that processes have."""
    place = folder / f"meeting{len(list(folder.iterdir()))}"
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: SharedMemory(rank, size, place, timeout), range(size)))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, "sums by threads are no native calls"),
        ({"disable_step_graph": True}, "as asked"),
        ({"pp_size": 2, "tp_size": 1}, "stages of a pipeline"),
        ({"ops": "reference"}, "cannot record"),
    ],
    ids=["threads", "asked", "stages", "ops"],
)
@pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")
def test_steps_of_ranks_that_are_not_recorded_say_why(values: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = str(checkpoint("llama", tmp_path))
    config = Config.from_flat({"model_path": path, **SMALL, "ops": None, "tp_size": 2, **values})
    core = EngineCore(config, describe(path), lambda message: None, ThreadRanks(config, describe(path)))
    try:
        decisions = {name: (value, why) for name, value, why in core.info["decisions"]}
        assert decisions["rank_steps"][0] == "eager" and why in decisions["rank_steps"][1]
    finally:
        core.close()


@pytest.mark.slow
def test_a_step_without_memory_on_rank_0_ends_all(tmp_path: Path) -> None:
    """The others are in the middle of it, and it cannot be undone there: nobody goes on with what is half done."""
    path = str(checkpoint("llama", tmp_path))
    config = Config.from_flat({"model_path": path, "tp_size": 2, **SMALL})
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    model = core.runner.model._model  # pyright: ignore
    forward, steps = model.layers[1].feed, []

    def starved(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise MemoryError("not enough memory")
        return forward(*args)

    model.layers[1].feed = starved
    try:
        with pytest.raises(EngineDead, match="rank 0 failed within a step: MemoryError"):
            answers(core, load())
    finally:
        core.close()
    assert len(steps) == 5 and isinstance(ranks.error, EngineDead)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"ops": "invariant"}, "same bits"),
        ({"enable_deterministic_inference": True}, "same bits"),
        ({"load_format": "dummy"}, "random weights"),
    ],
)
def test_what_several_ranks_do_not_serve_is_refused(values: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match=f"tp_size 2: .*{why}") as refused:
        Engine(model_path=str(path), tp_size=2, **{**SMALL, **values})
    assert refused.value.param == "tp_size"  # from the engine's thread, which tells by messages alone


@pytest.mark.parametrize(
    "name", ["pp_async_batch_depth", "data-parallel-address", "all2all_backend", "cp_strategy", "dcp_size"]
)
def test_other_kinds_of_parallelism_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: there is no .*docs/parallel.md"):
        Config.from_flat({name: 2})


def test_the_names_of_other_engines_are_understood() -> None:
    for name in ("tp", "tp_size", "tensor-parallel-size"):
        assert Config.from_flat({name: 2}).runtime.tp_size == 2
    for name in ("pp", "pp_size", "pipeline-parallel-size"):
        assert Config.from_flat({name: 2}).runtime.pp_size == 2
    for name in ("ep", "ep_size", "expert-parallel-size"):
        assert Config.from_flat({name: 2, "tp": 2}).runtime.ep_size == 2
    for name in ("tp", "pp", "ep"):
        with pytest.raises(ConfigError, match=f"{name}_size: 0 must be above 0"):
            Config.from_flat({name: 0})


def test_sizes_that_cannot_be_shared_out_end_the_start_before_any_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phloem.launch.core.RankProcesses", None)
    path = tiny_checkpoint("llama", tmp_path, num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    with pytest.raises(ModelLoadError, match=r"tp_size 2: 9 attention heads and 3 kv heads .* valid: 1, 3, 9"):
        Engine(model_path=str(path), tp_size=2, **SMALL)


@pytest.mark.parametrize(
    ("sizes", "error", "why"),
    [
        ({"tp_size": 2, "ep_size": 4}, ConfigError, r"ep_size 4: .* the 2 ranks of tp_size; valid: 1, 2"),
        ({"ep_size": 2}, ConfigError, r"ep_size 2: .* the 1 ranks of tp_size; valid: 1"),
        ({"tp_size": 2, "ep_size": 2}, ConfigError, "ep_size 2: llama has no experts"),
        ({"pp_size": 4}, ModelLoadError, r"pp_size 4: 3 layers cannot be shared out; valid: 1, 2, 3"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    sizes: dict[str, Any], error: type[Exception], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    monkeypatch.setattr("phloem.launch.core.RankProcesses", None)
    with pytest.raises(error, match=why):
        Engine(model_path=str(path), **SMALL, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("comm", "sizes"),
    [("shm", {"tp_size": 2}), ("gloo", {"pp_size": 2}), ("shm", {"tp_size": 2, "ops": None})],
    ids=["shm", "gloo", "recorded"],
)
def test_an_engine_in_this_process_has_ranks_beside_it(comm: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """And tells of one that dies: what runs ends with the reason, and so does all that comes after."""
    path = str(checkpoint("llama", tmp_path))
    asks: list[dict[str, Any]] = [
        {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True},
        {"temperature": 1, "top_p": 0.9, "max_new_tokens": 24, "ignore_eos": True, "sampling_seed": 3},
        {"temperature": 0, "max_new_tokens": 12, "regex": "[a-d]+x"},
    ]
    with Engine(model_path=path, **SMALL) as one:
        expected = [one.generate("hello world", ask)["output_ids"] for ask in asks]
    with Engine(model_path=path, tp_comm=comm, **{**SMALL, **sizes}) as engine:
        steps = {name: value for name, value, _ in engine.get_server_info()["decisions"]}["rank_steps"]
        assert steps == ("recorded" if "ops" in sizes and built() else "eager")
        assert [engine.generate("hello world", ask)["output_ids"] for ask in asks] == expected
        (pid,) = ranks_of(os.getpid())
        ended: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

        def ask() -> None:
            try:
                engine.generate("a story", {"max_new_tokens": 400, "ignore_eos": True})
            except BaseException as error:
                ended.put(error)

        asker = threading.Thread(target=ask)
        asker.start()
        eventually(lambda: engine.get_server_info()["internal_states"][0]["running"] == 1)
        os.kill(pid, signal.SIGKILL)
        error = ended.get(timeout=10)
        asker.join()
        assert isinstance(error, EngineDead) and "rank 1 of 2" in error.message and "SIGKILL" in error.message
        with pytest.raises(EngineDead):
            engine.generate("hello", asks[0])
    assert gone(pid) and not ranks_of(os.getpid())


@pytest.mark.slow
@linux
def test_a_server_of_two_ranks_answers_and_starts_again_after_the_death_of_one(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    options = ("--dtype", "float32", "--ops", "reference", "--max-total-tokens", "2048")
    one = Server(path, *options).wait_ready()
    try:
        expected = one.generate("hello world", 24).json()["output_ids"]
    finally:
        one.close()
    server = Server(path, *options, "--tensor-parallel-size", "2").wait_ready()
    try:
        assert server.generate("hello world", 24).json()["output_ids"] == expected
        assert any("tp_size" in line and "rank 0 chooses" in line for line in server.lines)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        askers = [threading.Thread(target=lambda: answers.put(server.generate("a story", 450))) for _ in range(3)]
        for asker in askers:
            asker.start()
        eventually(lambda: server.state()["running"] == 3)
        first = server.engine_pid()
        (rank,) = ranks_of(first)
        os.kill(rank, signal.SIGKILL)
        for _ in askers:
            answer = answers.get(timeout=10)
            assert answer.status_code == 503, answer.text
            assert "rank 1 of 2" in answer.text and "SIGKILL" in answer.text
        eventually(lambda: server.get("/health").status_code == 200, 90)
        second = server.engine_pid()
        assert second != first and gone(first) and gone(rank)
        assert server.generate("hello world", 24).json()["output_ids"] == expected
        (rank,) = ranks_of(second)
        # The other way round: the engine's own process dies, and its ranks with it.
        os.kill(second, signal.SIGKILL)
        eventually(lambda: gone(rank), 5)
        eventually(lambda: server.engine_pid() != second and server.get("/health").status_code == 200, 90)
        third = server.engine_pid()
        (rank,) = ranks_of(third)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert gone(third) and gone(rank)
    finally:
        server.close()


@pytest.mark.slow
@linux
def test_a_rank_that_is_stopped_is_found_within_two_seconds(tmp_path: Path) -> None:
    """Whichever it is, under load; all that ran is answered, nothing of it stays, and the server serves again."""
    path = checkpoint("qwen3_moe", tmp_path)
    before = shared_folders()
    options = ("--dtype", "float32", "--ops", "reference", "--max-total-tokens", "2048", "--tp", "2", "--ep-size", "2")
    server = Server(path, *options).wait_ready()
    pids: list[int] = []
    try:
        expected = server.generate("hello world", 24).json()["output_ids"]
        for which in (1, 0):
            pids += stop_one(server, which)
            eventually(lambda: server.get("/health").status_code == 200, 90)
            assert server.generate("hello world", 24).json()["output_ids"] == expected
        engine = server.engine_pid()
        pids += [engine, *ranks_of(engine)]
        assert len(pids) == len(set(pids)) == 6
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        eventually(lambda: all(gone(pid) for pid in pids), 5)
        check_folders_gone(before)
    finally:
        server.close()


def test_what_killed_starts_have_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    for name, age in (("phloem-ranks-old", 7200), ("phloem-ranks-new", 60), ("another", 7200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meeting").touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["another", "phloem-ranks-new"]


@linux
def test_who_sends_to_a_rank_that_is_stopped_does_not_wait_for_it() -> None:
    """In the middle of a message that fills the socket, as an adapter's weights do."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    child = Child(1, lambda *_: None, lambda _, why: told.put(why), "code")  # it reads its input, and no socket
    child.patience(60.0)
    try:
        os.kill(child.process.pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(child.send, bytes(8 << 20))
            watch([child], lambda: not told.empty(), lambda _, why: told.put(why))
            with pytest.raises(OSError, match="Broken pipe"):
                sending.result(timeout=20)
        assert "was stopped by a signal" in told.get_nowait()
    finally:
        child.close()


def stop_one(server: Server, which: int) -> list[int]:
    """Stop a rank of a server under load, whose requests are then answered; gives the processes of both ranks."""
    engine = server.engine_pid()
    pids = [engine, *ranks_of(engine)]
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    askers = [threading.Thread(target=lambda: answers.put(server.generate("a story", 450))) for _ in range(3)]
    for asker in askers:
        asker.start()
    eventually(lambda: server.state()["running"] == 3)
    stopped = time.monotonic()
    os.kill(pids[which], signal.SIGSTOP)
    for _ in askers:
        answer = answers.get(timeout=10)
        assert time.monotonic() - stopped < 8 and answer.status_code == 503, answer.text
        assert "was stopped by a signal" in answer.text and answer.headers["retry-after"]
        assert which == 0 or "rank 1 of 2" in answer.text
    return pids
