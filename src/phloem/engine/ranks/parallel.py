"""One model on several ranks: rank 0 plans and chooses tokens, the others execute what they are told, and no more.

Each launched batch goes to every rank at once. What follows is said when rank 0's own step thread comes to it: `Go`
(run that batch, with these token ids) and `Chosen` (rows of hidden states whose logits are wanted; they come by the
comm). So the others know no requests, draws or grammars, and a batch that rank 0 never runs is never run.

Legend: T tokens, L rows of hidden states, N hidden size, R rows (requests).
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import numpy as np
import torch

from phloem import platforms
from phloem.core.batch import Batch
from phloem.core.errors import BadRequest, ConfigError, EngineDead
from phloem.core.nodes import Nodes
from phloem.distributed import deepep
from phloem.distributed.comm import StepUndone
from phloem.distributed.groups import Groups
from phloem.distributed.mesh import Mesh
from phloem.engine.around import RunnerAround
from phloem.engine.choices import on_paper
from phloem.engine.forward import run_forward
from phloem.engine.inputs import Step
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.ranks.contexts import run_rows
from phloem.engine.ranks.counts import spread_of
from phloem.engine.ranks.plans import Packing, Plan, raw
from phloem.engine.ranks.stages import Kind, Together
from phloem.engine.ranks.unshared import option_of, refuse_unshared
from phloem.kernels.graph import RecordingEnded
from phloem.layers.context import BuildContext
from phloem.layers.rows import Rows
from phloem.models import build_model
from phloem.models._common import Decoder
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.adapters._sites import Sites
    from phloem.attention import AttentionBackend
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.batch import Pending, Runner, StepOutput
    from phloem.core.config import Config
    from phloem.core.memory import MemorySpec
    from phloem.core.resolve import Decision
    from phloem.engine.recorded.choice import SharedWay
    from phloem.engine.recorded.flexible import FlexibleSteps
    from phloem.engine.recorded.graphs import RecordedStep
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, ForwardBatch
    from phloem.platforms import Platform
    from phloem.platforms._facts import StepFacts

T = TypeVar("T")
Taken = tuple[tuple[torch.Tensor, torch.Tensor], Any]  # with the mark behind which the device has them
Coming = Future[Taken | None]  # of a step of a pipeline (`Leading.start`)
_log = log.get("engine")


class Pages(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How large each group's memory is, on every rank: rank 0 has measured. `facts`: what must agree. `most`: pages of
    a row. `adapters`: how many there may be at a time, and their largest rank; None: none are served. `graph_bytes`:
    that graphs may take on each."""

    num_pages: tuple[int, ...]
    facts: dict[str, str]
    most: int
    adapters: tuple[int, int] | None = None
    graph_bytes: int | None = None


class Rehearse(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Of ranks with a device each: run dummy steps of these (tokens, rows), and the largest, together, and say what is
    left beside. `facts`: as in `Pages`."""

    shapes: list[tuple[int, int, int]]
    facts: dict[str, str]


class Go(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run the planned batch of this step; `ids` int64 [T] are its tokens, those of the last step included, and `lens`
    int32 the rows that rank 0 has cut it into: others would add in another order. Those that only devices know are
    below 0: they go from one to the others. `head`: what all ranks, or the last
    stage, make of the wanted states at once; "": `Chosen` asks for it, if anybody does. `undone`: steps that all ranks
    have left. `way`, `size`: by which graph all of them run it (`Capture`); -1: op by op."""

    step: int
    epoch: int
    ids: bytes
    lens: bytes
    head: Kind | Literal[""] = ""
    undone: int = 0
    way: int = -1
    size: int = 0


class Capture(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Record the step of this size, of one of the ways in which steps are recorded, together with the others."""

    way: int
    size: int


class Chosen(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Hidden states of `rows` positions come by the comm: their logits, or their most likely tokens, are wanted."""

    rows: int
    kind: Kind


class Moved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Where the experts of one sparse layer lie from the next step on: those in each of `ep_size` ranks' slots."""

    layer: int
    ranks: list[list[int]]


class Placed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An adapter that batches know by its entry from now on: `adapters._shares.packed`, whole."""

    entry: int
    fits: bytes


class Busy(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How long a rank's stage has computed so far is wanted, once it has done what it was told before."""


class End(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """No more steps."""


Told = Pages | Rehearse | Plan | Go | Capture | Chosen | Moved | Placed | Busy | End
encode_told = msgspec.msgpack.Encoder().encode
_DECODER: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)
decode_told = _DECODER.decode


@dataclass(frozen=True)
class Team:
    """A rank among those that share a model out, while it is built. Of rank 0, `tell` reaches all the others."""

    mesh: Mesh
    groups: Groups
    tell: Callable[[Told], None]
    loaded: Callable[[int], None]  # with the bytes read. Rank 0: wait until all have their weights; the others: say so
    decision: Decision
    # Of rank 0, once all have their weights: the least (free, all) bytes of other machines that have ranks,
    # or of ranks with a device each.
    elsewhere: Callable[[], tuple[int, int] | None] = lambda: None
    busy: Callable[[float], None] = lambda _: None  # of the others: says seconds, where it was asked for
    measured: Callable[[int, int], None] = lambda free, total: None  # the same, bytes of its device (`Rehearse`)


def ranks_of(config: Config) -> int:
    """How many processes one model is shared out among. Where steps are compiled whole it is one: the compiler shares
    them out among devices."""
    count = config.runtime.pp_size * config.runtime.tp_size
    return 1 if count > 1 and platforms.compiles(config.runtime.device) else count


def ranks_here(config: Config) -> int:
    """How many processes take of one machine's memory and cores, those of other replicas among them."""
    return ranks_of(config) // config.nodes.nnodes * config.runtime.dp_size


def mesh_of(config: Config, rank: int) -> Mesh:
    """A rank's place."""
    runtime = config.runtime
    dp, cp = runtime.attn_dp_size, runtime.attn_cp_size
    return Mesh.of(rank, pp=runtime.pp_size, dp=dp, cp=cp, tp=runtime.tp_size // (dp * cp), ep=runtime.ep_size)


def refuse(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse what several ranks do not serve, so that nothing is served wrongly.

    Raises:
        ConfigError: something that one rank alone does.
        ModelLoadError: sizes that cannot be shared out, with those that could.
    """
    if Nodes.of(config).rank:
        raise ConfigError("node_rank: a further node is started by `phloem serve`", param="node_rank")
    refuse_unshared(config, checkpoint)
    backend, name = config.runtime.moe_a2a_backend, platforms.named(config.runtime.device)
    refuse_device(config, name, platforms.facts_of(name))
    if backend in deepep.NAMES:
        deepep.refuse(backend, deepep.PACKAGE in platforms.facts_of(name).exchanges, name)
    meshes = [mesh_of(config, rank) for rank in range(0, ranks_of(config), config.runtime.tp_size)]
    # A share without weights says whether the sizes divide, before any process is started.
    for mesh in meshes:
        spread = spread_of(config, checkpoint)
        ctx = shared(on_paper.context(spread), mesh, Groups(), config.runtime.moe_a2a_backend)
        built = build_model(checkpoint.model_type, checkpoint.config, ctx, on_paper.POSITIONS)
        on_paper.check(config, checkpoint, built, spread, None)
        on_paper.check_drafts(config, checkpoint, built)
        if config.runtime.ep_size > 1 and not on_paper.has_experts(built):
            message = f"ep_size {config.runtime.ep_size}: {checkpoint.model_type} has no experts"
            raise ConfigError(message, param="ep_size")


def refuse_device(config: Config, name: str, facts: StepFacts) -> None:
    """Raises ConfigError for devices that several ranks do not run on."""
    if not (facts.on_host or facts.meets):
        why = f"ranks run on processors, or on graphics cards that meet by NCCL, not on {name}"
        raise ConfigError("{} {}: {}".format(*option_of(config), why), param="tp_size")


def shared(ctx: BuildContext, mesh: Mesh, groups: Groups, backend: str = "none") -> BuildContext:
    """What a rank's model is built of: its place, and its ends of the groups. `backend`: of `moe_a2a_backend`."""
    if mesh.dp.size * mesh.cp.size == 1:
        return replace(ctx, mesh=mesh, comm=groups.tp)
    context = mesh.cp.size > 1
    by = groups.tp if backend in deepep.NAMES else None
    exchange = None if by is None else deepep.DeepEP(by, low_latency=backend == deepep.NAMES[1])
    rows = Rows(groups.tp, mesh.cp if context else mesh.dp, backend != "none", context, exchange)
    return replace(ctx, mesh=mesh, comm=groups.attn, rows=rows)


class LostStep(EngineDead):
    """Rank 0 failed where the others waited for it: what they would be given next is not what they wait for."""


@contextlib.contextmanager
def _all_or_none(groups: Groups, whole: Together | None = None) -> Generator[None]:
    """Around what all ranks compute together. A step for which rank 0 or another one has no memory is left by all of
    them, where they can. Raises LostStep for whatever else goes wrong on rank 0, so that nobody may go on."""
    try:
        yield
        return
    except EngineDead:
        raise
    except Exception as error:
        if whole is not None and whole.undoing is not None and is_out_of_memory(error):
            whole.leave()
            raise
        why = first_line(error)
    groups.abort()
    raise LostStep(f"rank 0 failed within a step: {why}")


class LeadingModel:
    """Rank 0's share of a model, with the face of the whole (`models.Model`): what it is asked for, all ranks do.

    The forward pass itself is begun by `Leading`, which knows the step.
    """

    def __init__(self, whole: Together, team: Team) -> None:
        self._whole, self._groups, self._tell, self._ranks = whole, team.groups, team.tell, team.mesh.size
        model = self._model = whole.model
        self.attention_specs: list[AttentionSpec] = model.attention_specs
        self.memory: list[MemorySpec] = model.memory
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Of this rank."""
        return self._model.weight_bytes

    @property
    def busy(self) -> float:
        """Seconds in which the first of several stages has computed."""
        return self._whole.busy

    def forward(self, step: ForwardBatch) -> Tensor:
        return self._whole.forward(step)

    def head(self, hidden_LD: Tensor, /) -> Tensor:
        return self._chosen(hidden_LD, "logits")

    def greedy(self, hidden_LD: Tensor, /) -> Tensor:
        return self._chosen(hidden_LD, "greedy")

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int, /
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """None: whole rows are gathered."""
        del hidden_LD, k, scale_LJ, norms

    def _chosen(self, hidden_LD: Tensor, kind: Kind) -> Tensor:
        early = self._whole.found.pop(kind, None)
        if early is not None and len(early) == len(hidden_LD):
            return early
        hidden_LD = hidden_LD.contiguous()  # before anybody waits for them
        with _all_or_none(self._groups, self._whole):
            self._tell(Chosen(len(hidden_LD), kind))
            return self._whole.chosen(hidden_LD, kind)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        raise BadRequest(f"weights are shared out among {self._ranks} ranks: they are not changed while they serve")

    def checkpoint_name(self, name: str, /) -> str | None:
        return self._model.checkpoint_name(name)

    def weight_names(self) -> list[str]:
        """Those of all stages."""
        stage = self._model.stage if isinstance(self._model, Decoder) else None
        return self._model.weight_names() + ([] if stage is None else sorted(stage.elsewhere))

    def get_weight(self, name: str, rows: int | None = None, /) -> Tensor:
        raise BadRequest(f"weights are shared out among {self._ranks} ranks (tp_size): no rank has a whole one")


class Leading:
    """Rank 0's way of running steps (`forward.Way`), with all ranks: as they are recorded, or eagerly."""

    def __init__(
        self,
        whole: Together,
        backend: AttentionBackend,
        pool: KVPool,
        team: Team,
        recorded: FlexibleSteps | None = None,
        platform: Platform | None = None,
        ways: Sequence[SharedWay] = (),
    ) -> None:
        """`platform`: of ranks with a device each; `ways`: in which these record steps."""
        self._recorded, self._ways = recorded, ways
        for number, way in enumerate(ways):
            way.graphs.announce = partial(_announce, team.tell, number)
        self._whole, self._backend, self._pool, self._team = whole, backend, pool, team
        self._rows, self.ahead = whole.rows, whole.ahead
        self._streams = None if platform is None else platform.streams
        self._devices = platform is not None
        self._taking = ThreadPoolExecutor(1, "phloem-stages", self._aside, (platform,)) if self.ahead else None
        self._kind: Kind | Literal[""] = ""

    @property
    def busy(self) -> float:
        """Seconds in which the first of several stages has computed."""
        return self._whole.busy

    def start(self, step: Step, kind: Kind | Literal[""]) -> Coming:
        """Begin a step on the first stage; the others go on with it. To come: its hidden states [L, N], and what the
        head made of them. All that were started come before any `run`."""
        batch, whole, undone = step.batch, self._whole, self._undone
        ids = self._ids(step).tobytes()
        self._team.tell(Go(batch.step, batch.epoch, ids, raw(batch.query_lens), kind, undone))
        assert self._taking is not None
        try:
            with _all_or_none(self._team.groups, whole):
                whole.begin(kind, later=True)
                self._resume(undone)
                inputs = step.inputs
                run_forward(whole, self._backend, self._pool, inputs, inputs.logit_index)
        except EngineDead:
            raise
        except Exception:
            self._taking.submit(self._take).result()  # the word that it never happened, behind what is on its way
            raise
        finally:
            whole.head = ""
        return self._taking.submit(self._take)

    @property
    def _undone(self) -> int:
        return 0 if self._whole.undoing is None else self._whole.undoing.count

    def _resume(self, undone: int) -> None:
        if self._whole.undoing is not None:
            self._whole.undoing.resume(undone)

    def _aside(self, platform: Platform | None) -> None:
        """Of the thread that takes what stages give: the device would else begin no step before it has come."""
        if platform is not None and self._streams is not None:
            platform.begin_steps()
            self._streams.apart()

    def _take(self) -> Taken | None:
        """None: a stage had no memory for the step."""
        with torch.inference_mode(), _all_or_none(self._team.groups):
            try:
                found = self._whole.taken()
            except StepUndone:
                return None
            return found, None if self._streams is None else self._streams.mark()

    def _ids(self, step: Step) -> NDArray[np.int64]:
        """[T]: the step's tokens, as ranks are told of them."""
        batch = step.batch
        if not self._devices:
            return np.ascontiguousarray(step.arrays(batch.num_rows)[0], np.int64)
        # Groups of ranks that attend to their own rows take them out of what is told: there it is waited for.
        return batch.input_ids.astype(np.int64) if self._rows is None else step.last.known(batch)

    def _found(self, step: Step) -> tuple[int, RecordedStep[Any, Any] | None]:
        """(Which of the ways runs it, by which recording); (-1, None): none does."""
        for number, way in enumerate(self._ways):
            found = way.found(step)
            if found is not None:
                return number, found
        return -1, None

    @property
    def spread(self) -> Callable[[Tensor], object] | None:
        """As `LastTokens.spread`."""
        return entrance_of(self._whole) if self._devices else None

    def landed(self, coming: Coming) -> tuple[Tensor, Tensor]:
        """What was started. Raises StepUndone where a stage had no memory for it: then it never happened."""
        found = coming.result()
        if found is None:
            with _all_or_none(self._team.groups, self._whole):
                raise StepUndone("another stage found no memory")
        tensors, mark = found
        if self._streams is not None:
            self._streams.follow(mark, tensors)
        return tensors

    def expect(self, kind: Kind | Literal[""]) -> None:
        """What is asked of the head for all of the next step's states, so that no rank waits to be told; "": not yet
        known."""
        self._kind = kind if self._whole.comm is not None else ""

    def hand(self, kind: Kind, found: Tensor) -> None:
        """What the head made of the states whose tokens are chosen next."""
        self._whole.found = {kind: found}

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor:
        batch, kind, undone = step.batch, self._kind, self._undone
        self._whole.found, self._kind = {}, ""
        ids, (number, found) = self._ids(step), self._found(step)
        by = number, 0 if found is None else found.size
        self._team.tell(Go(batch.step, batch.epoch, ids.tobytes(), raw(batch.query_lens), kind, undone, *by))
        ready()
        with _all_or_none(self._team.groups, self._whole):
            self._whole.begin("")
            self._resume(undone)
            if self._rows is not None:
                known = replace(batch, input_ids=ids.astype(np.int32))
                return run_rows(self._whole, self._rows, self._backend, self._pool, known, step.last)
            if found is None:
                hidden_LN = run_shared(self._whole, self._backend, self._pool, step, self._recorded)
            else:
                self._team.groups.check()  # no graph is replayed whose communicator has ended
                hidden_LN = self._ways[number].replayed(step, found, _nothing)
            if kind:
                self._whole.found = {kind: self._whole.headed(hidden_LN, kind)}
            return hidden_LN


def _announce(tell: Callable[[Told], None], way: int, size: int) -> None:
    """Raises RecordingEnded where a rank has gone: whoever asks for a step is told of it."""
    try:
        tell(Capture(way, size))
    except EngineDead as error:
        raise RecordingEnded(str(error)) from None


def entrance_of(whole: Together) -> Callable[[Tensor], object] | None:
    """How the tokens that rank 0's device chose come to those of the ranks that embed them; None: nobody else does."""
    comm = whole.entrance
    return None if comm is None else comm.broadcast


def run_shared(
    whole: Together, backend: AttentionBackend, pool: KVPool, step: Step, recorded: FlexibleSteps | None
) -> Tensor:
    """A rank's part of a step: hidden states [L, N]. Raises EngineDead where another rank has gone."""
    found = None if recorded is None else recorded.run(step, _nothing)
    if found is None:
        inputs = step.inputs
        wanted = inputs.logit_index
        if len(wanted) or whole.comm is None:
            return run_forward(whole, backend, pool, inputs, wanted)
        # As recorded steps do, of other ranks perhaps: one position stands for none, so that all make the same sums.
        return run_forward(whole, backend, pool, inputs, wanted.new_zeros(1))[:0]
    if whole.comm is not None:
        whole.comm.check()
    return found


def _nothing() -> None:
    pass


def told_by(sites: Sites | None, team: Team | None) -> Sites | None:
    """Rank 0's places for adapters, so that the other ranks hear of each that is put there."""
    if sites is not None and team is not None:
        sites.tell = lambda entry, fits: team.tell(Placed(entry, fits))
    return sites


class ParallelRunner(RunnerAround):
    """Rank 0's own runner, with the others: they are sent each batch before it is launched here.

    `tell` raises EngineDead when a rank has gone; so does a step's result. Nothing is served after that. What runs
    `between` steps runs on rank 0 alone: what is asked for there reads, and changes nothing that ranks share.
    """

    def __init__(self, inner: Runner, tell: Callable[[Told], None]) -> None:
        super().__init__(inner)
        self._tell, self._packing = tell, Packing()

    @property
    def draft_room(self) -> int:
        return 0

    def launch(self, batch: Batch) -> Pending[StepOutput]:
        self.send(batch)
        return super().launch(batch)

    def send(self, batch: Batch) -> None:
        """To the other ranks, who run it when they are told to."""
        self._tell(self._packing.pack(batch))
