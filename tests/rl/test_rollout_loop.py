"""The example of a training loop, through a real server: the reward rises, and both sides compute the same."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from phloem.testing.checkpoints import tiny_checkpoint
from phloem.utils.sockets import bind

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples" / "rl"


def example(name: str = "grpo") -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def served(model: Path) -> Iterator[tuple[str, int]]:
    """The address and the process of a server, for training."""
    pytest.importorskip("transformers", reason="the examples train with transformers")
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "phloem", "serve", str(model), "--port", str(port), "--max-total-tokens", "4096"]
    command += ["--dtype", "float32", "--enable-deterministic-inference"]
    server = subprocess.Popen([sys.executable, *command])
    try:
        end = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < end and server.poll() is None
            time.sleep(0.1)
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(30)


def test_the_reward_rises_while_weights_are_pushed(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path)
    with served(model) as (url, pid):
        steps = example().train(url, str(model), 25)
        engine = int(subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()[0])
        middle = resident(engine)
        more = example().train(url, str(model), 3)
        assert resident(engine) < 1.05 * middle, "memory grows with updates"
    first, last = (sum(step.reward for step in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > first + 0.2, [step.reward for step in steps]
    assert max(step.logprob_diff for step in steps + more) < 1e-3
    assert [step.version for step in steps] == [f"step-{number}" for number in range(25)]


def test_two_agents_agree_on_words(tmp_path: Path) -> None:
    example()  # the other one is built on it
    model = tiny_checkpoint("llama", tmp_path)
    with served(model) as (url, _):
        steps = example("two_agents").train(url, str(model), 30)
    first, last = (sum(step.reward for step in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > first + 0.2, [step.reward for step in steps]
    assert max(step.logprob_diff for step in steps) < 1e-3
    assert [step.version for step in steps] == [f"step-{number}" for number in range(30)]
