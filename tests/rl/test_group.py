"""A trainer in a process of its own broadcasts weights to the engine, by torch.distributed (gloo)."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phloem import Engine
from phloem.core.errors import PhloemError
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.utils.sockets import bind

pytestmark = pytest.mark.slow
LONG: dict[str, Any] = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}

# As trainers do it: a group beside the default one, under a prefix of its own.
TRAINER = """
import sys, datetime, torch
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world, rendezvous
port, path, bucket, few = sys.argv[1], sys.argv[2], sys.argv[3] == "bucket", int(sys.argv[4])
store, rank, world = next(rendezvous(f"tcp://127.0.0.1:{port}", rank=0, world_size=2))
store = PrefixStore("weights", store)
group, _ = _new_process_group_helper(world, rank, [], "gloo", store, group_name="weights",
                                     timeout=datetime.timedelta(seconds=60))
_world.pg_group_ranks[group] = {i: i for i in range(world)}
print("joined", flush=True)
sys.stdin.readline()
tensors = list(load_file(path).values())
if bucket:
    tensors = [torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])]
for tensor in tensors[:few]:
    torch.distributed.broadcast(tensor, src=0, group=group)
print("sent", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("new"), seed=9)


@pytest.fixture
def engine(old: Path) -> Iterator[Engine]:
    with Engine(model_path=str(old), max_total_tokens=2048) as found:
        yield found


def ids(engine: Engine) -> list[int]:
    answer: Any = engine.generate("hello there", LONG)
    return answer["output_ids"]


class Trainer:
    def __init__(self, port: int, path: Path, way: str = "", few: int = 1000) -> None:
        command = [sys.executable, "-c", TRAINER, str(port), str(path / "model.safetensors"), way, str(few)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def free_port() -> int:
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    return port


def announced(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


@pytest.mark.parametrize("way", ["one by one", "bucket"])
def test_broadcast_weights_are_those_of_the_trainer(engine: Engine, old: Path, new: Path, way: str) -> None:
    with Engine(model_path=str(new), max_total_tokens=2048) as other:
        want = ids(other)
    before, port = ids(engine), free_port()
    trainer = Trainer(port, new, way)
    try:
        engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
        assert trainer.said() == "joined"
        with pytest.raises(PhloemError, match="destroy it first"):
            engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
        trainer.go()
        fields = {**announced(new), "load_format": "flattened_bucket" if way == "bucket" else None}
        engine.update_weights_from_distributed(**fields, group_name="weights", weight_version="step-1")
        assert ids(engine) == want != before and engine.get_weight_version() == "step-1"
        assert trainer.said() == "sent"
        engine.destroy_weights_update_group("weights")
        with pytest.raises(PhloemError, match="there is no group 'weights'"):
            engine.destroy_weights_update_group("weights")
    finally:
        trainer.end()


def test_a_trainer_that_dies_in_the_middle_changes_nothing(engine: Engine, new: Path) -> None:
    before, port = ids(engine), free_port()
    trainer = Trainer(port, new, few=3)
    try:
        engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
        assert trainer.said() == "joined"
        trainer.go()
        threading.Timer(1.0, trainer.end).start()
        answers: list[Any] = []
        beside = threading.Thread(target=lambda: answers.append(ids(engine)))
        beside.start()
        with pytest.raises(PhloemError, match="nothing was changed"):
            engine.update_weights_from_distributed(**announced(new), group_name="weights")
        beside.join()
        assert answers == [before] and ids(engine) == before
        with pytest.raises(PhloemError, match="destroy it and begin anew"):
            engine.update_weights_from_distributed(**announced(new), group_name="weights")
        engine.destroy_weights_update_group("weights")
    finally:
        trainer.end()


def test_a_rendezvous_without_a_trainer_ends_and_holds_nobody_up(engine: Engine) -> None:
    from phloem.protocol import weights as ask

    body = ask.InitGroupBody(master_address="127.0.0.1", master_port=str(free_port()), rank_offset=1, world_size=2)
    begun = time.monotonic()
    reply = engine._door.start(engine._client.control("init_group", 60.0, **{**ask.group(body), "timeout": 2.0}))
    assert ids(engine) == ids(engine)
    done = reply.result(50)
    assert not done.ok and "the rendezvous failed" in done.message
    assert time.monotonic() - begun < 40
    for fields, told in ((dict(rank_offset=0), "the trainer is 0"), (dict(backend="nccl"), "use gloo")):
        with pytest.raises(PhloemError, match=told):
            engine.init_weights_update_group(**{**_GROUP, **fields})


_GROUP: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}


def test_a_rendezvous_that_fails_late_leaves_another_group_of_its_name_alone(engine: Engine) -> None:
    """A trainer that gave the wrong port destroys the group, and begins anew under the same name."""
    from phloem.protocol import weights as ask

    def joining(timeout: float) -> Any:
        body = ask.InitGroupBody(
            master_address="127.0.0.1", master_port=str(free_port()), rank_offset=1, world_size=2, group_name="g"
        )
        args = {**ask.group(body), "timeout": timeout}
        return engine._door.start(engine._client.control("init_group", 60.0, **args))

    first = joining(1.0)
    engine.destroy_weights_update_group("g")
    second = joining(30.0)
    assert not first.result(50).ok
    engine.destroy_weights_update_group("g")  # raises: there is no such group
    del second
