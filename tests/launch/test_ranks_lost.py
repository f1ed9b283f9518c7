"""Ranks that are of no use any more, but whose processes live and close nothing: nobody waits for them."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from served import Server, eventually, ranks_of
from share_support import checkpoint

from phloem.core.config import Config
from phloem.core.errors import EngineDead
from phloem.launch.child import Child
from phloem.launch.ranks import RankProcesses

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for stopped processes")


@pytest.mark.parametrize(
    ("say", "why"),
    [(("failed", "no room"), "no room"), (("", "what is this"), "what it says is not understood")],
    ids=["failed", "strange"],
)
def test_a_rank_that_has_failed_is_lost_though_its_process_lives(
    say: tuple[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads may wait for others, for minutes."""
    support = str(Path(__file__).parents[1] / "support")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([support, os.environ.get("PYTHONPATH", "")]))
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    child = Child(1, lambda *_: None, lambda _, why: ended.put(why), "rank_stand_in")
    try:
        child.begin({"say": say})
        assert why in ended.get(timeout=20)
        assert child.process.poll() is None
    finally:
        child.close()
    assert ended.empty(), "it is told once"


@pytest.mark.slow
@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_goes_while_ranks_find_each_other_is_not_waited_for(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo lets nobody go who waits for others to come, before its time-out of minutes."""
    path, there, let_go = checkpoint("llama", tmp_path), threading.Event(), threading.Event()

    def joining(*_: object) -> None:
        there.set()
        let_go.wait(60)

    monkeypatch.setattr("phloem.launch.ranks.join", joining)
    began: list[RankProcesses] = []
    monkeypatch.setattr(RankProcesses, "_joined", lambda self, *a: (began.append(self), joined(self, *a))[1])
    errors: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()

    def start() -> None:
        with pytest.raises(EngineDead) as caught:
            RankProcesses(Config.from_flat({"model_path": str(path), "tp_size": 2, "tp_comm": "gloo"}))
        errors.put((time.monotonic(), str(caught.value)))

    starting = threading.Thread(target=start)
    starting.start()
    try:
        assert there.wait(60)
        begun = time.monotonic()
        os.kill(began[0].ranks[0].process.pid, number)
        at, why = errors.get(timeout=20)
        assert "rank 1 of 2 has gone" in why
        assert ("was stopped by a signal" in why) == (number == signal.SIGSTOP)
        assert at - begun < 10, "and not gloo's minutes"
    finally:
        let_go.set()
        starting.join(20)


@pytest.mark.slow
@linux
def test_every_request_is_answered_whose_second_stage_is_killed(tmp_path: Path) -> None:
    """Streams and whole answers, of two routes: 503, or an error as the last event; no connection just ends."""
    server = Server(checkpoint("llama", tmp_path), "--dtype", "float32", "--max-total-tokens", "8192", "--pp-size", "2")
    found: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def ask(number: int) -> None:
        path, body = (
            ("/generate", {"text": f"hello {number}", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}),
            ("/v1/completions", {"prompt": f"hello {number}", "max_tokens": 400, "ignore_eos": True}),
        )[number // 2 % 2]
        try:
            answer = httpx.post(server.url + path, json={**body, "stream": number % 2 == 0}, timeout=60, verify=False)
            found.put((answer.status_code, answer.text))
        except httpx.HTTPError as error:
            found.put((0, repr(error)))

    try:
        server.wait_ready()
        askers = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for asker in askers:
            asker.start()
        eventually(lambda: server.state()["running"] == 8)
        os.kill(ranks_of(server.engine_pid())[0], signal.SIGKILL)
        for _ in askers:
            status, text = found.get(timeout=20)
            assert status in (200, 503) and "rank 1 of 2 has gone" in text, text
            assert '"engine_unavailable"' in text and '"retryable":true' in text
    finally:
        server.close()


joined = RankProcesses._joined  # pyright: ignore[reportPrivateUsage]
