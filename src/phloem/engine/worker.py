"""From a configuration and a checkpoint to a runner that can execute steps; every choice on the way is a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from phloem import attention, quant
from phloem.adapters import served
from phloem.adapters._sites import Sites
from phloem.attention import AttentionBackend
from phloem.attention._packed import refusal
from phloem.core import resolve, speculation
from phloem.core.errors import ConfigError
from phloem.core.memory import groups_of
from phloem.core.nodes import Nodes
from phloem.core.ranges import parse_bytes
from phloem.core.resolve import Decision
from phloem.engine import compiled
from phloem.engine.canvases import denoising
from phloem.engine.choices import experts, on_paper
from phloem.engine.choices.dtypes import (
    tower_of,
)
from phloem.engine.choices.kept import Kept
from phloem.engine.choices.kept import kept as kept_of
from phloem.engine.choices.routes import chosen_of, keep_beside
from phloem.engine.choices.sizing import Need, Sizing, size_pool
from phloem.engine.compiled import CompiledModel, CompiledSteps, check_model
from phloem.engine.drafts import beside as drafts
from phloem.engine.drafts import drafted
from phloem.engine.pooled import PooledRunner, run_texts
from phloem.engine.ranks import balancing
from phloem.engine.ranks.balancing import Balancer
from phloem.engine.ranks.executor import Executor
from phloem.engine.ranks.machine import Machine, machine_of, take
from phloem.engine.ranks.parallel import Leading, LeadingModel, Pages, Rehearse, ranks_here, ranks_of, shared, told_by
from phloem.engine.ranks.rehearsal import Rehearsed
from phloem.engine.ranks.stages import Together
from phloem.engine.ranks.unshared import option_of
from phloem.engine.recorded import choice
from phloem.engine.runner import ModelRunner
from phloem.engine.towers.encoding import load_seeing
from phloem.engine.towers.media import Desk
from phloem.engine.warmup import warm
from phloem.engine.warmup.foretold import plan_of
from phloem.kernels.ops import Ops
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.models._common import Decoder
from phloem.models._foreign_tower import ForeignTower
from phloem.models._pooled import load_pooled
from phloem.models._transformers import load_foreign
from phloem.utils import log, memory
from phloem.utils.machine import memory as total_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.attention import Sharing
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.core.denoising import Denoising
    from phloem.core.renoising import Renoising
    from phloem.engine.drafts.drafting import Beside, Loaded
    from phloem.engine.forward import Way
    from phloem.engine.ranks.parallel import Team, Told
    from phloem.engine.recorded.flexible import FlexibleSteps
    from phloem.engine.transfer import LastTokens
    from phloem.engine.warmup.shapes import Shape
    from phloem.engine.warmup.warm import Warming
    from phloem.layers.context import AttentionSpec, Chosen
    from phloem.models import Model, Tower
    from phloem.platforms import Platform

_log = log.get("engine")

# Of a model that does not generate: texts and tokens of a step, where nobody says otherwise.
POOLED_ROWS = 256
POOLED_TOKENS = 2048

_More = tuple[tuple[frozenset[int], ...], bool, "Loaded | None"]  # stages, whether rows have adapters, what drafts
Report = Callable[[str, float], None]  # a phase of start-up ended: its name, its seconds


@dataclass
class Built:
    """What `build` made."""

    runner: ModelRunner | PooledRunner
    context_length: int
    max_running_requests: int
    chunked_prefill_size: int
    mixed_prefill_size: int
    worthwhile_prefill: int
    max_total_tokens: int
    tower: Tower | None = None  # of pictures
    sites: Sites | None = None  # where adapters go, if any are served
    decisions: list[Decision] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    recorder: Balancer | None = None  # counts how often experts are chosen
    denoising: Denoising | Renoising | None = None  # how a model of diffusion fills its blocks
    drafter: str = speculation.NONE  # what drafts


class _Phase:
    def __init__(self, report: Report) -> None:
        self._report = report
        self._start = perf_counter()

    def end(self, name: str) -> None:
        now = perf_counter()
        self._report(name, now - self._start)
        self._start = now


def build(
    config: Config, checkpoint: Checkpoint, report: Report, team: Team | None = None, beside: Beside | None = None
) -> Built:
    """Load the model, or rank 0's share of it, and size its memory. `beside`: loads a model that drafts for it.

    Raises:
        ConfigError: a setting that this machine or model cannot serve.
        ModelLoadError: the checkpoint is missing something or is corrupt.
    """
    if team is None and ranks_of(config) > 1:
        raise ConfigError(f"{option_of(config)[0]}: this runs on one rank alone", param="tp_size")
    phase = _Phase(report)
    decisions: list[Decision] = []
    checkpoint = _bounded(config, checkpoint, decisions)
    decisions.append(Decision("model_impl", checkpoint.chosen.impl, checkpoint.chosen.reason))
    checkpoint, fills = denoising.decide(config, checkpoint, decisions)
    machine = machine_of(config, checkpoint, decisions)
    if team is not None:
        decisions.append(team.decision)
    hosted = experts.hosting(config, checkpoint, machine.platform, machine.ops, decisions)
    if hosted is not None:
        machine = replace(machine, hosted=hosted, eager=machine.eager or hosted.eager)
    if checkpoint.chosen.impl == "transformers":
        machine = _foreign(config, machine)
    if checkpoint.pooling is not None:
        machine = _reading(config, machine)
    warming = _warming(config, checkpoint, machine)
    phase.end("device")
    try:
        if checkpoint.pooling is not None:
            return _build_pooled(config, checkpoint, machine, decisions, phase, warming)
        built = _build(config, checkpoint, machine, warming, decisions, phase, team, beside, fills is not None)
        return replace(built, denoising=fills)
    except BaseException:
        if warming is not None:
            warming.close()
        raise


def _foreign(config: Config, machine: Machine) -> Machine:
    """For a model whose code is not ours: it is called op by op, and rows may round otherwise beside others."""
    if config.lora.enable_lora or config.lora.lora_paths:
        raise ConfigError("adapters are served beside models with a file of their own alone", param="enable_lora")
    return replace(machine, ops=replace(machine.ops, row_bits=False), eager="transformers' code is called op by op")


def _warming(config: Config, checkpoint: Checkpoint, machine: Machine) -> Warming | None:
    """Begin to compile what this machine's ranks will launch."""
    apart = "transformers' code" if checkpoint.chosen.impl == "transformers" else ""
    apart = apart or ("" if machine.hosted is None else machine.hosted.eager)
    sizes = machine.running, machine.chunk
    plan = plan_of(config, checkpoint, machine.platform, machine.ops, machine.dtype, sizes, apart)
    return warm.start(machine.platform, *plan)


def _build(
    config: Config, checkpoint: Checkpoint, machine: Machine, warming: Warming | None, decisions: list[Decision],
    phase: _Phase, team: Team | None, beside: Beside | None, fills: bool,
) -> Built:  # fmt: skip
    platform, ops = machine.platform, machine.ops
    running, chunk, context = machine.running, machine.chunk, checkpoint.context_length
    free, _ = platform.memory()
    chosen = chosen_of(config, checkpoint)
    machine = _telling(machine, chosen)
    model, sites, helper = _weights(config, checkpoint, machine, decisions, team, beside, chosen)
    balancer = balancing.settle(config, machine.spread, model, checkpoint, team, decisions)
    mover = balancer if machine.hosted is None else experts.settle(config, machine.hosted, model, decisions)
    several = team is not None
    where = drafted.place(config, checkpoint, platform, ops, model, helper, several=several, fills=fills)
    drafter = drafted.decide(config, where)
    decisions.append(drafter.decision)
    phase.end("weights")

    kept = kept_of(config, checkpoint, platform, ops, machine.dtype, model, decisions)
    backend, page = kept.backend, kept.page
    told = kept.facts(checkpoint, machine)
    own, stages = _stages(model)
    carded = Together(model, team.groups) if team is not None and platform.facts.meets else None
    need = _need(config, machine, model, kept, context, (stages, sites is not None, helper))
    need = need if carded is None else replace(need, model=Rehearsed(carded))
    rehearse = None if team is None or carded is None else _rehearsing(team, machine, told)
    if warm.loaded(warming, need, platform, decisions, rehearse):
        phase.end("kernels")
    weights = min(_taken(model, sites, machine) + drafts.taken(helper), free)
    sizing = size_pool(config.cache, platform, need, weights, *_beside(config, platform, team))
    decisions += sizing.decisions
    pool = _pool(model, helper, sizing, kept, platform.device, own)
    keep_beside(pool, chosen, checkpoint, decisions)
    pages = -(-min(context, sizing.tokens) // page) + 1
    if team is not None:
        lent = None if sites is None else sites.sizes
        team.tell(Pages(sizing.num_pages, told, pages, lent, sizing.graph_bytes))
    sharing = _sharing(config, backend, decisions, alone=carded is None)
    graph_bytes, draft_bytes = drafts.graph_bytes(helper, sizing.graph_bytes)
    more = platform.memory()[0], graph_bytes, sharing is not None, sites is not None, machine.eager
    place = choice.Place(model, backend, pool, ops, platform.facts, *more, None if carded is None else carded.comm)
    rows = max(running, drafter.rows) if platform.facts.on_host else running
    ways = choice.choose(config.runtime, place, rows, pages, chunk, decisions)
    led, leading = _led(config, machine, checkpoint, model, kept, pool, (rows, chunk, pages), team, decisions, ways)
    phase.end("memory")
    if choice.record_first(config.runtime, ways, platform.facts, decisions):
        phase.end("graphs")
    more = rows, pages, chunk, machine.eager, tower_of(model), draft_bytes
    drafting = drafts.prepare(helper, drafts.Place(config, platform, backend, pool, ops, *more), decisions)
    if warming is not None:
        warming.ready()
    runner = ModelRunner(
        led, backend, pool, ops, running, facts=platform.facts, recorded=ways,
        streams=platform.streams, give_back=platform.empty_cache, begin=platform.begin_steps, sharing=sharing,
        kernels=warming.told if warming is not None else None, logprobs=config.model.logprobs_mode,
        desk=_desk(config, model, ops, running), leading=leading, drafting=drafting, mover=mover, wardrobe=sites,
    )  # fmt: skip
    sizes = running, chunk, machine.mixed, min(chunk, platform.worthwhile_chunk), sizing.tokens
    info = _info(machine, runner, kept.dtype, sizing.facts.bytes_per_token)
    return Built(runner, context, *sizes, tower_of(model), sites, decisions, info, balancer, drafter=drafter.drafter)


def _need(config: Config, machine: Machine, model: Model, kept: Kept, context: int, more: _More) -> Need:
    """What steps need."""
    ops, backend, kind = machine.ops, kept.backend, kept.dtype
    recorded = ops.recorder is not None and not config.runtime.disable_step_graph and not machine.eager
    sizes = kept.page, context, machine.running, machine.chunk
    attends = partial(_attends, backend.name, ops, machine.platform.device, kind)
    return Need(model, backend, ops, kind, *sizes, recorded, kept.scales, *more, attends)


def _telling(machine: Machine, chosen: Chosen | None) -> Machine:
    """Where the experts that tokens choose are told."""
    if chosen is None or machine.platform.facts.on_host:
        return machine
    return replace(machine, eager="the experts of tokens are told op by op")


def _rehearsing(team: Team, machine: Machine, facts: dict[str, str]) -> Callable[[list[Shape]], None]:
    """Of rank 0 with others that have a device each: how they are told which steps are run, from then on by all."""
    streams = machine.platform.streams
    if streams is not None:
        streams.check = team.groups.check
    return lambda shapes: team.tell(Rehearse(shapes, facts))


def _beside(config: Config, platform: Platform, team: Team | None) -> tuple[int, Callable[[], tuple[int, int] | None]]:
    """How many processes take of the same memory, and what other machines, or devices, have."""
    processes = 1 if platform.facts.meets else ranks_here(config)
    return processes, (lambda: None) if team is None else team.elsewhere


def _pool(
    model: Model, helper: Loaded | None, sizing: Sizing, kept: Kept, device: torch.device, own: frozenset[int] | None
) -> KVPool:
    """The memory of all layers; where drafts branch, with pages for that."""
    counts = drafts.with_spare(helper, groups_of(model.memory), sizing.num_pages, kept.page)
    return KVPool(model.memory, counts, kept.page, kept.dtype, device, kept.scales, own)


def _led(
    config: Config,
    machine: Machine,
    checkpoint: Checkpoint,
    model: Model,
    kept: Kept,
    pool: KVPool,
    most: tuple[int, int, int],
    team: Team | None,
    decisions: list[Decision],
    ways: Sequence[choice.RecordedWay],
) -> tuple[Model, Way | None]:
    """The model as the runner sees it, and the way of running steps that comes before any other; None: there is none.
    `most`: rows of a decode step, tokens of a step, and pages of a row."""
    compiler, name = machine.ops.compiler, checkpoint.model_type
    if compiler is not None:
        check_model(model, pool, name, machine.platform.name, sees=tower_of(model) is not None)
        makes = compiler()
        steps = CompiledSteps(makes, model, kept.backend, pool, *most)
        steps.prepare(decisions, name)
        return CompiledModel(model, makes, machine.running), steps
    if team is None:
        return model, None
    whole = Together(model, team.groups)
    if machine.platform.facts.meets:
        shares = choice.shared_ways(ways)
        led = Leading(whole, kept.backend, pool, team, platform=machine.platform, ways=shares)
        return LeadingModel(whole, team), led
    recorded = _recorded(config, machine, whole, kept, pool, most[2], decisions)
    return LeadingModel(whole, team), Leading(whole, kept.backend, pool, team, recorded)


def _recorded(
    config: Config, machine: Machine, whole: Together, kept: Kept, pool: KVPool, pages: int, decisions: list[Decision]
) -> FlexibleSteps | None:
    """What runs the steps of one of several ranks from recordings; None: they run eagerly."""
    eager = "" if machine.spread is None else "experts that are chosen are counted op by op"
    place = choice.Place(whole.model, kept.backend, pool, machine.ops, machine.platform.facts, 0, eager=eager)
    return choice.among_ranks(config, whole, place, machine.running, pages, machine.chunk, decisions)


def _stages(model: Model) -> tuple[frozenset[int] | None, tuple[frozenset[int], ...]]:
    """Which layers' memory is this rank's own (None: all of it), and of every stage; see `Stage`."""
    stage = model.stage if isinstance(model, Decoder) else None
    return (None, ()) if stage is None else (stage.own, stage.pools)


def _weights(
    config: Config,
    checkpoint: Checkpoint,
    machine: Machine,
    decisions: list[Decision],
    team: Team | None,
    beside: Beside | None,
    chosen: Chosen | None,
) -> tuple[Model, Sites | None, Loaded | None]:
    """The model, where adapters go in it, and what drafts for it."""
    model = _loaded(config, checkpoint, machine, decisions, team, chosen)
    ops, dtype, platform = machine.ops, machine.dtype, machine.platform
    sites = told_by(served.sites(config.lora, model, ops, dtype, platform.facts.on_host, decisions), team)
    if team is not None:
        team.loaded(_read(model))
    if beside is None:
        return model, sites, None
    return model, sites, beside(model, BuildContext(ops, dtype, platform.device), checkpoint.context_length)


def _info(machine: Machine, runner: ModelRunner, kv_dtype: torch.dtype, bytes_per_token: int) -> dict[str, Any]:
    return {
        "weight_bytes": runner.model.weight_bytes,
        "kv_bytes_per_token": bytes_per_token,
        "kv_cache_dtype": str(kv_dtype).removeprefix("torch."),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "device": machine.platform.name,
        "prepared": runner.prepared,
    }


def _sharing(config: Config, backend: AttentionBackend, decisions: list[Decision], *, alone: bool) -> Sharing | None:
    """What it costs to attend once to pages that rows share; None: it is not done."""
    sharing, why = attention.sharing_of(backend)
    if not alone:
        sharing, why = None, "ranks run one kind of graph each, of rows that attend for themselves"
    if config.runtime.disable_cascade_attention:
        sharing, why = None, "as asked"
    decisions.append(Decision("cascade_attention", "off" if sharing is None else "on", why))
    return sharing


def _bounded(config: Config, checkpoint: Checkpoint, decisions: list[Decision]) -> Checkpoint:
    """As the model with the context that is served: tables of positions need not be longer."""
    _, total = total_memory()
    context = resolve.context_length(config.model.context_length, checkpoint.context_length, total)
    return replace(checkpoint, context_length=take(decisions, context))


def build_executor(config: Config, checkpoint: Checkpoint, team: Team, receive: Callable[[], Told]) -> Executor:
    """A rank beside the first: its share of the model, and as much memory as rank 0 says.

    Raises:
        ConfigError: as `build`, and where this rank has something else than rank 0.
        ModelLoadError: as `build`.
    """
    decisions: list[Decision] = []
    checkpoint = _bounded(config, checkpoint, decisions)
    machine = machine_of(config, checkpoint, decisions)
    if team.groups.rank % Nodes.of(config).each == 0:  # the first of a further machine
        warming = _warming(config, checkpoint, machine)
    else:
        warming = warm.start(machine.platform, {}, "another rank of this machine has a process for that")
    try:
        return _executor(config, checkpoint, machine, decisions, team, receive, warming)
    except BaseException:
        if warming is not None:
            warming.close()
        raise


def _executor(
    config: Config, checkpoint: Checkpoint, machine: Machine, decisions: list[Decision], team: Team,
    receive: Callable[[], Told], warming: Warming | None,
) -> Executor:  # fmt: skip
    model = _loaded(config, checkpoint, machine, decisions, team)
    kept = kept_of(config, checkpoint, machine.platform, machine.ops, machine.dtype, model, decisions)
    team.loaded(_read(model))
    whole, platform, mine = Together(model, team.groups), machine.platform, kept.facts(checkpoint, machine)
    told = receive()
    if isinstance(told, Rehearse):
        alike(told.facts, mine, team.groups.rank)
        sizes = kept.page, checkpoint.context_length, machine.running, machine.chunk
        need = Need(Rehearsed(whole), kept.backend, machine.ops, kept.dtype, *sizes, False, kept.scales)
        if warming is not None:
            warming.wait()
        warm.rehearse(need, platform, told.shapes, team.measured)
        told = receive()
    if not isinstance(told, Pages):
        raise ConfigError("rank 0 ended its start", param="tp_size")
    alike(told.facts, mine, team.groups.rank)
    device = platform.device
    sites = None if told.adapters is None else Sites(model, machine.ops, machine.dtype, *told.adapters)
    own = model.stage.own if isinstance(model, Decoder) and model.stage is not None else None
    pool = KVPool(model.memory, told.num_pages, kept.page, kept.dtype, device, kept.scales, own)
    shift = balancing.shifter_of(model, checkpoint, machine.spread, team)
    common = whole, kept.backend, pool, machine.ops, machine.running, shift, team.busy
    if platform.facts.meets:
        found = platform.memory()[0], told.graph_bytes, False, sites is not None, machine.eager, whole.comm
        place = choice.Place(model, kept.backend, pool, machine.ops, platform.facts, *found)
        sizes = machine.running, told.most, machine.chunk
        ways = choice.shared_ways(choice.choose(config.runtime, place, *sizes, decisions))
        return Executor(*common, None, sites, platform, ways)
    return Executor(*common, _recorded(config, machine, whole, kept, pool, told.most, decisions), sites)


def _desk(config: Config, model: Model, ops: Ops, running: int) -> Callable[[LastTokens], Desk] | None:
    tower = tower_of(model)
    if tower is None:
        return None
    budget = parse_bytes(config.media.mm_encoder_cache, "mm_encoder_cache")
    return lambda last: Desk(tower, ops, running, budget, last.up)


def _read(model: Model) -> int:
    return model.bytes_read if isinstance(model, Decoder) else 0


def _taken(model: Model, sites: Sites | None, machine: Machine) -> int:
    """Bytes of weights; a host takes those of adapters when they come, and a device has copies of some experts."""
    on_host, found = machine.platform.facts.on_host, model.weight_bytes
    tower = tower_of(model)
    found += tower.weight_bytes if isinstance(tower, ForeignTower) else 0
    if machine.hosted is not None:
        aside = machine.hosted.aside
        found += aside.device_bytes - (0 if on_host else aside.host_bytes)
    return found + (0 if sites is None or on_host else sites.nbytes)


def _reading(config: Config, machine: Machine) -> Machine:
    """For a model that reads whole texts: as many texts and tokens as a step of it may have."""
    schedule = config.schedule
    running = schedule.max_running_requests or max(machine.running, POOLED_ROWS)
    return replace(machine, running=running, chunk=schedule.chunked_prefill_size or max(machine.chunk, POOLED_TOKENS))


def _build_pooled(
    config: Config, checkpoint: Checkpoint, machine: Machine, decisions: list[Decision], phase: _Phase,
    warming: Warming | None,
) -> Built:  # fmt: skip
    """A model that does not generate: no pages, no sampling, whole texts."""
    platform, pooling = machine.platform, checkpoint.pooling
    assert pooling is not None
    if config.lora.enable_lora or config.lora.lora_paths:
        raise ConfigError("adapters are served beside models that generate alone", param="enable_lora")
    ops = _products(config, checkpoint, machine, decisions)
    ctx = BuildContext(
        ops, machine.dtype, platform.device, quant=quant.method_for(config.model.quantization, checkpoint.stored)
    )
    model = load_pooled(checkpoint, ctx, log.progress(_log, "loading", checkpoint.name))
    if isinstance(model.body, Decoder) and (why := refusal(model.body.memory, model.body.attention_specs)) is not None:
        raise ConfigError(f"task {pooling.task}: {checkpoint.model_type} cannot be served so: {why}", param="task")
    phase.end("weights")
    running, chunk = machine.running, machine.chunk
    decisions[:] = [
        d for d in decisions if d.name not in ("max_running_requests", "chunked_prefill_size", "mixed_prefill_size")
    ]
    decisions += [
        Decision("task", pooling.task, f"{pooling.reason}: {pooling.about}"),
        Decision("max_running_requests", running, "texts that are computed or waited for at a time"),
        Decision("chunked_prefill_size", chunk, "tokens of a step; a longer text has one of its own"),
        Decision("kv_cache", "none", "every text is read once, whole"),
    ]
    if platform.facts.on_host and memory.keep_freed():
        decisions.append(Decision("freed_memory", "kept", "the same blocks are wanted again by the next step"))
    if warming is not None:
        warming.finish_texts(partial(run_texts, model, ops), min(chunk, checkpoint.context_length), decisions)
        warming.ready()
    runner = PooledRunner(
        model, ops, running, facts=platform.facts, give_back=platform.empty_cache, begin=platform.begin_steps,
        kernels=None if warming is None else warming.told,
    )  # fmt: skip
    info = {
        "weight_bytes": model.weight_bytes,
        "kv_bytes_per_token": 0,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "device": platform.name,
        "prepared": runner.prepared,
    }
    return Built(runner, checkpoint.context_length, running, chunk, chunk, chunk, 0, None, None, decisions, info)


def _products(config: Config, checkpoint: Checkpoint, machine: Machine, decisions: list[Decision]) -> Ops:
    """The table for whole texts: on a host with torch's products of float32, which are faster for many rows."""
    stored = checkpoint.gguf is not None or config.model.quantization is not None
    wide = machine.dtype == torch.float32 and not stored
    if not (machine.platform.facts.on_host and wide and config.runtime.ops is None):
        return machine.ops
    decisions.append(Decision("products", "torch", "faster than this table's for float32 weights and many rows"))
    plain = Ops()
    return replace(
        machine.ops,
        prepare_linear=plain.prepare_linear,
        linear=plain.linear,
        embedding=plain.embedding,
        embedding_part=None,
        activations=None,
    )


def _loaded(
    config: Config, checkpoint: Checkpoint, machine: Machine, decisions: list[Decision], team: Team | None = None,
    chosen: Chosen | None = None,
) -> Model:  # fmt: skip
    platform, begun = machine.platform, perf_counter()
    own = checkpoint.chosen.impl == "phloem"
    stager = platform.stager() if checkpoint.format == "safetensors" and own else None
    method = quant.method_for(config.model.quantization, checkpoint.stored)
    ctx = BuildContext(machine.ops, machine.dtype, platform.device, quant=method, stager=stager)
    if team is not None:
        ctx = shared(ctx, team.mesh, team.groups, config.runtime.moe_a2a_backend)
    ctx = replace(ctx, chosen=chosen, spread=machine.spread)
    if machine.hosted is not None:
        ctx = replace(ctx, aside=machine.hosted.aside, expert_quant=machine.hosted.method)
    try:
        if not own:
            trust = config.model.trust_remote_code
            model = load_foreign(checkpoint, ctx, log.progress(_log, "loading", checkpoint.name), trust=trust)
        else:
            check = partial(on_paper.check_alone, config, checkpoint, spread=machine.spread, chosen=chosen)
            read = check if team is None else lambda model: None  # of shares it was asked before ranks were started
            progress = log.progress(_log, "loading", checkpoint.name)
            model = load_seeing(config, checkpoint, ctx, progress, decisions, read)
    finally:
        if stager is not None:
            stager.close()
    compiled.share_weights(model, checkpoint, machine.ops, config.runtime.tp_size)
    found = None if method is None else method.report
    if found is None and isinstance(model, Decoder) and model.index.report is not None and model.index.report.noted:
        found = model.index.report
    if found is not None:
        decisions.append(Decision("weights", *found.decision(str(machine.dtype).removeprefix("torch."))))
    seconds, size = perf_counter() - begun, model.weight_bytes / resolve.GIB
    _log.info("%s: %.2f GiB of weights in %.1f s, %.2f GiB/s", checkpoint.name, size, seconds, size / seconds)
    return model


def _attends(
    name: str, ops: Ops, device: torch.device, kv_dtype: torch.dtype, specs: Sequence[AttentionSpec]
) -> AttentionBackend:
    """The same backend for other layers."""
    return attention.BACKENDS.get(name)(ops, specs, device, kv_dtype)


def alike(theirs: dict[str, str], own: dict[str, str], rank: int) -> None:
    """Raises ConfigError where a rank has something else than rank 0."""
    other = [f"{what} {own[what]}, rank 0 has {value}" for what, value in theirs.items() if own[what] != value]
    if other:
        raise ConfigError(f"rank {rank}: {'; '.join(other)}", param="tp_size")
