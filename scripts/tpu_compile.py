"""Compile the Pallas kernel and a whole step over four devices by TPUs' own compiler, without a TPU; memory and cost.

    python scripts/tpu_compile.py v5e:2x2

Needs libtpu, which `phloem[tpu]` brings. Only the compiler runs: nothing here says how fast a step is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
import torch
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.engine import compiled
from phloem.kernels.jax.mesh import Devices
from phloem.kernels.jax.pallas import attend
from phloem.kernels.jax.table import table
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.models import load_model

CPU = torch.device("cpu")
# (rows, tokens of each, kv heads, query heads of each, head size, soft cap)
SHAPES = [(64, 1, 8, 4, 128, 0.0), (1, 1024, 8, 4, 128, 0.0), (16, 1, 4, 2, 256, 50.0), (1, 256, 4, 2, 256, 50.0)]
SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def told(what: str, begun: float, made: Any) -> None:
    memory, cost = made.memory_analysis(), made.cost_analysis()
    mib = {name: getattr(memory, f"{name}_size_in_bytes") / 2**20 for name in ("argument", "output", "alias", "temp")}
    sizes = ", ".join(f"{name} {size:.1f}" for name, size in mib.items())
    counts = f"{cost.get('flops', 0) / 1e6:.1f} Mflop, {cost.get('bytes accessed', 0) / 2**20:.1f} MiB read and written"
    print(f"{what}: {perf_counter() - begun:.1f} s; MiB: {sizes}; {counts}", flush=True)


def kernel(device: Any) -> None:
    place = SingleDeviceSharding(device)

    def like(shape: tuple[int, ...], kind: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    for rows, tokens, heads, group, size, cap in SHAPES:
        cache, begun = like((4096, heads, 16, size), jnp.bfloat16), perf_counter()
        function = jax.jit(partial(attend, scale=0.1, softcap=cap, interpret=False))
        bounds = like((rows, tokens))
        q = like((rows, tokens, heads, group, size), jnp.bfloat16)
        made = function.lower(q, cache, cache, like((rows, 256)), bounds, bounds, None).compile()
        told(f"paged_attention, {rows} x {tokens} tokens, {heads} x {group} heads of {size}", begun, made)


def step(devices: list[Any]) -> None:
    """Single tokens of a small Llama's shape, with dummy weights, in bfloat16; backend `pallas`."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMALL))
        checkpoint = describe(folder, load_format="dummy")
    ops = table("tpu", Devices.described(devices))
    assert ops.compiler is not None
    model = load_model(checkpoint, BuildContext(ops, torch.bfloat16, CPU))
    compiled.share_weights(model, checkpoint, ops, len(devices))
    backend = BACKENDS.get("pallas")(ops, model.attention_specs, CPU, torch.bfloat16)
    pool = KVPool(model.memory, [1024], 16, torch.bfloat16, CPU)
    steps = compiled.CompiledSteps(ops.compiler(), model, backend, pool, 16, 64, 256)
    rows, begun = 16, perf_counter()
    arrays = [torch.zeros(rows, dtype=torch.int32) for _ in range(2)]
    arrays += [torch.arange(rows + 1, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)]
    arrays += [torch.arange(rows, dtype=torch.int32), torch.zeros(rows, 256, dtype=torch.int32)]
    arrays += [torch.zeros(rows, dtype=torch.int32)]
    told(f"step over {len(devices)} devices, {rows} rows", begun, steps.single.ahead(arrays))


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else "v5e:2x2"
    found = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    print(f"{target}: {len(found)} x {found[0].device_kind}")
    kernel(found[0])
    step(list(found))


if __name__ == "__main__":
    main()
