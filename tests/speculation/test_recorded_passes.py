"""Passes of heads that draft, recorded on a device: what they draft, and what they leave for one another, is what eager
passes give, bit for bit; recordings fail, are left and are given up as those of other steps."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dflash_support
import draft_support
import numpy as np
import pytest
import torch
from pools import pool_for
from recorded_support import OPS
from tape import TapeRecorder
from test_mtp import with_mtp

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Batch, Drafting
from phloem.core.config import Config
from phloem.core.resolve import Decision
from phloem.core.speculation import Wanted
from phloem.engine.drafts import beside
from phloem.engine.drafts.drafting import DraftWork
from phloem.engine.transfer import LastTokens
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.platforms._facts import StepFacts
from phloem.speculation import assemble
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
READS = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__index__")
PAGES, ROWS, CHUNK = 8, 4, 24


def llama(path: Path, head: Callable[..., Path], **options: Any) -> tuple[Path, Path]:
    return tiny_checkpoint("llama", path / "target", num_hidden_layers=6), head(path / "head", **options)


def latent(path: Path) -> tuple[Path, Path]:
    target, _ = with_mtp(path, "deepseek_v3")
    return target, target


KINDS: dict[str, tuple[str, Callable[[Path], tuple[Path, Path]], dict[str, Any]]] = {
    "eagle": ("eagle", lambda path: llama(path, draft_support.eagle), {}),
    "eagle3": ("eagle3", lambda path: llama(path, draft_support.eagle3), {}),
    "eagle3, normalised": (
        "eagle3", lambda path: llama(path, draft_support.eagle3, norms=True, norm_output=True, vocab=0), {}
    ),
    "eagle, trees": ("eagle", lambda path: llama(path, draft_support.eagle), {"topk": 2, "steps": 3, "drafts": 6}),
    "mtp": ("mtp", latent, {}),
    "dflash": ("dflash", lambda path: llama(path, dflash_support.dflash), {}),
}  # fmt: skip


class Head:
    """A model with its head, both of the same files; `recorder` None: its passes run eagerly."""

    def __init__(self, kind: str, files: tuple[Path, Path], recorder: TapeRecorder | None, **place: Any) -> None:
        algorithm, _, options = KINDS[kind]
        target, head = describe(str(files[0])), files[1]
        ops: Any = OPS if recorder is None else OPS.__class__(**{**vars(OPS), "recorder": lambda: recorder})
        ctx = BuildContext(ops, torch.float32, CPU)
        self.model: Any = load_model(target, ctx)
        wanted = Wanted(algorithm, draft_model=None if algorithm == "mtp" else str(head), **{"drafts": 3, **options})
        load = assemble.beside(wanted, target)
        assert load is not None
        self.loaded = load(self.model, ctx, 512)
        spare = 0 if self.loaded.tree is None else self.loaded.tree.spare_pages(4)
        self.pool = pool_for(self.model.memory, 40 + spare, 4, torch.float32, CPU)
        generator = torch.Generator().manual_seed(5)
        for one in (*self.pool.keys, *self.pool.values):
            one.copy_(torch.randn(one.shape, generator=generator))
        backend = BACKENDS.get("reference")(ops, self.model.attention_specs, CPU, torch.float32)
        facts = StepFacts(records_idle=True, on_host=False)
        platform: Any = SimpleNamespace(facts=facts, memory=lambda: (1 << 24, 1 << 24))
        self.decisions: list[Decision] = []
        config = Config.from_flat({"check_step_graph": place.pop("check", False)})
        sizes = ROWS, PAGES, CHUNK, "" if recorder is not None else "eagerly, to compare"
        where = beside.Place(config, platform, backend, self.pool, ops, *sizes, None, place.pop("graph_bytes", 1 << 20))
        with torch.inference_mode():
            prepared = beside.prepare(self.loaded, where, self.decisions)
        assert prepared is not None
        self.prepared, self.ways = prepared, prepared.recorded

    def work(self, last: LastTokens) -> DraftWork:
        greedy = SimpleNamespace(greedy=np.ones(ROWS, bool), temperature=np.zeros(ROWS, np.float32))
        slots: Any = SimpleNamespace(columns=greedy)
        return self.prepared.make(slots, last)

    def drafts(self, *plans: tuple[list[int], list[int], int], on_host: bool = False) -> list[list[list[int]]]:
        """Of steps with these (drafts wanted, tokens read, known tokens) of each row: ids, how many, parents."""
        found, work = [], self.work(LastTokens(ROWS, CPU, on_host, None, drafts=8))
        with torch.inference_mode():
            for counts, lens, known in plans:
                made = work.run(self.batch(counts, lens, known))[0]
                parents = [] if made.parents is None else made.parents.tolist()
                found.append([made.input_ids.tolist(), made.query_lens.tolist(), parents])
        return found

    def batch(self, counts: list[int], lens: list[int], known: int) -> Batch:
        rows, ids = len(counts), np.arange(20, 20 + sum(lens), dtype=np.int32)
        ones = np.ones(rows, np.int32)
        starts = np.array([known - length for length in lens], np.int32)
        plan = Drafting(np.array(counts, np.int32), starts, np.array(lens, np.int32), ids)
        table = np.arange(1, 1 + PAGES * rows, dtype=np.int32).reshape(rows, PAGES)
        return Batch(
            5, np.arange(rows, dtype=np.int32)[::-1].copy(), ones, np.full(rows, known - 1, np.int32),
            np.arange(50, 50 + rows, dtype=np.int32), (table,) * len(self.pool.groups), ones,
            drafts=np.array(counts, np.int32), drafting=plan,
        )  # fmt: skip


# Passes of 1 to 17 tokens, at and around sizes that have pieces; rows that only catch up, and that want different
# numbers of drafts; one that is larger than all.
PLANS = [
    ([3], [1], 9), ([3, 2, 3], [1, 4, 1], 11), ([3, 1], [4, 4], 13), ([1, 3], [5, 4], 14), ([0, 0], [4, 3], 15),
    ([3, 0, 2, 1], [4, 4, 4, 4], 16), ([2, 2, 2, 2], [5, 4, 4, 4], 17), ([3, 3, 3, 3], [1, 1, 1, 1], 18),
    ([1, 0, 2, 1], [7, 6, 6, 7], 19),
]  # fmt: skip


def same_memory(a: KVPool, b: KVPool) -> None:
    for one, other in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
        assert torch.equal(one[1:], other[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_passes_draft_what_eager_ones_do(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    files, recorder = KINDS[kind][1](tmp_path), TapeRecorder()
    ours, eager = Head(kind, files, recorder), Head(kind, files, None)
    assert not eager.ways
    graphs = {type(way).__name__: way.graphs.facts() for way in ours.ways}
    told = [one.name for one in ours.decisions]
    assert ("DecodeGraphs" in graphs) == ("draft_step_graphs" in told) == (kind != "dflash")
    assert "PieceGraphs" in graphs and "draft_piecewise_graphs" in told
    for facts in graphs.values():
        assert facts["recorded"] == facts["sizes"] and not facts["given_up"] and facts["refused"] is None
    assert eager.drafts(*PLANS) == ours.drafts(*PLANS)
    same_memory(ours.pool, eager.pool)
    # Every pass but those of more tokens than pieces are recorded for; of blocks, whose places count, some have more.
    assert recorder.replays == 6 if kind == "dflash" else recorder.replays > 2 * len(PLANS)
    before = recorder.replays
    # Over what is left in every buffer.
    assert eager.drafts(*PLANS[::-1]) == ours.drafts(*PLANS[::-1])
    same_memory(ours.pool, eager.pool)
    assert recorder.replays == 2 * before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_each_is_compared_with_an_eager_one_if_asked(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    files, recorder = KINDS[kind][1](tmp_path), TapeRecorder()
    checked, eager = Head(kind, files, recorder, check=True), Head(kind, files, None)
    assert checked.drafts(*PLANS) == eager.drafts(*PLANS)
    assert recorder.replays % 2 == 0


@pytest.mark.slow
def test_what_cannot_be_recorded_runs_eagerly(tmp_path: Path) -> None:
    """No memory at a size; none at all; a request that comes while one is recorded."""
    pytest.importorskip("transformers")
    files = KINDS["eagle"][1](tmp_path)
    want = Head("eagle", files, None).drafts(*PLANS)
    failing = Head("eagle", files, TapeRecorder(torch.OutOfMemoryError("no room")))
    for way in failing.ways:
        assert not way.graphs.facts()["recorded"] and "out of memory" in str(way.graphs.facts()["refused"])
    without = Head("eagle", files, TapeRecorder(), graph_bytes=0)
    assert all("budget" in str(way.graphs.refused) for way in without.ways)
    left = Head("eagle", files, TapeRecorder())
    for way in left.ways:
        way.drop()
        way.graphs.looks.waiting = lambda: True
        with torch.inference_mode():
            way.graphs.record_all()
        assert not way.graphs.facts()["recorded"] and way.graphs.refused is None and not way.graphs.given_up
    for one in (failing, without, left):
        assert one.drafts(*PLANS) == want
    for way in left.ways:
        way.graphs.looks.waiting = lambda: False
        with torch.inference_mode():
            way.graphs.record_all()
        assert way.graphs.facts()["recorded"] == way.graphs.facts()["sizes"]
    assert left.drafts(*PLANS) == Head("eagle", files, None).drafts(*PLANS)


def counted_run(head: Head, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a step of three rows with three drafts sends something up, and reads something."""
    last, seen = LastTokens(ROWS, CPU, False, None, drafts=8), Counter[str]()

    def counted(real: Any, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen[name] += 1
            return real(*args, **options)

        return call

    last.up, last.into, last.down = (counted(getattr(last, name), name) for name in ("up", "into", "down"))
    work, batch = head.work(last), head.batch([3, 3, 3], [1, 1, 1], 9)
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), name))
    with torch.inference_mode():
        made, _ = work.run(batch, late=True)
    monkeypatch.undo()
    assert made.query_lens.tolist() == [4, 4, 4]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_pass_makes_two_copies_and_waits_for_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inputs up, and where its drafts and what it leaves go."""
    pytest.importorskip("transformers")
    head = Head(kind, KINDS[kind][1](tmp_path), TapeRecorder())
    assert counted_run(head, monkeypatch) == {"into": 3, "up": 3}


@pytest.mark.slow
def test_a_tree_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    head = Head("eagle, trees", KINDS["eagle, trees"][1](tmp_path), TapeRecorder())
    found = counted_run(head, monkeypatch)
    assert found["into"] == 3 and {name: found[name] for name in READS if found[name]} == {"cpu": 1, "numpy": 1}
    # Of each pass but the first: where to choose from, pages, and tokens and places; of each how likely tokens are.
    assert found["up"] <= 3 + 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle", "eagle3", "eagle, trees", "dflash"])
def test_a_device_drafts_what_the_host_does(kind: str, tmp_path: Path) -> None:
    """Trees too, whose drafts are gone on from where the device chooses: nodes, parents and what is kept."""
    pytest.importorskip("transformers")
    files = KINDS[kind][1](tmp_path)
    there, here = Head(kind, files, None), Head(kind, files, None)
    assert there.drafts(*PLANS) == here.drafts(*PLANS, on_host=True)
    same_memory(there.pool, here.pool)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle, trees", "dflash"])
def test_what_ends_leaves_no_graphs(kind: str, tmp_path: Path) -> None:
    """They go with the last reference, without the collector."""
    pytest.importorskip("transformers")
    head = Head(kind, KINDS[kind][1](tmp_path), TapeRecorder())
    work = head.work(LastTokens(ROWS, CPU, False, None, drafts=8))
    with torch.inference_mode():
        work.run(head.batch([3, 1], [1, 4], 9))
    graphs = [weakref.ref(step.graph) for way in head.ways for step in way.graphs._steps.values()]
    assert graphs and all(one() is not None for one in graphs)
    gc.collect()
    gc.disable()
    try:
        del head, work
        assert [one() for one in graphs] == [None] * len(graphs)
    finally:
        gc.enable()
