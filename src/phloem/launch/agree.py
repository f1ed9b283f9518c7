"""What all nodes of one model must have alike, and what is said where they have not."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.describe import describe
from phloem.checkpoint.fingerprint import fingerprint
from phloem.core.adapters import adapter_spec
from phloem.core.errors import ModelLoadError, PhloemError

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config

# Settings that decide what ranks compute, how they meet, or what becomes of them. What node 0 alone does with the rest
# (sampling, grammars, the pool's size, HTTP) the others need not know.
SETTINGS = (
    *("nnodes", "tp_size", "pp_size", "ep_size", "dp_size", "attn_dp_size", "attn_cp_size"),
    *("moe_a2a_backend", "tp_comm", "on_engine_death"),
    *("load_format", "dtype", "quantization", "context_length", "model_impl"),
    *("page_size", "kv_cache_dtype", "max_running_requests", "chunked_prefill_size"),
    *("device", "attention_backend", "ops", "enable_deterministic_inference"),
    *("disable_step_graph", "disable_piecewise_graph", "piecewise_graph_max_tokens", "check_step_graph"),
    *("kt_num_gpu_experts", "kt_method", "kt_max_deferred_experts_per_token", "kt_expert_placement_strategy"),
    *("ep_num_redundant_experts", "enable_eplb"),
    *("enable_lora", "max_lora_rank", "max_loras_per_batch", "max_loaded_loras"),
    *("speculative_algorithm", "speculative_num_steps", "speculative_num_draft_tokens", "speculative_eagle_topk"),
    *("speculative_ngram_max_trie_depth", "speculative_ngram_capacity", "disable_speculative_adaptive"),
    *("speculative_config", "enable_spec_capture"),
)
MOST = 6  # differences that are told
LONGEST = 60  # characters of a value that is shown


def version_of(package: str) -> str:
    """Without what only says how it was built."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "unknown"


def facts_of(config: Config, checkpoint: Checkpoint, command: str = "serve") -> dict[str, str]:
    """What this node has of it. `command`: of phloem, for one that looks cannot be a part of one that serves. Raises
    ModelLoadError."""
    flat = config.flat()
    return {
        "command": f"phloem {command}",
        "version of phloem": version_of("phloem"),
        "version of torch": version_of("torch"),
        **{name: str(flat[name]) for name in SETTINGS},
        "model type": checkpoint.model_type,
        **config_facts(checkpoint),
        "digest of the weights": _digest(checkpoint),
        "counts of experts (init_expert_location)": _file(flat["init_expert_location"]),
        "tokens of drafts (speculative_token_map)": _file(flat["speculative_token_map"]),
        "model that drafts (speculative_draft_model_path)": _draft(flat["speculative_draft_model_path"]),
        # What is in them node 0 alone reads, and tells the others' ranks.
        "adapters (lora_paths)": ", ".join(adapter_spec(text).name for text in flat["lora_paths"] or []) or "none",
    }


def _digest(checkpoint: Checkpoint) -> str:
    try:
        return fingerprint(checkpoint)
    except OSError as error:
        raise ModelLoadError(f"{error.filename}: {error.strerror}") from None


def _draft(path: str | None) -> str:
    """By what a model or a head that drafts is known: it may lie elsewhere on another node."""
    if path is None:
        return "none"
    try:
        found = describe(path)
        return f"{found.model_type}, digest {fingerprint(found)}"
    except (PhloemError, OSError) as error:
        return f"unreadable ({error})"


def _file(path: str | None) -> str:
    if path in (None, "trivial"):
        return "none"
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        return f"unreadable ({error.strerror})"


def config_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What its configuration says, by key; of long values the beginning and a digest."""
    return {f"config.json {key}": _short(value) for key, value in sorted(checkpoint.config.items())}


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def differences(own: dict[str, str], theirs: dict[str, str], node: str) -> str:
    """In words; "" where there are none. `node`: whose `theirs` are."""
    names = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    if not names:
        return ""
    told = [f"{name} is {theirs.get(name, 'missing')} there, {own.get(name, 'missing')} here" for name in names[:MOST]]
    more = f"; and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{node} differs from node 0 (here): {'; '.join(told)}{more}"
