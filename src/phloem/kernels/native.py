"""The native table: the op table over the C++ kernels of csrc/cpu, on any CPU that the library was built for.

Activations are float32. KV caches are bfloat16 or float32 `[pages, K, S, D]`, or int8 `[pages, K, S, D + 4]`: D values,
then the float32 scale of that token and head.
"""

from __future__ import annotations

import dataclasses

import torch

from phloem.core.errors import ConfigError
from phloem.kernels import _native_attention as attention
from phloem.kernels import _native_basic as basic
from phloem.kernels import _native_gates as gates
from phloem.kernels import _native_latent as latent
from phloem.kernels import _native_moe as moe
from phloem.kernels import _native_recurrent as recurrent
from phloem.kernels import _native_sampling as sampling
from phloem.kernels import native_linear
from phloem.kernels._native_recorder import Recorder
from phloem.kernels._native_refill import memory, refill, renew
from phloem.kernels._native_runtime import Unavailable, runtime
from phloem.kernels.ops import Ops
from phloem.utils.cores import available_cores

__all__ = ["Recorder", "Unavailable", "describe", "runtime", "table", "use_level", "worker_ids"]

# What linear layers multiply, and why, for whoever asks what was chosen.
_FLOAT32 = (
    "float32",
    "as the type that was asked for; weights of fewer than 16 bits are unpacked to float32, in up to eight times their "
    "memory",
)
_ROUNDED = (
    "by weight",
    "bytes beside integer weights, bfloat16 beside bfloat16 ones, the fastest here; --dtype float32 leaves them whole",
)


def table(
    threads: int | None = None, level: str | None = None, *, invariant: bool = False, float32: bool = False
) -> Ops:
    """The op table. `threads`: default the cores that the process may use. `level` (tests) lowers the instruction set,
    as `use_level` does for every table.
    `invariant`: a token's result has the same bits whatever else is in the batch, at the price of slower prefill.
    `float32`: linear layers multiply activations as they are, with weights unpacked as far as that needs.

    Raises `Unavailable` where the library is missing.
    """
    rt = runtime()
    rt.library.set_level(level or rt.forced)
    rt.library.set_threads(threads or available_cores())
    linear = native_linear.NativeLinear(rt, exact=invariant, float32=float32)
    made = {
        **basic.ops(rt),
        **attention.ops(rt),
        **sampling.ops(rt),
        **recurrent.ops(rt),
        **gates.ops(rt),
        **latent.ops(rt, exact=invariant),
        **native_linear.ops(linear),
        **moe.ops(rt, linear),
    }
    kv = tuple(basic.CACHES)
    name = "invariant" if invariant else "native"
    kept = {"refill": refill, "rewriting": linear.rewriting, "memory": memory, "renew": renew}
    whole = dataclasses.replace(
        Ops(),
        name=name,
        kv_dtypes=kv,
        row_bits=True,
        block_attention=True,
        recorder=lambda: Recorder(rt),
        **kept,
        **made,
    )
    activations, adapters = (_FLOAT32, torch.float32) if float32 else (_ROUNDED, torch.bfloat16)
    return dataclasses.replace(
        whole,
        activations=activations,
        adapter_dtype=adapters,
        apart=linear.apart if invariant else None,
        whole_logprobs=invariant,
    )


def use_level(level: str | None) -> tuple[str, ...]:
    """Make this the instruction set of the tables made from now on; None: the best. The ones that there are.

    Raises:
        Unavailable: where the library is missing.
        ConfigError: where this processor cannot run it, or the library was built without it.
    """
    rt = runtime()
    levels: tuple[str, ...] = rt.library.levels()
    if level is not None and level not in levels:
        raise ConfigError(f"cpu_level: this processor runs {', '.join(levels)}, not {level}", param="cpu_level")
    rt.forced = level
    return levels


def worker_ids() -> list[int]:
    """The system's ids of the pool's threads beside the caller's; none where the library is missing."""
    try:
        return runtime().library.worker_ids()
    except Unavailable:
        return []


def describe() -> str:
    """What the library runs with on this machine, for the decision's reason."""
    rt = runtime()
    library = rt.library
    where = "at this level" if rt.forced else "here"
    return f"the fastest {where} ({library.level()} instructions, {library.threads()} threads)"
