"""Executes steps on a device, in the order of `launch`, in a thread of its own: the scheduler plans meanwhile.

The parts: `thread` (the queue, the order, running out of memory), `forward` (the ways of computing hidden states) and
`choose` (the ways of choosing tokens from them).
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from phloem.core.errors import BadRequest, OutOfMemory
from phloem.core.speculation import MOST_DRAFTS
from phloem.engine.apart import apart, drafts_apart, every_token
from phloem.engine.canvases.fill import Filler
from phloem.engine.canvases.refill import Refiller
from phloem.engine.drafts.branches import Branches
from phloem.engine.forward import Eager, Forward
from phloem.engine.inputs import Step
from phloem.engine.pipeline import Flight
from phloem.engine.ranks.waves import Heads, Starts, Waves
from phloem.engine.recorded.gaps import Gaps
from phloem.engine.replay import again
from phloem.engine.sampling.answer import empty, give_out, keep_hidden, prompt_logprobs
from phloem.engine.sampling.choose import Choice, Chooser, kind_of
from phloem.engine.sampling.logprobs import Later
from phloem.engine.sampling.masks import Masks
from phloem.engine.sampling.slots import Slots
from phloem.engine.thread import Launched, Order, StepThread
from phloem.engine.towers.hearing import ears_of
from phloem.engine.transfer import LastTokens
from phloem.engine.wanted import Wanted
from phloem.engine.wearing import Ends, Passes
from phloem.models import Conditioned
from phloem.platforms._facts import StepFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.attention import AttentionBackend, Sharing
    from phloem.core.batch import Batch, Follower, Places, StepOutput
    from phloem.core.config import LogprobsMode
    from phloem.core.memory import Group
    from phloem.engine.drafts.beside import Prepared
    from phloem.engine.drafts.branches import Laid
    from phloem.engine.forward import Way
    from phloem.engine.pipeline import Settle
    from phloem.engine.recorded.choice import RecordedWay
    from phloem.engine.towers.media import Desk, Pictures
    from phloem.engine.transfer import Coming
    from phloem.engine.wearing import Wardrobe
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model
    from phloem.platforms._streams import Streams

T = TypeVar("T")
MOST_READ = 1 << 22  # numbers of a weight in one answer


def _forwards(groups: Sequence[Group]) -> bool:
    return all(group.kind != "state" for group in groups)


def stands_apart(model: Model, groups: Sequence[Group], *, on_host: bool) -> bool:
    """Whether each token of an answer is a row of its own, whatever stands beside it."""
    # Tokens of a block of diffusion see each other: they are never rows of their own.
    alone = not any(spec.block for spec in model.attention_specs) and not isinstance(model, Conditioned)
    return on_host and _forwards(groups) and alone


def cuts_back(groups: Sequence[Group], *, on_host: bool) -> bool:
    """Whether memory can be cut back to the tokens that were accepted."""
    return on_host or _forwards(groups)


class StepWork:
    """How one step is computed: all that steps share, used by the thread that runs them alone.

    It knows neither that thread nor the runner, so that closing the runner and letting it go frees all of this.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        ops: Ops,
        max_slots: int,
        facts: StepFacts,
        recorded: Sequence[RecordedWay],
        streams: Streams | None,
        sharing: Sharing | None = None,
        logprobs: LogprobsMode = "raw",
        desk: Callable[[LastTokens], Desk] | None = None,
        leading: Way | None = None,
        drafting: Prepared | None = None,
        wardrobe: Wardrobe | None = None,
    ) -> None:
        self.model, self.ops, self._sharing = model, ops, sharing
        drafts = 0 if drafting is None else MOST_DRAFTS
        self.last = LastTokens(max_slots, pool.device, facts.on_host, streams, ops, drafts=drafts)
        self.slots = Slots(max_slots, model.vocab_size, pool.device, logprobs, self.last.up)
        self.masks = Masks(model.vocab_size, pool.device, ops, facts.masks_ahead, self.last.up)
        self._on_host, self._forgotten = facts.on_host, 0
        self.stands_apart = stands_apart(model, pool.groups, on_host=facts.on_host)
        self._each = self.stands_apart and ops.name == "invariant"
        ways = [*recorded, *(() if drafting is None else drafting.recorded)]
        self.gaps = Gaps(ways) if ways and facts.records_idle else None
        # What a step's states have taken in of refused drafts is undone; the host has the tokens for that.
        self._replays, self.cuts_back = not _forwards(pool.groups), cuts_back(pool.groups, on_host=facts.on_host)
        self._pool, self._ears = pool, ears_of(model, pool, backend.ops, max_slots)
        self.desk = None if desk is None else desk(self.last)
        eager = Eager(model, backend, pool)
        self._forward: Forward | Passes = Forward(recorded if leading is None else [leading], eager)
        if wardrobe is not None:
            self._forward = Passes(wardrobe, self._forward, eager, pool, self.last, sharing)
        self._ends = Ends(model, wardrobe)
        self.chooser = Chooser(self._ends, ops, self.slots, self.last, self.masks)
        self.waves = self._in_waves(leading)
        self._heads = leading if isinstance(leading, Heads) else None
        if self._heads is not None:
            self.last.spread = self._heads.spread
        self._filler = Filler(model, ops, self.slots, self.last)
        self._refiller = Refiller(model, ops, self.slots, self.last) if isinstance(model, Conditioned) else None
        self._drafting = None if drafting is None else drafting.make(self.slots, self.last)
        shape = None if drafting is None else drafting.loaded.tree
        own = () if drafting is None else drafting.own
        self._branches = None if shape is None else Branches(pool, own, shape, self.last.up)

    def _in_waves(self, leading: Way | None) -> Waves | None:
        """What begins steps of a pipeline while its later stages have others."""
        if not isinstance(leading, Starts) or not leading.ahead:
            return None
        chooses = self.slots, self.masks, self.last, self.chooser
        return Waves(leading, lambda batch, wanted: self._step(batch, wanted, None)[0], *chooses)

    def _run(self, step: Step, settle: Settle, output: StepOutput, easy: bool) -> Tensor:
        """Hidden states of the wanted positions. `easy`: as in `Choice`."""
        if self._heads is not None:
            plain = len(step.wanted.at) and not step.batch.prompt_targets
            self._heads.expect(kind_of(self.slots, step.wanted, easy) if plain else "")
        if self.waves is None:
            return self._forward.run(step, settle)
        busy = self.waves.busy
        hidden_LN = self._forward.run(step, settle)
        output.stage_seconds = self.waves.busy - busy
        return hidden_LN

    def needs_values(self, batch: Batch) -> bool:
        """Whether the step can only be begun when the one before has landed. Beside the host it waits for those values
        only where they are looked at: the device is computing then."""
        if self.waves is not None:
            return self.waves.waits(batch)
        return self._on_host and self._follows(batch)

    def _follows(self, batch: Batch) -> bool:
        ids = batch.slots[self.slots.follows[batch.slots]]
        fresh = {admission.slot for admission in batch.admissions}
        return any(slot not in fresh and self.slots[slot].follows for slot in ids.tolist())

    def _unseen(self, batch: Batch) -> bool:
        """Whether nobody looks at the drafts of this step before it lands: no grammar, penalty or processor, no state
        that takes them in, no ranks that are told of them."""
        if self._on_host or self._replays or self._heads is not None or batch.drafting is None:
            return False
        return all(self.slots[slot].plain for slot in batch.slots[batch.drafting.counts > 0].tolist())

    def forget(self) -> None:
        self._forgotten += 1
        self.masks.drop()
        if self.desk is not None:
            self.desk.forget()
        self.slots.clear()
        if self._refiller is not None:
            self._refiller.forget()

    def _admit(self, order: Order) -> None:
        followers = order.followers
        for slot, follower in followers.items():
            if follower is None:
                self.slots.unfollow(slot)
        tokens = self._ends.tokens(order.batch) if order.batch.admissions else {}
        for admission in order.batch.admissions:
            self.slots.admit(admission, followers.get(admission.slot), tokens.get(admission.slot, 0))
        if self._ears is not None and order.batch.admissions:
            self._ears.admit(order.batch.admissions)

    def begin(self, order: Order, settle: Settle) -> Flight:
        """Give a step to the device; `settle` is called when only the computation is left to do."""
        start, desk = perf_counter(), self.desk
        if desk is not None:
            order = replace(order, batch=desk.admit(order.batch))
        batch, drafted = order.batch, 0.0
        self._admit(order)
        if batch.places is not None:
            return self._fill(batch, batch.places, settle)
        if self.waves is not None and self.waves.takes(batch):
            return self.waves.begin(batch, start)
        if batch.drafting is not None and self._drafting is not None:
            settle()
            batch, drafted = self._drafting.run(batch, self._unseen(batch))
        wanted = Wanted.of(batch)
        ids: NDArray[np.int32] = wanted.slots
        easy = bool(self.slots.easy[ids].all())
        slots = [] if easy else [self.slots[slot] for slot in ids.tolist()]
        late = not self._on_host and self._follows(batch)
        if not late:
            self.masks.begin(slots, wanted)
        output = empty(batch)
        output.drafted, output.drafting_seconds = wanted.drafted, drafted
        if self._ears is not None and self._ears.aligned:
            output.pooled = self._ears.of(batch)
        before = perf_counter()
        placed, pictures = (batch, None) if desk is None else desk.dress(batch)
        step, after = self._step(placed, wanted, pictures)
        hidden_LN = self._run(step, settle, output, easy)
        if self._pool.routes is not None:
            self._pool.routes.keep(batch)
            output.routed = self._pool.routes.of(batch, self.slots.routed)
        if desk is not None:
            output.encoded, output.found = desk.counted()
        if late:
            self._values(settle)
            self.masks.begin(slots, wanted)
        count, beside, coming = len(ids), list[Later](), None
        if count:
            choice = Choice(wanted, slots, easy, hidden_LN[:count], output, before, self._ends.entries(batch, wanted))
            coming = self.chooser.run(choice)
            beside = [*choice.late, *keep_hidden(output, wanted, slots, hidden_LN, self.last.down)]
            after(coming)
        else:
            output.forward_seconds = perf_counter() - before
        if batch.prompt_targets:
            beside += prompt_logprobs(output, batch, self.slots, hidden_LN[count:], self._ends, self.ops, self.last)

        def land() -> StepOutput:
            for one in beside:
                one.land()
            if coming is not None:
                give_out(output, wanted, slots, coming)
            output.total_seconds = perf_counter() - start
            return output

        if self.gaps is not None:
            self.gaps.begun(batch)
        awaited = [one.coming for one in beside] + ([coming] if coming is not None else [])
        return Flight(land, lambda: all(one.done() for one in awaited))

    def _step(self, placed: Batch, wanted: Wanted, pictures: Pictures | None) -> tuple[Step, Callable[[Coming], None]]:
        """(The step, what is done with the memory that drafts have written, once it is known which of them count)."""
        if placed.parents is not None:
            assert self._branches is not None
            laid = self._branches.lay(placed, self._drafts_alone)
            step = Step(laid.batch, wanted, self._pool, self.last, echoes=laid.echoes)
            return step, partial(self._keep_branches, placed, laid, wanted)
        rows = self._alone(placed, self._each and pictures is None)
        step = Step(rows, wanted, self._pool, self.last, self._sharing, pictures)
        return step, partial(self._replay, step.known, wanted) if self._replays and wanted.drafted else _nothing

    def _replay(self, batch: Batch, wanted: Wanted, coming: Coming) -> None:
        """Recurrent states as they are behind the tokens that count."""
        rows = again(batch, wanted, coming.wait()[0])
        if rows is not None:
            step = Step(rows, Wanted.of(rows), self._pool, self.last, self._sharing)
            self._forward.run(step, lambda: None)

    def _keep_branches(self, batch: Batch, laid: Laid, wanted: Wanted, coming: Coming) -> None:
        """The keys and values of the branches that count take their requests' places."""
        assert self._branches is not None
        kept = {int(wanted.rows[way[0]]): int(way[-1] - way[0]) for way in wanted.kept(coming.wait()[0])}
        self._branches.keep(batch, laid, {row: place for row, place in kept.items() if row in laid.trees})

    def _fill(self, batch: Batch, places: Places, settle: Settle) -> Flight:
        """A step that says what stands at places, and yields nothing."""
        start, wanted, output = perf_counter(), Wanted.of(batch), empty(batch)
        again = self._refiller
        redrawn = None if again is None else again.dress(batch, places)
        hidden_LN = self._forward.run(Step(batch, wanted, self._pool, self.last, self._sharing, redrawn), settle)
        saying = (self._filler if again is None else again).run(places, wanted, hidden_LN)
        output.forward_seconds = perf_counter() - start

        def land() -> StepOutput:
            saying.land(output)
            output.total_seconds = perf_counter() - start
            return output

        return Flight(land, saying.done)

    def _alone(self, batch: Batch, each: bool) -> Batch:
        """Positions as rows of one token, where the table's promises ask for that; `each`: all of them."""
        if each:
            return every_token(batch)
        return apart(batch, self.slots.prompts[batch.slots]) if self.stands_apart else batch

    def _drafts_alone(self, batch: Batch) -> Batch:
        """Drafts as rows of one token, and the other tokens as ever."""
        return self._alone(batch, self._each) if self.stands_apart else drafts_apart(batch)

    def _values(self, settle: Settle) -> None:
        """Wait for what the step before gave. Raises `OutOfMemory` if it gave nothing for lack of memory."""
        before = self._forgotten
        settle(values=True)
        if self._forgotten != before:
            raise OutOfMemory("launched behind a step that ran out of memory")


def _nothing(coming: Coming) -> None:
    """All that drafts have written is in its place."""


class Mover(Protocol):
    """Changes something of the model between steps, now and then."""

    def due(self) -> bool:
        """Whether `move` shall run behind the steps that were launched."""
        ...

    def move(self) -> int: ...

    def facts(self) -> dict[str, Any]:
        """What it tells of itself."""
        ...


class ModelRunner:
    """One model on one device, with its KV pool (`core.batch.Runner`).

    Args:
        facts: how steps run on the device.
        recorded: ways of running steps by recordings, the preferred one first.
        streams: copies beside the computation, where there is such a thing.
        give_back: frees what the device's allocator keeps without using it, after a step ran out of memory.
        begin: called once in the thread that runs the steps.
        sharing: what it costs to attend to pages that rows share once for all of them; None: it is not done.
        desk: makes what minds the pictures of requests, where the model takes any.
        kernels: tells what has been compiled, where kernels are compiled at run time.
        logprobs: of which distribution log probabilities of sampled tokens are.
        leading: how steps run with other ranks, where there are any.
        drafting: a model that drafts, where there is one.
        mover: what changes the places of experts, where they have several.
        wardrobe: adapters with weights of their own, where any are served.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        ops: Ops,
        max_slots: int,
        *,
        facts: StepFacts,
        recorded: Sequence[RecordedWay] = (),
        streams: Streams | None = None,
        give_back: Callable[[], None] | None = None,
        begin: Callable[[], None] | None = None,
        sharing: Sharing | None = None,
        kernels: Callable[[], dict[str, Any]] | None = None,
        logprobs: LogprobsMode = "raw",
        desk: Callable[[LastTokens], Desk] | None = None,
        leading: Way | None = None,
        drafting: Prepared | None = None,
        mover: Mover | None = None,
        wardrobe: Wardrobe | None = None,
    ) -> None:
        self.model, self.pool, self._mover = model, pool, mover
        own = sum(group.kind != "cross" for group in pool.groups)  # cross memory goes by slot: it needs no manager
        given = pool.num_pages if drafting is None else drafting.own
        self.groups, self.num_pages, self.page_size = pool.groups[:own], given[:own], pool.page_size
        self.max_slots = max_slots
        self.draft_room = 0
        self.drafts = None if drafting is None else drafting.loaded
        self.recorded = recorded
        self._drafting: Sequence[RecordedWay] = () if drafting is None else drafting.recorded
        self._kernels = kernels
        self._handed: dict[int, Follower | None] = {}
        self._handing = threading.Lock()
        self._work = work = StepWork(
            model, backend, pool, ops, max_slots, facts, recorded, streams, sharing, logprobs, desk, leading, drafting,
            wardrobe,
        )  # fmt: skip
        self.cuts_back = work.cuts_back  # drafts may be refused
        self.waves = 1 if work.waves is None else work.waves.most  # steps that may be on their way at a time
        self.row_bits = ops.row_bits and work.stands_apart  # of a token, whether decoded, drafted or forced
        self._steps = StepThread(
            work.begin,
            work.needs_values,
            work.forget,
            give_back=give_back,
            idle=work.gaps.idle if work.gaps is not None else None,
            settles=facts.on_host and self.waves == 1,
            ahead=max(1, self.waves - 1),
        )
        if work.gaps is not None:
            work.gaps.leave_when(self._steps.waiting)
        self._steps.start(begin)

    def launch(self, batch: Batch) -> Launched[StepOutput]:
        launched = self._steps.launch(Order(batch, self._taken(batch) if self._handed else {}))
        if self._mover is not None and self._mover.due():
            self.between(self._mover.move)
        return launched

    def constrain(self, slot: int, follower: Follower | None) -> None:
        """Hand over what follows the request that the next launched batch admits to this slot.

        It goes with that batch, in whose step it takes its place: no step launched earlier sees it. A batch that
        failed for lack of memory has lost it, as it has lost the slot. None, for a slot that is not admitted anew:
        from the next launched batch on nothing follows it.
        """
        with self._handing:
            self._handed[slot] = follower

    def between(self, work: Callable[[], T]) -> Launched[T]:
        return self._steps.between(work)

    def read_weight(self, name: str, rows: int) -> NDArray[np.float32]:
        names = self.model.weight_names()
        found = name if name in names else self.model.checkpoint_name(name)
        if found is None or found not in names:
            raise BadRequest(f"no weight is called {name!r:.200}", param="name")
        values = self.model.get_weight(found, rows)
        if values.numel() > MOST_READ:
            shape = " x ".join(str(size) for size in values.shape)
            raise BadRequest(f"{shape} numbers of {name} are too many for an answer", param="truncate_size")
        return values.float().cpu().numpy()

    def make_resident(self, limit: int, stopped: Callable[[], bool]) -> int:
        """As `KVPool.make_resident`."""
        return self.pool.make_resident(limit, stopped)

    def close(self) -> None:
        """End the thread after the steps that were launched."""
        self._steps.close()
        self._work.masks.close()

    @property
    def busy_since(self) -> float:
        """perf_counter at which the oldest step in progress began; 0 when idle."""
        return self._steps.busy_since

    @property
    def graph_bytes(self) -> int:
        """Memory that recorded steps take."""
        return sum(way.nbytes for way in (*self.recorded, *self._drafting))

    @property
    def prepared(self) -> dict[str, Any]:
        """What has been recorded and compiled so far."""
        found: dict[str, Any] = {"graphs": {way.decision: way.graphs.facts() for way in self.recorded}}
        if self._drafting:
            found["draft_graphs"] = {way.decision: way.graphs.facts() for way in self._drafting}
        if self._mover is not None:
            found["experts"] = self._mover.facts()
        return found if self._kernels is None else {**found, "kernels": self._kernels()}

    def forget_pictures(self) -> None:
        """Drop what the tower made of pictures, because its weights have changed. For `between`."""
        if self._work.desk is not None:
            self._work.desk.cache.clear()

    def drop_graphs(self) -> None:
        """Forget recorded steps because weights moved in memory. For `between`."""
        for way in self.recorded:
            way.drop()

    def _taken(self, batch: Batch) -> dict[int, Follower | None]:
        """Of what was handed over, what this batch's step is to see."""
        admitted = {admission.slot for admission in batch.admissions}
        with self._handing:
            due = [slot for slot, follower in self._handed.items() if slot in admitted or follower is None]
            return {slot: self._handed.pop(slot) for slot in due}
