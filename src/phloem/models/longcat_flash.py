"""LongCat-Flash: pairs of layers with latent attention; a sparse block reads the first and joins the second.

Some experts give what they read. A pair of layers is one in the files; here they are numbered through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, usual, usual_mlp
from phloem.models._layer import DecoderLayer, Experts, LayerKind, PreNorms, feed_of
from phloem.models.deepseek_v3 import latent_attention

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.mesh import Axis
    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.models._layer import Place
    from phloem.models._stage import Stage

SPELLING = {
    "num_hidden_layers": "num_layers",
    "num_experts_per_tok": "moe_topk",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "expert_ffn_hidden_size",
}
IGNORED = (r"model\.mtp.*",)
DEFAULTS = {"rope_theta": 1e7, "routed_scaling_factor": 6.0, "zero_expert_num": 0, "rms_norm_eps": 1e-5}
TINY = {
    "num_hidden_layers": None,
    "intermediate_size": None,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_layers": 2,
    "ffn_hidden_size": 64,
    "n_routed_experts": 6,
    "zero_expert_num": 3,
    "moe_topk": 3,
    "expert_ffn_hidden_size": 24,
    "routed_scaling_factor": 2.0,
}
VARIANTS = {"no-zero": {"zero_expert_num": 0, "moe_topk": 2}}

_PAIR = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlps|input_layernorm|post_attention_layernorm)\.([01])\.(.+)")
_SPARSE = re.compile(r"model\.layers\.(\d+)\.mlp\.((?:experts\.(\d+)\.)?.+)")
_NAMES = ExpertNames(router="router.classifier", correction="router.e_score_correction_bias")


class LongCat(Decoder):
    experts = 0  # that have matrices

    def checkpoint_name(self, name: str) -> str | None:
        if match := _PAIR.fullmatch(name):
            number, part, second, rest = match.groups()
            return f"model.layers.{2 * int(number) + int(second)}.{part.replace('mlps', 'mlp')}.{rest}"
        if match := _SPARSE.fullmatch(name):
            if int(match[3] or 0) >= self.experts:
                return None  # some files hold matrices of experts that have none
            return f"model.layers.{2 * int(match[1])}.shortcut.{match[2]}"
        return super().checkpoint_name(name)

    def _stage(self, axis: Axis, pools: list[range]) -> Stage:
        raise ModelLoadError(f"pp_size {axis.size}: a layer of this model reads what the one before it sets aside")


@dataclass
class Aside:
    """What the sparse block of a pair made, until the second layer adds it."""

    sparse_TN: Tensor | None = None


class First(PreNorms):
    def __init__(self, ctx: BuildContext, kind: HalfKind, place: Place) -> None:
        super().__init__(ctx, kind, place)
        assert kind.sparse is not None
        self.shortcut, self.aside = feed_of(ctx, kind.sparse, place), kind.aside

    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        out, rest_TN = self.mixer.out(out, add=residual_TN)
        x_TN, total_TN = self.norms[-1].add(out, rest_TN)
        self.aside.sparse_TN = self.shortcut(None, x_TN, None, add=False)[0]
        return self.mlp(None, x_TN, None, add=False)[0], total_TN


class Second(PreNorms):
    """Carries what was set aside beside what its mixer gives, so that both are cut to the rows that are wanted."""

    def __init__(self, ctx: BuildContext, kind: HalfKind, place: Place) -> None:
        super().__init__(ctx, kind, place)
        self.aside, self.width = kind.aside, place.hidden_size

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, total_TN = super().attend(x_TN, residual_TN, step)
        sparse_TN, self.aside.sparse_TN = self.aside.sparse_TN, None
        assert sparse_TN is not None
        return self.ops.join(out, sparse_TN), total_TN

    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        fed, rest_TN = super().feed(out[:, : -self.width], residual_TN)
        return self.ops.add(fed, out[:, -self.width :]), rest_TN


@dataclass(frozen=True)
class HalfKind(LayerKind):
    """One layer of a pair; the first has the sparse block."""

    aside: Aside = field(default_factory=Aside)
    sparse: Experts | None = None

    def make(self, ctx: BuildContext, place: Place) -> DecoderLayer:
        return Second(ctx, self, place) if self.sparse is None else First(ctx, self, place)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    size, count = config["hidden_size"], int(config["n_routed_experts"])
    router = RouterSpec(config["num_experts_per_tok"], scale=float(config["routed_scaling_factor"]))
    inner, more = config["moe_intermediate_size"], int(config["zero_expert_num"] or 0)
    sparse = Experts(
        ExpertsConfig(count, inner, router, router_bias=bool(config.get("router_bias")), names=_NAMES, identities=more),
        name="shortcut",
    )
    attention = latent_attention(config)
    scaled = replace(attention.sizes, latent_scale=(size / config["kv_lora_rank"]) ** 0.5)
    attention = replace(attention, sizes=scaled, scale=attention.scale * (size / config["q_lora_rank"]) ** 0.5)
    layers: list[LayerKind] = []
    for _ in range(config["num_hidden_layers"]):
        aside = Aside()
        layers += [HalfKind(attention, usual_mlp(config), aside=aside, sparse=half) for half in (sparse, None)]
    model = LongCat(ctx, usual(config, layers=tuple(layers)), max_positions)
    model.experts = count
    return model
