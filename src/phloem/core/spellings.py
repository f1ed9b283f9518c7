"""What users of other engines write: options that are not there, and an address in two parts."""

from __future__ import annotations

from typing import Any

from phloem.core.errors import ConfigError

MASTER = ("master_addr", "master_port")  # an address in two parts
CP_NAMES = ("attention_context_parallel_size", "context_parallel_size")  # of `attn_cp_size`

# What other engines have and this one does not: refused by name, and not taken for a slip of the pen.
_NOT_THERE = {
    name: f"there is no {what}"
    for what, names in {
        "choice of how many batches a pipeline has: as many as stages (pp_size)": (
            "pp_async_batch_depth pp_max_micro_batch_size"
        ),
        "other way of experts than --ep-size, by which every rank sees all tokens": (
            "enable_expert_parallel all2all_backend eplb_config ep_dispatch_algorithm deepep_mode"
        ),
        "data parallelism over several machines": (
            "data_parallel_size_local data_parallel_address data_parallel_rpc_port data_parallel_start_rank "
            "data_parallel_hybrid_lb data_parallel_external_lb"
        ),
        "context parallelism of decoding, or beside tp_size: attn_cp_size is of the ranks of tp_size": (
            "cp_size dcp_size decode_context_parallel_size prefill_context_parallel_size"
        ),
        "other arrangement of a prompt than zigzag, which attn_cp_size alone asks for": "enable_prefill_cp cp_strategy",
        "choice of executors: use_ray asks for Ray": "distributed_executor_backend",
    }.items()
    for name in names.split()
}


def one_address(values: dict[str, Any]) -> dict[str, Any]:
    """With `master_addr` and `master_port`, the names of torchrun and vLLM, as the one `dist_init_addr`.

    Raises:
        ConfigError: one of the two alone, or another address beside them.
    """
    found = {name.replace("-", "_"): value for name, value in values.items()}
    host, port = found.get("master_addr"), found.get("master_port")
    if host is None and port is None:
        return {name: value for name, value in values.items() if name.replace("-", "_") not in MASTER}
    if host is None or port is None:
        lacks, has = ("master_addr", "master_port") if host is None else ("master_port", "master_addr")
        raise ConfigError(f"{has}: {lacks} must be given with it", param=has)
    address = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    said = next((found[name] for name in ("dist_init_addr", "nccl_init_addr") if found.get(name) is not None), address)
    if said != address:
        raise ConfigError(f"dist_init_addr: {said} is not what master_addr and master_port say, {address}")
    rest = {name: value for name, value in values.items() if name.replace("-", "_") not in MASTER}
    return {**rest, "dist_init_addr": address}


def attention_groups(runtime: dict[str, Any]) -> None:
    """`enable_dp_attention` with `dp_size` as the one `attn_dp_size`, in place.

    Raises:
        ConfigError: a size is missing, or both are there and differ.
    """
    if not runtime.get("enable_dp_attention"):
        return
    size, said = runtime.get("dp_size", 1), runtime.get("attn_dp_size", 1)
    if max(size, said) == 1:
        why = "how many groups attend to requests of their own must be said with dp_size"
        raise ConfigError(f"enable_dp_attention: {why}", param="enable_dp_attention")
    if min(size, said) > 1 and size != said:
        raise ConfigError(f"attn_dp_size: {said} is not what dp_size says, {size}", param="attn_dp_size")
    runtime.update(enable_dp_attention=False, dp_size=1, attn_dp_size=max(size, said))


def refuse_missing(name: str) -> None:
    """Raises ConfigError for an option of other engines that is knowingly not there."""
    key = name.replace("-", "_")
    if key in _NOT_THERE:
        raise ConfigError(f"{name}: {_NOT_THERE[key]}; docs/parallel.md says what there is", param=name)
