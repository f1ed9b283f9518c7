"""A trainer in a process of its own broadcasts weights to the engine, by torch.distributed (gloo)."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from engine_door import http_door
from safetensors.torch import load_file, save_file

from phloem import Engine
from phloem.core.errors import BadRequest, PhloemError
from phloem.rl import group as groups
from phloem.rl.group import Group, backend_for
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.utils.sockets import bind

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
for line in sys.stdin:
    tensors = list(load_file(line.strip() if "/" in line else path).values())
    if bucket:
        tensors = [torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])]
    for tensor in tensors[:few]:
        torch.distributed.broadcast(tensor, src=0, group=group)
    print("sent", flush=True)
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

    def go(self, path: Path | None = None) -> None:
        """Broadcast the tensors of the file that it began with, or of this one."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n" if path is None else f"{path}\n")
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
    tensors = load_file(path / "model.safetensors")
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


@pytest.mark.slow
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


@pytest.mark.slow
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


WRONG = {
    "a name": ({"nobody.weight": torch.ones(4)}, "no weight is called 'nobody.weight'"),
    "a shape": ({"model.norm.weight": torch.ones(5)}, r"model.norm.weight is \[5\], expected \[32\]"),
    "a type": ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "push its values in 16 or 32 bits"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one by one", "bucket"])
@pytest.mark.parametrize("wrong", list(WRONG))
def test_what_is_announced_wrongly_is_refused_at_once_and_the_group_goes_on(
    engine: Engine, new: Path, tmp_path: Path, wrong: str, way: str
) -> None:
    """Before anything is broadcast; what then comes is not taken for the next update."""
    tensors, why = WRONG[wrong]
    save_file({**load_file(new / "model.safetensors"), **tensors}, tmp_path / "model.safetensors")
    before, port = ids(engine), free_port()
    trainer = Trainer(port, tmp_path, way)
    kind = {"group_name": "weights", "load_format": "flattened_bucket" if way == "bucket" else None}
    try:
        engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights", timeout=60.0)
        assert trainer.said() == "joined"
        begun = time.monotonic()
        with pytest.raises(PhloemError, match=f"{why}.*received and forgotten, and the group stays"):
            engine.update_weights_from_distributed(**announced(tmp_path), **kind)
        assert time.monotonic() - begun < 5, "it waited for a broadcast"
        trainer.go()
        assert trainer.said() == "sent" and ids(engine) == before
        trainer.go(new / "model.safetensors")
        engine.update_weights_from_distributed(**announced(new), **kind)
        assert trainer.said() == "sent" and ids(engine) != before
    finally:
        trainer.end()


@pytest.mark.slow
def test_a_trainer_that_broadcasts_nothing_behind_a_refusal_is_told_to_begin_anew(
    engine: Engine, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "PATIENCE", 1.0)
    port = free_port()
    trainer, told = Trainer(port, new), announced(new)
    told["names"][0] = "nobody.weight"
    try:
        engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
        assert trainer.said() == "joined"
        with pytest.raises(PhloemError, match="no weight is called"):
            engine.update_weights_from_distributed(**told, group_name="weights")
        time.sleep(0.5)
        with pytest.raises(
            PhloemError, match=r"a refused call announced did not come whole.*destroy it and begin anew"
        ):
            engine.update_weights_from_distributed(**announced(new), group_name="weights")
        trainer.go()
        assert trainer.said() == "" and trainer.process.wait(30) != 0, "its broadcast did not fail"
        with pytest.raises(PhloemError, match="destroy it and begin anew"):
            engine.update_weights_from_distributed(**told, group_name="weights")
        engine.destroy_weights_update_group("weights")
    finally:
        trainer.end()


@pytest.mark.slow
def test_larger_tensors_than_a_refused_call_announced_end_nothing_but_the_group(
    engine: Engine, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo would end the process. The trainer broadcast nothing behind its refusal, and goes on with the next call."""
    monkeypatch.setattr(groups, "PATIENCE", 2.0)
    port = free_port()
    trainer = Trainer(port, new)
    try:
        engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
        assert trainer.said() == "joined"
        before, count = ids(engine), 2 * len(announced(new)["names"])
        with pytest.raises(PhloemError, match="no weight is called"):
            engine.update_weights_from_distributed(["no"] * count, ["float32"] * count, [[1]] * count, "weights")
        trainer.go()
        with pytest.raises(PhloemError, match=r"did not come whole.*destroy it and begin anew"):
            engine.update_weights_from_distributed(**announced(new), group_name="weights")
        assert ids(engine) == before
    finally:
        trainer.end()


@pytest.mark.slow
def test_what_cannot_be_received_ends_the_group(engine: Engine, new: Path) -> None:
    port = free_port()
    trainer, told = Trainer(port, new), announced(new)
    try:
        engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
        assert trainer.said() == "joined"
        with pytest.raises(PhloemError, match=r"unknown type 'float7'.*cannot be used any more.*begin anew"):
            engine.update_weights_from_distributed(
                **{**told, "dtypes": ["float7"] * len(told["names"])}, group_name="weights"
            )
    except BaseException:
        trainer.end()
        raise
    trainer.go()
    assert trainer.said() == "" and trainer.process.wait(30) != 0, "its broadcast did not fail"
    trainer.end()


@pytest.mark.slow
def test_a_broadcast_that_is_shorter_than_announced_is_refused(engine: Engine, new: Path, tmp_path: Path) -> None:
    """By gloo nothing tells of that but what the memory held before."""
    tensors, port = load_file(new / "model.safetensors"), free_port()
    name = "model.embed_tokens.weight"
    save_file({name: tensors[name][:-1].clone()}, tmp_path / "model.safetensors")
    trainer, before = Trainer(port, tmp_path), ids(engine)
    shapes: Any = [list(tensors[name].shape)]
    try:
        engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
        trainer.go()
        with pytest.raises(PhloemError, match=f"{name} has numbers that are NaN"):
            engine.update_weights_from_distributed([name], ["float32"], shapes, "weights")
        assert ids(engine) == before
    finally:
        trainer.end()


def test_a_group_waits_as_long_as_its_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from phloem.protocol import weights as ask
    from phloem.rl import keeper

    waits = list[float]()

    class Made(Group):
        def __init__(self, name: str, address: str, rank: int, world: int, backend: str, timeout: float, _: Any):
            waits.append(timeout)
            super().__init__(name, address, rank, world, backend, timeout)

        def join(self) -> Any:
            return Future[None]()

    monkeypatch.setattr(keeper, "Group", Made)
    own: Any = keeper.Keeper.__new__(keeper.Keeper)
    own._groups, own._index = {}, SimpleNamespace(ctx=SimpleNamespace(device=torch.device("cpu")))
    for at, said in enumerate((None, 2.0, 1800.0)):
        own.join(ask.group(ask.InitGroupBody(**{**_GROUP, "group_name": f"g{at}", "timeout": said})))
    assert waits == [300.0, 2.0, 1800.0]


@pytest.mark.slow
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


@pytest.mark.slow
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


ADAPTER: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.slow
def test_an_adapter_that_is_broadcast_is_the_one_of_its_tensors(old: Path, tmp_path: Path) -> None:
    """Miles: what is announced over HTTP comes through the group that weights come through."""
    made = torch.Generator().manual_seed(1)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    down, up = torch.randn(4, 32, generator=made), torch.randn(64, 4, generator=made)
    given = {f"{name}_A.weight": down, f"{name}_B.weight": up}
    save_file(given, tmp_path / "model.safetensors")
    port, trainer = free_port(), None
    with Engine(model_path=str(old), max_total_tokens=2048, enable_lora=True) as engine, http_door(engine) as url:
        try:
            trainer = Trainer(port, tmp_path)
            engine.init_weights_update_group("127.0.0.1", port, 1, 2, "weights")
            assert trainer.said() == "joined"
            trainer.go()
            body = {"lora_name": "actor", "config_dict": ADAPTER, "group_name": "weights", "upsert": True}
            answer = httpx.post(
                f"{url}/load_lora_adapter_from_distributed", json={**body, **announced(tmp_path)}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["loaded_adapters"] == {"actor": "__tensor__/actor"}
            engine.load_lora_adapter_from_tensors("same", given, ADAPTER)
            said: list[Any] = [engine.generate("hello", LONG, lora_path=one) for one in ("actor", "same", None)]
            broadcast, sent, base = (one["output_ids"] for one in said)
            assert broadcast == sent != base
            for change, told in (({"group_name": "x"}, "no group 'x'"), ({"names": None}, "names is needed")):
                answer = httpx.post(
                    f"{url}/load_lora_adapter_from_distributed", json={**body, **announced(tmp_path), **change}
                )
                assert answer.status_code == 400 and told in answer.text
        finally:
            if trainer is not None:
                trainer.end()


# NCCL: stand-ins for torch's store and group, as there is no GPU here; everything else is what runs on one.


class Nccl:
    """What `_new_process_group_helper` gives: its rank 0 has sent `sent`, in this order; then it dies."""

    def __init__(self, sent: list[torch.Tensor]) -> None:
        self.sent, self.roots, self.destroyed = sent, list[tuple[int, int]](), False

    def broadcast(self, values: list[torch.Tensor], options: Any) -> Nccl:
        self.roots.append((options.rootRank, options.rootTensor))
        if not self.sent:
            raise RuntimeError("NCCL error: remote process exited")
        (value,), sent = values, self.sent.pop(0)
        assert (value.shape, value.dtype) == (sent.shape, sent.dtype)
        value.copy_(sent)
        return self

    def wait(self) -> None:
        """Only puts what comes behind it in order, as NCCL's does."""


class Torch:
    """How often the device was waited for, and what the group was made with."""

    def __init__(self) -> None:
        self.waited, self.made = 0, dict[str, Any]()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Nccl, Torch]]:
    tensors = [torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)]
    fake, seen = Nccl(tensors), Torch()

    class Store:
        def set_timeout(self, timeout: Any) -> None:
            seen.made["store timeout"] = timeout.total_seconds()

    def made(world: int, rank: int, ranks: list[int], backend: str, store: Any, **fields: Any) -> tuple[Nccl, None]:
        seen.made |= {"world": world, "rank": rank, "ranks": ranks, "backend": backend, "store": store, **fields}
        return fake, None

    def wait(_: Any) -> None:
        seen.waited += 1

    def destroyed(group: Nccl) -> None:
        group.destroyed = True

    monkeypatch.setattr(groups.c10d, "rendezvous", lambda *_, **fields: iter([(Store(), fields["rank"], 3)]))
    monkeypatch.setattr(groups.c10d, "PrefixStore", lambda name, store: (name, store))
    monkeypatch.setattr(groups.c10d, "_new_process_group_helper", made)
    monkeypatch.setattr(groups.dist, "destroy_process_group", destroyed)
    monkeypatch.setattr(groups, "in_host_memory", lambda _: False)
    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    yield fake, seen
    groups.c10d._world.pg_group_ranks.pop(fake, None)


def names_of(*tensors: torch.Tensor) -> dict[str, Any]:
    return {
        "names": [f"w{at}" for at in range(len(tensors))],
        "dtypes": [str(tensor.dtype) for tensor in tensors],
        "shapes": [list(tensor.shape) for tensor in tensors],
    }


def test_tensors_come_over_nccl_in_their_order_and_are_waited_for(nccl: tuple[Nccl, Torch]) -> None:
    fake, seen = nccl
    first, second = list(fake.sent)
    group = Group("actor", "tcp://10.0.0.1:29500", 2, 3, "nccl", 5.0, torch.device("cpu"))
    group.join().result(10)
    assert seen.made["backend"] == "nccl" and (seen.made["rank"], seen.made["world"]) == (2, 3)
    assert seen.made["store"][0] == seen.made["group_name"] == "actor" and seen.made["ranks"] == []
    assert groups.c10d._world.pg_group_ranks[fake] == {0: 0, 1: 1, 2: 2}
    found = dict(group.receive(**names_of(first, second), bucket=False).result(10))
    assert torch.equal(found["w0"], first) and torch.equal(found["w1"], second)
    assert fake.roots == [(0, 0)] * 2 and seen.waited == 1
    rows = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)]
    fake.sent = [torch.cat(rows)]
    found = dict(group.receive(**names_of(first, second), bucket=True).result(10))
    assert torch.equal(found["w0"], first) and torch.equal(found["w1"], second) and seen.waited == 2
    with pytest.raises(BadRequest, match="remote process exited; nothing was changed"):
        group.receive(**names_of(first), bucket=False).result(10)
    fake.sent = [first]
    with pytest.raises(BadRequest, match="destroy it and begin anew"):
        group.receive(**names_of(first), bucket=False).result(10)
    group.leave()
    group._worker.shutdown(wait=True)
    assert fake.destroyed and fake.sent == [first]


def test_gloo_beside_a_device_goes_through_the_host() -> None:
    assert Group("g", "tcp://x:1", 1, 2, "gloo", 1.0, torch.device("meta"))._device == torch.device("cpu")
    assert Group("g", "tcp://x:1", 1, 2, "nccl", 1.0, torch.device("meta"))._device == torch.device("meta")


def test_which_backend_a_group_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_for("", host=True) == backend_for("gloo", host=True) == backend_for("gloo", host=False) == "gloo"
    with pytest.raises(BadRequest, match="runs on the host, use gloo"):
        backend_for("nccl", host=True)
    monkeypatch.setattr(groups.dist, "is_backend_available", lambda name: name in ("nccl", "gloo"))
    assert backend_for("", host=False) == backend_for("nccl", host=False) == "nccl"
    with pytest.raises(BadRequest, match="built without it"):
        backend_for("mpi", host=False)
