"""Whether the processor computes routed experts beside the device (`--kt-*`), by which table, and which ones.

Options have SGLang's names. Each is kept to, or ends the start with the reason why it cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem import quant
from phloem.core.errors import ConfigError
from phloem.core.resolve import GIB, Decision
from phloem.distributed.experts import hit_share, moves, place
from phloem.engine.ranks.counts import read_counts
from phloem.engine.ranks.parallel import ranks_of
from phloem.engine.ranks.unshared import option_of
from phloem.layers.aside import Aside
from phloem.models._common import Decoder
from phloem.platforms import cpu
from phloem.utils import log
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.kernels.ops import Ops
    from phloem.models import Model
    from phloem.platforms import Platform
    from phloem.quant import Method

_log = log.get("engine.experts")

MADE = {"AMXINT4": "int4", "MOE_INT4": "int4", "AMXINT8": "int8", "MOE_INT8": "int8"}
# By what is stored: files of quant/ that read such weights (some read several kinds, which the checkpoint decides).
_ANY = ("compressed_tensors", "modelopt")
STORED = {
    "FP8": ("fp8", *_ANY),
    "FP8_PERCHANNEL": ("fp8", *_ANY),
    "RAWINT4": ("awq", "gptq", "auto_round", "compressed_tensors"),
    "MXFP4": ("mxfp4", *_ANY),
    "GPTQ_INT4": ("gptq", "auto_round"),
}
METHODS = (*MADE, "BF16", "LLAMAFILE", *STORED)
NEEDING = "kt_method kt_cpuinfer kt_threadpool_count kt_max_deferred_experts_per_token kt_gpu_prefill_token_threshold"
STEPS = 256  # between two looks at what is chosen
MOST = 64  # experts that change places at a time: the next step waits for their copies


@dataclass(frozen=True)
class Hosting:
    """What layers are told, and what their weights are made of. `eager`: why steps cannot be recorded; "": they can."""

    aside: Aside
    method: Method | None
    eager: str


def asked(config: Config) -> bool:
    """Whether experts are to lie on the host.

    Raises:
        ConfigError: only details of it are given.
    """
    own = config.experts
    if own.kt_num_gpu_experts is not None or own.kt_weight_path is not None:
        return True
    flat = config.flat()
    alone = [name for name in NEEDING.split() if flat[name] is not None]
    alone += ["kt_enable_dynamic_expert_update"] if own.kt_enable_dynamic_expert_update else []
    alone += ["kt_expert_placement_strategy"] if own.kt_expert_placement_strategy != "uniform" else []
    if alone:
        raise ConfigError(f"{alone[0]}: it needs kt_num_gpu_experts, which may be 0", param=alone[0])
    return False


def threads(config: Config) -> int | None:
    """How many are asked for, by either name.

    Raises:
        ConfigError: more than there are cores, or several pools of them.
    """
    own, cores = config.experts, available_cores()
    if own.kt_cpuinfer is not None and own.kt_cpuinfer > cores:
        raise ConfigError(f"kt_cpuinfer: {own.kt_cpuinfer} threads, but {cores} cores", param="kt_cpuinfer")
    if own.kt_threadpool_count not in (None, 1):
        why = f"{own.kt_threadpool_count} pools: one pool of threads computes all experts, on whatever NUMA nodes"
        raise ConfigError(f"kt_threadpool_count: {why}", param="kt_threadpool_count")
    return own.kt_cpuinfer


def hosting(
    config: Config, checkpoint: Checkpoint, platform: Platform, ops: Ops, decisions: list[Decision]
) -> Hosting | None:
    """None: experts lie where the model does.

    Raises:
        ConfigError: an option that cannot be kept to.
    """
    if not asked(config):
        return None
    _refuse(config, checkpoint)
    on_host, count = platform.facts.on_host, threads(config)
    if on_host and count is not None and config.runtime.threads not in (None, count):
        why = f"{count}, but threads is {config.runtime.threads}: the model runs on the same ones"
        raise ConfigError(f"kt_cpuinfer: {why}", param="kt_cpuinfer")
    host, why = ops, "the table that the model runs on"
    if not on_host or ops.name == "reference":
        host, why = cpu.Platform(count or config.runtime.threads).table(None, float32=config.model.dtype == "float32")
    same = on_host and host.name == ops.name
    deferred = config.experts.kt_max_deferred_experts_per_token or 0
    k = next((int(checkpoint.config[key]) for key in _CHOSEN if checkpoint.config.get(key)), 0)
    if deferred and deferred >= k:
        why = f"{deferred} of {k} experts of a token; one at least is its own layer's"
        raise ConfigError(f"kt_max_deferred_experts_per_token: {why}", param="kt_max_deferred_experts_per_token")
    streams = config.experts.kt_gpu_prefill_token_threshold or None
    crossing = None if same else platform.streams
    aside = Aside(host, same=same, deferred=deferred, streams_from=None if same else streams, streams=crossing)
    decisions.append(Decision("expert_ops", host.name, why))
    if deferred:
        why = "of each token, the least weighted: added one sparse layer later, which changes the answers"
        decisions.append(Decision("deferred_experts", deferred, why))
    eager = "" if same and not deferred else "routed experts are computed on the host, in the middle of a step"
    return Hosting(aside, _method(config, checkpoint), eager)


_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")


def _refuse(config: Config, checkpoint: Checkpoint) -> None:
    name = "kt_num_gpu_experts"
    if checkpoint.chosen.impl != "phloem":
        raise ConfigError(f"{name}: this model's code is transformers', whose experts stay where it is", param=name)
    if checkpoint.pooling is not None:
        raise ConfigError(f"{name}: not for a model that does not generate", param=name)
    if ranks_of(config) > 1:
        raise ConfigError(f"{name}: not with {option_of(config)[0]} above 1", param=name)
    given, strategy = config.experts.init_expert_location, config.experts.kt_expert_placement_strategy
    if given not in (None, "trivial") and strategy != "frequency":
        why = f"{given}: places are {strategy}; counts decide with kt_expert_placement_strategy frequency"
        raise ConfigError(f"init_expert_location: {why}", param="init_expert_location")
    path, own = config.experts.kt_weight_path, checkpoint.path
    places = {own.resolve(), own.resolve().parent} if own.is_file() else {own.resolve()}
    if path is not None and path != config.model.model_path and Path(path).resolve() not in places:
        why = f"{path!r} is not the model: experts are read from its own files, as they are; --kt-method AMXINT4 rounds"
        raise ConfigError(f"kt_weight_path: {why} them", param="kt_weight_path")


def _method(config: Config, checkpoint: Checkpoint) -> Method | None:
    """What the host's experts are made of; None: as the rest of the model.

    Raises:
        ConfigError: an unknown name, or one that the checkpoint is not stored in.
    """
    name = config.experts.kt_method
    if name is None:
        return None
    stored = "GGUF" if checkpoint.gguf is not None else "" if checkpoint.stored is None else checkpoint.stored.method
    if name not in METHODS:
        raise ConfigError(f"kt_method: {name!r} is not one of {', '.join(METHODS)}", param="kt_method")
    if name in MADE:
        if stored:
            why = f"{name} rounds plain weights, and these are stored as {stored}; without it they are computed as such"
            raise ConfigError(f"kt_method: {why}", param="kt_method")
        return quant.method(MADE[name])
    fits = {"BF16": not stored and config.model.quantization is None, "LLAMAFILE": stored == "GGUF"}
    reader = "" if checkpoint.stored is None else checkpoint.stored.file
    if not fits.get(name, reader in STORED.get(name, ())):
        why = f"{name}, but the weights are {f'stored as {stored}' if stored else 'plain'}"
        raise ConfigError(f"kt_method: {why}; without it they are computed as they are", param="kt_method")
    return None


def settle(config: Config, hosted: Hosting, model: Model, decisions: list[Decision]) -> Mover | None:
    """Put experts in their places, when all weights are there.

    Raises:
        ConfigError: the model has no experts, or fewer; or it cannot defer.
    """
    name, aside, own = "kt_num_gpu_experts", hosted.aside, config.experts
    if not isinstance(model, Decoder) or not any(weight.experts for weight in model.index.weights):
        raise ConfigError(f"{name}: this model has no routed experts", param=name)
    # pyrefly: ignore[missing-attribute] - of a Decoder
    if aside.deferred and type(model).finish is not Decoder.finish:
        why = "the last layer of this model is another one's"
        raise ConfigError(f"kt_max_deferred_experts_per_token: {why}", param="kt_max_deferred_experts_per_token")
    each = own.kt_num_gpu_experts or 0
    counts = None if own.init_expert_location in (None, "trivial") else read_counts(str(own.init_expert_location))
    layers, experts = aside.counts.shape
    if not layers:  # all are computed by the fused op: no layer has entered
        layers, experts = 1 if counts is None else len(counts), max(weight.experts for weight in model.index.weights)
    table = place(own.kt_expert_placement_strategy, layers, experts, each, counts)
    if aside.same:
        why = f"the device is this processor: its table {aside.ops.name!r} computes all of them; places mean nothing"
        decisions.append(Decision("host_experts", "all", why))
        return None
    aside.put(table)
    aside.counts[:] = 0
    size = f"{aside.host_bytes / GIB:.2f} GiB on the host, {aside.device_bytes / GIB:.2f} GiB of copies on the device"
    why = f"of {experts} in each of {layers} layers, {own.kt_expert_placement_strategy}; {size}"
    decisions.append(Decision("device_experts", each, why))
    if aside.streams_from is not None:
        why = "tokens of a step, from which on the experts of each layer are copied to the device for it"
        decisions.append(Decision("streamed_experts", aside.streams_from, why))
    return Mover(aside, moves_at_all=own.kt_enable_dynamic_expert_update and 0 < each < experts)


class Mover:
    """Looks between steps at what is chosen, and lets hot experts take the places of cold ones on the device."""

    def __init__(self, aside: Aside, *, moves_at_all: bool) -> None:
        self._aside, self._moves = aside, moves_at_all
        self._looked = 0

    def due(self) -> bool:
        """Whether to call `move` behind the steps that were launched."""
        due = self._moves and self._aside.steps - self._looked >= STEPS
        if due:
            self._looked = self._aside.steps
        return due

    def move(self) -> int:
        """For the thread that runs the steps, between two of them. How many experts changed places."""
        aside = self._aside
        found = moves(aside.table, aside.counts, MOST)
        before = hit_share(aside.table, aside.counts)
        aside.move(found)
        if found:
            after = hit_share(aside.table, aside.counts)
            text = "%d experts moved: the device has %.0f %% of the choices, not %.0f %%"
            _log.info(text, len(found), after * 100, before * 100)
        aside.counts //= 2  # what was long ago counts less
        return len(found)

    def facts(self) -> dict[str, Any]:
        """For the server's information."""
        aside = self._aside
        return {
            "device_experts": int(aside.table.sum()),
            "hit_share": round(hit_share(aside.table, aside.counts), 4),
            "hidden_share": round(aside.hidden_share, 4),
            "moved": aside.moved,
            "counts": np.asarray(aside.counts).tolist(),
        }
