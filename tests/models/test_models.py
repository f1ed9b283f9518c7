"""Every family against transformers, in float32, through our pages, and what a forward pass consists of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_support import PROMPT, Engine, check_modes, close
from torch.utils._python_dispatch import TorchDispatchMode

from phloem.checkpoint.families import FAMILIES, family
from phloem.core.memory import Latent, Paged, State
from phloem.kernels.ops import Ops
from phloem.layers.context import ForwardBatch, memory_of
from phloem.testing.checkpoints import denoisers, encoders, families, listeners, tiny_checkpoint

LLAMA_NAMES = [f"llama-{name}" for name in family("llama").variants]
VARIANTS = [f"{name}-{variant}" for name in families() for variant in family(name).variants]
ROPES = {
    "llama3": {
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}


def test_every_family_says_how_a_tiny_one_is_made() -> None:
    """But for those that are another one under a new name."""
    aliases = {name for name in FAMILIES.names() if FAMILIES.get(name).__module__ != f"phloem.models.{name}"}
    made = {*families(), *encoders(), *listeners(), *denoisers(), "diffusion_gemma"}
    assert made | aliases == set(FAMILIES.names())
    assert not aliases & set(families())


@pytest.mark.some(23)
@pytest.mark.parametrize("name", families())
def test_logits(made: Any, name: str) -> None:
    check_modes(*made(name))


@pytest.mark.some(26)
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_variants(made: Any, name: str) -> None:
    check_modes(*made(name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROPES)
def test_logits_of_stretched_rotations(made: Any, kind: str) -> None:
    check_modes(*made("llama", rope_parameters={"rope_type": kind, **ROPES[kind]}))


@pytest.mark.parametrize("name", families())
def test_memory_is_what_attention_layers_keep(made: Any, name: str) -> None:
    model = Engine(made(name)[0]).model
    if isinstance(model.memory[0], Latent):
        assert model.memory == [spec for layer in model.layers for spec in layer.memory]
        assert not model.attention_specs
    elif any(isinstance(spec, State) for spec in model.memory):
        paged = [spec for spec in model.memory if isinstance(spec, Paged)]
        assert len(paged) == len(model.attention_specs)
        assert [model.memory[spec.pool] for spec in model.attention_specs] == paged
    else:
        assert model.memory == memory_of(model.attention_specs)


def test_gemma3_old_config_spelling(made: Any, tmp_path: Path) -> None:
    """`rope_theta`, `rope_local_base_freq` and the pattern, as published checkpoints have them."""
    path, theirs = made("gemma3_text")
    config = json.loads((path / "config.json").read_text())
    ropes = config.pop("rope_parameters")
    del config["layer_types"]
    config.update(
        rope_theta=ropes["full_attention"]["rope_theta"],
        rope_local_base_freq=ropes["sliding_attention"]["rope_theta"],
        sliding_window_pattern=6,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    close(Engine(tmp_path).whole(PROMPT), theirs)


def test_sharded_checkpoint(made: Any, tmp_path: Path) -> None:
    _, theirs = made("llama")
    path = tiny_checkpoint("llama", tmp_path, shards=3)
    assert len(list(path.glob("*.safetensors"))) >= 3
    close(Engine(path).whole(PROMPT), theirs)


def test_bfloat16_runs_and_is_near(made: Any) -> None:
    path, theirs = made("llama")
    ours = Engine(path, torch.bfloat16).whole(PROMPT)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < 0.15 * theirs.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        *("llama", "qwen2", "qwen3_moe", "gemma3_text-caps", "phi3", "olmo2", "granite", "mixtral", "gpt_oss"),
        *("gemma4_text", "gemma3n_text", "llama4_text", "youtu", "deepseek_v3-yarn"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_table(made: Any, variant: str, dtype: torch.dtype) -> None:
    """Packed weights, float32 activations and a bfloat16 KV cache: near, and its own chunks agree with its whole."""
    from phloem.kernels import native

    try:
        ops = native.table(1)
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    path, theirs = made(variant)
    engine = Engine(path, dtype, ops=ops, kv_dtype=torch.bfloat16)
    whole = engine.whole(PROMPT)
    # Rounding may turn a router's choice, and that token's logits: of these experts, for three tokens at most. So too
    # where queries and keys are normalised and not scaled: their softmax is nearly a choice.
    worst = (whole - theirs).abs().amax(-1).sort()[0]
    assert worst[-4 if variant in ("gpt_oss", "gemma4_text", "llama4_text") else -1] < 0.05 * theirs.abs().max()
    pages = engine.pages(len(PROMPT))
    chunks = [engine.step([(PROMPT[a:b], pages, a)], every=True) for a, b in ((0, 9), (9, 10), (10, 23))]
    # Which of Gemma 3n's gates are open hangs on their spread, which other rounding moves.
    near = 0.02 if variant == "gemma3n_text" else 0.01
    assert (torch.cat(chunks) - whole).abs().max() < near * theirs.abs().max()
    names = {"phi3": "qkv_proj", **dict.fromkeys(("youtu", "deepseek_v3-yarn"), "kv_b_proj")}
    name = f"model.layers.1.self_attn.{names.get(variant, 'k_proj')}.weight"
    torch.testing.assert_close(
        engine.model.get_weight(name), Engine(path, dtype).model.get_weight(name), atol=0, rtol=0
    )


# A forward pass is ops and views


class Watch(TorchDispatchMode):
    """Notes every aten op that runs outside the table."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.outside: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.outside.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def wrap(self, op: Any) -> Any:
        def inside(*args: Any, **options: Any) -> Any:
            self.inside += 1
            try:
                return op(*args, **options)
            finally:
                self.inside -= 1

        return inside


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        *("llama-bias", "qwen2", "qwen3", "mistral", "gemma3_text-caps", "phi3", "olmo2", "granite", "gpt_oss"),
        *("starcoder2", "falcon", "phi", "qwen2_moe", "ministral3", "glm4"),
    ],
)
def test_forward_is_ops_and_views(made: Any, variant: str) -> None:
    watch = Watch()
    plain = Ops()
    wrapped = {
        spec.name: watch.wrap(getattr(plain, spec.name))
        for spec in dataclasses.fields(Ops)
        if callable(getattr(plain, spec.name))
    }
    engine = Engine(made(variant)[0], ops=Ops(**wrapped))
    model = engine.model

    def attention(spec: Any, heads: Any) -> Any:
        watch.inside += 1
        assert heads.rotation.positions.shape == (4,)
        assert (heads.rotation.q_norm is not None) == (variant in ("qwen3", "gemma3_text-caps"))
        out = heads.q.contiguous() + heads.k.sum() + heads.v.sum()
        watch.inside -= 1
        return out

    memory: Any = SimpleNamespace(attend=attention)
    for index in (None, torch.tensor([2, 0])):
        step = ForwardBatch(torch.tensor(PROMPT[:4]), torch.arange(4), memory, index)
        with torch.no_grad(), watch:
            logits = model.head(model.forward(step))
        assert logits.shape == (4 if index is None else 2, model.vocab_size)
    assert watch.outside <= {"view", "slice", "_unsafe_view"}, watch.outside
