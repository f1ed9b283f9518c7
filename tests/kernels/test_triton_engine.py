"""The Triton table and backend under whole models, beneath the interpreter: the same logits as the reference table."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from pools import pool_for, pool_of
from tree_support import OWN, SHAPE, SPECS, S, check_attention
from triton_support import need_interpreter

from phloem.attention import Memory, begin
from phloem.attention import reference as reference_backend
from phloem.attention.reference import TableStep
from phloem.checkpoint.describe import Checkpoint, describe
from phloem.core.memory import groups_of
from phloem.kernels.ops import AttentionCall, Ops, PagedBatch
from phloem.kvcache.pool import KVPool
from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch, Heads
from phloem.models import FAMILIES, load_model
from phloem.testing.checkpoints import tiny_checkpoint

need_interpreter()
from phloem.attention import triton as backend_file  # noqa: E402
from phloem.kernels.triton import table  # noqa: E402

SPEC = AttentionSpec(0, 4, 2, 16, 0.25)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}


SPARSE = {
    **CONFIG,
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6},
    **{"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "n_group": 1, "topk_group": 1},
}
GLM = {**SPARSE, "model_type": "glm4_moe", "use_qk_norm": True, "partial_rotary_factor": 0.5}
DEEPSEEK = {
    **{**SPARSE, "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "num_key_value_heads": 4},
    **{"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
}


def build(ops: Ops, tmp_path: object, config: dict[str, Any] = CONFIG) -> Any:
    ctx = BuildContext(ops=ops, dtype=torch.float32, device=torch.device("cpu"))
    model = FAMILIES.module(config["model_type"]).build(config, ctx, 64)
    checkpoint = Checkpoint(
        path=tmp_path,  # type: ignore[arg-type]
        format="dummy",
        model_type=config["model_type"],
        config=config,
        generation_config={},
        eos_ids=(),
        context_length=64,
        vocab_size=67,
        tokenizer_path=tmp_path,  # type: ignore[arg-type]
        gguf=None,
        name="tiny",
        architectures=(),
    )
    model.load(checkpoint, None)
    return model


def steps() -> list[tuple[PagedBatch, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A ragged prefill, then two decode steps of both rows."""
    pages = torch.tensor([[3, 1], [2, 4]]).int()
    made = []
    done = [0, 0]
    for new in ([5, 9], [1, 1], [1, 1]):
        positions = torch.cat([torch.arange(done[r], done[r] + new[r]) for r in range(2)])
        rows = torch.repeat_interleave(torch.arange(2), torch.tensor(new))
        slots = pages[rows, positions // 8] * 8 + positions % 8
        done = [done[r] + new[r] for r in range(2)]
        start = torch.tensor([0, *new]).cumsum(0).int()
        batch = PagedBatch(start, torch.tensor(done).int(), pages, slots.int(), max(new), max(done))
        made.append((batch, torch.randint(0, 67, (sum(new),)), positions, start[1:].long() - 1))
    return made


@pytest.mark.parametrize("name", ["triton", "invariant"])
def test_model_on_the_triton_table(name: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    ops = table.table() if name == "triton" else table.invariant_table()
    want_model, got_model = build(Ops(), tmp_path), build(ops, tmp_path)
    specs = want_model.attention_specs
    want_pool, got_pool = (pool_of(specs, 6, 8, torch.float32, torch.device("cpu")) for _ in range(2))
    backend = backend_file.Backend(ops, specs, torch.device("cpu"), torch.float32)
    for batch, ids, positions, last in steps():
        want_step = ForwardBatch(ids, positions, Memory(want_pool, [TableStep(Ops(), batch, want_pool)]), last)
        got_step = ForwardBatch(ids, positions, begin(backend, [batch], got_pool), last)
        want = want_model.head(want_model.forward(want_step))
        got = got_model.head(got_model.forward(got_step))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("config", [GLM, DEEPSEEK], ids=lambda config: config["model_type"])
def test_experts_of_other_routers_and_latent_attention(
    config: dict[str, Any], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sigmoid with a correction, and groups: no op falls back to the loop that asks which expert has which token."""
    torch.manual_seed(0)
    want_model, got_model = build(Ops(), tmp_path, config), build(table.table(), tmp_path, config)
    cpu, memory = torch.device("cpu"), want_model.memory
    want_pool, got_pool = (KVPool(memory, [6] * len(groups_of(memory)), 8, torch.float32, cpu) for _ in range(2))
    specs = want_model.attention_specs
    plain = reference_backend.Backend(Ops(), specs, cpu, torch.float32)
    backend = backend_file.Backend(table.table(), specs, cpu, torch.float32)
    for batch, ids, positions, last in steps():
        want_step = ForwardBatch(ids, positions, begin(plain, [batch], want_pool), last)
        want = want_model.head(want_model.forward(want_step))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "nonzero", lambda *_, **__: pytest.fail("the device was waited for"))
            got_step = ForwardBatch(ids, positions, begin(backend, [batch], got_pool), last)
            got = got_model.head(got_model.forward(got_step))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_float8_cache_with_scales(name: str, dtype: torch.dtype, heads: int) -> None:
    """Keys and values far beyond what a float8 holds, through prefill and decode: right with their scales only.

    The pages are written by the backend; so that the interpreter's rounding to float8 does not count, the expected
    result is computed in float32 from what the pages hold.
    """
    torch.manual_seed(1)
    scales = ([20.0, 8.0][:heads], [3.0, 12.0][:heads])
    device = torch.device("cpu")
    pool = pool_of([SPEC], 4, 8, torch.float8_e4m3fn, device, {0: scales})
    bare = pool_of([SPEC], 4, 8, torch.float8_e4m3fn, device)
    ops = table.table() if name == "triton" else Ops()
    module = backend_file if name == "triton" else reference_backend
    backend = module.Backend(ops, [SPEC], device, torch.float8_e4m3fn)
    pages, done = torch.tensor([[2, 3]]).int(), 0
    k, v = torch.randn(11, 2, 16) * 900, torch.randn(11, 2, 16) * 600  # up to several thousand
    q = torch.randn(11, 4, 16) / 900
    for new in (9, 1, 1):
        slots = pages[0, torch.arange(done, done + new) // 8] * 8 + torch.arange(done, done + new) % 8
        here = slice(done, done + new)
        done += new
        batch = PagedBatch(torch.tensor([0, new]).int(), torch.tensor([done]).int(), pages, slots.int(), new, done)
        inputs = [part[here].to(dtype) for part in (q, k, v)]
        got = backend.begin(batch, pool)(SPEC, Heads(*inputs))
        factors = [torch.tensor(scale).float().view(1, -1, 1, 1) for scale in scales]
        read = [(cache.float() * by) for cache, by in zip((pool.keys[0], pool.values[0]), factors, strict=True)]
        want = Ops().paged_attention(q[here], tuple(read), batch, AttentionCall(SPEC.scale))
        assert (got.float() - want).norm() / want.norm() < 0.02
        # And what the pages hold is what was given, within float8's three bits of mantissa.
        for cache, given in zip(read, (k, v), strict=True):
            held = cache[2:4].transpose(1, 2).flatten(0, 1)[:done]
            assert (held - given[:done]).norm() / given[:done].norm() < 0.12
        cut = backend_of(module, ops).begin(batch, bare)(SPEC, Heads(*inputs))
        assert (cut.float() - want).norm() / want.norm() > 0.2 and not cut.isnan().any()


def backend_of(module: ModuleType, ops: Ops) -> Any:
    return module.Backend(ops, [SPEC], torch.device("cpu"), torch.float8_e4m3fn)


def test_drafts_that_branch() -> None:
    """Trees of drafts in a pool of two layers, one of them a window, against dense attention (`tree_support`)."""
    pool = pool_of(SPECS, OWN + SHAPE.spare_pages(S), S, torch.float32, torch.device("cpu"))
    backend = backend_file.Backend(table.table(), SPECS, torch.device("cpu"), torch.float32)
    check_attention(backend, pool, 2e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe"])
def test_models_whose_routers_are_their_own(name: str, tmp_path: Any) -> None:
    """Latent attention, and experts that another router chose: as by the reference table."""
    pytest.importorskip("transformers")
    path = tiny_checkpoint(name, tmp_path)
    hidden: list[torch.Tensor] = []
    for ops in (Ops(), table.table()):
        model: Any = load_model(describe(str(path)), BuildContext(ops, torch.float32, torch.device("cpu")))
        kind = reference_backend if ops.name == "reference" else backend_file
        backend = kind.Backend(ops, model.attention_specs, torch.device("cpu"), torch.float32)
        pool = pool_for(model.memory, 8, 4, torch.float32, torch.device("cpu"))
        starts, lens = torch.tensor([0, 7, 8, 12]).int(), torch.tensor([7, 1, 4]).int()
        slots = torch.tensor([*range(4, 11), 16, *range(24, 28)]).int()
        pages = torch.tensor([[1, 2], [4, 0], [6, 7]]).int()
        batch = PagedBatch(starts, lens, pages, slots, 7, 7)
        ids = torch.arange(20, 32)
        places = torch.tensor([*range(7), 0, *range(4)])
        with torch.inference_mode():
            step = ForwardBatch(ids, places, begin(backend, [batch], pool), torch.tensor([6, 7, 11]))
            hidden.append(model.head(model.forward(step)))
    torch.testing.assert_close(hidden[1], hidden[0], atol=2e-4, rtol=1e-3)
