"""The engine: the scheduler on its runner, built and run by one thread, in a process of its own or in this one."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from phloem.adapters import served
from phloem.adapters.desk import Desk
from phloem.checkpoint.families import audio_of
from phloem.core import speculation
from phloem.core.errors import BadRequest, ConfigError, EngineDead, PhloemError
from phloem.core.messages import Failed, FromEngine, Ready, Stats, Submit, ToEngine
from phloem.core.ranges import parse_bytes
from phloem.core.renoising import Renoising
from phloem.core.targets import Targets
from phloem.engine import worker
from phloem.engine.canvases.canvas import CanvasRunner
from phloem.engine.canvases.renoise import RenoisingRunner
from phloem.engine.choices.unserved import refuse_unserved, uncaptured, undrafted
from phloem.engine.compiled import CompiledModel
from phloem.engine.drafts import drafted
from phloem.engine.ranks import cards, parallel
from phloem.engine.ranks.unshared import refuse_unshared
from phloem.engine.runner import ModelRunner
from phloem.engine.watchdog import Watchdog
from phloem.grammar._base import name_of
from phloem.grammar._manager import GrammarManager, GrammarSettings
from phloem.kvcache.events import Feed
from phloem.kvcache.manager import CacheManager
from phloem.kvcache.parted import PartedCache
from phloem.kvcache.publisher import ZmqPublisher, read_config
from phloem.launch.disagg import check as check_disagg
from phloem.launch.disagg import disaggregated
from phloem.launch.encoders import EncoderCore, encoders_of, seeing
from phloem.launch.encoders import check as check_encoders
from phloem.launch.nodes import dismiss
from phloem.launch.pictures import PictureCore, refuse_ranks
from phloem.launch.ranks import RankProcesses
from phloem.launch.rest import Resting
from phloem.launch.starting import Starting
from phloem.launch.tiers import check as check_tiers
from phloem.launch.tiers import tiers_of
from phloem.models._common import Decoder
from phloem.rl.keeper import Keeper
from phloem.rl.payload import named_tensors
from phloem.scheduler import loop
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings
from phloem.speculation import assemble
from phloem.speculation.capturing import Capturer, capturer
from phloem.text.vocabulary import thinking_markers, vocabulary
from phloem.utils import leftovers, log, machine, memory

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.batch import Runner
    from phloem.core.config import Config
    from phloem.core.late import Prepared
    from phloem.engine.worker import Built
    from phloem.launch.ranks import Phase, Ranks

_log = log.get("launch")

Send = Callable[[FromEngine], None]
Prepare = Callable[[Submit, Any], "Prepared | None"]
Poll = Callable[[float | None], list[ToEngine]]  # seconds to wait -> messages; EOFError: the door has gone

# Of the KV pool, made resident while nothing else is to do after the start: the first answers do not wait for it.
WARM_BYTES = 256 << 20


class _Inbox:
    def __init__(self, poll: Poll, ranks: Ranks | None) -> None:
        self._poll, self._ranks = poll, ranks

    def poll(self, timeout: float | None) -> list[ToEngine]:
        if self._ranks is not None:
            self._ranks.check()
        try:
            return self._poll(timeout)
        except EOFError:
            raise loop.InboxClosed from None


class EngineCore:
    """The scheduler on its runner. Built and run by one thread; `send` is called from that thread alone."""

    def __init__(self, config: Config, checkpoint: Checkpoint, send: Send, ranks: Ranks | None = None) -> None:
        """`ranks`: the others of several; None: they are started here, if more than one is asked for."""
        self._ranks = ranks
        self._phase: Phase = "start"
        if ranks is None and parallel.ranks_of(config) > 1:
            self._ranks = RankProcesses(config)
        try:
            self._build(config, checkpoint, send)
        except BaseException as error:
            if self._ranks is not None:
                self._ranks.close("start", str(error))
            raise

    def _build(self, config: Config, checkpoint: Checkpoint, send: Send) -> None:
        starting = Starting(send)
        self._closing = threading.Event()
        drafts = speculation.wanted(config)
        assemble.check(drafts)
        team = None if self._ranks is None else self._ranks.team
        beside = assemble.beside(drafts, checkpoint) if team is None else None
        built = worker.build(config, checkpoint, starting.took, team, beside)
        self.runner = built.runner
        runner, speculates = _drafting(drafts, built, config, checkpoint, team)
        if isinstance(built.denoising, Renoising):
            runner = RenoisingRunner(runner, built.denoising, checkpoint.vocab_size)
        elif built.denoising is not None:
            runner = CanvasRunner(runner, built.denoising)
        hung = (lambda seconds: None) if self._ranks is None else self._ranks.hung
        self._watchdog = Watchdog(built.runner, config.schedule.watchdog_timeout, hung)
        cache = _cache(config, checkpoint, built)
        settings = _settings(config, checkpoint, built, speculates)
        self._grammars = _grammars(config, checkpoint)
        prepare = _hearing(checkpoint, _no_grammar if self._grammars is None else self._grammars.prepare)
        self._encoders = encoders_of(config, checkpoint, built)
        self._sends = send
        self._desk, self._keeper = _desk(config, built, starting.took), _keeper(config, checkpoint, built)
        self.scheduler = Scheduler(
            runner,
            settings,
            cache,
            self._send,
            prepare=seeing(self._encoders, prepare),
            lender=self._desk,
            keeper=self._keeper,
        )
        self.scheduler.recorder, self.scheduler.encoders = built.recorder, self._encoders
        self.scheduler.capturer = _capturer(config, built, checkpoint)
        self._publisher = _publisher(config, cache, self.scheduler)
        self._tiers = tiers_of(config, checkpoint, built, self.scheduler)
        self._disagg = disaggregated(config, checkpoint, built, self.scheduler)
        self.info = self._facts(built, checkpoint, starting.seconds)

    def _facts(self, built: Built, checkpoint: Checkpoint, phases: dict[str, float]) -> dict[str, Any]:
        """What the door and `/server_info` are told."""
        return {
            **built.info,
            "max_total_num_tokens": built.max_total_tokens,
            "max_running_requests": built.max_running_requests,
            "chunked_prefill_size": built.chunked_prefill_size,
            "page_size": built.runner.page_size,
            "vocab_size": checkpoint.vocab_size,
            "context_length": built.context_length,
            "decisions": [[d.name, d.value, d.reason] for d in built.decisions]
            + ([] if self._grammars is None else [list(self._grammars.decision())]),
            "disaggregation": None if self._disagg is None else self._disagg.info,
            "kv_events": None if self._publisher is None else self._publisher.info(),
            "phases": phases,
            "lora_adapters": None if self._desk is None else self._desk.loaded(),
        }

    def _send(self, message: FromEngine) -> None:
        if isinstance(message, Stats) and self._grammars is not None:
            message.grammar_seconds = self._grammars.take_compile_seconds()
        self._sends(message)

    def run(self, poll: Poll, rest: Callable[[], None] | None = None) -> None:
        """Serve until told to drain. `rest` is called once whenever there was nothing to do for some seconds."""
        threading.Thread(target=self._warm, name="phloem-warm", daemon=True).start()
        self._phase = "serving"
        try:
            loop.run(self.scheduler, _Inbox(poll, self._ranks), Resting(rest) if rest is not None else None)
            self._phase = "drained"
        except EngineDead as error:
            raise error if self._ranks is None else self._ranks.explain(error) from None

    def _warm(self) -> None:
        memory.background_thread()
        begun = perf_counter()
        done = self.runner.make_resident(WARM_BYTES, self._closing.is_set)
        if done:
            _log.debug("%d MiB of the KV pool made resident in %.2f s", done >> 20, perf_counter() - begun)

    def close(self) -> None:
        self._closing.set()
        if self._disagg is not None:
            self._disagg.close()
        if self._encoders is not None:
            self._encoders.close()
        self._watchdog.close()
        if self._desk is not None:
            self._desk.close()
        if self._keeper is not None:
            self._keeper.close()
        if self._ranks is not None:
            self._ranks.close(self._phase)
        self.runner.close()
        if self._grammars is not None:
            self._grammars.close()
        if self._publisher is not None:
            self._publisher.close()
        if self._tiers is not None:
            self._tiers.close()


def _settings(config: Config, checkpoint: Checkpoint, built: Built, speculates: bool) -> ScheduleSettings:
    return ScheduleSettings(
        max_running_requests=built.max_running_requests,
        max_queued_requests=config.schedule.max_queued_requests,
        max_queue_seconds=config.schedule.max_queue_seconds,
        chunked_prefill_size=built.chunked_prefill_size,
        mixed_prefill_size=built.mixed_prefill_size,
        worthwhile_prefill=built.worthwhile_prefill,
        schedule_policy=config.schedule.schedule_policy,
        targets=Targets.parse(config.schedule.slo),
        fair=config.schedule.fair_queueing,
        context_length=built.context_length,
        vocab_size=checkpoint.vocab_size,
        eos_ids=checkpoint.eos_ids,
        stream_interval=config.schedule.stream_interval,
        random_seed=config.model.random_seed,
        overlap=not config.schedule.disable_overlap_schedule,
        debug_invariants=config.runtime.debug_invariants,
        whole_prompts=checkpoint.pooling is not None,
        speculates=speculates,
        forced_tokens=drafted.MOST_ROWS if isinstance(built.runner, ModelRunner) and built.runner.row_bits else 0,
        block=0 if built.denoising is None else built.denoising.unit,
        canvas=0 if built.denoising is None else built.denoising.canvas,
        waves=built.runner.waves if isinstance(built.runner, ModelRunner) else 1,
        dynamic_chunks=config.schedule.enable_dynamic_chunking,
        sees=built.tower is not None,
        whole_pictures=built.tower is not None and built.tower.whole,
    )


def _cache(config: Config, checkpoint: Checkpoint, built: Built) -> CacheManager:
    parts = [
        CacheManager(
            built.runner.groups,
            built.runner.num_pages,
            built.runner.page_size,
            enabled=not config.cache.disable_radix_cache and checkpoint.pooling is None,
            eviction=config.cache.radix_eviction_policy,
            chunk=built.chunked_prefill_size,
        )
        for _ in range(config.runtime.attn_dp_size)
    ]
    return parts[0] if len(parts) == 1 else PartedCache(parts)


def _drafting(
    drafts: speculation.Wanted, built: Built, config: Config, checkpoint: Checkpoint, team: parallel.Team | None
) -> tuple[Runner, bool]:
    """The runner, of rank 0 with the others, perhaps with drafts, and whether it has them. Raises ConfigError for a
    drafter that cannot serve."""
    runner = built.runner
    if not isinstance(runner, ModelRunner):
        built.decisions.append(drafted.without(drafts, undrafted(config, checkpoint, several=False)))
        return runner, False
    inner = runner if team is None else parallel.ParallelRunner(runner, team.tell)
    return assemble.around(drafts, runner, built.drafter, inner), built.drafter != speculation.NONE


def _capturer(config: Config, built: Built, checkpoint: Checkpoint) -> Capturer | None:
    """What captures hidden states. Raises ConfigError where that was asked for and cannot be."""
    runner = built.runner
    model = runner.model if isinstance(runner, ModelRunner) else None
    why = uncaptured(config, checkpoint, several=parallel.ranks_of(config) > 1)
    return capturer(config.speculative, model, checkpoint.vocab_size, built.context_length, why)


def _grammars(config: Config, checkpoint: Checkpoint) -> GrammarManager | None:
    """What follows constrained requests; it reads the tokenizer when the first one comes. None without a tokenizer."""
    if config.model.skip_tokenizer_init or checkpoint.pooling is not None:
        return None
    model, grammar = config.model, config.grammar
    template = Path(model.chat_template) if model.chat_template else None
    settings = GrammarSettings(
        backend=grammar.grammar_backend,
        whitespace=grammar.grammar_whitespace,
        jump_forward=not grammar.disable_jump_forward,
        compile_timeout=grammar.grammar_timeout,
        thinking=thinking_markers(checkpoint, template, model.reasoning_parser),
    )
    return GrammarManager(lambda: vocabulary(checkpoint), settings)


def _publisher(config: Config, cache: CacheManager, scheduler: Scheduler) -> ZmqPublisher | None:
    """What tells gateways of the cache. Raises ConfigError where that is asked for and cannot be."""
    text = config.cache.kv_events_config
    settings = read_config(text) if text is not None else None
    if settings is None or not settings.wanted or not cache.enabled:
        return None
    publisher = ZmqPublisher(settings, cache.page_size)
    scheduler.feed = Feed(cache.tree, publisher)
    return publisher


def _desk(config: Config, built: Built, report: worker.Report) -> Desk | None:
    """What lends adapters, with those that are given; None where none are served."""
    if built.sites is None or not isinstance(built.runner, ModelRunner):
        return None
    begun, runner, model = perf_counter(), built.runner, built.runner.model
    names = set(model.weight_names())

    def base(name: str) -> Tensor:
        if name not in names:
            raise KeyError(name)
        return model.get_weight(name)

    memory = None if config.lora.lora_memory is None else parse_bytes(config.lora.lora_memory, "lora_memory")
    desk = Desk(built.sites, runner.between, base, config.lora.max_loras_per_batch, memory, named_tensors)
    try:
        for spec in served.specs(config.lora):
            desk.load(spec.name, spec.path, spec.pinned).result()
    except BadRequest as error:
        raise ConfigError(error.message, param="lora_paths") from None
    report("adapters", perf_counter() - begun)
    return desk


def _hearing(checkpoint: Checkpoint, prepare: Prepare) -> Prepare:
    """With a check that a model hears something, and as much as it takes: it would hear what another request has."""
    names = audio_of(checkpoint.model_type)
    size = 0 if names is None else 8 * checkpoint.config[names["bands"]] * checkpoint.config[names["states"]]

    def checked(submit: Submit, prompt: Any) -> Prepared | None:
        if len(submit.audio) != size:
            what = f"this model hears {size} bytes of features" if size else "this model does not hear"
            raise BadRequest(f"audio: {what}, and not {len(submit.audio)}", param="audio")
        return prepare(submit, prompt)

    return checked


def _keeper(config: Config, checkpoint: Checkpoint, built: Built) -> Keeper | None:
    """What changes weights; None for models that do not generate, that hear, or that run transformers' code."""
    if not isinstance(built.runner, ModelRunner):
        return None
    model = built.runner.model
    model = model.inner if isinstance(model, CompiledModel) else model
    if not isinstance(model, Decoder):
        return None
    if audio_of(checkpoint.model_type) is not None:
        return None  # what lies in the slots was made by the weights that are there
    return Keeper(
        built.runner,
        model,
        checkpoint,
        config.model.weight_version,
        config.runtime.enable_weights_cpu_backup,
    )


def _no_grammar(submit: Submit, prompt: Any) -> None:
    field = name_of(submit.sampling)
    if field is not None:
        raise BadRequest(f"{field} needs the tokenizer, which skip_tokenizer_init leaves out", param=field)


def refuse(config: Config, checkpoint: Checkpoint) -> None:
    """What cannot be served, as far as that is known before any rank is started and any weight read. What the layers of
    a model on one rank lack, `worker.build` says when it has them, before it reads their weights.

    Raises:
        ConfigError: settings that do not go together, or not with this model.
        ModelLoadError: sizes that cannot be shared out, with those that could.
    """
    sizes = config.runtime.ep_size, config.runtime.attn_dp_size, config.nodes.nnodes
    if checkpoint.pictures is not None:
        refuse_ranks(config)
        return
    if config.disagg.encoder_only:
        return
    assemble.check(speculation.wanted(config))
    several = parallel.ranks_of(config) > 1
    cards.refuse(config)
    refuse_unserved(config, checkpoint, several=several)
    served.check(config.lora, several=several)
    if several or max(sizes) > 1 or config.nodes.node_rank:
        refuse_unshared(config, checkpoint)
        parallel.refuse(config, checkpoint)


def _check(config: Config, checkpoint: Checkpoint) -> None:
    """As `refuse`, and whether options contradict each other. What is wrong the further nodes are told."""
    try:
        check_tiers(config)
        check_disagg(config)
        check_encoders(config, checkpoint)
        refuse(config, checkpoint)
    except PhloemError as error:
        dismiss(config, error.message)
        raise


def serve(
    config: Config,
    checkpoint: Checkpoint,
    send: Send,
    poll: Poll,
    built: Callable[[], None] | None = None,
    rest: Callable[[], None] | None = None,
) -> None:
    """Build, run and close an engine; whatever ends it is told to the door."""
    leftovers.sweep()
    try:
        _check(config, checkpoint)
        if checkpoint.pictures is None or config.runtime.base_gpu_id is not None:
            cards.take(config, 0)
        usual = EngineCore if checkpoint.pictures is None else PictureCore
        kind = EncoderCore if config.disagg.encoder_only else usual
        core = kind(config, checkpoint, send)
        try:
            send(Ready(info=core.info))
            if built is not None:
                built()
            core.run(poll, rest)
        finally:
            core.close()
    except Exception as error:
        reason, param = machine.exhausted(error) or str(error), error.param if isinstance(error, PhloemError) else None
        send(Failed(error=reason, kind=type(error).__name__, trace=traceback.format_exc(), param=param))
        raise
