"""The head itself (EAGLE-3, Li et al. 2025), to be trained: plain torch, under the names of published files.

It is unrolled as it will be used (training-time test): in round i, place t stands for the token at t + i. Round 0 reads
the model's states; later rounds read the head's own result at the same place. So a query of round i attends to round 0
up to its own place, and to rounds 1 to i at its place alone.

Legend: T packed tokens of a batch, n of them that a round computes, N hidden size, H heads, K kv heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phloem.core.errors import ConfigError
from phloem.layers.rope import inverse_frequencies, rope_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True)
class HeadSizes:
    """Of its config.json."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    eps: float

    @staticmethod
    def of(config: dict[str, Any]) -> HeadSizes:
        """Raises ConfigError for sizes that do not go together, or that this head does not have."""
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        if heads % kv_heads or head_size % 2:
            raise ConfigError(f"draft_model_config: {heads} heads over {kv_heads} of size {head_size} do not divide")
        if config.get("hidden_act", "silu") not in ACTIVATIONS:
            raise ConfigError(f"draft_model_config: hidden_act {config['hidden_act']!r}: such heads have silu")
        sizes = config["hidden_size"], config["intermediate_size"], heads, kv_heads, head_size
        return HeadSizes(*sizes, config["draft_vocab_size"], float(config.get("rms_norm_eps", 1e-6)))


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        width, kv_width = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
        self.q_proj = nn.Linear(2 * sizes.hidden, width, bias=False)
        self.k_proj = nn.Linear(2 * sizes.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * sizes.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, sizes.hidden, bias=False)


class Feed(nn.Module):
    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.down_proj = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(sizes), Feed(sizes)
        self.hidden_norm = Norm(sizes.hidden, sizes.eps)
        self.input_layernorm = Norm(sizes.hidden, sizes.eps)
        self.post_attention_layernorm = Norm(sizes.hidden, sizes.eps)


@dataclass
class Packed:
    """Whole texts behind one another."""

    ids_T: Tensor  # int64
    aux_TA: Tensor  # what the head reads of the model: three states side by side
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = torch.tensor(self.lengths, device=self.ids_T.device)
        self.ends = lengths.cumsum(0)
        self.text_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        self.end_T = self.ends[self.text_T]
        self.place_T = torch.arange(len(self.ids_T), device=lengths.device) - (self.end_T - lengths[self.text_T])

    def later(self, values_T: Tensor, by: int) -> Tensor:
        """What stands `by` places later in the same text; 0 beyond its end."""
        at_T = torch.arange(len(values_T), device=values_T.device) + by
        inside_T = at_T < self.end_T
        return torch.where(inside_T, values_T[at_T.clamp(max=len(values_T) - 1)], torch.zeros_like(values_T))


class Attends(Protocol):
    """Attention of a round's n queries [n, H, D] over the keys and values of round 0 [T, K, D], of its own text and up
    to its own place, and those of each later round [n, K, D], at its place alone: [n, H * D]."""

    def __call__(
        self,
        batch: Packed,
        at_n: Tensor,
        q_nHD: Tensor,
        first: tuple[Tensor, Tensor],
        later: list[tuple[Tensor, Tensor]],
        /,
    ) -> Tensor: ...


class Eagle3(nn.Module):
    """Its parameters have the names of published checkpoints."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: dict[str, Any], positions: int) -> None:
        """`positions`: of a text, at most, the rounds behind its end included."""
        super().__init__()
        sizes = self.sizes = HeadSizes.of(config)
        self.fc = nn.Linear(3 * sizes.hidden, sizes.hidden, bias=False)
        self.midlayer = Layer(sizes)
        self.norm = Norm(sizes.hidden, sizes.eps)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        spec = rope_spec(config, sizes.head_size)
        inverse, factor = inverse_frequencies(spec, int(config.get("max_position_embeddings") or positions))
        angles = torch.arange(positions)[:, None] * inverse[None]
        self.turned = spec.rotary_size
        self.attends: Attends | None = None  # another way of attending than `densely`
        self.register_buffer("cos", angles.cos() * factor, persistent=False)
        self.register_buffer("sin", angles.sin() * factor, persistent=False)

    def unroll(
        self,
        batch: Packed,
        embed: Callable[[Tensor], Tensor],
        rows: Sequence[Tensor],
        ids: Callable[[int, Tensor], Tensor],
    ) -> Iterator[Tensor]:
        """Results [n, N] of each round, which `logits` reads.

        Args:
            embed: token ids to embeddings.
            rows: of each round the places that it computes, rising; each round's are among those of the one before.
            ids: of a round and its places, the tokens that it reads. It is asked when its round begins.
        """
        g_TN = self.fc(batch.aux_TA)
        place_T, layer = batch.place_T, self.midlayer
        # Of round 0 every place is attended to; of later ones those that are computed.
        all_T = torch.arange(len(batch.ids_T), device=batch.ids_T.device)
        x_T2 = self._joined(embed(ids(0, all_T)), g_TN)
        first = self._keys(x_T2, place_T)
        later: list[tuple[Tensor, Tensor]] = []
        at_n = rows[0]
        x_n2, g_nN = x_T2[at_n], g_TN[at_n]
        for number in range(len(rows)):
            if number:
                kept = torch.isin(at_n, rows[number])
                at_n, g_nN = at_n[kept], g_nN[kept]
                later = [(k[kept], v[kept]) for k, v in later]
                x_n2 = self._joined(embed(ids(number, at_n)), g_nN)
                later.append(self._keys(x_n2, place_T[at_n] + number))
            q_nHD = self._turn(layer.self_attn.q_proj(x_n2), self.sizes.heads, place_T[at_n] + number)
            mixed = (self.attends or self.densely)(batch, at_n, q_nHD, first, later)
            h_nN = g_nN + layer.self_attn.o_proj(mixed.to(g_nN.dtype))
            g_nN = h_nN + layer.mlp(layer.post_attention_layernorm(h_nN))
            yield g_nN

    def logits(self, out_nN: Tensor) -> Tensor:
        """float32 [n, draft vocabulary]."""
        return self.lm_head(self.norm(out_nN)).float()

    def _joined(self, embed_nN: Tensor, g_nN: Tensor) -> Tensor:
        return torch.cat((self.midlayer.input_layernorm(embed_nN), self.midlayer.hidden_norm(g_nN)), -1)

    def _keys(self, x_n2: Tensor, places_n: Tensor) -> tuple[Tensor, Tensor]:
        mixer = self.midlayer.self_attn
        k_nKD = self._turn(mixer.k_proj(x_n2), self.sizes.kv_heads, places_n)
        return k_nKD, mixer.v_proj(x_n2).unflatten(-1, (self.sizes.kv_heads, -1)).float()

    def _turn(self, x: Tensor, heads: int, places_n: Tensor) -> Tensor:
        """Rotated to its position, float32 [n, heads, D]: halves of the turned dimensions are pairs."""
        x = x.unflatten(-1, (heads, -1)).float()
        cos, sin = self.cos[places_n][:, None], self.sin[places_n][:, None]
        half = self.turned // 2
        one, other, rest = x[..., :half], x[..., half : self.turned], x[..., self.turned :]
        return torch.cat((one * cos - other * sin, other * cos + one * sin, rest), -1)

    def densely(
        self,
        batch: Packed,
        at_n: Tensor,
        q_nHD: Tensor,
        first: tuple[Tensor, Tensor],
        later: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """`Attends`, text by text, with all scores of a text at once."""
        sizes, counts = self.sizes, torch.bincount(batch.text_T[at_n], minlength=len(batch.lengths)).tolist()
        group = sizes.heads // sizes.kv_heads
        q_nKGD = q_nHD.unflatten(1, (sizes.kv_heads, group)) * sizes.head_size**-0.5
        extra_nKGi = [torch.einsum("nkgd,nkd->nkg", q_nKGD, k_nKD)[..., None] for k_nKD, _ in later]
        places_n, found, begin, start = batch.place_T[at_n], list[Tensor](), 0, 0
        for count, length in zip(counts, batch.lengths, strict=True):
            mine, text = slice(begin, begin + count), slice(start, start + length)
            begin, start = begin + count, start + length
            if not count:
                continue
            k_KSD, v_KSD = (x[text].transpose(0, 1) for x in first)
            # One product for each kv head: its group's queries, one behind the other.
            q_KqD = q_nKGD[mine].permute(1, 2, 0, 3).flatten(1, 2)
            hidden_nS = torch.arange(length, device=at_n.device) > places_n[mine][:, None]
            scores = torch.bmm(q_KqD, k_KSD.transpose(1, 2)).unflatten(1, (group, count))
            parts = [scores.masked_fill(hidden_nS, float("-inf")), *(x[mine].permute(1, 2, 0, 3) for x in extra_nKGi)]
            shares = torch.softmax(torch.cat(parts, -1), -1)
            out = torch.bmm(shares[..., :length].flatten(1, 2), v_KSD).unflatten(1, (group, count))
            for at, (_, v_nKD) in enumerate(later):
                out = out + shares[..., length + at, None] * v_nKD[mine].transpose(0, 1)[:, None]
            found.append(out.permute(2, 0, 1, 3).flatten(1))
        return torch.cat(found) if found else q_nHD.flatten(1)
