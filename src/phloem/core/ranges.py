"""In which ranges settings lie, and sizes in bytes as people write them."""

from __future__ import annotations

import math
from typing import Any

from phloem.core.errors import ConfigError

EPLB_STEPS = 1000  # unless said otherwise
_NOT_BELOW_0 = (
    "base_gpu_id",
    "node_rank", "kt_num_gpu_experts", "kt_max_deferred_experts_per_token", "kt_gpu_prefill_token_threshold",
    "ep_num_redundant_experts", "max_queue_seconds",
)  # fmt: skip
_POSITIVE = (
    "context_length",
    "max_total_tokens",
    "page_size",
    "max_running_requests",
    "max_queued_requests",
    "chunked_prefill_size",
    "stream_interval",
    "watchdog_timeout",
    "grammar_timeout",
    "threads",
    "kt_cpuinfer",
    "kt_threadpool_count",
    "tp_size",
    "ep_size",
    "pp_size",
    "eplb_rebalance_num_iterations",
    "dp_size",
    "attn_dp_size",
    "attn_cp_size",
    "nnodes",
    "gpu_id_step",
    "dist_timeout",
    "image_step_tokens",
    "piecewise_graph_max_tokens",
    "max_body_bytes",
    "max_bodies_bytes",
    "max_update_bytes",
    "header_timeout",
    "body_timeout",
    "max_prompts_per_request",
    "max_lora_rank",
    "max_loras_per_batch",
    "max_loaded_loras",
)

_SECONDS = ("watchdog_timeout", "grammar_timeout", "dist_timeout", "header_timeout", "body_timeout")
LONGEST = 10_000_000  # seconds: what systems' clocks and waits take


def check_ranks(flat: dict[str, Any]) -> None:
    """Raises ConfigError for ranks, or for experts over them, that no model can have: before any process is started."""
    tp, ep, groups, context = flat["tp_size"], flat["ep_size"], flat["attn_dp_size"], flat["attn_cp_size"]
    whats = {
        "ep_size": (ep, "experts are shared out among the {} ranks of tp_size"),
        "attn_dp_size": (groups, "groups of the {} ranks of tp_size"),
        "attn_cp_size": (context, "tokens are shared out among the {} ranks of tp_size"),
    }
    for name, (size, what) in whats.items():
        if tp % size:
            valid = ", ".join(str(count) for count in range(1, tp + 1) if tp % count == 0)
            raise ConfigError(f"{name} {size}: {what.format(tp)}; valid: {valid}", param=name)
    if min(groups, context) > 1:
        why = f"each of {groups} groups (attn_dp_size) has requests of its own, whole"
        raise ConfigError(f"attn_cp_size {context}: {why}", param="attn_cp_size")
    groups *= context
    if flat["use_ray"] and (tp * flat["pp_size"] == 1 or flat["dp_size"] > 1):
        why = f"dp_size {flat['dp_size']}: Ray starts the ranks of one model"
        if tp * flat["pp_size"] == 1:
            why = "one rank needs no other machine; tp_size or pp_size says how many there are"
        raise ConfigError(f"use_ray: {why}", param="use_ray")
    kept = flat["kt_num_gpu_experts"] is not None or flat["kt_weight_path"] is not None
    asked = {
        "enable_eplb": flat["enable_eplb"],
        "ep_num_redundant_experts": flat["ep_num_redundant_experts"] > 0,
        "init_expert_location": flat["init_expert_location"] not in (None, "trivial") and not kept,
    }
    name = next((name for name, found in asked.items() if found), "")
    if name and ep == 1:
        also = ", or kt_num_gpu_experts, which may be 0" if name == "init_expert_location" else ""
        raise ConfigError(f"{name}: experts lie over several ranks with ep_size above 1{also}", param=name)
    if flat["moe_a2a_backend"] != "none":
        if not tp == ep == groups > 1:
            sizes = f"tp_size {tp}, ep_size {ep} and attn_dp_size (or attn_cp_size) {groups}"
            why = f"moe_a2a_backend: {sizes} must be the same number above 1"
            raise ConfigError(why, param="moe_a2a_backend")
        if name or flat["expert_distribution_recorder_mode"] is not None:
            name = name or "expert_distribution_recorder_mode"
            raise ConfigError(f"moe_a2a_backend: not with {name}: every rank must see all rows", param=name)
    if flat["eplb_rebalance_num_iterations"] != EPLB_STEPS and not flat["enable_eplb"]:
        name = "eplb_rebalance_num_iterations"
        raise ConfigError(f"{name}: experts are not moved; enable_eplb must be given with it", param=name)


def check_ranges(flat: dict[str, Any]) -> None:
    """Raises ConfigError for a setting, by its flat name, that is out of its range."""
    for name in _POSITIVE:
        if flat[name] is not None and not flat[name] > 0:
            raise ConfigError(f"{name}: {flat[name]!r} must be above 0", param=name)
    for name in _SECONDS:
        if flat[name] is not None and flat[name] > LONGEST:
            raise ConfigError(f"{name}: {flat[name]!r} is above {LONGEST} seconds", param=name)
    for name in _NOT_BELOW_0:
        if flat[name] is not None and flat[name] < 0:
            raise ConfigError(f"{name}: {flat[name]!r} is below 0", param=name)
    if not 0 <= flat["port"] <= 65535:
        raise ConfigError(f"port: {flat['port']} is not in 0 to 65535", param="port")
    fraction = flat["mem_fraction_static"]
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"mem_fraction_static: {fraction} is not in (0, 1]", param="mem_fraction_static")
    for name in ("hicache_ratio", "hicache_size"):
        value = flat[name]
        if value is not None and not (math.isfinite(value) and value >= 0 and (value or name == "hicache_size")):
            least = "0 or above" if name == "hicache_size" else "above 0"
            raise ConfigError(f"{name}: {value!r} must be a number {least}", param=name)
    if flat["kv_memory"] is not None:
        parse_bytes(flat["kv_memory"])
    if flat["lora_memory"] is not None:
        parse_bytes(flat["lora_memory"], "lora_memory")


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str, name: str = "kv_memory") -> int:
    """'2GiB' -> 2147483648.

    Raises:
        ConfigError: if the text is not a number with one of the units B, KB, MB, GB, KiB, MiB, GiB.
    """
    body = text.strip().lower()
    digits = body.rstrip("kmgib ")
    try:
        return int(float(digits) * _UNITS[body[len(digits) :].strip()])
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: {text!r} is not a size such as 512MiB or 2GB", param=name) from None
