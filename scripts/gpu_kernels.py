"""Every Triton kernel on the device it runs on, against plain torch in float32 on the same inputs.

Fresh random inputs, uninitialised memory filled with NaN while checking (`poisoned`), and an error that is a relative
norm: NaN never passes. On a CPU the kernels run under Triton's interpreter, in float32 and tiny.
"""

from __future__ import annotations

import contextlib
import importlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_odd
import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels import reference as ref
from phloem.kernels import reference_attention as attention_ref
from phloem.kernels import reference_experts as experts_ref
from phloem.kernels import reference_formats as formats
from phloem.kernels import reference_sampling as sampling_ref
from phloem.kernels.ops import Adapters, AttentionCall, Draw, LatentCall, PagedBatch, Rotation, SharedPages
from phloem.platforms._facts import own_float8

LIMITS = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}


@dataclass
class Outcome:
    """`error` is a relative norm (0 for an exact comparison that held); `ok` is the verdict."""

    name: str
    ok: bool
    error: float
    limit: float
    seconds: float
    message: str = ""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def wide(cache: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return cache[0].float(), cache[1].float()


class Kernels:
    """The checks. `device` and `dtype` of the inputs; `tiny` for the interpreter."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tiny: bool) -> None:
        self.device, self.dtype, self.tiny = device, dtype, tiny
        self.generator = torch.Generator(device).manual_seed(int(time.time()))
        self.fp8 = own_float8()

    def randn(self, *shape: int, dtype: torch.dtype | None = None, by: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device) * by
        return drawn.to(dtype or self.dtype)

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def tensor(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def paged(self, queries: list[int], lengths: list[int], page: int = 16) -> PagedBatch:
        rows, width = len(lengths), -(-max(lengths) // page)
        table = torch.randperm(rows * width, generator=self.generator, device=self.device).view(rows, width) + 1
        slots = [
            table[row, position // page] * page + position % page
            for row, (new, length) in enumerate(zip(queries, lengths, strict=True))
            for position in range(length - new, length)
        ]
        start = self.tensor([0, *queries], torch.int64).cumsum(0).int()
        lens = self.tensor(lengths, torch.int32)
        return PagedBatch(start, lens, table.int(), torch.stack(slots).int(), max(queries), max(lengths))

    # Each check returns pairs (got, want): want in float32, or of got's own type for an exact comparison.

    def norms(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import norm

        width = 96 if self.tiny else 4096
        x, residual, weight = self.randn(7, width), self.randn(7, width), self.randn(width)
        heads, small = self.randn(5, 3, 128)[:, :2], self.randn(128)
        total = (x + residual).float()
        got_norm, got_total = norm.add_rms_norm(x, residual, weight, 1e-6)
        return [
            (norm.rms_norm(x, weight, 1e-6), ref.rms_norm(x.float(), weight, 1e-6)),
            (norm.rms_norm(heads, small, 1e-6), ref.rms_norm(heads.float(), small, 1e-6)),
            (got_norm, ref.rms_norm(total, weight, 1e-6)),
            (got_total, total),
        ]

    def float8_norm(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import norm

        x, residual, weight = self.randn(7, 1152), self.randn(7, 1152), self.randn(1152).abs() + 0.5
        want = ref.rms_norm((x + residual).float(), weight, 1e-6)
        pairs: list[tuple[Tensor, Tensor]] = []
        for grouped in (False, True):
            values, scale, total = norm.rms_norm_fp8(x, residual, weight, 1e-6, self.fp8, grouped=grouped)
            spread = formats.spread_groups(values, scale) if grouped else values.float() * scale[:, None]
            pairs += [(spread, want), (total, (x + residual).float())]
        return pairs

    def few_rows(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import gemm_fp8

        x, bias = self.randn(5, 640, by=0.1), self.randn(200)
        blocks, by_block = formats.quantise_blocks(self.randn(200, 640).float(), self.fp8)
        rows, by_row = formats.quantise_fp8(self.randn(200, 640).float(), self.fp8)
        return [
            (
                gemm_fp8.few_rows_gemm(x, blocks, by_block, bias),
                F.linear(x.float(), formats.spread_blocks(blocks, by_block), bias.float()),
            ),
            (
                gemm_fp8.few_rows_gemm(x, rows, by_row, None),
                F.linear(x.float(), rows.float() * by_row[:, None]),
            ),
        ]

    def shared_pages(self) -> list[tuple[Tensor, Tensor]]:
        """Rows 0, 1 and 3 begin with the same 256 tokens: in a decode step and in one with longer rows."""
        from phloem.attention._cascade import Sharing, find
        from phloem.kernels.triton import attention

        cheap = Sharing(tile=16, programs=264, splits=(16, 8), token_bytes=1 << 30, part_bytes=1)
        pairs: list[tuple[Tensor, Tensor]] = []
        for queries in ([1] * 4, [1, 3, 40, 2]):
            lengths = [300, 500, 310, 270]
            batch = self.paged(queries, lengths)
            batch.page_table[1, :16] = batch.page_table[3, :16] = batch.page_table[0, :16]
            prefix = torch.tensor(lengths) - torch.tensor(queries)
            table, count = batch.page_table.cpu().numpy(), torch.tensor(queries).int().numpy()
            found = find(table, count, prefix.int().numpy(), 16, 0, cheap)
            assert found is not None
            pages = SharedPages(*(torch.from_numpy(array).to(self.device) for array in found.arrays))
            cache = tuple(self.randn(int(batch.page_table.max()) + 1, 2, 16, 64) for _ in "kv")
            q, sinks = self.randn(sum(queries), 8, 64), self.randn(8)
            for call in (AttentionCall(0.125), AttentionCall(0.125, 200, 0.0, sinks)):
                got = attention.paged_attention(q, cache, replace(batch, shared=pages), call)
                pairs.append((got, attention_ref.paged_attention(q.float(), wide(cache), batch, call)))
        return pairs

    def activations(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import activation

        x, y = self.randn(5, 2 * 1100, by=3), self.randn(5, 2 * 1100)
        return [
            (activation.silu_and_mul(x), ref.silu_and_mul(x.float())),
            (activation.gelu_tanh_and_mul(x), ref.gelu_tanh_and_mul(x.float())),
            (activation.add(x, y), x.float() + y.float()),
            (activation.softcap(x, 2.5), ref.softcap(x.float(), 2.5)),
        ]

    def rope(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import rope

        pairs: list[tuple[Tensor, Tensor]] = []
        tokens, heads, kv_heads, size = (5, 3, 2, 32) if self.tiny else (300, 32, 8, 128)
        for interleaved in (False, True):
            q, k, v = (
                self.randn(tokens, heads, size),
                self.randn(tokens, kv_heads, size),
                self.randn(tokens, kv_heads, size),
            )
            angles = torch.rand(500, size // 2, device=self.device) * 6
            cos_sin = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
            positions = self.ints(0, 500, tokens)
            slots = torch.randperm(tokens * 2, device=self.device)[:tokens].int()
            caches = [torch.zeros(tokens, kv_heads, 4, size, dtype=self.dtype, device=self.device) for _ in range(2)]
            want_q, want_k = q.float().clone(), k.float().clone()
            ref.rope_(want_q, want_k, positions, cos_sin, interleaved)
            want = [torch.zeros_like(cache, dtype=torch.float32) for cache in caches]
            ref.write_kv(want_k, v.float(), want[0], want[1], slots)
            turn = Rotation(positions, cos_sin, interleaved)
            together = rope.rope_write_kv(q.clone(), k, v, turn, caches[0], caches[1], slots)
            pairs += [(together, want_q), (caches[0], want[0]), (caches[1], want[1])]
            rope.rope_(q, k, positions, cos_sin, interleaved)
            again = [torch.zeros_like(cache) for cache in caches]
            rope.write_kv(k, v, again[0], again[1], slots)
            pairs += [(q, want_q), (k, want_k), (again[0], want[0]), (again[1], want[1])]
        return pairs

    def pages(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import pages

        table, ids = self.randn(50, 130), self.ints(0, 50, 9)
        return [
            (pages.embedding(ids, table, 1.0), table[ids]),
            (pages.embedding(ids, table, 7.3), ref.embedding(ids, table, 7.3)),
            (pages.select_rows(table, ids), table[ids]),
        ]

    def tokens(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.engine import transfer
        from phloem.kernels.triton import tokens

        last, slots = self.ints(0, 900, 300), torch.randperm(300, device=self.device)[:150]
        ids, chosen, sound = self.ints(0, 900, 150), self.ints(0, 900, 150).int(), self.randn(150)
        ids[::3], sound[::4] = -1, float("nan")
        mine, theirs = [ids.clone(), last.clone()], [ids.clone(), last.clone()]
        tokens.late_tokens_(mine[0], mine[1], slots)
        transfer.late_tokens_(theirs[0], theirs[1], slots)
        packed = tokens.keep_tokens_(mine[1], slots, chosen, sound)
        want = transfer.keep_tokens_(theirs[1], slots, chosen, sound)
        return [(mine[0], theirs[0]), (packed, want), (mine[1], theirs[1])]

    def _attend(self, queries: list[int], lengths: list[int], head: int, heads: int, kv_heads: int, **how: Any) -> Any:
        from phloem.kernels.triton import attention

        window, cap, sinks = how.pop("window", 0), how.pop("cap", 0.0), how.pop("sinks", False)
        batch = self.paged(queries, lengths)
        number = batch.page_table.numel() + 1
        caches = [self.randn(number, kv_heads, 16, head) for _ in range(2)]
        if how.pop("float8", False):
            caches = [cache.to(self.fp8) for cache in caches]
            how["scales"] = (self.randn(kv_heads, dtype=torch.float32).abs() + 0.5,) * 2
        q = self.randn(sum(queries), heads, head)
        sink = self.randn(heads, dtype=torch.float32) if sinks else None
        run = attention.decode_attention if max(queries) == 1 else attention.extend_attention
        call, cache = AttentionCall(head**-0.5, window, cap, sink), (caches[0], caches[1])
        got = run(q, cache, batch, call, **how)
        kept = {key: how[key] for key in ("scales", "tree_mask") if key in how}
        return got, attention_ref.paged_attention(q.float(), cache, batch, call, **kept)

    def decode(self) -> list[tuple[Tensor, Tensor]]:
        lengths = [3, 40] if self.tiny else [1, 17, 1024, 3333]
        ones, head = [1] * len(lengths), 32 if self.tiny else 128
        return [
            self._attend(ones, lengths, head, 8, 2),
            self._attend(ones, lengths, head, 8, 8, splits=1),
            self._attend(ones, lengths, head, 7, 1, splits=5),
            self._attend(ones, lengths, head // 2, 8, 1, window=30, sinks=True),
            self._attend(ones, lengths, head * 2, 8, 4, window=20, cap=5.0),
            self._attend(ones, lengths, head - 16, 4, 2, split_size=128),
            self._attend(ones, lengths, head, 8, 2, float8=True),
        ]

    def extend(self) -> list[tuple[Tensor, Tensor]]:
        queries, lengths = ([3, 1, 20], [3, 9, 33]) if self.tiny else ([300, 1, 77, 512], [300, 900, 1111, 513])
        head = 32 if self.tiny else 128
        mask = torch.rand(sum(queries), max(queries), device=self.device) > 0.4
        start = 0
        for count in queries:
            mask[start : start + count, :count].tril_().fill_diagonal_(True)  # a draft sees drafts before it
            start += count
        return [
            self._attend(queries, lengths, head, 8, 2),
            self._attend(queries, lengths, head, 3, 3),
            self._attend(queries, lengths, head // 2, 8, 1, window=30, sinks=True),
            self._attend(queries, lengths, head * 2, 8, 4, window=20, cap=5.0),
            self._attend(queries, lengths, head - 16, 4, 2),
            self._attend(queries, lengths, head, 8, 2, tree_mask=mask),
            self._attend(queries, lengths, head, 8, 2, float8=True),
        ]

    def mla(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import mla

        heads, nope, rope, latent = (5, 16, 16, 32) if self.tiny else (16, 128, 64, 512)
        pairs: list[tuple[Tensor, Tensor]] = []
        for queries, lengths in (([1, 1], [9, 40]), ([5, 1, 9], [5, 30, 20])):
            batch = self.paged(queries, lengths)
            cache = self.randn(batch.page_table.numel() + 1, 1, 16, latent + rope)
            q_nope, q_rope = self.randn(sum(queries), heads, nope), self.randn(sum(queries), heads, rope)
            up, out = self.randn(heads, nope, latent, by=nope**-0.5), self.randn(heads, latent, nope, by=latent**-0.5)
            got = mla.latent_attention(q_nope, q_rope, cache, batch, LatentCall(up, out, 0.1))
            wide = [x.float() for x in (q_nope, q_rope, cache, up, out)]
            call = LatentCall(wide[3], wide[4], 0.1)
            pairs.append((got, attention_ref.latent_attention(wide[0], wide[1], wide[2], batch, call)))
        return pairs

    def sampling(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import sample

        rows, vocab = (4, 900) if self.tiny else (64, 128256)
        logits = self.randn(rows, vocab, dtype=torch.float32, by=3)
        draw = Draw(
            torch.rand(rows, device=self.device) * 1.5,
            self.ints(-1, 60, rows).int(),
            torch.rand(rows, device=self.device) * 0.99 + 0.01,
            torch.rand(rows, device=self.device) * 0.1,
            self.ints(0, 2**62, rows),
            self.ints(0, 5000, rows),
        )
        got, want = sample.sample(logits, draw), sampling_ref.sample(logits, draw)
        # A draw that falls on a boundary between two tokens may go either way: all but one in a hundred must agree.
        close = torch.where((got != want).float().mean() <= 0.01, want, got)
        masked, mask = logits.clone(), self.ints(-(2**31), 2**31, 2, vocab // 32).int()
        expected, some = logits.clone(), self.tensor([rows - 1, 0], torch.int32)
        sample.mask_tokens_(masked, some, mask)
        ref.mask_tokens_(expected, some, mask)
        return [
            (close, want),
            (sample.argmax(logits), logits.argmax(-1).int()),
            (sample.logsumexp(logits), logits.logsumexp(-1)),
            (masked.nan_to_num(neginf=-1e4), expected.nan_to_num(neginf=-1e4)),
        ]

    def moe(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import moe

        pairs: list[tuple[Tensor, Tensor]] = []
        count, width, inner, k = (4, 64, 48, 2) if self.tiny else (64, 1024, 384, 8)
        gate_up, down = (
            self.randn(count, 2 * inner, width, by=width**-0.5),
            self.randn(count, width, inner, by=inner**-0.5),
        )
        for tokens in (1, 9) if self.tiny else (1, 40, 1000):
            x, logits = self.randn(tokens, width), self.randn(tokens, count, by=2)
            weights, ids = moe.route(logits, k, True)
            want_weights, want_ids = experts_ref.route(logits, k, True)
            pairs += [(weights, want_weights), (ids, want_ids)]
            wide = (x.float(), want_weights, want_ids, gate_up.float(), down.float())
            want = experts_ref.experts(*wide)
            pairs.append((moe.experts(x, want_weights, want_ids, gate_up, down), want))
            stacks = gate_up.flatten(0, 1), down.flatten(0, 1)
            pairs.append((moe.moe(x, logits, *stacks, k, True), want))
        return pairs

    def moe_fp8(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import moe

        count, width, inner = (4, 256, 128) if self.tiny else (32, 1024, 384)
        gate_up, gate_scale = formats.quantise_blocks(self.randn(count, 2 * inner, width, by=width**-0.5), self.fp8)
        down, down_scale = formats.quantise_blocks(self.randn(count, width, inner, by=inner**-0.5), self.fp8)
        x, logits = self.randn(70, width), self.randn(70, count)
        weights, ids = experts_ref.route(logits, 4, True)
        got = moe.experts(x, weights, ids, gate_up, down, scales=(gate_scale, down_scale))
        wide = formats.spread_blocks(gate_up, gate_scale), formats.spread_blocks(down, down_scale)
        rounded = formats.spread_groups(*formats.quantise_fp8(x, self.fp8, 128))
        return [(got, experts_ref.experts(rounded, weights, ids, *wide))]

    def moe_many(self) -> list[tuple[Tensor, Tensor]]:
        return self._many(False)

    def moe_many_fp8(self) -> list[tuple[Tensor, Tensor]]:
        return self._many(True)

    def _many(self, float8: bool) -> list[tuple[Tensor, Tensor]]:
        """Every form of the products of many rows, with an expert that gets none and rows that fill no tile; none on a
        device without the hardware, or in float32, which takes more shared memory than a device has."""
        from phloem.kernels.triton import moe, trial

        if self.device.type == "cuda" and (
            trial.capability(self.device) < trial.CAPABLE or self.dtype == torch.float32
        ):
            return []
        count, width, inner, k = (4, 64, 48, 2) if self.tiny else (32, 1032, 376, 4)
        width, inner = (width, inner) if not float8 else ((128, 128) if self.tiny else (1024, 384))
        gate_up = self.randn(count, 2 * inner, width, by=width**-0.5)
        down, x = self.randn(count, width, inner, by=inner**-0.5), self.randn(70 if self.tiny else 1111, width)
        weights, ids = experts_ref.route(self.randn(len(x), count - 1, by=2), k, True)
        wide, scales, seen = (gate_up.float(), down.float()), None, x.float()
        if float8:
            gate_up, first = formats.quantise_blocks(gate_up.float(), self.fp8)
            down, second = formats.quantise_blocks(down.float(), self.fp8)
            wide, scales = (formats.spread_blocks(gate_up, first), formats.spread_blocks(down, second)), (first, second)
            seen = formats.spread_groups(*formats.quantise_fp8(x, self.fp8, 128))
        want = experts_ref.experts(seen, weights, ids, *wide)
        work = trial.Work(gate_up, down, 0, scales, moe.parts_of_tiles)
        lists = moe.sort_by_expert(ids, count, 128)
        parts = [work.form(form, x, weights, lists) for form in work.forms]
        return [(part.view(*ids.shape, width).float().sum(1), want) for part in parts]

    def quantise(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import quantise

        x = self.randn(9, 300 if self.tiny else 4224)
        token, token_scale = quantise.per_token_fp8(x, self.fp8)
        group, group_scale = quantise.per_group_fp8(x, self.fp8)
        return [
            (token.float() * token_scale[:, None], x.float()),
            (formats.spread_groups(group, group_scale), x.float()),
            (token_scale, formats.quantise_fp8(x, self.fp8)[1]),
            (group_scale, formats.quantise_fp8(x, self.fp8, 128)[1]),
        ]

    def gemm_fp8(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import gemm_fp8

        pairs: list[tuple[Tensor, Tensor]] = []
        features, outputs = (256, 130) if self.tiny else (4096, 1500)
        weight, weight_scale = formats.quantise_blocks(self.randn(outputs, features), self.fp8)
        for tokens in (1, 20) if self.tiny else (1, 33, 500):
            x, x_scale = formats.quantise_fp8(self.randn(tokens, features), self.fp8, 128)
            want = F.linear(formats.spread_groups(x, x_scale), formats.spread_blocks(weight, weight_scale))
            pairs.append((gemm_fp8.block_scaled_gemm(x, x_scale, weight, weight_scale, None, self.dtype), want))
        return pairs

    def gemm_int(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import gemm_int

        pairs: list[tuple[Tensor, Tensor]] = []
        features, outputs, group = (256, 70, 64) if self.tiny else (4096, 1500, 128)
        nibbles = self.ints(0, 16, outputs, features)
        step, zero = (
            torch.rand(outputs, features // group, device=self.device),
            self.ints(0, 16, outputs, features // group),
        )
        wide = (nibbles - zero.repeat_interleave(group, 1)) * step.repeat_interleave(group, 1)
        packed = gemm_int.pack_int4(nibbles, group)
        for tokens in (1, 20) if self.tiny else (1, 33, 500):
            x = self.randn(tokens, features)
            pairs.append((gemm_int.int4_gemm(x, packed, step, zero.float()), F.linear(x.float(), wide.float())))
        return pairs

    def grouped(self) -> list[tuple[Tensor, Tensor]]:
        """GGUF's types and integers of 8 bits, of few tokens, of more and of many, and rows by number."""
        from phloem.kernels.narrow import Narrow
        from phloem.kernels.triton import gemm_gguf, narrow_gguf

        pairs: list[tuple[Tensor, Tensor]] = []
        features, outputs = (512, 21) if self.tiny else (4096, 1500)
        forms = [Narrow("gguf", 1, 32, stored=kind) for kind in narrow_gguf.KINDS]
        forms += [Narrow("int8", 1, 128, zeros=True), Narrow("int8", 1, features)]
        for form in forms[2::6] if self.tiny else forms:
            run = narrow_gguf.empty(form, outputs, features, torch.device(self.device))
            for table in run.tensors():
                if table.is_floating_point():
                    table.copy_(torch.rand(table.shape, device=self.device) * 2.0**-8)
                else:
                    octets = table.view(torch.uint8)
                    octets.copy_(self.ints(0, 256, *octets.shape))
            wide = gemm_gguf.widened_rows([run], 0, outputs, torch.float32)
            ids = self.ints(0, outputs, 9)
            pairs.append((gemm_gguf.chosen_rows([run], ids, torch.float32), wide[ids]))
            for tokens in (1, 2, 20) if self.tiny else (1, 2, 5, 33, 200, 500):
                x = self.randn(tokens, features)
                pairs.append((gemm_gguf.grouped_gemm(x, [run]), F.linear(x.float(), wide)))
        return pairs

    def experts_any(self) -> list[tuple[Tensor, Tensor]]:
        return gpu_odd.experts_any(self)

    def experts_4bit(self) -> list[tuple[Tensor, Tensor]]:
        return gpu_odd.experts_4bit(self)

    def gemm_mxfp4(self) -> list[tuple[Tensor, Tensor]]:
        return gpu_odd.gemm_mxfp4(self)

    def late_router(self) -> list[tuple[Tensor, Tensor]]:
        return gpu_odd.late_router(self)

    def lora(self) -> list[tuple[Tensor, Tensor]]:
        from phloem.kernels.triton import lora

        features, outputs, rank = (96, 70, 8) if self.tiny else (4096, 1500, 16)
        x, y = self.randn(40, features), self.randn(40, outputs)
        down, up = self.randn(4, 2, rank, features, by=features**-0.5), self.randn(4, rank, outputs)
        index = self.tensor([3, *[0] * 3, *[1, 2] * 9, *[2] * 17, 0], torch.int32)
        facts = self.tensor([[0, 0], [rank, 0], [rank, 1], [rank, 0]], torch.int32)
        factor, shift = self.randn(4, outputs).float(), self.randn(4, outputs).float()
        adapters = Adapters(index, facts, down, up, factor, shift, torch.tensor([outputs // 3, outputs]))
        want = ref.add_adapters(y.float(), x.float(), adapters)
        return [(lora.add_adapters(y, x, adapters), want)]

    def invariant(self) -> list[tuple[Tensor, Tensor]]:
        """Bits that must not depend on the batch."""
        from phloem.kernels.triton import invariant, norm, sample

        features, outputs = (96, 70) if self.tiny else (4096, 1500)
        x, weight, bias = (
            self.randn(70, features),
            self.randn(outputs, features, by=features**-0.5),
            self.randn(outputs),
        )
        together = invariant.product(x, weight, bias)
        pairs = [(together, F.linear(x.float(), weight.float(), bias.float()))]
        for rows in (slice(0, 1), slice(3, 20), slice(64, 70)):
            pairs.append((invariant.product(x[rows], weight, bias), together[rows]))
            pairs.append((norm.rms_norm(x[rows], weight[0], 1e-6), norm.rms_norm(x, weight[0], 1e-6)[rows]))
            pairs.append((sample.logsumexp(x[rows].float()), sample.logsumexp(x.float())[rows]))
        lengths = [150, 20] if self.tiny else [150, 5000, 2000]
        batch = self.paged([1] * len(lengths), lengths)
        caches = [self.randn(batch.page_table.numel() + 1, 2, 16, 32) for _ in range(2)]
        q = self.randn(len(lengths), 8, 32)
        whole = invariant.paged_attention(q, (caches[0], caches[1]), batch, AttentionCall(0.2))
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            start = self.tensor([0, 1], torch.int32)
            alone = PagedBatch(start, batch.seq_lens[one], batch.page_table[one], batch.token_slots[one], 1, length)
            pairs.append(
                (invariant.paged_attention(q[one], (caches[0], caches[1]), alone, AttentionCall(0.2)), whole[one])
            )
        return pairs


CHECKS = [
    *("norms", "activations", "rope", "pages", "tokens", "decode", "extend", "mla", "sampling", "moe", "quantise"),
    *("gemm_fp8", "moe_fp8", "gemm_int", "lora", "invariant", "float8_norm", "few_rows", "shared_pages"),
    *("moe_many", "moe_many_fp8", "experts_any", "experts_4bit", "gemm_mxfp4", "late_router"),
    "grouped",
]
# Kernels some ways of which need no check of their own, and why.
UNCHECKED: dict[str, str] = {}
# Checks whose result is rounded to float8 on the way: (limit of the relative norm).
ROUNDED = {"quantise": 0.04, "moe_fp8": 0.04, "moe_many_fp8": 0.04, "float8_norm": 0.04}
# The interpreter loses a carry when it rounds to float8, which costs a factor of two here and there.
ROUNDED_TINY = {name: 0.15 for name in ROUNDED}


def distance(got: Tensor, want: Tensor) -> float:
    """Relative norm of the difference; 0 only for equal values, infinite for other shapes and for NaN."""
    if got.shape != want.shape:
        return float("inf")
    if got.dtype == want.dtype and torch.equal(got, want):
        return 0.0
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


Check = Callable[[Kernels], list[tuple[Tensor, Tensor]]]


def beside() -> dict[str, Check]:
    """Checks in files beside this one: each `gpu_kernels_*.py` has a `CHECKS` of its own, by name, and may have
    `ROUNDED`."""
    found: dict[str, Check] = {}
    for path in sorted(Path(__file__).parent.glob("gpu_kernels_*.py")):
        module = importlib.import_module(path.stem)
        ROUNDED.update(getattr(module, "ROUNDED", {}))
        ROUNDED_TINY.update(dict.fromkeys(getattr(module, "ROUNDED", {}), 0.15))
        found |= module.CHECKS
    return found


def names() -> list[str]:
    """All checks, in the order in which they are worth running."""
    return [*CHECKS, *(name for name in beside() if name not in CHECKS)]


def run(device: torch.device, dtype: torch.dtype, tiny: bool, only: str = "") -> list[Outcome]:
    """Every check; one that fails or raises does not stop the others."""
    kernels, others = Kernels(device, dtype, tiny), beside()
    outcomes: list[Outcome] = []
    for name in names():
        if only and name not in only.split(","):
            continue
        limit = (ROUNDED_TINY if tiny else ROUNDED).get(name, LIMITS[dtype])
        begin = time.perf_counter()
        label = f"{name} ({str(dtype).removeprefix('torch.')})"
        check = partial(others[name], kernels) if name in others else getattr(kernels, name)
        try:
            with poisoned(), torch.inference_mode():
                errors = [distance(got, want) for got, want in check()]
        except Exception as error:
            message = f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
            outcomes.append(Outcome(label, False, float("inf"), limit, time.perf_counter() - begin, message))
            continue
        if not errors:
            continue  # not for this device and type
        wrong = [f"#{place}: {error:.2g}" for place, error in enumerate(errors) if not error <= limit]
        outcomes.append(Outcome(label, not wrong, max(errors), limit, time.perf_counter() - begin, ", ".join(wrong)))
    return outcomes


def as_dicts(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [asdict(outcome) for outcome in outcomes]
