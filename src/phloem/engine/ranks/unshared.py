"""What several ranks of a model do not serve. Without torch: a node that executes alone can say so too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config


def option_of(config: Config) -> tuple[str, int]:
    """The option that asks for several ranks, and its value."""
    runtime = config.runtime
    sizes = {"tp_size": runtime.tp_size, "pp_size": runtime.pp_size, "ep_size": runtime.ep_size}
    sizes |= {"attn_dp_size": runtime.attn_dp_size, "attn_cp_size": runtime.attn_cp_size}
    sizes["nnodes"] = config.nodes.nnodes
    return next(((name, size) for name, size in sizes.items() if size > 1), ("tp_size", 1))


def refuse_unshared(config: Config, checkpoint: Checkpoint) -> None:
    """Raises ConfigError for something that one rank alone does."""
    name, size = option_of(config)
    reasons = {
        "diffusion pipelines run on one rank": checkpoint.pictures is not None,
        "models that do not generate run on one rank": checkpoint.pooling is not None,
        "transformers' own code runs on one rank (model_impl)": checkpoint.chosen.impl != "phloem",
        "sums over ranks are not the same bits for every tp_size (ops invariant, enable_deterministic_inference)": (
            config.runtime.tp_size > 1
            and (config.runtime.enable_deterministic_inference or config.runtime.ops == "invariant")
        ),
        "random weights would differ from rank to rank (load_format dummy)": config.model.load_format == "dummy",
        "a model that takes pictures or sound runs on one rank": "vision_config" in checkpoint.config
        or "audio_config" in checkpoint.config
        or checkpoint.model_type == "whisper",
    }
    for reason, found in reasons.items():
        if found:
            raise ConfigError(f"{name} {size}: {reason}", param=name)
    _refuse_options(config, name, size)
    _refuse_ungrouped(config)


def _refuse_options(config: Config, name: str, size: int) -> None:
    """Raises ConfigError for an option that one rank alone keeps to."""
    mode, of_pages = "disaggregation_mode", f"each of several ranks has a part of every page ({name} {size})"
    counted = "kt_num_gpu_experts"
    reasons = {
        mode: (config.disagg.disaggregation_mode != "null", f"prompts cannot be computed elsewhere: {of_pages}"),
        counted: (
            config.experts.kt_num_gpu_experts is not None or config.experts.kt_weight_path is not None,
            f"not with {name} above 1",
        ),
        "enable_return_routed_experts": (config.runtime.enable_return_routed_experts, f"not with {name} above 1"),
    }
    for option, (found, reason) in reasons.items():
        if found:
            raise ConfigError(f"{option}: {reason}", param=option)


def _refuse_ungrouped(config: Config) -> None:
    """Raises ConfigError for something that is not done where groups of ranks attend to requests of their own."""
    size, running = config.runtime.attn_dp_size, config.schedule.max_running_requests
    reasons = {
        "cache tiers are of one prefix cache (enable_hierarchical_cache)": config.cache.enable_hierarchical_cache,
        "cache events are of one prefix cache (kv_events_config)": config.cache.kv_events_config is not None,
        "prefill and decode servers have one prefix cache (disaggregation_mode)": (
            config.disagg.disaggregation_mode != "null"
        ),
        f"each group needs a running request (max_running_requests {running})": running is not None and running < size,
    }
    for reason, found in reasons.items():
        if size > 1 and found:
            raise ConfigError(f"attn_dp_size {size}: {reason}", param="attn_dp_size")
