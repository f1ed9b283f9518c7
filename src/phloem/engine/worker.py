"""From a configuration and a checkpoint to a runner that can execute steps; every choice on the way is a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from phloem import attention, models, platforms
from phloem.attention import AttentionBackend, AttentionNeed
from phloem.core import resolve
from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.engine.decode import DecodeGraphs
from phloem.engine.runner import ModelRunner
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.utils import log
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from phloem.core.config import Config
    from phloem.kernels.ops import Ops
    from phloem.models import Model
    from phloem.platforms import Platform
    from phloem.utils.checkpoint import Checkpoint

_log = log.get("engine")

Report = Callable[[str, float], None]  # a phase of start-up ended: its name, its seconds


@dataclass
class Built:
    """What `build` made."""

    runner: ModelRunner
    context_length: int
    max_running_requests: int
    chunked_prefill_size: int
    mixed_prefill_size: int
    worthwhile_prefill: int
    max_total_tokens: int
    decisions: list[Decision] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)


class _Phase:
    def __init__(self, report: Report) -> None:
        self._report = report
        self._start = perf_counter()

    def end(self, name: str) -> None:
        now = perf_counter()
        self._report(name, now - self._start)
        self._start = now


def build(config: Config, checkpoint: Checkpoint, report: Report) -> Built:
    """Load the model and size its memory.

    Raises:
        ConfigError: a setting that this machine or model cannot serve.
        ModelLoadError: the checkpoint is missing something or is corrupt.
    """
    phase = _Phase(report)
    decisions: list[Decision] = []
    context = _take(decisions, resolve.context_length(config.model.context_length, checkpoint.context_length))
    checkpoint = replace(checkpoint, context_length=context)  # tables of positions need not be longer
    threads = _take(decisions, resolve.threads(config.runtime.threads, available_cores()))
    platform, chosen = platforms.choose(config.runtime.device, threads)
    decisions.append(chosen)
    ops, why = platform.table(config.runtime.ops)
    decisions.append(Decision("ops", ops.name, why))
    dtype = _dtype(config, checkpoint, platform, decisions)
    phase.end("device")

    free, _ = platform.memory()
    built_in = BuildContext(ops=ops, dtype=dtype, device=platform.device, quant=config.model.quantization)
    model = models.load_model(checkpoint, built_in, _progress(checkpoint.name))
    phase.end("weights")

    kv_dtype = _kv_dtype(config, dtype)
    backend = _backend(config, model, platform, ops, kv_dtype, decisions)
    page = _take(decisions, resolve.page_size(config.cache.page_size, backend.name, backend.page_size))
    schedule = config.schedule
    asked, usual = schedule.max_running_requests, platform.default_running_requests
    running = _take(decisions, resolve.running_requests(asked, usual, platform.name))
    chunk = _take(decisions, resolve.chunk(schedule.chunked_prefill_size, platform.default_chunk, running))
    mixed = _take(decisions, resolve.mixed_chunk(platform.default_mixed_chunk, chunk))
    facts = resolve.MemoryFacts(
        *platform.memory(),
        weights=min(model.weight_bytes, free),
        bytes_per_token=KVPool.bytes_per_token(model.attention_specs, kv_dtype),
        default_fraction=platform.default_memory_fraction,
    )
    tokens = _take(decisions, resolve.pool_tokens(config.cache, facts, page, context, running))
    pool = KVPool(model.attention_specs, tokens // page + 1, page, kv_dtype, platform.device)
    graphs = _graphs(config, model, backend, pool, ops, running, -(-min(context, tokens) // page) + 1, decisions)
    runner = ModelRunner(model, backend, pool, ops, max_slots=running, graphs=graphs, streams=platform.streams)
    phase.end("memory")
    info = {
        "weight_bytes": model.weight_bytes,
        "kv_bytes_per_token": facts.bytes_per_token,
        "kv_cache_dtype": str(kv_dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "device": platform.name,
    }
    return Built(runner, context, running, chunk, mixed, min(chunk, platform.worthwhile_chunk), tokens, decisions, info)


def _backend(
    config: Config,
    model: Model,
    platform: Platform,
    ops: Ops,
    kv_dtype: torch.dtype,
    decisions: list[Decision],
) -> AttentionBackend:
    """The attention backend: the named one, or the platform's first that accepts."""
    need = AttentionNeed(model.attention_specs, kv_dtype, platform.device, config.cache.page_size)
    known = attention.BACKENDS.names()
    names = [name for name in platform.attention_backends() if name in known]
    choice = attention.choose(names, need, ops, named=config.runtime.attention_backend)
    why = "; ".join([choice.reason, *(f"not {name}: {reason}" for name, reason in choice.declined.items())])
    decisions.append(Decision("attention_backend", choice.backend.name, why))
    return choice.backend


def _graphs(
    config: Config,
    model: Model,
    backend: AttentionBackend,
    pool: KVPool,
    ops: Ops,
    limit: int,
    max_pages: int,
    decisions: list[Decision],
) -> DecodeGraphs | None:
    """Recorded decode steps, where the op table can record; made on first use, never before the server is ready."""
    if config.runtime.disable_step_graph:
        decisions.append(Decision("step_graphs", "off", "as asked"))
        return None
    if ops.recorder is None:
        decisions.append(Decision("step_graphs", "off", f"the op table {ops.name!r} cannot record"))
        return None
    if not getattr(backend, "recordable", True):
        why = f"the attention backend {backend.name!r} plans each step on the host"
        decisions.append(Decision("step_graphs", "off", why))
        return None
    decisions.append(Decision("step_graphs", "on", "recorded on first use"))
    return DecodeGraphs(ops.recorder(), model, backend, pool, limit, max_pages, check=config.runtime.check_step_graph)


def _take(decisions: list[Decision], decision: Decision) -> Any:
    decisions.append(decision)
    return decision.value


def _dtype(config: Config, checkpoint: Checkpoint, platform: Platform, decisions: list[Decision]) -> torch.dtype:
    if config.model.dtype != "auto":
        dtype, why = getattr(torch, config.model.dtype), "as asked"
    else:
        stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        dtype, why = platform.dtype(stored)
    decisions.append(Decision("dtype", str(dtype).removeprefix("torch."), why))
    return dtype


_KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn,
}


def _kv_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    name = config.cache.kv_cache_dtype
    if name == "auto":
        return dtype
    if name not in _KV_DTYPES:
        raise ConfigError(
            f"kv_cache_dtype: {name!r} is not one of auto, {', '.join(_KV_DTYPES)}", param="kv_cache_dtype"
        )
    return _KV_DTYPES[name]


def _progress(name: str) -> Callable[[str, float], None]:
    """Log the share of the weights that is loaded, at most every two seconds."""
    last = perf_counter()

    def note(what: str, share: float) -> None:
        nonlocal last
        if perf_counter() - last > 2:
            last = perf_counter()
            _log.info("loading %s: %3.0f %% (%s)", name, share * 100, what)

    return note
