"""The head's attention by flex attention: its mask and its sums are those of the dense form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phloem.core.errors import ConfigError
from phloem.training.flex import FlexAttention, chosen, sees
from phloem.training.head import Eagle3, Packed
from phloem.training.options import Options, from_file

SIZE = 32
CONFIG: dict[str, Any] = {
    "hidden_size": SIZE,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 100.0,
    "rms_norm_eps": 1e-5,
    "draft_vocab_size": 12,
}
LENGTHS = (90, 5, 60)  # more than a block, and texts that end within one


def case() -> tuple[Eagle3, Packed, list[Tensor], Callable[[Tensor], Tensor]]:
    """Rounds that compute fewer places each, as those of a training do."""
    torch.manual_seed(3)
    head, total = Eagle3(CONFIG, 256), sum(LENGTHS)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    packed = Packed(torch.randint(20, (total,)), torch.randn(total, 3 * SIZE), LENGTHS)
    kept = torch.rand(total) < 0.8
    rows = [kept.nonzero().squeeze(1)]
    for _ in range(2):
        rows.append(rows[-1][torch.rand(len(rows[-1])) < 0.7])
    embed_VN = torch.randn(20, SIZE)
    return head, packed, rows, lambda ids: embed_VN[ids]


def unrolled(head: Eagle3, packed: Packed, rows: list[Tensor], embed: Callable[[Tensor], Tensor]) -> list[Tensor]:
    def ids(number: int, at_n: Tensor) -> Tensor:
        return packed.ids_T[(at_n + number + 1).clamp(max=len(packed.ids_T) - 1)]

    with torch.no_grad():
        return list(head.unroll(packed, embed, rows, ids))


@pytest.mark.slow
def test_every_round_gives_what_dense_masks_give() -> None:
    head, packed, rows, embed = case()
    want = unrolled(head, packed, rows, embed)
    head.attends = FlexAttention(compiled=False)
    got = unrolled(head, packed, rows, embed)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    nobody = head.attends(packed, rows[0][:0], torch.zeros(0, 4, 16), (torch.zeros(155, 2, 16),) * 2, [])
    assert nobody.shape == (0, 64)


def test_a_query_sees_its_text_up_to_itself_and_itself_in_later_rounds() -> None:
    _, packed, (at_n, *_), _ = case()
    total, count = len(packed.ids_T), len(at_n)
    query, key = torch.arange(count)[:, None], torch.arange(total + 2 * count)[None]
    none = torch.zeros((), dtype=torch.int64)
    got = sees(packed, at_n)(none, none, query, key)
    starts = [0, 90, 95]
    for number in range(0, count, 7):
        place = int(at_n[number])
        start = max(one for one in starts if one <= place)
        own = [*range(start, place + 1), total + number, total + count + number]
        assert got[number].nonzero().squeeze(1).tolist() == own


@pytest.mark.slow
def test_blocks_that_nobody_sees_are_left_out() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = (256, 256)
    packed = Packed(torch.zeros(512, dtype=torch.int64), torch.zeros(512, 3 * SIZE), lengths)
    at_n = torch.arange(512)
    blocks = create_block_mask(sees(packed, at_n), None, None, 512, 1024, device="cpu", BLOCK_SIZE=128)
    seen = blocks.to_dense()[0, 0].bool()
    diagonal = torch.eye(4, dtype=torch.bool)
    lower = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(seen, torch.cat([lower, diagonal], 1))


def test_it_is_asked_for_by_name_and_refused_where_it_cannot_learn() -> None:
    assert Options().attention == "dense" and chosen("dense", torch.device("cpu")) is None
    with pytest.raises(ConfigError, match="no backward pass on a CPU"):
        chosen("flex", torch.device("cpu"))
    with pytest.raises(ConfigError, match="'sparse' is none of dense, flex"):
        from_file({"training": {"attention": "sparse"}}, Path("a.yaml"))
