"""Recordings of whole decode steps are left between two layers when somebody waits (`engine/recorded/looks.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pools import pool_for

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.kernels.graph import Interrupted
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.platforms._facts import StepFacts
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")


class Graph:
    bytes = 1

    def __init__(self, fn: Any) -> None:
        self._fn = fn

    def replay(self, *sizes: int) -> None:
        self._fn()


class Recorder:
    cuts = resizes = False

    def record(self, fn: Any) -> tuple[Graph, Any]:
        fn()
        return Graph(fn), fn()


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "mamba2"])
def test_a_decode_recording_is_left_between_layers_and_made_again(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model: Any = load_model(describe(str(tiny_checkpoint(name, tmp_path))), BuildContext(Ops(), torch.float32, CPU))
    pool = pool_for(model.memory, 4, 4, torch.float32, CPU)
    backend = BACKENDS.module("reference").Backend(Ops(), model.attention_specs, CPU, torch.float32)
    table = DecodeGraphs(Recorder(), model, backend, pool, StepFacts(records_idle=True), 4, 2)  # type: ignore[arg-type]
    looked: list[int] = []
    comes = 2  # at the second layer

    def waiting() -> bool:
        looked.append(1)
        return len(looked) >= comes

    table.graphs.looks.waiting = waiting
    with torch.inference_mode():
        table.graphs.get(3)
        assert table.graphs.idle() and table.graphs.get(3) is None and len(looked) == 2
        assert not table.graphs.given_up  # that is no failure
        comes = 1000
        assert table.graphs.idle()
        recorded = table.graphs.get(3)
        assert recorded is not None
        layers = (len(looked) - 2) // 2  # once to warm up, once to record
        assert layers == len(model.memory)
        before = len(looked)
        recorded.replay()
        assert len(looked) == before  # nobody looks outside of a recording


def test_layers_are_called_as_ever_by_who_looks() -> None:
    from phloem.engine.recorded.looks import Looks, Watched

    calls: list[Any] = []

    class Memory:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, *args)) or name

    looks = Looks()
    watched = Watched(Memory(), looks)  # type: ignore[arg-type]
    assert watched.attend(1, 2) == "attend"  # type: ignore[arg-type]
    assert watched.attend_latent(1, 2, 3, 4, 5, 6) == "attend_latent"  # type: ignore[arg-type]
    assert watched.choose(1, 2) == "choose" and watched.kept(4) == "kept" and watched.state(5) == "state"  # type: ignore[arg-type]
    watched.keep(1, 3)  # type: ignore[arg-type]
    assert calls == [("attend", 1, 2), ("attend_latent", 1, 2, 3, 4, 5, 6), ("choose", 1, 2), ("kept", 4),
                     ("state", 5), ("keep", 1, 3)]  # fmt: skip
    looks.waiting = lambda: True
    with pytest.raises(Interrupted), looks.recording():
        watched.state(0)
