"""The drafter of blocks itself (DFlash, arXiv 2602.06036), to be trained: plain torch, under the names of its files.

It is used as it is trained: features of the model's states at all places before an anchor, and a block that begins with
the anchor's token and goes on with masks. Each place of a block sees all of it, and nothing of other blocks.

Legend: T packed tokens of a batch, A anchors (blocks), B places of a block, N hidden size, H heads, K kv heads, D head
size, S tokens of a text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phloem.core.errors import ConfigError
from phloem.layers.rope import inverse_frequencies, rope_spec
from phloem.training.head import Feed, HeadSizes, Norm

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.training.head import Packed

RANGE = 0.02  # of the weights' noise, as such files say it (`initializer_range`)


class Attention(nn.Module):
    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        width, kv_width = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
        self.q_proj = nn.Linear(sizes.hidden, width, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, sizes.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(sizes.head_size, sizes.eps), Norm(sizes.head_size, sizes.eps)


class Layer(nn.Module):
    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(sizes), Feed(sizes)
        self.input_layernorm = Norm(sizes.hidden, sizes.eps)
        self.post_attention_layernorm = Norm(sizes.hidden, sizes.eps)


class BlockDrafter(nn.Module):
    """Its parameters have the names of published checkpoints. Embedding and head are the model's."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: dict[str, Any], positions: int) -> None:
        """`positions`: of a text, at most, the block behind its end included. Raises ConfigError."""
        super().__init__()
        if set(config.get("layer_types") or ()) - {"full_attention"} or config.get("is_causal"):
            raise ConfigError("draft_model_config: layers that see a part are served, and not trained here")
        sizes = self.sizes = HeadSizes.of({**config, "draft_vocab_size": config["vocab_size"]})
        said = config["dflash_config"]
        self.size, self.mask = int(config["block_size"]), int(said["mask_token_id"])
        self.fc = nn.Linear(len(said["target_layer_ids"]) * sizes.hidden, sizes.hidden, bias=False)
        self.hidden_norm, self.norm = Norm(sizes.hidden, sizes.eps), Norm(sizes.hidden, sizes.eps)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(config["num_hidden_layers"]))
        for one in self.modules():
            if isinstance(one, nn.Linear):
                nn.init.normal_(one.weight, std=RANGE)
        spec = rope_spec(config, sizes.head_size)
        inverse, factor = inverse_frequencies(spec, int(config.get("max_position_embeddings") or positions))
        angles = torch.arange(positions)[:, None] * inverse[None]
        self.turned = spec.rotary_size
        self.register_buffer("cos", angles.cos() * factor, persistent=False)
        self.register_buffer("sin", angles.sin() * factor, persistent=False)

    def forward(self, batch: Packed, anchors_A: Tensor, size: int, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What the model's head reads at each place of the blocks: [A, B, N].

        Args:
            anchors_A: among the packed tokens, rising.
            size: places of each block; fewer than those of training where fewer drafts are wanted.
            embed: token ids to embeddings.
        """
        kept_TN = self.hidden_norm(self.fc(batch.aux_TA))
        ids_AB = torch.full((len(anchors_A), size), self.mask, device=anchors_A.device)
        ids_AB[:, 0] = batch.ids_T[anchors_A]
        places_AB = batch.place_T[anchors_A][:, None] + torch.arange(size, device=anchors_A.device)
        x_ABN = embed(ids_AB)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            mixed = self._attend(layer, batch, anchors_A, kept_TN, layer.input_layernorm(x_ABN), places_AB)
            x_ABN = x_ABN + layer.self_attn.o_proj(mixed.to(x_ABN.dtype))
            x_ABN = x_ABN + layer.mlp(layer.post_attention_layernorm(x_ABN))
        return self.norm(x_ABN)

    def _attend(
        self, layer: Layer, batch: Packed, anchors_A: Tensor, kept_TN: Tensor, x_ABN: Tensor, places_AB: Tensor
    ) -> Tensor:
        """[A, B, H * D], text by text, with all scores of a text at once."""
        sizes, mixer, size = self.sizes, layer.self_attn, x_ABN.shape[1]
        group = sizes.heads // sizes.kv_heads
        q_ABHD = self._turn(mixer.q_norm(self._split(mixer.q_proj(x_ABN), sizes.heads)), places_AB)
        q_ABKGD = q_ABHD.unflatten(2, (sizes.kv_heads, group)) * sizes.head_size**-0.5
        k_ABKD, v_ABKD = self._keys(mixer, x_ABN, places_AB)
        k_TKD, v_TKD = self._keys(mixer, kept_TN, batch.place_T)
        own_AKGBL = torch.einsum("abkgd,alkd->akgbl", q_ABKGD, k_ABKD)
        counts = torch.bincount(batch.text_T[anchors_A], minlength=len(batch.lengths)).tolist()
        found, begin, start = list[Tensor](), 0, 0
        for count, length in zip(counts, batch.lengths, strict=True):
            mine, text = slice(begin, begin + count), slice(start, start + length)
            begin, start = begin + count, start + length
            if not count:
                continue
            # Of an anchor's own place there is no feature yet.
            hidden_AS = batch.place_T[text][None] >= batch.place_T[anchors_A[mine]][:, None]
            before_AKGBS = torch.einsum("abkgd,skd->akgbs", q_ABKGD[mine], k_TKD[text])
            before_AKGBS = before_AKGBS.masked_fill(hidden_AS[:, None, None, None], float("-inf"))
            shares = torch.softmax(torch.cat((before_AKGBS, own_AKGBL[mine]), -1), -1)
            out = torch.einsum("akgbs,skd->abkgd", shares[..., :length], v_TKD[text])
            out = out + torch.einsum("akgbl,alkd->abkgd", shares[..., length:], v_ABKD[mine])
            found.append(out.flatten(2))
        return torch.cat(found) if found else q_ABHD.flatten(2)[:, :size]

    def _keys(self, mixer: Attention, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (self._split(project(x), self.sizes.kv_heads) for project in (mixer.k_proj, mixer.v_proj))
        return self._turn(mixer.k_norm(k), places), v

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).float()

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        """Each head rotated to its position: halves of the turned dimensions are pairs."""
        cos, sin = self.cos[places].unsqueeze(-2), self.sin[places].unsqueeze(-2)
        half = self.turned // 2
        one, other, rest = x[..., :half], x[..., half : self.turned], x[..., self.turned :]
        return torch.cat((one * cos - other * sin, other * cos + one * sin, rest), -1)


def begin_with(drafter: BlockDrafter, norm_N: Tensor | None) -> None:
    """The model's last norm, and its highest state as what features are."""
    size = drafter.sizes.hidden
    with torch.no_grad():
        if norm_N is not None:
            drafter.norm.weight.copy_(norm_N)
        drafter.fc.weight.mul_(0.1)
        drafter.fc.weight[:, -size:] += torch.eye(size, device=drafter.fc.weight.device)


def anchors_of(batch: Packed, mask_T: Tensor, most: int, seed: int) -> Tensor:
    """Where blocks begin, rising: `most` places of each text, drawn from those of the assistant's (`mask_T`, bool)
    before another of them."""
    good_T = mask_T & batch.later(mask_T, 1)
    generator = torch.Generator().manual_seed(seed)
    found, start = list[Tensor](), 0
    for length in batch.lengths:
        places = start + good_T[start : start + length].nonzero().squeeze(1)
        if len(places) > most:
            drawn = torch.randperm(len(places), generator=generator)[:most].sort().values
            places = places[drawn.to(places.device)]
        found.append(places)
        start += length
    return torch.cat(found)


def labels_of(batch: Packed, mask_T: Tensor, anchors_A: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(What stands at the places behind each anchor, [A, B - 1] int64; whether it is learned, bool)."""
    at = anchors_A[:, None] + torch.arange(1, size, device=anchors_A.device)
    inside = at < batch.end_T[anchors_A][:, None]
    at = at.clamp(max=len(batch.ids_T) - 1)
    return batch.ids_T[at], inside & mask_T[at]


def weighted(loss_n: Tensor, place_n: Tensor, gamma: float) -> Tensor:
    """The mean of losses at these places (1 is the first behind an anchor) by weights exp(-(place - 1) / gamma); 0: all
    weigh alike."""
    weight_n = torch.exp(-(place_n - 1) / gamma) if gamma else torch.ones_like(loss_n)
    return (loss_n * weight_n).sum() / weight_n.sum().clamp(min=1e-6)


def losses_of(logits_nV: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
    """(Cross-entropy with these tokens, whether each is the likeliest), float32 [n] and bool [n]."""
    loss_n = F.cross_entropy(logits_nV.float(), labels_n, reduction="none")
    return loss_n, logits_nV.detach().argmax(-1) == labels_n
