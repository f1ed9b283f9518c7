"""Where passes of a model of diffusion spend their time, and shapes of such models for random weights."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest
from phloem.engine.canvases.canvas import CanvasRunner
from phloem.engine.canvases.fill import Filler
from phloem.engine.recorded.graphs import RecordedStep
from phloem.engine.sampling.sampler import uniforms
from phloem.kernels import _native_recorder as native

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch, Places
    from phloem.engine.canvases.canvas import Text
    from phloem.engine.canvases.fill import Saying
    from phloem.engine.wanted import Wanted

HEAD, REST = "head and choice", "the rest: scheduler, host"
_USUAL: dict[str, Any] = {
    "hidden_size": 2048, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 1, "bos_token_id": 1, "head_dim": 128,
    "num_attention_heads": 16,
}  # fmt: skip
# (config.json, layers and vocabulary of the whole model)
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "llada2_mini": (
        {
            **_USUAL, "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "intermediate_size": 5120,
            "moe_intermediate_size": 512, "num_key_value_heads": 4, "num_experts": 256, "num_experts_per_tok": 8,
            "n_group": 8, "topk_group": 4, "num_shared_experts": 1, "block_size": 32,
            "first_k_dense_replace": 0,  # the first of twenty is dense: a few layers are all of the others' kind
        },
        20,
        157184,
    ),
    "sdar_1_7b": (
        {
            **_USUAL, "architectures": ["SDARForCausalLM"], "model_type": "sdar", "intermediate_size": 6144,
            "num_key_value_heads": 8, "block_size": 4,
        },
        28,
        151936,
    ),
}  # fmt: skip


def write_shape(name: str, layers: int, folder: Path) -> Path:
    """The config.json of a model of so many layers, with a part of its vocabulary: the head has the share of a pass
    that it has of the whole model's. Raises BadRequest."""
    if name not in SHAPES:
        raise BadRequest(f"shape: {name!r}; known: {', '.join(SHAPES)}")
    config, whole, vocabulary = SHAPES[name]
    if not 1 <= layers <= whole:
        raise BadRequest(f"layers: {layers}, and the whole model has {whole}")
    size = max(512, vocabulary * layers // whole)
    made = {**config, "num_hidden_layers": layers, "vocab_size": size, "mask_token_id": size - 1}
    path = folder / "config.json"
    path.write_text(json.dumps(made))
    return path


@dataclass
class Profile:
    """Seconds of all passes: of each op of the recorded steps, and of the head with the choice behind it."""

    ops: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    passes: int = 0  # steps that said what is at places
    eager: int = 0  # of them, those that were not replayed

    def per_pass(self, seconds: float) -> dict[str, float]:
        """Milliseconds of a pass by what they are for, the most first; `seconds`: of all passes, by the clock."""
        parts = {**self.ops, REST: seconds - sum(self.ops.values())}
        return {
            name: took * 1e3 / max(1, self.passes) for name, took in sorted(parts.items(), key=lambda item: -item[1])
        }


@contextlib.contextmanager
def profiled() -> Generator[Profile]:
    """Replays of recorded steps time their ops, by processor threads that run them together."""
    found = Profile()
    replay, run = RecordedStep.replay, Filler.run

    def timed(step: RecordedStep[Any, Any], *sizes: int) -> Any:
        graph = step.graph
        if isinstance(graph, native.FlexibleStep):
            calls = graph.replay_timed(*sizes)
        elif isinstance(graph, native.RecordedStep):
            calls = graph.replay_timed()
        else:
            return replay(step, *sizes)
        for name, _alone, nanoseconds in calls:
            found.ops[name] += nanoseconds * 1e-9
        found.eager -= 1
        return step.outputs

    def noted(filler: Filler, places: Places, wanted: Wanted, hidden_LN: Tensor) -> Saying:
        begun = perf_counter()
        saying = run(filler, places, wanted, hidden_LN)
        found.ops[HEAD] += perf_counter() - begun
        found.passes, found.eager = found.passes + 1, found.eager + 1
        return saying

    RecordedStep.replay = timed  # pyright: ignore[reportAttributeAccessIssue]
    Filler.run = noted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        RecordedStep.replay, Filler.run = replay, run


@contextlib.contextmanager
def evenly(vocab: int) -> Generator[None]:
    """Masked places hold tokens that differ from place to place and pass to pass, instead of all the one mask token.

    To random weights that token is the same state at every place, for which a router chooses the same experts. With
    tokens that differ experts are chosen about as often as each other, as a trained router is made to choose them.
    """
    drawn = CanvasRunner._drawn  # pyright: ignore[reportPrivateUsage]

    def other(runner: CanvasRunner, batch: Batch, sizes: NDArray[np.int32], texts: dict[int, Text]) -> Batch:
        made = drawn(runner, batch, sizes, texts)
        asked = made.places
        if asked is not None:
            own = {row: sum(text.known[: text.num_prompt]) for row, text in texts.items()}
            numbers = np.array([own[row] for row in asked.rows.tolist()], np.uint64)
            settings = runner._settings  # pyright: ignore[reportPrivateUsage]
            made.input_ids[asked.at + settings.shifted] = uniforms(numbers, asked.draws.astype(np.uint64)) * vocab
        return made

    CanvasRunner._drawn = other  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    try:
        yield
    finally:
        CanvasRunner._drawn = drawn  # pyright: ignore[reportPrivateUsage]
