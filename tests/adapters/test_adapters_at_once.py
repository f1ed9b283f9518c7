"""Many callers who load, unload and use adapters of the same names at once, broken ones and folders that go among them:
each answer is that of one adapter or of none, and in the end nothing is left."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import write_adapter
from safetensors.torch import load_file, save_file

from phloem import Engine
from phloem.core.errors import PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("peft", reason="PEFT writes the adapters")
pytestmark = pytest.mark.slow
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
NAMES = ["one", "the/other: name%20 ñ"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def good(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    kinds: list[dict[str, Any]] = [{}, {"r": 8}, {"r": 3, "use_dora": True}]
    room = tmp_path_factory.mktemp("good")
    return [write_adapter(model, room / str(at), at, strong=2.0, **kind) for at, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def bad(good: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    room = tmp_path_factory.mktemp("bad")
    cut, none = (Path(shutil.copytree(good[0], room / name)) for name in ("cut", "none"))
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    tensors = load_file(none / file.name)
    first = min(tensors)
    tensors[first] = torch.full_like(tensors[first], float("nan"))
    save_file(tensors, none / file.name)
    return [cut, none, room / "missing"]


class Caller(threading.Thread):
    def __init__(self, engine: Engine, good: list[Path], bad: list[Path], room: Path, seed: int) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.wrong: list[str] = []
        self._engine, self._good, self._bad, self._room = engine, good, bad, room
        self._random = random.Random(seed)

    def run(self) -> None:
        for at in range(12):
            try:
                self._one(self._random.choice(NAMES), self._room / f"{self.name}-{at}")
            except Exception as error:  # no such name by now; whoever loads what is broken is told
                if not isinstance(error, PhloemError) or error.status != 400:
                    self.wrong.append(repr(error))

    def _one(self, name: str, copy: Path) -> None:
        kind, engine = self._random.randrange(8), self._engine
        if kind < 2:
            engine.load_lora_adapter(name, str(self._random.choice(self._good)), pinned=kind == 0)
        elif kind == 2:
            engine.unload_lora_adapter(name)
        elif kind == 3:
            with pytest.raises(PhloemError):
                engine.load_lora_adapter(name, str(self._random.choice(self._bad)))
        elif kind == 4:
            shutil.copytree(self._good[0], copy)
            goes = threading.Timer(0.01 * self._random.random(), shutil.rmtree, (copy,))
            goes.start()
            try:
                engine.load_lora_adapter(name, str(copy))
            finally:
                goes.join()
        else:
            answer: Any = engine.generate("The quick", GREEDY, lora_path=self._random.choice([name, None]))
            self.seen.append(tuple(answer["output_ids"]))


@pytest.mark.parametrize("places", [1, 2])
def test_callers_at_once(model: Path, good: list[Path], bad: list[Path], tmp_path: Path, places: int) -> None:
    settings: dict[str, Any] = {"max_loaded_loras": places, "max_total_tokens": 4096, "debug_invariants": True}
    with Engine(model_path=str(model), enable_lora=True, random_seed=1, **settings) as engine:

        def ids(name: str | None = None) -> tuple[int, ...]:
            answer: Any = engine.generate("The quick", GREEDY, lora_path=name)
            return tuple(answer["output_ids"])

        plain = ids()
        known = {plain}
        for path in good:
            engine.load_lora_adapter("known", str(path))
            known.add(ids("known"))
        engine.unload_lora_adapter("known")
        callers = [Caller(engine, good, bad, tmp_path, seed) for seed in range(5)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(120)
        assert not any(caller.is_alive() for caller in callers)
        assert [wrong for caller in callers for wrong in caller.wrong] == []
        assert {seen for caller in callers for seen in caller.seen} <= known
        for name in NAMES:
            engine.load_lora_adapter(name, str(good[0]))
            engine.unload_lora_adapter(name)
        assert ids() == plain
        state: Any = engine.get_server_info()
        assert "'loras_loaded': 0" in str(state) and "'lora_bytes': 0" in str(state)
