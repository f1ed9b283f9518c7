"""The Triton table and backend under whole models, beneath the interpreter: the same logits as the reference table."""

from __future__ import annotations

import pytest
import torch
from triton_support import need_interpreter

from phloem.attention.reference import TableStep
from phloem.kernels.ops import Ops, PagedBatch
from phloem.kvcache.pool import KVPool
from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch
from phloem.models import llama
from phloem.utils.checkpoint import Checkpoint

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


def build(ops: Ops, tmp_path: object) -> llama.Decoder:
    ctx = BuildContext(ops=ops, dtype=torch.float32, device=torch.device("cpu"))
    model = llama.build(CONFIG, ctx, 64)
    checkpoint = Checkpoint(
        path=tmp_path,  # type: ignore[arg-type]
        format="dummy",
        model_type="llama",
        config=CONFIG,
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
    want_pool, got_pool = (KVPool(specs, 6, 8, torch.float32, torch.device("cpu")) for _ in range(2))
    backend = backend_file.Backend(ops, specs, torch.device("cpu"), torch.float32)
    for batch, ids, positions, last in steps():
        want_step = ForwardBatch(ids, positions, TableStep(Ops(), batch, want_pool), last)
        got_step = ForwardBatch(ids, positions, backend.begin(batch, got_pool), last)
        want = want_model.head(want_model.forward(want_step))
        got = got_model.head(got_model.forward(got_step))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_float8_cache_with_scales() -> None:
    """What the backend stores and reads through a layer's scales is close to what it was given."""
    torch.manual_seed(1)
    pool = KVPool([SPEC], 4, 8, torch.float8_e4m3fn, torch.device("cpu"))
    exact = KVPool([SPEC], 4, 8, torch.float32, torch.device("cpu"))
    ops = table.table()
    backend = backend_file.Backend(ops, [SPEC], torch.device("cpu"), torch.float8_e4m3fn)
    backend.scales[0] = (torch.tensor([0.01, 0.02]), torch.tensor([0.02, 0.01]))
    batch = PagedBatch(
        torch.tensor([0, 5]).int(), torch.tensor([5]).int(), torch.tensor([[2]]).int(), torch.arange(16, 21).int(), 5, 5
    )
    q, k, v = torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    got = backend.begin(batch, pool)(SPEC, q, k, v, None)
    want = TableStep(Ops(), batch, exact)(SPEC, q, k, v, None)
    # float8 keeps three bits of mantissa; the interpreter loses a carry here and there besides.
    assert (got - want).norm() / want.norm() < 0.2
    assert pool.keys[0].float().abs().max() > 50
