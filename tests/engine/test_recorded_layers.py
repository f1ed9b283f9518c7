"""Steps of models with latent attention, recurrent layers and keys that are chosen, recorded whole and in pieces, equal
eager ones, bit for bit: tokens, log probabilities, hidden states, and everything that is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import pool_for
from recorded_support import OPS, READING, STEPS, batches
from tape import TapeRecorder

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import StepOutput
from phloem.core.config import Config
from phloem.core.memory import Kept
from phloem.core.resolve import Decision
from phloem.engine.drafts.drafting import extend
from phloem.engine.recorded import choice
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.recorded.pieces import PieceGraphs
from phloem.engine.runner import ModelRunner
from phloem.kernels.ops import Ops
from phloem.kernels.reference_attention import choose_keys
from phloem.kernels.reference_attention import latent_attention as chosen
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.models._draft import AuxTap, LastTap
from phloem.platforms._facts import StepFacts
from phloem.platforms.cpu import Platform
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
LIMIT = 24  # buckets 1, 2, 4, 8, 16, 24
LATENT = ["deepseek_v2", "deepseek_v3", "deepseek_v32", "longcat_flash"]
RECURRENT = ["qwen3_next", "lfm2", "kimi_linear", "mamba", "mamba2", "falcon_h1", "jamba", "nemotron_h"]
BEHIND = ["gemma3n_text"]  # computes something behind its last attention


class Engine:
    """A runner on a model of its own, recorded or not."""

    def __init__(
        self, path: Path, ops: Ops, recorder: TapeRecorder | None, *, whole: bool = True, tap: str = ""
    ) -> None:
        self.model: Any = load_model(describe(str(path)), BuildContext(ops, torch.float32, CPU))
        if tap:
            first = extend(self.model.memory, [Kept(self.model.hidden_size, "float32")])
            fuse = ops.add
            self.model.tap = LastTap(first) if tap == "last" else AuxTap(first, (0, 1), lambda two: fuse(*two))
        self.pool = pool_for(self.model.memory, 64, 4, torch.float32, CPU)
        backend = BACKENDS.module("reference").Backend(ops, self.model.attention_specs, CPU, torch.float32)
        self.ways: list[Any] = []
        if recorder is not None:
            shared: tuple[Any, ...] = recorder, self.model, backend, self.pool
            if whole:
                facts = StepFacts(records_idle=True)
                self.ways.append(DecodeGraphs(*shared, facts, 4, 20, check=True))
            self.ways.append(PieceGraphs(*shared, LIMIT, decodes=not whole, check=True))
            with torch.inference_mode():
                for way in self.ways:
                    way.graphs.record_all()
        self.runner = ModelRunner(self.model, backend, self.pool, ops, 4, facts=Platform.facts, recorded=self.ways)

    def run(self) -> list[StepOutput]:
        found = [self.runner.launch(batch) for batch in batches(self.pool, *STEPS)]
        return [pending.result() for pending in found]


def kept(pool: KVPool) -> list[torch.Tensor]:
    """All of what is kept but scratch."""
    pages = [one[1:] for one in (*pool.keys, *pool.values) if isinstance(one, torch.Tensor) and one.dim() > 1]
    return pages + [tensor[1:] for tensors in pool.states for tensor in tensors]


def same(got: list[StepOutput], want: list[StepOutput]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.failed == b.failed == {}
        assert a.tokens.tolist() == b.tokens.tolist() and a.logprobs == b.logprobs
        assert {row: x.tolist() for row, x in a.hidden.items()} == {row: x.tolist() for row, x in b.hidden.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LATENT, *RECURRENT, *BEHIND])
def test_recorded_steps_equal_eager_ones(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path, recorder = tiny_checkpoint(name, tmp_path), TapeRecorder()
    whole = name not in ("deepseek_v32", *BEHIND)
    ours, eager = Engine(path, OPS, recorder, whole=whole), Engine(path, OPS, None)
    for way in ours.ways:
        assert way.graphs.refused is None and not way.graphs.given_up, way.graphs.describe()
    want, got = eager.run(), ours.run()
    same(got, want)
    for a, b in zip(kept(ours.pool), kept(eager.pool), strict=True):
        assert torch.equal(a, b)
    assert recorder.replays == 2 * len(STEPS)  # each is replayed once more to be compared
    # Again, over what the first run left in every buffer, and in the states of rows that begin.
    same(ours.run(), eager.run())


@pytest.mark.slow
@pytest.mark.parametrize("tap", ["last", "of layers"])
def test_states_that_a_head_reads_are_kept_between_pieces(tap: str, tmp_path: Path) -> None:
    path, recorder = tiny_checkpoint("llama", tmp_path), TapeRecorder()
    ours, eager = (Engine(path, OPS, found, tap=tap) for found in (recorder, None))
    for way in ours.ways:
        assert way.graphs.refused is None and not way.graphs.given_up, way.graphs.describe()
    same(ours.run(), eager.run())
    assert recorder.replays == 2 * len(STEPS)
    assert any(one.any() for one in kept(eager.pool)[-1:])
    for a, b in zip(kept(ours.pool), kept(eager.pool), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ops", "why"),
    [
        ("mamba2", READING, "mamba2_scan of the op table 'reading' read values on the host"),
        ("jamba", READING, "selective_scan of the op table 'reading' read values on the host"),
        ("deepseek_v32", OPS, "choose_keys, chosen_latent_attention of the op table 'rows' read values on the host"),
        ("mamba2", OPS, ""),
        ("deepseek_v32", replace(OPS, choose_keys=partial(choose_keys), chosen_latent_attention=partial(chosen)), ""),
    ],
)
def test_what_reads_values_runs_between_pieces_until_the_table_has_a_kernel(
    name: str, ops: Ops, why: str, tmp_path: Path
) -> None:
    """As the op table says, and not by a capture that fails."""
    pytest.importorskip("transformers")
    path, recorder = tiny_checkpoint(name, tmp_path), TapeRecorder()
    ops = replace(ops, recorder=lambda: recorder)
    ours = Engine(path, ops, None)
    backend = BACKENDS.module("reference").Backend(ops, ours.model.attention_specs, CPU, torch.float32)
    decisions: list[Decision] = []
    facts = StepFacts(records_idle=True)
    place = choice.Place(ours.model, backend, ours.pool, ops, facts, 1 << 24)
    ways = choice.choose(Config().runtime, place, 4, 20, LIMIT, decisions)
    told = {one.name: one for one in decisions}
    assert [way.decision for way in ways] == [*(["step_graphs"] if not why else []), "piecewise_graphs"]
    assert told["step_graphs"].value == ("off" if why else "on") and told["step_graphs"].reason.startswith(why)
    if not why:
        return
    with torch.inference_mode():
        ways[0].graphs.record_all()
    ours.runner = ModelRunner(ours.model, backend, ours.pool, ops, 4, facts=Platform.facts, recorded=ways)
    eager = Engine(path, ops, None)
    same(ours.run(), eager.run())
    assert recorder.replays == len(STEPS)  # steps that decode too
