"""Weights from files to a device by pinned pieces and several readers: every entry arrives, in order, once."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.models._sources import DummySource, stored_in
from phloem.platforms._staging import Stager, _run
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")


class Cuda:
    """Streams and events that note who waited for whom; copies happen at once."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lock = threading.Lock()
        self.events = 0
        self.local = threading.local()

    def note(self, text: str) -> None:
        with self.lock:
            self.log.append(text)

    def Stream(self, device: Any) -> Any:
        return Stream(self, "copies")

    def current_stream(self, device: Any) -> Any:
        return Stream(self, "main")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        self.local.name = stream.name
        yield
        self.local.name = ""

    def Event(self) -> Any:
        return Event(self)


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Any) -> None:
        self.cuda.note(f"{self.name} waits for {other.name}")


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def record(self, stream: Any) -> None:
        assert self.cuda.local.name == stream.name == "copies"
        self.cuda.note("copied")

    def synchronize(self) -> None:
        self.cuda.note("host waits")


def stager(cuda: Cuda | None = None, piece: int = 96, readers: int = 3) -> Stager:
    return Stager(CPU, cuda or Cuda(), pin=False, readers=readers, piece=piece)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_any_part_of_any_tensor_arrives(tmp_path: Path, dtype: torch.dtype, to: torch.dtype) -> None:
    random = np.random.default_rng(0)
    moves = stager()
    for number in range(40):
        shape = tuple(int(n) for n in random.integers(1, 12, random.integers(1, 4)))
        values = torch.from_numpy(random.standard_normal(shape).astype(np.float32)).to(dtype)
        path = tmp_path / f"{number}"
        path.write_bytes(b"x" * 24 + values.view(torch.uint8).numpy().tobytes())
        index: list[int | slice] = []
        for size in shape:
            kind = random.integers(0, 4)
            start = int(random.integers(0, size))
            stop = int(random.integers(start + 1, size + 1))
            step = int(random.integers(1, 3))
            index.append([slice(0, size, 1), slice(start, stop, 1), slice(start, stop, step), start][kind])
        if all(isinstance(at, int) for at in index):
            index[0] = slice(0, shape[0], 1)
        for part in (None, tuple(index)):
            got = moves.load(path, 24, shape, dtype, part, to)
            want = values if part is None else values[part]
            assert got.dtype == to and got.is_contiguous() and got.shape == want.shape
            assert torch.equal(got.float(), want.to(to).float())
    moves.close()


def test_a_run_is_what_lies_together_in_the_file() -> None:
    everything = slice(0, 6, 1)
    assert _run((4, 6), (slice(1, 3, 1), everything)) == ((2, 6), 6)
    assert _run((4, 6), (2, slice(1, 3, 1))) == ((2,), 13)
    assert _run((4, 6), (slice(2, 3, 1), slice(1, 3, 1))) == ((1, 2), 13)
    assert _run((4, 6), (slice(0, 2, 1), slice(1, 3, 1))) is None
    assert _run((4, 6), (slice(0, 4, 2), everything)) is None


def test_a_buffer_is_written_again_only_when_its_copy_has_ended(tmp_path: Path) -> None:
    values = torch.arange(1000, dtype=torch.float32)
    (tmp_path / "x").write_bytes(values.numpy().tobytes())
    cuda = Cuda()
    moves = stager(cuda, piece=400, readers=1)  # two buffers, ten pieces
    assert torch.equal(moves.load(tmp_path / "x", 0, (1000,), torch.float32, None, torch.float32), values)
    assert cuda.log[0] == "copies waits for main" and cuda.log[-1] == "main waits for copies"
    assert cuda.log[1:-1] == ["copied", "copied", *["host waits", "copied"] * 8]
    cuda.log.clear()
    moves.close()
    assert cuda.log == ["host waits"] * 2


def test_a_file_that_is_too_short_is_an_error_and_the_readers_go_on(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    moves = stager()
    with pytest.raises(OSError, match="too short"):
        moves.load(tmp_path / "x", 0, (1000,), torch.float32, None, torch.float32)
    assert moves.load(tmp_path / "x", 0, (25,), torch.float32, None, torch.float32).shape == (25,)
    moves.close()


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "gemma3_text"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param), shards=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_same_weights_whichever_way_they_came(path: Path, dtype: torch.dtype) -> None:
    cuda = Cuda()
    moves = stager(cuda, piece=4096)
    checkpoint = describe(str(path))
    plain = load_model(checkpoint, BuildContext(Ops(), dtype, CPU))
    staged = load_model(checkpoint, BuildContext(Ops(), dtype, CPU, stager=moves))
    moves.close()
    assert cuda.log.count("copied") > 20
    for name in plain.weight_names():
        assert torch.equal(plain.get_weight(name), staged.get_weight(name)), name


def test_a_file_that_was_cut_off_is_named(path: Path, tmp_path: Path) -> None:
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    places = stored_in(first)
    assert places and all(place.path == first for place in places.values())
    first_name = min(places, key=lambda name: places[name].offset)
    assert places[first_name].offset == 8 + int.from_bytes(first.read_bytes()[:8], "little")

    class Broken:
        def load(self, *args: Any) -> Any:
            raise OSError("input/output error")

    ctx = BuildContext(Ops(), torch.float32, CPU, stager=Broken())
    with pytest.raises(ModelLoadError, match=r"safetensors: .*input/output error"):
        load_model(describe(str(tmp_path)), ctx)


def test_dummy_weights_are_drawn_where_the_model_is() -> None:
    meta = DummySource("w", (4, 6), device=torch.device("meta")).take(None, torch.bfloat16)
    assert meta.is_meta and meta.shape == (4, 6) and meta.dtype == torch.bfloat16
    norm = DummySource("n", (4,), role="norm", device=torch.device("meta")).take(None, torch.float32)
    assert norm.is_meta
    one, two = (DummySource("w", (300, 6)).take(None, torch.float32) for _ in range(2))
    part = DummySource("w", (300, 6)).take((slice(10, 20, 1), slice(0, 6, 1)), torch.float32)
    assert torch.equal(one, two) and torch.equal(part, one[10:20]) and 0.018 < float(one.std()) < 0.022
