"""Whether steps are recorded, whole or in pieces, and recording everything before the engine says it is ready."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

from phloem.core import resolve
from phloem.core.resolve import Decision
from phloem.engine.recorded.agreed import AgreedRecorder
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.recorded.flexible import FlexibleSteps
from phloem.engine.recorded.pieces import PieceGraphs
from phloem.kernels.shapes_only import reads_values
from phloem.layers.weight import Layer
from phloem.models import CutModel
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.core.config import Config, RuntimeConfig
    from phloem.distributed.comm import Comm
    from phloem.engine.inputs import Step
    from phloem.engine.ranks.stages import Together
    from phloem.engine.recorded.graphs import RecordedStep, StepGraphs
    from phloem.kernels.graph import GraphRecorder
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model
    from phloem.platforms._facts import StepFacts

_log = log.get("engine.recorded")

FLEXIBLE_TOKENS = 1024  # a step of more computes far longer than Python takes to call its ops
READY_SECONDS = 8.0  # for recording before the engine is ready
BUDGET_SHARE = 4  # pieces take up to this part of what is free; eager steps, which are the longest, need the rest


class RecordedWay(Protocol):
    """A way of running steps by recordings. Used by one runner's thread alone."""

    decision: str  # the name of the decision that tells of it
    graphs: StepGraphs[Any, Any]

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor | None:
        """As `forward.Way.run`."""
        ...

    def drop(self) -> None:
        """Forget what is recorded, because weights moved in memory."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        ...


class SharedWay(RecordedWay, Protocol):
    """One of which ranks know by which recording a step runs."""

    def found(self, step: Step) -> RecordedStep[Any, Any] | None:
        """The recording that `run` takes."""
        ...

    def replayed(self, step: Step, found: RecordedStep[Any, Any], ready: Callable[[], None]) -> Tensor:
        """As `run`, by that one."""
        ...


@dataclass(frozen=True)
class Place:
    """What steps run with. `free`: bytes of device memory left when weights and KV pool are there; `graph_bytes`: how
    many of them graphs may take (None: nothing was measured, and only pieces have a bound, a part of `free`); `shares`:
    attention to pages that rows share is done once for all of them; `adapts`: rows may have adapters; `eager`: why
    nothing can be recorded; `together`: by what all ranks record the same, where several do.
    """

    model: Model
    backend: AttentionBackend
    pool: KVPool
    ops: Ops
    facts: StepFacts
    free: int
    graph_bytes: int | None = None
    shares: bool = False
    adapts: bool = False
    eager: str = ""
    together: Comm | None = None


def choose(
    runtime: RuntimeConfig, place: Place, running: int, pages: int, chunk: int, decisions: list[Decision]
) -> list[RecordedWay]:
    """Decode steps as graphs, prefill and mixed steps in pieces or as one step of variable size, where each can be.

    `running`: most rows of a decode step; `pages`: most pages of a row; `chunk`: most tokens of a step.
    """
    recorder = _recorder(runtime, place)
    decode = _decode(runtime, recorder, place, running, pages, decisions)
    if decode is not None and recorder is not None and recorder.resizes:
        tokens = min(chunk, FLEXIBLE_TOKENS)
        why = f"recorded on first use, for up to {tokens} tokens: longer steps gain nothing"
        decisions.append(Decision("prefill_graph", "on", why))
        check = runtime.check_step_graph
        whole = place.model, place.backend, place.pool, place.facts
        ways: list[RecordedWay] = [decode, FlexibleSteps(recorder, *whole, tokens, running, pages, check)]
        if place.adapts:
            decisions.append(Decision("adapter_graph", "on", "recorded on first use, with adapters as its data"))
            ways.append(FlexibleSteps(recorder, *whole, tokens, running, pages, check, adapted=True))
        return ways
    if place.adapts:
        decisions.append(Decision("adapter_graph", "off", "steps with adapters run eagerly on this device"))
    pieces = _pieces(runtime, recorder, place, chunk, decode is None, decisions)
    shared = None
    if decode is not None and place.shares:
        decisions.append(Decision("shared_step_graphs", "on", f"recorded {_when(place)}"))
        shared = _decode_graphs(runtime, recorder, place, running, pages, shared=True)
    return [way for way in (shared, decode, pieces) if way is not None]


def in_pieces(runtime: RuntimeConfig, place: Place, chunk: int, decisions: list[Decision]) -> list[RecordedWay]:
    """Steps of a model that has none but those that run in pieces, where it can."""
    pieces = _pieces(runtime, _recorder(runtime, place), place, chunk, False, decisions)
    return [] if pieces is None else [pieces]


def shared_ways(ways: Sequence[RecordedWay]) -> list[SharedWay]:
    """Those of them, in their order."""
    return [way for way in ways if isinstance(way, DecodeGraphs | PieceGraphs)]


def _recorder(runtime: RuntimeConfig, place: Place) -> GraphRecorder | None:
    off = runtime.disable_step_graph or place.eager or place.ops.recorder is None
    return None if off or place.ops.recorder is None else place.ops.recorder()


def _agreed(recorder: GraphRecorder, place: Place, budget: int | None) -> GraphRecorder:
    return recorder if place.together is None else AgreedRecorder(recorder, place.together, budget)


def among_ranks(
    config: Config, whole: Together, place: Place, running: int, pages: int, chunk: int, decisions: list[Decision]
) -> FlexibleSteps | None:
    """Steps of ranks that share out each layer as one recorded step of variable size, on every rank, of which sums over
    all ranks are calls like the others; None: they run eagerly. It does not matter to one rank what another does: the
    sums are the same ones."""
    runtime, ops, comm = config.runtime, place.ops, whole.comm
    if runtime.disable_step_graph:
        why = "as asked"
    elif place.eager or ops.recorder is None:
        why = place.eager or f"the op table {ops.name!r} cannot record"
    elif comm is None:
        why = "stages of a pipeline, and groups that attend to rows of their own, meet between native calls too"
    elif not comm.records:
        why = f"sums by {comm.name} are no native calls"
    elif not place.backend.recordable:
        why = f"the attention backend {place.backend.name!r} plans each step on the host"
    else:
        tokens = min(chunk, FLEXIBLE_TOKENS)
        decisions.append(Decision("rank_steps", "recorded", f"on first use, for up to {tokens} tokens, sums included"))
        sizes = tokens, running, pages, runtime.check_step_graph
        return FlexibleSteps(ops.recorder(), whole, place.backend, place.pool, place.facts, *sizes)
    decisions.append(Decision("rank_steps", "eager", why))
    return None


def _when(place: Place) -> str:
    when = "the likely sizes before ready, the others in pauses" if place.facts.records_idle else "on first use"
    return when if place.together is None else f"{when}; on all ranks together, with their sums"


def _decode_graphs(
    runtime: RuntimeConfig, recorder: GraphRecorder | None, place: Place, running: int, pages: int, *, shared: bool
) -> DecodeGraphs:
    assert recorder is not None
    budget = None if place.graph_bytes is None else place.graph_bytes // (4 if place.shares else 2)
    whole, check = (place.model, place.backend, place.pool, place.facts), runtime.check_step_graph
    recorder = _agreed(recorder, place, budget)
    return DecodeGraphs(
        recorder, *whole, running, pages, check=check, budget=budget, shared=shared, leaves=place.together is None
    )


def _no_recorder(runtime: RuntimeConfig, place: Place) -> str:
    return "as asked" if runtime.disable_step_graph else place.eager or f"the op table {place.ops.name!r} cannot record"


def _reading(place: Place) -> list[str]:
    """The ops that its rows go through and no recording on a device can hold; between pieces they run eagerly."""
    parts = place.model.every_layer() if isinstance(place.model, Layer) else ()
    return sorted({name for part in parts for name in part.row_ops if reads_values(place.ops, name)})


def _decode(
    runtime: RuntimeConfig,
    recorder: GraphRecorder | None,
    place: Place,
    running: int,
    pages: int,
    decisions: list[Decision],
) -> DecodeGraphs | None:
    backend, refusal = place.backend, None
    if recorder is None:
        refusal = _no_recorder(runtime, place)
    elif not backend.recordable:
        refusal = f"the attention backend {backend.name!r} plans each step on the host"
    elif recorder.cuts and (reads := _reading(place)):
        refusal = f"{', '.join(reads)} of the op table {place.ops.name!r} read values on the host"
    if recorder is None or refusal is not None:
        decisions.append(Decision("step_graphs", "off", refusal or ""))
        return None
    decisions.append(Decision("step_graphs", "on", f"recorded {_when(place)}"))
    return _decode_graphs(runtime, recorder, place, running, pages, shared=False)


def _pieces(
    runtime: RuntimeConfig,
    recorder: GraphRecorder | None,
    place: Place,
    chunk: int,
    decodes: bool,
    decisions: list[Decision],
) -> PieceGraphs | None:
    model, refusal = place.model, None
    if runtime.disable_piecewise_graph:
        refusal = "as asked"
    elif recorder is None:
        refusal = _no_recorder(runtime, place)
    elif not recorder.cuts:
        why = "a prefill here computes far longer than it takes to launch"
        refusal = f"the op table {place.ops.name!r} records whole decode steps; {why}"
    elif not isinstance(model, CutModel):
        refusal = "the model does not say where its last attention ends"
    elif any(group.kind == "cross" for group in place.pool.groups):
        refusal = "cross-attention does not run between pieces"
    decision = resolve.piecewise_tokens(refusal, runtime.piecewise_graph_max_tokens, chunk)
    decisions.append(decision)
    if refusal is not None or recorder is None or not isinstance(model, CutModel):
        return None
    budget = place.free // BUDGET_SHARE if place.graph_bytes is None else place.graph_bytes // 2
    return PieceGraphs(
        _agreed(recorder, place, budget),
        model,
        place.backend,
        place.pool,
        decision.value,
        decodes=decodes,
        budget=budget,
        check=runtime.check_step_graph,
        inline=not place.facts.records_idle,
        leaves=place.together is None,
    )


def record_first(
    runtime: RuntimeConfig, ways: Sequence[RecordedWay], facts: StepFacts, decisions: list[Decision]
) -> bool:
    """What is recorded before the engine is ready: all if asked for, the likely sizes where no step may wait for it.
    Whether there was anything to do."""
    if runtime.record_graphs_before_ready:
        record_all(ways, decisions)
    elif facts.records_idle:
        record_likely(ways, decisions)
    else:
        return False
    return True


def record_all(ways: Sequence[RecordedWay], decisions: list[Decision]) -> None:
    """Record everything now; the decisions then say what there is, what memory it takes, and how long it took."""
    for way in ways:
        start = perf_counter()
        with torch.inference_mode():
            way.graphs.record_all(_progress(way.decision, start))
        _tell(way, decisions, f"before ready, as asked, in {perf_counter() - start:.1f} s")


def record_likely(ways: Sequence[RecordedWay], decisions: list[Decision], seconds: float = READY_SECONDS) -> None:
    """Record the likely sizes now, and of the others as many as these seconds allow; half of them for each way, and
    what one leaves for the next."""
    end = perf_counter() + seconds
    for number, way in enumerate(ways):
        start = perf_counter()
        with torch.inference_mode():
            way.graphs.record_likely(start + (end - start) / (len(ways) - number))
        took = perf_counter() - start
        _log.info("%s: %s, in %.1f s", way.decision, way.graphs.describe(), took)
        _tell(way, decisions, f"before ready, in {took:.1f} s; the others in pauses")


def _tell(way: RecordedWay, decisions: list[Decision], when: str) -> None:
    for number, decision in enumerate(decisions):
        if decision.name == way.decision:
            decisions[number] = replace(decision, reason=f"{way.graphs.describe()}; {when}")


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
