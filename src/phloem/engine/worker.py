"""From a configuration and a checkpoint to a runner that can execute steps; every choice on the way is a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from phloem import attention, quant
from phloem.adapters import served
from phloem.adapters._sites import Sites
from phloem.attention import AttentionBackend, AttentionNeed
from phloem.attention._packed import refusal
from phloem.core import resolve, speculation
from phloem.core.denoising import WHOLE
from phloem.core.errors import ConfigError
from phloem.core.memory import groups_of
from phloem.core.ranges import parse_bytes
from phloem.core.resolve import Decision
from phloem.engine import balancing, compiled, denoising, experts, warm
from phloem.engine import beside as drafts
from phloem.engine.balancing import Balancer
from phloem.engine.compiled import CompiledModel, CompiledSteps, check_model
from phloem.engine.dtypes import (
    backend_names,
    kept_in,
    kv_dtype_of,
    kv_scales_of,
    tower_of,
    unasked,
)
from phloem.engine.encoding import load_seeing
from phloem.engine.executor import Executor
from phloem.engine.machine import Machine, machine_of, take
from phloem.engine.media import Desk
from phloem.engine.parallel import Leading, LeadingModel, Pages, Rehearse, ranks_here, ranks_of, shared, told_by
from phloem.engine.pooled import PooledRunner
from phloem.engine.recorded import choice
from phloem.engine.rehearsal import Rehearsed
from phloem.engine.routes import chosen_of, keep_beside
from phloem.engine.runner import ModelRunner
from phloem.engine.sizing import Need, Sizing, size_pool
from phloem.engine.stages import Together
from phloem.engine.unshared import option_of
from phloem.kernels.ops import Ops
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.models._common import Decoder
from phloem.models._foreign_tower import ForeignTower
from phloem.models._pooled import load_pooled
from phloem.models._transformers import load_foreign
from phloem.utils import log, memory
from phloem.utils.cores import available_cores
from phloem.utils.machine import memory as total_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from phloem.attention import Sharing
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.core.denoising import Denoising
    from phloem.core.renoising import Renoising
    from phloem.engine.drafting import Beside, Loaded
    from phloem.engine.forward import Way
    from phloem.engine.parallel import Team, Told
    from phloem.engine.recorded.flexible import FlexibleSteps
    from phloem.engine.transfer import LastTokens
    from phloem.engine.warm import Warming
    from phloem.layers.context import Chosen
    from phloem.models import Model, Tower
    from phloem.models._scales import LayerScales
    from phloem.platforms import Platform

_log = log.get("engine")

# Of a model that does not generate: texts and tokens of a step, where nobody says otherwise.
POOLED_ROWS = 256
POOLED_TOKENS = 2048

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
        phase.end("device")
        return _build_pooled(config, checkpoint, machine, decisions, phase)
    warming = warm.start(machine.platform, *_ahead(config, checkpoint, machine))
    phase.end("device")
    try:
        built = _build(config, checkpoint, machine, warming, decisions, phase, team, beside)
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


def _build(
    config: Config,
    checkpoint: Checkpoint,
    machine: Machine,
    warming: Warming | None,
    decisions: list[Decision],
    phase: _Phase,
    team: Team | None,
    beside: Beside | None,
) -> Built:
    platform, ops = machine.platform, machine.ops
    running, chunk, context = machine.running, machine.chunk, checkpoint.context_length
    free, _ = platform.memory()
    chosen = chosen_of(config, checkpoint)
    machine = _telling(machine, chosen)
    model, sites, helper = _weights(config, checkpoint, machine, decisions, team, beside, chosen)
    balancer = balancing.settle(config, machine.spread, model, checkpoint, team, decisions)
    mover = balancer if machine.hosted is None else experts.settle(config, machine.hosted, model, decisions)
    phase.end("weights")
    kept = _kept(config, checkpoint, machine, model, decisions)
    kv_dtype, scales, backend, page = kept.dtype, kept.scales, kept.backend, kept.page
    told = kept.facts(checkpoint, machine)
    recorded = ops.recorder is not None and not config.runtime.disable_step_graph and not machine.eager
    own, stages = _stages(model)
    carded = Together(model, team.groups) if team is not None and platform.facts.meets else None
    need = Need(model, backend, ops, kv_dtype, page, context, running, chunk, recorded, scales, stages)
    need = need if team is None or carded is None else _rehearsed(need, team, carded, machine, warming, told)
    if warming is not None:
        warming.finish(need, platform.device, decisions)
        phase.end("kernels")
    weights = min(_taken(model, sites, machine) + drafts.taken(helper), free)
    sizing = size_pool(config.cache, platform, need, weights, *_beside(config, platform, team))
    decisions += sizing.decisions
    pool = _pool(model, helper, sizing, kept, platform.device, own)
    keep_beside(pool, chosen, checkpoint, decisions)
    pages = -(-min(context, sizing.tokens) // page) + 1
    if team is not None:
        team.tell(Pages(sizing.num_pages, told, pages, sites and sites.sizes, sizing.graph_bytes))
    sharing = _sharing(config, backend, decisions, alone=carded is None)
    more = platform.memory()[0], sizing.graph_bytes, sharing is not None, sites is not None, machine.eager
    place = choice.Place(model, backend, pool, ops, platform.facts, *more, carded and carded.comm)
    rows = max(running, speculation.wanted(config).rows) if platform.facts.on_host else running
    ways = choice.choose(config.runtime, place, rows, pages, chunk, decisions)
    led, leading = _led(config, machine, checkpoint, model, kept, pool, (rows, chunk, pages), team, decisions, ways)
    phase.end("memory")
    if choice.record_first(config.runtime, ways, platform.facts, decisions):
        phase.end("graphs")
    if warming is not None:
        warming.ready()
    held = drafts.Place(config, platform, backend, pool, ops, rows, pages, chunk, machine.eager, tower_of(model))
    drafting = drafts.prepare(helper, held, decisions)
    runner = ModelRunner(
        led, backend, pool, ops, running, facts=platform.facts, recorded=ways,
        streams=platform.streams, give_back=platform.empty_cache, begin=platform.begin_steps, sharing=sharing,
        kernels=warming.told if warming is not None else None, logprobs=config.model.logprobs_mode,
        desk=_desk(config, model, ops, running), leading=leading, drafting=drafting, mover=mover, wardrobe=sites,
    )  # fmt: skip
    sizes = running, chunk, machine.mixed, min(chunk, platform.worthwhile_chunk), sizing.tokens
    info = _info(machine, runner, kv_dtype, sizing.facts.bytes_per_token)
    return Built(runner, context, *sizes, tower_of(model), sites, decisions, info, balancer)


def _telling(machine: Machine, chosen: Chosen | None) -> Machine:
    """Where the experts that tokens choose are told."""
    if chosen is None or machine.platform.facts.on_host:
        return machine
    return replace(machine, eager="the experts of tokens are told op by op")


def _rehearsed(
    need: Need, team: Team, whole: Together, machine: Machine, warming: Warming | None, facts: dict[str, str]
) -> Need:
    """Of rank 0 with others that have a device each: what is run for it from here on all run, who are told so."""
    need, streams = replace(need, model=Rehearsed(whole)), machine.platform.streams
    team.tell(Rehearse([] if warming is None else warm.few_shapes(need), facts))
    if streams is not None:
        streams.check = team.groups.check
    return need


def _beside(config: Config, platform: Platform, team: Team | None) -> tuple[int, Callable[[], tuple[int, int] | None]]:
    """How many processes take of the same memory, and what other machines, or devices, have."""
    processes = 1 if platform.facts.meets else ranks_here(config)
    return processes, (lambda: None) if team is None else team.elsewhere


def _pool(
    model: Model, helper: Loaded | None, sizing: Sizing, kept: _Kept, device: torch.device, own: frozenset[int] | None
) -> KVPool:
    """The memory of all layers; where drafts branch, with pages for that."""
    counts = drafts.with_spare(helper, groups_of(model.memory), sizing.num_pages, kept.page)
    return KVPool(model.memory, counts, kept.page, kept.dtype, device, kept.scales, own)


def _led(
    config: Config,
    machine: Machine,
    checkpoint: Checkpoint,
    model: Model,
    kept: _Kept,
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
    config: Config, machine: Machine, whole: Together, kept: _Kept, pool: KVPool, pages: int, decisions: list[Decision]
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


@dataclass(frozen=True)
class _Kept:
    """How a model's keys and values are kept, and what attends to them."""

    dtype: torch.dtype
    scales: Mapping[int, LayerScales]
    backend: AttentionBackend
    page: int

    def facts(self, checkpoint: Checkpoint, machine: Machine) -> dict[str, str]:
        """What all ranks must have alike."""
        return {
            "model type": checkpoint.model_type,
            "context length": str(checkpoint.context_length),
            "type of the KV cache": str(self.dtype),
            "attention backend": self.backend.name,
            "page size": str(self.page),
            "op table": machine.ops.name,
            "rows and tokens of a step": f"{machine.running}, {machine.chunk}",
        }


def _kept(config: Config, checkpoint: Checkpoint, machine: Machine, model: Model, decisions: list[Decision]) -> _Kept:
    platform, ops = machine.platform, machine.ops
    kv_dtype = unasked(config, checkpoint, model, platform, ops) or kept_in(config, machine.dtype, model)
    scales = kv_scales_of(config, checkpoint, model, kv_dtype, decisions)
    backend = _backend(config, model, platform, ops, kv_dtype, scales, decisions)
    block = max((spec.block for spec in model.attention_specs), default=0) % WHOLE
    page = take(decisions, resolve.page_size(config.cache.page_size, backend.name, backend.page_size, block))
    return _Kept(kv_dtype, scales, backend, page)


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
    model = _loaded(config, checkpoint, machine, decisions, team)
    kept = _kept(config, checkpoint, machine, model, decisions)
    team.loaded(_read(model))
    whole, platform, mine = Together(model, team.groups), machine.platform, kept.facts(checkpoint, machine)
    told = receive()
    if isinstance(told, Rehearse):
        alike(told.facts, mine, team.groups.rank)
        sizes = kept.page, checkpoint.context_length, machine.running, machine.chunk
        need = Need(Rehearsed(whole), kept.backend, machine.ops, kept.dtype, *sizes, False, kept.scales)
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


def _build_pooled(
    config: Config, checkpoint: Checkpoint, machine: Machine, decisions: list[Decision], phase: _Phase
) -> Built:
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
    schedule = config.schedule
    running = schedule.max_running_requests or max(machine.running, POOLED_ROWS)
    chunk = schedule.chunked_prefill_size or max(machine.chunk, POOLED_TOKENS)
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
    runner = PooledRunner(
        model, ops, running, facts=platform.facts, give_back=platform.empty_cache, begin=platform.begin_steps
    )
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
            model = load_seeing(config, checkpoint, ctx, log.progress(_log, "loading", checkpoint.name), decisions)
    finally:
        if stager is not None:
            stager.close()
    compiled.share_weights(model, checkpoint, machine.ops, config.runtime.tp_size)
    if method is not None and method.report is not None:
        decisions.append(Decision("weights", *method.report.decision(str(machine.dtype).removeprefix("torch."))))
    seconds, size = perf_counter() - begun, model.weight_bytes / resolve.GIB
    _log.info("%s: %.2f GiB of weights in %.1f s, %.2f GiB/s", checkpoint.name, size, seconds, size / seconds)
    return model


def alike(theirs: dict[str, str], own: dict[str, str], rank: int) -> None:
    """Raises ConfigError where a rank has something else than rank 0."""
    other = [f"{what} {own[what]}, rank 0 has {value}" for what, value in theirs.items() if own[what] != value]
    if other:
        raise ConfigError(f"rank {rank}: {'; '.join(other)}", param="tp_size")


def _ahead(config: Config, checkpoint: Checkpoint, machine: Machine) -> tuple[dict[str, Any], str | None]:
    """What the process that compiles beside the loading is told, or why there is none."""
    backend = config.runtime.attention_backend or backend_names(machine.platform)[0]
    kept, name = config.cache.kv_cache_dtype, str(machine.dtype).removeprefix("torch.")
    refusal = None
    if machine.eager:
        refusal = f"{machine.eager}: which kernels it needs shows when it runs"
    elif ranks_of(config) > 1:
        refusal = "several ranks have other sizes than the whole model, and launch their kernels together"
    elif checkpoint.quantised or config.model.quantization is not None:
        refusal = "which form quantised weights take shows when they are loaded"
    elif machine.ops.name not in warm.TABLES:
        refusal = f"the op table {machine.ops.name!r} has no such kernels"
    elif backend not in warm.BACKENDS:
        refusal = f"the attention backend {backend!r} brings its own kernels"
    plan = {
        "model_type": checkpoint.model_type,
        "config": checkpoint.config,
        "context": checkpoint.context_length,
        "vocab": checkpoint.vocab_size,
        "ops": machine.ops.name,
        "dtype": name,
        "kv_dtype": name if kept == "auto" else str(kv_dtype_of(config, machine.dtype)).removeprefix("torch."),
        "page": config.cache.page_size,
        "running": machine.running,
        "chunk": machine.chunk,
        "processes": available_cores(),
    }
    return plan, refusal


def _backend(
    config: Config,
    model: Model,
    platform: Platform,
    ops: Ops,
    kv_dtype: torch.dtype,
    scales: Mapping[int, LayerScales],
    decisions: list[Decision],
) -> AttentionBackend:
    """The attention backend: the named one, or the platform's first that accepts."""
    # Of latents, what has written and read them knows; no backend does.
    width = max((len(scales[spec.pool][0]) for spec in model.attention_specs if spec.pool in scales), default=0)
    need = AttentionNeed(model.attention_specs, kv_dtype, platform.device, config.cache.page_size, width)
    choice = attention.choose(backend_names(platform), need, ops, named=config.runtime.attention_backend)
    why = "; ".join([choice.reason, *(f"not {name}: {reason}" for name, reason in choice.declined.items())])
    decisions.append(Decision("attention_backend", choice.backend.name, why))
    return choice.backend
