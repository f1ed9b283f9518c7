"""Weights in buckets of lent memory, as checkpoint-engine sends them: by a sender written from its published protocol
(`Sender`), on shared memory; memory of a device by stand-ins for what opens it. The package itself stands in
tests/compat/test_checkpoint_engine.py."""

from __future__ import annotations

import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_door import http_door
from safetensors.torch import load_file
from torch import multiprocessing
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from phloem import Engine
from phloem.core.errors import BadRequest, PhloemError
from phloem.platforms import _lent
from phloem.rl import ipc
from phloem.rl._records import Made, records
from phloem.rl._shared import device_handle
from phloem.rl.payload import _Reader
from phloem.testing.checkpoints import tiny_checkpoint

zmq = pytest.importorskip("zmq", reason="buckets are announced over ZeroMQ")

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
ALIGN = 256
BUCKET = 1 << 17
HOST = torch.device("cpu")


@pytest.fixture(autouse=True)
def shared() -> Iterator[None]:
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    yield
    multiprocessing.set_sharing_strategy(before)


class Sender:
    """checkpoint-engine's side: binds, lends two halves of one memory by turns, tells of an error that it was told of.

    `ends`: how often it says that there is no more (once before 0.3, twice since). `few`: buckets after which it goes
    away without a word.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], ends: int = 2, few: int | None = None) -> None:
        self.memory = torch.zeros(2 * BUCKET, dtype=torch.uint8).share_memory_()
        self.handle = bytes(ForkingPickler.dumps(reduce_tensor(self.memory)))
        self.address = f"ipc://@checkpoint-engine-{uuid.uuid4()}-0.sock"
        self.handles = {"CPU": self.address}
        self.pickled: Callable[[Any], bytes] = pickle.dumps
        self.said: list[bytes] = []  # by the engine
        self._tensors, self._ends, self._few = tensors, ends, few
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self._socket.bind(self.address)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._socket.send(self.handle)
            for number, bucket in enumerate(self._buckets()):
                if number == self._few:
                    return
                places, half = [], number % 2 * BUCKET
                at = half
                for name, tensor in bucket:
                    rows = tensor.contiguous().view(-1).view(torch.uint8)
                    self.memory[at : at + len(rows)] = rows
                    places.append({"name": name, "dtype": tensor.dtype, "shape": tensor.shape, "offset": at})
                    at += -(-len(rows) // ALIGN) * ALIGN
                if self._heard():
                    self._socket.send_pyobj(RuntimeError("Some workers failed to update weights"))
                    return
                self._socket.send(self.pickled(places))
            self._heard()
            for _ in range(self._ends):
                self._socket.send_pyobj(None)
                self._heard()
        except zmq.Again:
            self.said.append(b"nothing for 30 s")
        finally:
            self._socket.close()
            self._context.term()

    def _heard(self) -> bytes:
        self.said.append(self._socket.recv())
        return self.said[-1]

    def _buckets(self) -> list[list[tuple[str, torch.Tensor]]]:
        found: list[list[tuple[str, torch.Tensor]]] = [[]]
        room = BUCKET
        for name, tensor in self._tensors.items():
            size = -(-tensor.nbytes // ALIGN) * ALIGN
            if size > room:
                found.append([])
                room = BUCKET
            found[-1].append((name, tensor))
            room -= size
        return found


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("new"), seed=9)


@pytest.fixture(scope="module")
def engine(old: Path) -> Iterator[Engine]:
    with Engine(model_path=str(old), max_total_tokens=2048) as found:
        yield found


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").update_weights_from_disk(str(request.getfixturevalue("old")))


def ids(engine: Engine) -> list[int]:
    answer: Any = engine.generate(input_ids=[5, 6, 7, 8], sampling_params=GREEDY)
    return answer["output_ids"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("ends", [1, 2])
def test_buckets_give_the_weights_of_a_fresh_start(engine: Engine, new: Path, ends: int) -> None:
    with Engine(model_path=str(new), max_total_tokens=2048) as other:
        want, sums = ids(other), other.weights_checker("checksum")
    before = ids(engine)
    with Sender(weights(new), ends) as sender:
        assert len(sender._buckets()) > 1
        engine.update_weights_from_ipc(sender.handles, weight_version="step-1")
        assert ids(engine) == want != before and engine.get_weight_version() == "step-1"
        assert engine.weights_checker("checksum") == sums
    assert sender.said == [b""] * (len(sender._buckets()) + 1 + ends)


@pytest.mark.slow
def test_http_both_ways_of_asking(engine: Engine, new: Path) -> None:
    before = ids(engine)
    with http_door(engine) as url:
        with Sender(weights(new)) as sender:
            body = {"zmq_handles": sender.handles, "flush_cache": True, "weight_version": "ipc"}
            answer = httpx.post(f"{url}/update_weights_from_ipc", json=body, timeout=60)
            assert answer.status_code == 200 and answer.json()["weight_version"] == "ipc", answer.text
            assert answer.json()["num_tensors"] == len(weights(new))
        assert ids(engine) != before
        with Sender(weights(new)) as sender:
            rpc = {"method": "update_weights_from_ipc", "args": [sender.handles], "timeout": 300.0}
            httpx.post(f"{url}/collective_rpc", json=rpc, timeout=60).raise_for_status()
        for wrong, told in (
            ({**rpc, "method": "sleep"}, "update_weights_from_ipc alone"),
            ({**rpc, "args": []}, "one argument"),
            ({**rpc, "args": [{"CPU": 1}]}, "is of texts"),
        ):
            answer = httpx.post(f"{url}/collective_rpc", json=wrong)
            assert answer.status_code == 400 and told in answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
def test_what_the_model_has_no_use_for_is_told_to_the_sender_and_changes_nothing(
    engine: Engine, new: Path, begun: bool
) -> None:
    before = ids(engine)
    tensors = {**weights(new), "model.nobody.weight": torch.ones(3)}
    if begun:
        engine.begin_weight_update()
    with Sender(tensors) as sender, pytest.raises(PhloemError, match=r"no weight is called 'model\.nobody\.weight'"):
        engine.update_weights_from_ipc(sender.handles)
    assert any(b"model.nobody.weight" in answer for answer in sender.said)
    if begun:
        _, message = engine.end_weight_update()
        assert message.startswith("0 tensors")  # nothing of what was sent is kept
    assert ids(engine) == before


@pytest.mark.slow
def test_a_sender_that_goes_away_in_the_middle_changes_nothing(engine: Engine, new: Path) -> None:
    before = ids(engine)
    with Sender(weights(new), few=1) as sender, pytest.raises(PhloemError, match="has gone in the middle"):
        engine.update_weights_from_ipc(sender.handles)
    assert ids(engine) == before


def test_nobody_at_the_socket_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "CONNECT_SECONDS", 0.3)
    with pytest.raises(BadRequest, match="nobody listens at ipc://@nobody"):
        ipc.receive("ipc://@nobody-is-here", HOST, lambda _: None, 1 << 20, threading.Event())
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(BadRequest, match="the engine stops"):
        ipc.receive("ipc://@nobody-is-here", HOST, lambda _: None, 1 << 20, stopped)


def received(sender: Sender, limit: int = 1 << 24, device: torch.device = HOST) -> list[tuple[str, torch.Tensor]]:
    return ipc.receive(sender.address, device, lambda _: None, limit, threading.Event())


TYPES = {
    "a": torch.arange(100, dtype=torch.float32).view(10, 10),
    "b": torch.ones(7, dtype=torch.bfloat16),
    "c": torch.arange(50_000, dtype=torch.float16),
    "d": torch.empty(0, 4),
    "e": torch.tensor(3.5),
    "f": torch.arange(60_000, dtype=torch.float16),
}


def test_tensors_are_what_was_sent_whatever_their_type() -> None:
    with Sender(TYPES) as sender:
        found = dict(received(sender))
    assert list(found) == list(TYPES)
    for name, tensor in TYPES.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_more_than_the_model_has_is_refused() -> None:
    with Sender(TYPES) as sender, pytest.raises(BadRequest, match="more than this model's weights"):
        received(sender, limit=1000)
    assert any(b"more than" in answer for answer in sender.said)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/phloem-ipc-was-here",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_handle_or_bucket_runs_nothing(protocol: int) -> None:
    sender = Sender({})
    sender.handle = pickle.dumps((Evil(), ()), protocol)
    with sender, pytest.raises(BadRequest, match=r"names|operation"):
        received(sender)
    sender = Sender(TYPES)
    sender.pickled = lambda places: pickle.dumps([Evil()], protocol)
    with sender, pytest.raises(BadRequest, match=r"names|operation"):
        received(sender)
    assert not os.path.exists("/tmp/phloem-ipc-was-here")


def test_memory_that_is_no_row_of_bytes_or_was_cut_short_is_refused() -> None:
    def lent(tensor: torch.Tensor) -> ipc.Memory:
        return ipc.lent_memory(bytes(ForkingPickler.dumps(reduce_tensor(tensor))), HOST)

    whole = torch.arange(64, dtype=torch.uint8).share_memory_()
    memory = lent(whole)
    assert memory.size == 64 and torch.equal(memory.read(8, 4), whole[8:12])
    memory.close()
    for wrong in (torch.ones(4), whole.view(8, 8), torch.empty(0, dtype=torch.uint8)):
        with pytest.raises(BadRequest, match="one row of bytes"):
            lent(wrong.share_memory_() if wrong.numel() else wrong)
    with pytest.raises(BadRequest, match="part of another one"):
        lent(whole[:32])
    with pytest.raises(BadRequest, match=r"_load_from_bytes"):  # a plain pickle of a tensor holds its values
        ipc.lent_memory(pickle.dumps(reduce_tensor(whole)), HOST)
    handle = bytes(ForkingPickler.dumps(reduce_tensor(whole)))
    memory = ipc.lent_memory(handle, HOST)
    name = next(arg for arg in records(handle)[1][1].args[0].args if isinstance(arg, bytes) and arg[:6] == b"/torch")
    os.truncate(f"/dev/shm{name.decode()}", 70)
    with pytest.raises(BadRequest, match="has shrunk"):
        memory.read(0, 64)
    memory.close()
    with pytest.raises(BadRequest, match="has 70 bytes, expected 128"):
        ipc.lent_memory(handle, HOST)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"offset": 2 * BUCKET}, "outside of the memory"),
        ({"offset": -1}, "no number from 0 on"),
        ({"shape": (1 << 40,)}, "outside of the memory"),
        ({"shape": None}, "without a shape"),
        ({"dtype": "float32"}, "no known type"),
        ({"name": 7}, "outside of the memory"),
    ],
)
def test_what_is_wrong_with_a_bucket_is_named(change: dict[str, Any], told: str) -> None:
    class Row:
        size = 2 * BUCKET

        def read(self, start: int, size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.uint8)

        def settle(self) -> None: ...
        def close(self) -> None: ...

    good = {"name": "a", "dtype": torch.float32, "shape": torch.Size([2]), "offset": 0}
    assert ipc.tensors_in(records(pickle.dumps([good])), Row(), 8)[0][1].shape == (2,)
    with pytest.raises(BadRequest, match=told):
        ipc.tensors_in(records(pickle.dumps([good | change])), Row(), 1 << 30)
    for found, want in (({}, "is a list"), ([1], "lacks name"), ([{"name": "a"}], "lacks dtype, shape, offset")):
        with pytest.raises(BadRequest, match=want):
            ipc.tensors_in(found, Row(), 8)


def test_which_socket_is_meant_for_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ipc.address_for({"whoever": "ipc://@a"}, HOST) == "ipc://@a"
    assert ipc.address_for({"GPU-1": "ipc://@a", "CPU": "ipc:///tmp/b.sock"}, HOST) == "ipc:///tmp/b.sock"
    with pytest.raises(BadRequest, match="no socket for CPU; it names GPU-1, GPU-2"):
        ipc.address_for({"GPU-1": "ipc://@a", "GPU-2": "ipc://@b"}, HOST)
    for address in ("tcp://10.0.0.1:5555", "ipc://", "inproc://x", "ipc://relative/path"):
        with pytest.raises(BadRequest, match="no socket of this machine"):
            ipc.address_for({"CPU": address}, HOST)
    monkeypatch.setattr(ipc, "name_of", lambda device: "GPU-2")
    card = torch.device("cuda", 1)
    assert ipc.address_for({"GPU-1": "ipc://@a", "GPU-2": "ipc://@b"}, card) == "ipc://@b"
    with pytest.raises(BadRequest, match="no socket for GPU-2"):
        ipc.address_for({"GPU-1": "ipc://@a"}, card)


# memory of a device

CARD = torch.device("cuda", 1)
COUNTER = b"/torch_12_34_5"


def card_handle(**change: Any) -> bytes:
    """What checkpoint-engine sends of a buffer on a GPU: plainly pickled, by the number that its process has for it."""
    parts = {
        "cls": torch.Tensor, "size": torch.Size([2 * BUCKET]), "stride": (1,), "offset": 0,
        "storage": torch.storage.TypedStorage, "dtype": torch.uint8, "device": 0, "handle": b"h" * 66,
        "bytes": 2 * BUCKET, "start": 512, "grad": False, "counter": COUNTER, "count_at": 0, "event": b"e" * 64,
        "wait": True,
    }  # fmt: skip
    return pickle.dumps((rebuild_cuda_tensor, tuple({**parts, **change}.values())))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for what torch does with a handle: `card["memory"]` is what it opens."""
    seen: dict[str, Any] = {"memory": None, "args": [], "settled": 0, "collected": 0}

    def rebuild(*args: Any) -> torch.Tensor:
        seen["args"].append(args)
        if seen["memory"] is None:
            raise RuntimeError("CUDA error: invalid device context")
        return seen["memory"]

    def count(name: str) -> Any:
        return lambda *_: seen.__setitem__(name, seen[name] + 1)

    monkeypatch.setattr(_lent, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(_lent, "name_of", lambda device: "GPU-1f-2e")
    monkeypatch.setattr(torch.cuda, "synchronize", count("settled"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", count("collected"))
    return seen


def test_a_device_s_memory_is_opened_on_the_engine_s_own_device_and_copied(card: dict[str, Any]) -> None:
    sender = Sender(TYPES)
    card["memory"], sender.handle = sender.memory, card_handle()
    with sender:
        found = dict(received(sender, device=CARD))
    assert all(torch.equal(found[name], tensor) for name, tensor in TYPES.items())
    ((cls, size, stride, offset, storage, dtype, device, *rest),) = card["args"]
    assert (cls, size, stride, offset) == (torch.Tensor, (2 * BUCKET,), (1,), 0)
    assert (storage, dtype, device) == (torch.storage.TypedStorage, torch.uint8, 1)  # 0 is the sender's number for it
    assert rest == [b"h" * 66, 2 * BUCKET, 512, False, COUNTER, 0, b"e" * 64, True]
    # Each bucket's copies are there before the sender may write the next one; the memory is given back at the end.
    assert card["settled"] == len(sender._buckets()) and card["collected"] == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": torch.float32, "bytes": 8 * BUCKET}, "one row of bytes"),
        ({"size": torch.Size([4 * BUCKET])}, "outside of its memory"),
        ({"handle": None}, "that is none"),
        ({"handle": b"h" * 5000}, "that is none"),
        ({"counter": b"/../etc/passwd"}, "not torch's"),
        ({"bytes": -1}, "no number from 0 on"),
        ({"device": "GPU-77"}, "the tensors are on GPU-77, this engine is on GPU-1f-2e"),
        ({}, "cannot be opened: CUDA error"),
    ],
)
def test_handles_of_a_device_are_checked_before_they_are_opened(
    card: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadRequest, match=told):
        ipc.lent_memory(card_handle(**change), CARD)
    assert len(card["args"]) == (0 if change else 1)


def test_tensors_of_a_payload_may_lie_on_the_device(card: dict[str, Any]) -> None:
    """As verl serialises them on a GPU: by the UUID of the device, each tensor with a handle of its own."""
    card["memory"] = torch.arange(6.0).view(2, 3)
    named = card_handle(dtype=torch.float32, size=torch.Size([2, 3]), stride=(3, 1), bytes=24, device="1f-2e")

    def lent(record: Any) -> torch.Tensor:
        return _lent.copied(device_handle(record), CARD)

    (_, args) = records(named)
    reader = _Reader(24, lent)
    found = reader.tensor(Made("rebuild_cuda_tensor", args))
    assert torch.equal(found, card["memory"]) and found is not card["memory"] and card["settled"] == 1
    with pytest.raises(BadRequest, match="more than the 24 bytes"):
        reader.tensor(Made("_rebuild_cuda_tensor_modified", args))
    with pytest.raises(BadRequest, match="on a GPU"):
        _Reader(24).tensor(Made("rebuild_cuda_tensor", args))


def test_a_device_s_memory_on_a_host_is_refused_with_the_remedy() -> None:
    with pytest.raises(BadRequest, match=r"on a GPU.*send tensor\.cpu\(\)"):
        ipc.lent_memory(card_handle(), HOST)


def test_a_late_second_end_is_answered_and_a_missing_one_holds_nobody_up() -> None:
    for ends in (1, 2):
        with Sender({"a": torch.ones(2)}, ends) as sender:
            assert [name for name, _ in received(sender)] == ["a"]
        assert sender.said == [b""] * (2 + ends)
