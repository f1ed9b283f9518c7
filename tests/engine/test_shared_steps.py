"""Compiled steps shared out over a mesh of devices: two of jax's CPU backend, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow
pytest.importorskip("jax")
TWO = "--xla_force_host_platform_device_count=2"
# Grouped heads, norms of them, windows and tied embeddings, experts, those with biases and sinks, latents,
# convolutions, gated delta nets with experts.
FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3", "lfm2", "qwen3_next"]

SCRIPT = """
import sys, tempfile
from pathlib import Path
import jax, torch
from model_support import CPU, LIMIT, PAGE, PROMPT, Engine
from pools import pool_for
from test_jax import Compiled
from phloem.attention import BACKENDS
from phloem.engine import compiled
from phloem.kernels.jax.table import table
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.testing.checkpoints import tiny_checkpoint

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)

class Shared(Compiled):
    def __init__(self, like, backend):
        ops = table().share(2)
        makes = ops.compiler()
        self.model = load_model(like.checkpoint, BuildContext(ops, torch.float32, CPU))
        compiled.share_weights(self.model, like.checkpoint, ops, 2)
        self.pool = pool_for(self.model.memory, 256, PAGE, torch.float32, CPU)
        attention = BACKENDS.get(backend)(ops, self.model.attention_specs, CPU, torch.float32)
        self.head = compiled.CompiledModel(self.model, makes, 4).head
        self.steps = compiled.CompiledSteps(makes, self.model, attention, self.pool, 4, 32, 64)

def halves(array):
    return array.size and array.addressable_shards[0].data.size * 2 == array.size

for name in sys.argv[1:]:
    name, _, backend = name.partition(":")
    like = Engine(tiny_checkpoint(name, Path(tempfile.mkdtemp())))
    made, pages = Shared(like, backend or "reference"), like.pages(len(PROMPT) + 1)
    with torch.inference_mode():
        prompt = made.head(made.steps.several(made.inputs(PROMPT, pages, 0, 32)))
        behind = made.head(made.steps.single(made.inputs([7], pages, len(PROMPT), 1)))
        far = (prompt - like.step([(PROMPT, pages, 0)])).abs().max()
        far = max(far, (behind - like.step([([7], pages, len(PROMPT))])).abs().max())
    matrices = [w.value.a for w in made.model.weights() if w.role == "matrix" and not isinstance(w.value, torch.Tensor)]
    weights, caches = sum(map(halves, matrices)), sum(map(halves, (k.a for k in made.pool.keys)))
    print(f"{name} {far < LIMIT} {weights / len(matrices):.2f} {caches}", flush=True)
"""


def test_over_two_devices_the_logits_are_those_of_one_and_each_has_half_of_the_weights() -> None:
    root = Path(__file__).resolve().parents[2]
    paths = [root / "src", root / "tests" / "support", root / "tests" / "kernels"]
    env = {**os.environ, "XLA_FLAGS": TWO, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    asked = [*FAMILIES, "gpt_oss:pallas"]
    command = [sys.executable, "-c", SCRIPT, *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line.split() for line in done.stdout.splitlines()]
    assert [(name, same) for name, same, *_ in told] == [(each.partition(":")[0], "True") for each in asked]
    found = {name: (float(weights), int(caches)) for name, _, weights, caches in told}
    assert all(weights > 0.6 for weights, _ in found.values()), found  # routers and what does not divide stay whole
    # Pages of its three layers by kv heads; latents are everybody's.
    assert found["llama"][1] == 3 and found["deepseek_v3"][1] == 0


def test_served_over_two_devices_the_tokens_are_those_of_the_reference_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And other weights take the places of the first ones."""
    path, other = tiny_checkpoint("llama", tmp_path / "first"), tiny_checkpoint("llama", tmp_path / "other", seed=3)
    asked = {"text": "Sap moves through the phloem of a tree. " * 3}
    asked["sampling_params"] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}  # pyright: ignore[reportArgumentType]
    sizes: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 512, "chunked_prefill_size": 32}
    wanted = list[Any]()
    for each in (path, other):
        with Engine(model_path=str(each), device="cpu", ops="reference", **sizes) as engine:
            wanted.append(engine.generate(asked["text"], asked["sampling_params"]))
    monkeypatch.setenv("XLA_FLAGS", TWO)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    server = Server(path, "--device", "jax", "--tp-size", "2", "--max-running-requests", "4", *options)
    try:
        server.wait_ready()
        first = httpx.post(server.url + "/generate", json=asked, timeout=120).json()
        body = {"model_path": str(other)}
        changed = httpx.post(server.url + "/update_weights_from_disk", json=body, timeout=60)
        assert changed.status_code == 200, changed.text
        second = httpx.post(server.url + "/generate", json=asked, timeout=120).json()
        log = "\n".join(server.lines)
    finally:
        server.close()
    assert [first["output_ids"], second["output_ids"]] == [answer["output_ids"] for answer in wanted]
    assert "the compiler shares each step out" in log
