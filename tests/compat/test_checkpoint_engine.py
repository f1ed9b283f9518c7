"""checkpoint-engine's own `ParameterServer`, from its wheel, updates a server: registers a checkpoint, gathers, and
hands it over bucket by bucket through `/collective_rpc`, which its own `request_inference_to_update` calls.

There is no GPU here: what it asks of one (`DeviceManager`, pinned memory, CUDA's handles) is given by the host, with
gloo and shared memory. Its buckets, its conversation and its ends are its own.

    pip download --no-deps checkpoint-engine==0.4.2 -d build/trainers
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_door import http_door
from safetensors.torch import load_file, save_file

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.utils.sockets import bind

pytestmark = pytest.mark.slow
WHEELS = Path(__file__).parents[2] / "build" / "trainers"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}

DRIVER = """
import contextlib, gc, logging, os, sys, types
from multiprocessing.reduction import ForkingPickler
import torch, zmq
from torch.multiprocessing.reductions import reduce_tensor

wheel, url, checkpoint, port, room = sys.argv[1:6]
sys.path.insert(0, wheel)
try:
    import loguru
except ImportError:  # it logs, and nothing else
    made = types.ModuleType("loguru")
    made.logger = logging.getLogger("checkpoint_engine")
    sys.modules["loguru"] = made
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(int(port) - 1)}
torch.multiprocessing.set_sharing_strategy("file_system")
empty = torch.empty
torch.empty = lambda *sizes, pin_memory=False, **more: empty(*sizes, **more)
# A handle of shared memory is one only in ForkingPickler's hands; of CUDA's memory a plain pickle holds it.
zmq.Socket.send_pyobj = lambda self, thing, *_, **__: self.send(bytes(ForkingPickler.dumps(thing)))

from checkpoint_engine import ps


class Module:
    def __getattr__(self, name):
        return lambda *_: 0

    device_count = staticmethod(lambda: 1)
    mem_get_info = staticmethod(lambda *_: (int(room), int(room)))
    get_device_properties = staticmethod(lambda *_: types.SimpleNamespace(uuid="0-host-0"))


class Host:
    device_type, backend, device_module = "cpu", "gloo", Module()
    supports_inplace_pin = supports_device_p2p = staticmethod(lambda: False)
    supports_device_ipc = staticmethod(lambda: True)
    ipc_collect = host_empty_cache = staticmethod(gc.collect)


class Handler(contextlib.nullcontext):
    def __enter__(self):
        return self

    export = staticmethod(reduce_tensor)


def no_store(*_):
    raise ImportError("no transfer engine")


ps.DeviceManager, ps.P2PStore = Host, no_store
ps.build_ipc_handler = lambda *_: Handler()
from checkpoint_engine import request_inference_to_update

sent = []


def ask(paths):
    sent.append(paths)
    request_inference_to_update(f"{url}/collective_rpc", dict(paths))


server = ps.ParameterServer(rank=0, world_size=1, auto_pg=True)
server.register_checkpoint("new", files=[checkpoint])
server.gather_metas("new")
try:
    server.update("new", ask)
except RuntimeError as error:
    print("failed:", error)
else:
    print("updated", sent)
"""


@pytest.fixture(scope="module")
def wheel() -> str:
    found = sorted(WHEELS.glob("checkpoint_engine-*.whl"))
    if not found:
        pytest.skip(f"no wheel of checkpoint-engine: pip download --no-deps checkpoint-engine -d {WHEELS}")
    return str(found[-1])


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def served(old: Path) -> Iterator[tuple[Engine, str]]:
    with Engine(model_path=str(old), max_total_tokens=2048) as engine, http_door(engine) as url:
        yield engine, url


def drive(wheel: str, url: str, checkpoint: Path, room: int) -> str:
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    command = [sys.executable, "-c", DRIVER, wheel, url, str(checkpoint), str(port), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def ids(engine: Engine) -> list[int]:
    answer: Any = engine.generate(input_ids=[5, 6, 7, 8], sampling_params=GREEDY)
    return answer["output_ids"]


@pytest.mark.parametrize("room", [1 << 18, 1 << 30])  # bytes that it finds free: many small buckets, and one
def test_its_parameter_server_updates_an_engine(
    served: tuple[Engine, str], wheel: str, old: Path, tmp_path: Path, room: int
) -> None:
    engine, url = served
    new = tiny_checkpoint("llama", tmp_path / "new", seed=9)
    with Engine(model_path=str(new), max_total_tokens=2048) as other:
        want, sums = ids(other), other.weights_checker("checksum")
    before = ids(engine)
    assert "updated" in drive(wheel, url, new / "model.safetensors", room)
    assert ids(engine) == want != before and engine.weights_checker("checksum") == sums
    engine.update_weights_from_disk(str(old))
    assert ids(engine) == before


def test_what_the_model_has_not_is_told_and_changes_nothing(
    served: tuple[Engine, str], wheel: str, tmp_path: Path
) -> None:
    engine, url = served
    before = ids(engine)
    new = tiny_checkpoint("llama", tmp_path / "new", seed=9)
    tensors = load_file(new / "model.safetensors")
    tensors["a.first.weight"] = tensors["model.norm.weight"].clone()  # in the first bucket
    save_file(tensors, tmp_path / "wrong.safetensors")
    assert "failed: Failed to update weights" in drive(wheel, url, tmp_path / "wrong.safetensors", 1 << 18)
    assert ids(engine) == before
