"""Whether steps are recorded in pieces, and recording everything before the engine says it is ready."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from phloem.core import resolve
from phloem.engine.pieces import PieceGraphs
from phloem.kernels.graph import PieceRecorder
from phloem.models import CutModel
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.attention import AttentionBackend
    from phloem.core.config import RuntimeConfig
    from phloem.core.resolve import Decision
    from phloem.engine.decode import DecodeGraphs
    from phloem.kernels.graph import GraphRecorder
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model

_log = log.get("engine.recording")

BUDGET_SHARE = 4  # pieces take up to this part of what is free; eager steps, which are the longest, need the rest


@dataclass(frozen=True)
class Place:
    """What steps run with. `free`: bytes of device memory left when weights and KV pool are there."""

    model: Model
    backend: AttentionBackend
    pool: KVPool
    ops: str
    free: int


def why_none(runtime: RuntimeConfig, ops: str) -> str:
    """Why there is no recorder."""
    return "as asked" if runtime.disable_step_graph else f"the op table {ops!r} cannot record"


def pieces(
    runtime: RuntimeConfig, recorder: GraphRecorder | None, place: Place, chunk: int, decisions: list[Decision]
) -> PieceGraphs | None:
    """Prefill and mixed steps in recorded pieces, where the recorder can cut and the model says where."""
    model, refusal = place.model, None
    if runtime.disable_piecewise_cuda_graph:
        refusal = "as asked"
    elif recorder is None:
        refusal = why_none(runtime, place.ops)
    elif not isinstance(recorder, PieceRecorder):
        refusal = (
            f"the op table {place.ops!r} records whole decode steps; a prefill here computes longer than it launches"
        )
    elif not isinstance(model, CutModel):
        refusal = "the model does not say where its last attention ends"
    decision = resolve.piecewise_tokens(refusal, runtime.piecewise_cuda_graph_max_tokens, chunk)
    decisions.append(decision)
    if refusal is not None or not isinstance(recorder, PieceRecorder) or not isinstance(model, CutModel):
        return None
    return PieceGraphs(
        recorder,
        model,
        place.backend,
        place.pool,
        decision.value,
        budget=place.free // BUDGET_SHARE,
        check=runtime.check_step_graph,
    )


def record_all(decode: DecodeGraphs | None, pieces: PieceGraphs | None, decisions: list[Decision]) -> None:
    """Record everything now; the decisions then say what there is, what memory it takes, and how long it took."""
    for name, table in (("step_graphs", decode), ("piecewise_graphs", pieces)):
        if table is None:
            continue
        start = perf_counter()
        with torch.inference_mode():
            table.graphs.record_all(_progress(name, start))
        number = next(number for number, decision in enumerate(decisions) if decision.name == name)
        why = f"{table.graphs.describe()}; before ready, as asked, in {perf_counter() - start:.1f} s"
        decisions[number] = replace(decisions[number], reason=why)


def _progress(name: str, start: float) -> Callable[[int, int], None]:
    """Log how many are recorded, at most every second, and when all are."""
    last = start

    def note(done: int, total: int) -> None:
        nonlocal last
        now = perf_counter()
        if done == total or now - last > 1:
            last = now
            _log.info("recording %s: %d of %d, %.1f s", name, done, total, now - start)

    return note
