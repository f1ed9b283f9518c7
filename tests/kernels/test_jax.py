"""The table in jax against the reference table, over whole models, and what becomes of a step that is compiled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import CPU, LIMIT, PAGE, PROMPT, Engine
from pools import pool_for

from phloem.attention import BACKENDS
from phloem.core.errors import EngineDead
from phloem.engine.compiled import CompiledModel, CompiledSteps
from phloem.engine.memory import is_out_of_memory
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow
jax = pytest.importorskip("jax")
# What they have: plain attention, biases, windows, soft caps, sandwich norms, experts (softmax; biased, with sinks; in
# groups, by sigmoid), latents, an indexer, attention by chunks, learned positions.
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3_text", "qwen3_moe", "gpt_oss", "olmo2", "granite", "phi3"]
FAMILIES += ["deepseek_v3", "deepseek_v32", "llama4_text", "gpt2"]
# Short convolutions, Mamba 2, Mamba 1 beside attention and with experts, gated delta nets, scaled convolutions.
FAMILIES += ["lfm2", "mamba2", "jamba", "qwen3_next", "falcon_h1"]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """The answers are the same ones, and tiny models take longer to compile than to compute."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Compiled:
    """One row of a model over the table in jax."""

    def __init__(self, like: Engine) -> None:
        from phloem.kernels.jax.table import table

        ops = table()
        self.compiler: Any = ops.compiler and ops.compiler()
        self.model: Any = load_model(like.checkpoint, BuildContext(ops, torch.float32, CPU))
        self.pool = pool_for(self.model.memory, 256, PAGE, torch.float32, CPU)
        backend = BACKENDS.get("reference")(ops, self.model.attention_specs, CPU, torch.float32)
        self.head = CompiledModel(self.model, self.compiler, 4).head
        self.steps: Any = CompiledSteps(self.compiler, self.model, backend, self.pool, 4, 32, 64)

    def inputs(self, ids: list[int], pages: list[int], prefix: int, room: int) -> list[torch.Tensor]:
        """One row as `StepInputs.tensors`, padded to so many tokens."""
        places = np.arange(prefix, prefix + len(ids))
        slots = np.array(pages)[places // PAGE] * PAGE + places % PAGE
        padded = [np.pad(values, (0, room - len(ids))) for values in (np.array(ids), places, slots)]
        arrays = [*padded[:2], np.array([0, len(ids)]), places[-1:] + 1, np.array([len(ids) - 1])]
        for group in self.pool.groups:
            if group.kind == "state":
                # Read from where the step before has written, and written elsewhere.
                arrays += [np.array([each]) for each in (bool(prefix) * 5, 6 if prefix else 5, not prefix, prefix)]
                continue
            table, first = np.zeros((1, 16)), group.first_needed(prefix) // PAGE
            table[0, first : len(pages)] = pages[first:]
            arrays += [table, padded[2]]
        return [torch.from_numpy(array.astype(np.int32)) for array in arrays]


@pytest.mark.some(6)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_file_gives_the_logits_of_the_reference_table_compiled_by_jax(name: str, tmp_path: Path) -> None:
    wanted = Engine(tiny_checkpoint(name, tmp_path))
    pages, made = wanted.pages(len(PROMPT) + 1), Compiled(wanted)
    steps = made.steps
    with torch.inference_mode():
        prompt = made.head(steps.several(made.inputs(PROMPT, pages, 0, 32)))
        behind = made.head(steps.single(made.inputs([7], pages, len(PROMPT), 1)))
    assert (prompt - wanted.step([(PROMPT, pages, 0)])).abs().max() < LIMIT
    assert (behind - wanted.step([([7], pages, len(PROMPT))])).abs().max() < LIMIT


def test_a_step_lowers_for_a_tpu_with_weights_as_arguments_and_caches_in_place(tmp_path: Path) -> None:
    """Nothing of a TPU is here. The real compiler is not either: this says that every op has a form there."""
    made = Compiled(Engine(tiny_checkpoint("llama", tmp_path)))
    text = made.steps.single.lowered(made.inputs([7], [3, 5], 2, 1), "tpu")
    assert "stablehlo.dot_general" in text
    caches = 2 * len(made.model.layers)
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == caches
    constants = [line for line in text.splitlines() if "stablehlo.constant" in line and "384x32" in line]
    assert not constants  # the embedding


def test_a_weight_that_changes_is_seen_by_the_next_call_without_compiling_again(tmp_path: Path) -> None:
    made = Compiled(Engine(tiny_checkpoint("llama", tmp_path)))
    hidden = torch.ones(1, made.model.hidden_size)
    first = made.head(hidden)
    weight = made.model.head.weight.value
    weight.a = weight.a * 2
    assert torch.allclose(made.head(hidden), 2 * first)


def test_a_step_that_fails_behind_its_start_says_that_the_caches_are_lost() -> None:
    """They were given to it: whoever calls again would only hear from jax that its arrays have been deleted."""
    from phloem.kernels.jax.graph import Compiler
    from phloem.kernels.jax.tensor import Array

    compiler, failing = Compiler({}), [True]

    def host(x: Any) -> Any:
        if failing[0]:
            raise MemoryError("RESOURCE_EXHAUSTED: no room")
        return x

    cache = compiler.cache(torch.zeros(4))

    def step(arrays: list[Any]) -> Any:
        cache.a = cache.a + arrays[0].a
        return Array(jax.pure_callback(host, jax.ShapeDtypeStruct((4,), "float32"), cache.a))

    function = compiler.function("step", step, [cache])
    for _ in range(2):  # the second finds no caches
        with pytest.raises(EngineDead, match="step failed and took the KV caches with it"):
            function([torch.ones(4)])
        failing[0] = False


def test_a_step_that_cannot_be_compiled_leaves_the_caches_as_they_were() -> None:
    from phloem.kernels.jax.graph import Compiler

    compiler, failing = Compiler({}), [True]
    cache = compiler.cache(torch.zeros(4))

    def step(arrays: list[Any]) -> Any:
        if failing[0]:
            raise RuntimeError("RESOURCE_EXHAUSTED: the compiler found no room")
        cache.a = cache.a + arrays[0].a
        return cache

    function = compiler.function("step", step, [cache])
    with pytest.raises(RuntimeError) as caught:
        function([torch.ones(4)])
    assert is_out_of_memory(caught.value)
    failing[0] = False
    assert function([torch.ones(4)]).tolist() == [1, 1, 1, 1]


def test_without_jax_its_platforms_say_what_installs_it() -> None:
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'jax' else find(name, *rest)\n"
        "from phloem.platforms import AVAILABLE, choose\n"
        "print(AVAILABLE.get('jax')(), AVAILABLE.get('tpu')(), choose('auto', 1)[1].reason)\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'phloem[jax]'" in done.stdout and "pip install 'phloem[tpu]'" in done.stdout
    assert "not tpu: the library jax is not installed" in done.stdout
