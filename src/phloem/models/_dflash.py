"""DFlash (arXiv 2602.06036): layers of Qwen3's kind that tell a whole block of tokens in one pass.

Of each token that the model has computed a feature is kept: its residual stream behind several of its layers, side by
side through `fc`, normalised. Each layer of the drafter makes keys and values of these features, and of them alone
of all that came before; it asks with the block: the token that is known last, and masks behind it. Features and block
are rotated to the positions of their tokens. The result at a mask's place tells the token of that very position, or, of
drafters that sample from the anchor, each place tells the one behind it.

DSpark adds to a place's logits a term of the token before it, of low rank: what is told first counts for what follows,
behind one pass.

Legend: C tokens whose features a pass takes in, B places of its blocks, N hidden size, L places whose token is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.memory import Paged
from phloem.layers.embed import Embedding, Head
from phloem.models._common import usual_attention, usual_mlp
from phloem.models._draft import DraftHead, Fuse, Shared
from phloem.models._layer import LayerKind, MixerAlone, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.layers.context import BuildContext, ForwardBatch


@dataclass(frozen=True)
class Sight:
    """What a layer's queries see. `window`: so many positions, their own the last; 0: all. `ahead`: and all of their
    block, else of it what stands before them."""

    window: int = 0
    ahead: bool = True


@dataclass(frozen=True)
class DFlashFacts:
    """What a file says of a drafter."""

    states: int  # of the model that `fc` takes
    sights: tuple[Sight, ...]  # of each layer
    vocab: int = 0  # its own vocabulary; 0: the model's head is used
    norms: bool = True  # of each head of q and k
    embed_scale: float = 1.0  # of the embeddings as the table has them
    rank: int = 0  # of what the token before a place adds to its logits; 0: nothing does


class DFlash(DraftHead):
    """A drafter. Its first memory is the features; those behind it are its layers' keys and values."""

    def __init__(self, ctx: BuildContext, shared: Shared, config: dict[str, Any], facts: DFlashFacts) -> None:
        super().__init__(ctx, shared)
        size, eps = self.hidden_size, float(config.get("rms_norm_eps", 1e-6))
        self.fuse = Fuse(ctx, size, eps, norms=False, bias=False, count=facts.states)
        place = Place(size, eps, 0.0, shared.positions)
        self.hidden_norm, self.norm = place.norm(ctx.child("hidden_norm")), place.norm(ctx.child("norm"))
        self.layers: list[MixerAlone] = []
        self.ahead: dict[int, bool] = {}  # by pool: whether queries see all of their block
        for number, sight in enumerate(facts.sights):
            place.pool = len(self.memory)
            norm = "head" if facts.norms else ""
            attention = usual_attention(config, window=sight.window, qk_norm=norm)
            layer = LayerKind(attention, usual_mlp(config)).make(ctx.child("layers").child(number), place)
            assert isinstance(layer, MixerAlone) and layer.attention is not None
            # All of a text is kept, whatever a layer sees of it: the pages are those of the model's own layers.
            self.memory += [replace(one, window=0) for one in layer.memory if isinstance(one, Paged)]
            self.attention_specs.append(layer.attention)
            self.ahead[place.pool] = sight.ahead
            self.layers.append(layer)
        if facts.vocab:
            self.own_head = Head(ctx.child("lm_head"), facts.vocab, size, None)
        self.term: tuple[Embedding, Head] | None = None
        if facts.rank:
            both = ctx.child("markov_head")
            before = Embedding(both.child("markov_w1"), self.vocab_size, facts.rank)
            self.term = before, Head(both.child("markov_w2"), facts.vocab or self.vocab_size, facts.rank, None)
        own = shared.target.embed.scale
        self.embed_scale = facts.embed_scale / own  # of what the model's embedding gives

    def feature(self, states: Sequence[Tensor]) -> Tensor:
        """What is kept of each token: [T, N] of the model's states, [T, N] each."""
        return self.hidden_norm(self.fuse(states))

    def head(self, hidden_LN: Tensor, before_L: Tensor | None = None) -> Tensor:
        """As of any head; `before_L` int64: the tokens before the places, of a drafter whose logits they change."""
        if self.term is None or before_L is None:
            return super().head(hidden_LN)
        table, weights = self.term
        logits_LD = (self.own_head or self.shared.target.head)(hidden_LN) + weights(table(before_L).to(hidden_LN.dtype))
        return self.spread(logits_LD)

    def forward(self, step: ForwardBatch) -> Tensor:
        """Of the places `step.logit_index` [L] of the blocks: [L, N].

        `step.positions` [C + B] are those of the features, then those of the blocks' tokens `step.input_ids` [B].
        """
        count = len(step.input_ids)
        known = len(step.positions) - count
        kept_CN = torch.cat(step.memory.kept(0), -1)[:known]
        if not count:
            return self._take_in(kept_CN, step)
        x_BN = self.shared.target.embed(step.input_ids)
        if self.embed_scale != 1.0:
            x_BN = self.ops.scale(x_BN, self.embed_scale)
        kept_CN, rest_BN = kept_CN.to(x_BN.dtype), None
        for layer in self.layers:
            normed_BN, total_BN = layer.norms[0].add(x_BN, rest_BN)
            out, _ = layer.mixer.attend(None, torch.cat((kept_CN, normed_BN)), None, step)
            out = out[known:]
            if layer is self.layers[-1]:
                out, total_BN = self.selected(step, out, total_BN)
            x_BN, rest_BN = layer.feed(out, total_BN)
        return self.norm.add(x_BN, rest_BN)[0]

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Of a step of which all tokens have an id, those of features -1, up to the last layer's mixer, for all of them
        alike: what `forward` computes of the blocks, whichever tokens are theirs (`models.CutModel`)."""
        asks_T1 = (step.input_ids >= 0).unsqueeze(-1)
        x_TN = self.shared.target.embed(step.input_ids.clamp(min=0))
        if self.embed_scale != 1.0:
            x_TN = self.ops.scale(x_TN, self.embed_scale)
        kept_TN, rest_TN = torch.cat(step.memory.kept(0), -1).to(x_TN.dtype), None
        for layer in self.layers:
            normed_TN, total_TN = layer.norms[0].add(x_TN, rest_TN)
            out, _ = layer.mixer.attend(None, torch.where(asks_T1, normed_TN, kept_TN), None, step)
            if layer is self.layers[-1]:
                return out, total_TN
            x_TN, rest_TN = layer.feed(out, total_TN)
        raise AssertionError("a drafter has layers")

    def conclude(self, step: ForwardBatch, out: Tensor, rest_TN: Tensor) -> Tensor:
        """As `models.CutModel`; `step.logit_index` counts features too."""
        return self.norm.add(*self.layers[-1].feed(*self.selected(step, out, rest_TN)))[0]

    def _take_in(self, kept_CN: Tensor, step: ForwardBatch) -> Tensor:
        """Keys and values of features alone: nothing is asked."""
        kept_CN = kept_CN.to(self.shared.kind)
        for layer in self.layers:
            layer.mixer.attend(None, kept_CN, None, step)
        return kept_CN[:0]
