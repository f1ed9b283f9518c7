"""What runs an engine's steps, and how large they may be; every choice on the way is a decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem import platforms
from phloem.checkpoint.families import audio_of
from phloem.core import resolve
from phloem.core.resolve import Decision
from phloem.engine import compiled
from phloem.engine.choices import experts
from phloem.engine.choices.dtypes import dtype_of
from phloem.engine.ranks.counts import spread_of
from phloem.engine.ranks.parallel import ranks_here, ranks_of, refuse_device
from phloem.engine.ranks.unshared import option_of
from phloem.kernels.ops import Ops
from phloem.platforms import cpu
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.engine.choices.experts import Hosting
    from phloem.layers.spread import Spread
    from phloem.platforms import Platform

HEARING_ROWS = 16  # requests that hear: each holds the keys and values of its audio, of a large model 246 MB


@dataclass(frozen=True)
class Machine:
    """What runs the steps, and how large they may be."""

    platform: Platform
    ops: Ops
    dtype: torch.dtype
    running: int
    chunk: int
    mixed: int
    eager: str = ""  # why steps cannot be recorded
    spread: Spread | None = None  # where experts lie over ranks, or are counted
    hosted: Hosting | None = None  # the host, where it has the routed experts


def take(decisions: list[Decision], decision: Decision) -> Any:
    """What was decided, noted."""
    decisions.append(decision)
    return decision.value


def machine_of(config: Config, checkpoint: Checkpoint, decisions: list[Decision]) -> Machine:
    ranks, processes = ranks_of(config), ranks_here(config)
    asked_threads = config.runtime.threads or experts.threads(config)
    threads = take(decisions, resolve.threads(asked_threads, max(1, available_cores() // processes)))
    platform, chosen = platforms.choose(config.runtime.device, threads, compiles=True)
    decisions.append(chosen)
    if platform.facts.compiles:
        compiled.check(config, checkpoint, platform.name, decisions)
    if ranks > 1:
        refuse_device(config, platform.name, platform.facts)
    if platform.facts.on_host and not platform.facts.compiles:
        decisions += cpu.level(config.runtime.cpu_level)
    asked_ops = config.runtime.ops or ("invariant" if config.runtime.enable_deterministic_inference else None)
    ops, why = platform.table(asked_ops, float32=config.model.dtype == "float32")
    decisions.append(Decision("ops", ops.name, why))
    ops = compiled.share_table(config, ops, decisions)
    if ops.activations is not None:
        decisions.append(Decision("activations", *ops.activations))
    dtype = dtype_of(config, checkpoint, platform, decisions)
    schedule = config.schedule
    asked, usual = schedule.max_running_requests, platform.default_running_requests
    if audio_of(checkpoint.model_type) is not None:
        usual = min(usual, HEARING_ROWS)
    running = take(decisions, resolve.running_requests(asked, usual, platform.name))
    chunk = take(decisions, resolve.chunk(schedule.chunked_prefill_size, platform.default_chunk, running))
    mixed = take(decisions, resolve.mixed_chunk(platform.default_mixed_chunk, chunk))
    spread = spread_of(config, checkpoint)
    return Machine(platform, ops, dtype, running, chunk, mixed, _eager(config, platform, spread), spread)


def _eager(config: Config, platform: Platform, spread: Spread | None) -> str:
    """Why steps cannot be recorded; "": they may be."""
    runtime = config.runtime
    apart = runtime.pp_size * runtime.attn_dp_size * runtime.attn_cp_size > 1
    if ranks_of(config) > 1 and (apart or not platform.facts.meets):
        where = "between the calls of a step" if platform.facts.meets else "within a step"
        return "{} {}: ranks meet {}".format(*option_of(config), where)
    return "experts that are chosen are counted op by op" if spread is not None else ""
