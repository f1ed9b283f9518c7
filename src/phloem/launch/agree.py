"""What all nodes of one model must have alike, and what is said where they have not."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from phloem.checkpoint.digest import config_facts, weights_digest

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config

# Settings that decide what ranks compute, how they meet, or what becomes of them. What node 0 alone does with the rest
# (sampling, grammars, the pool's size, HTTP) the others need not know.
SETTINGS = (
    *("nnodes", "tp_size", "pp_size", "ep_size", "dp_size", "tp_comm", "on_engine_death"),
    *("load_format", "dtype", "quantization", "context_length", "model_impl"),
    *("page_size", "kv_cache_dtype", "max_running_requests", "chunked_prefill_size"),
    *("device", "attention_backend", "ops", "enable_deterministic_inference"),
    *("kt_num_gpu_experts", "kt_method", "kt_max_deferred_experts_per_token", "kt_expert_placement_strategy"),
)
MOST = 6  # differences that are told


def version_of(package: str) -> str:
    """Without what only says how it was built."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "unknown"


def facts_of(config: Config, checkpoint: Checkpoint) -> dict[str, str]:
    """What this node has of it. Raises ModelLoadError."""
    flat = config.flat()
    return {
        "version of phloem": version_of("phloem"),
        "version of torch": version_of("torch"),
        **{name: str(flat[name]) for name in SETTINGS},
        "model type": checkpoint.model_type,
        **config_facts(checkpoint),
        "digest of the weights": weights_digest(checkpoint),
    }


def differences(own: dict[str, str], theirs: dict[str, str], node: str) -> str:
    """In words; "" where there are none. `node`: whose `theirs` are."""
    names = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    if not names:
        return ""
    told = [f"{name} is {theirs.get(name, 'missing')} there, {own.get(name, 'missing')} here" for name in names[:MOST]]
    more = f"; and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{node} differs from node 0 (here): {'; '.join(told)}{more}"
