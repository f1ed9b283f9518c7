"""Whisper (Radford et al., 2022): an encoder of sound, and a decoder whose layers also attend to its states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.layers.context import AttentionSpec
from phloem.layers.cross import CrossAttention
from phloem.models._common import Decoder, renamed, usual, usual_attention
from phloem.models._ears import Ears, EarsConfig, keys_without_bias
from phloem.models._index import WeightIndex
from phloem.models._layer import LayerKind, MixerAlone, Plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import DecoderConfig
    from phloem.models._index import Progress
    from phloem.models._layer import Place

AUDIO = {
    "bands": "num_mel_bins",
    "states": "max_source_positions",
    "layers": "decoder_layers",
    "heads": "decoder_attention_heads",
    "width": "median_filter_width",
}
DEFAULTS = {
    "activation_function": "gelu",
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "median_filter_width": 7,
    "vocab_size": 51865,
}
SPELLING = {
    "hidden_size": "d_model",
    "intermediate_size": "decoder_ffn_dim",
    "num_attention_heads": "decoder_attention_heads",
    "max_position_embeddings": "max_target_positions",
}
NEEDS = (
    "vocab_size",
    "hidden_size",
    "decoder_layers",
    "num_attention_heads",
    "intermediate_size",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_mel_bins",
    "max_source_positions",
)
TINY = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "decoder_start_token_id": 1,
    "hidden_size": None,
    "intermediate_size": None,
    "num_attention_heads": None,
    "num_hidden_layers": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": None,
}

_EPS = 1e-5
_BODY = {
    "model.decoder.embed_tokens.": "model.embed_tokens.",
    "model.decoder.embed_positions.": "model.embed_positions.",
    "model.decoder.layer_norm.": "model.layer_norm.",
}
_LAYER = "model.decoder.layers."


@dataclass(frozen=True)
class Crosswise:
    """Makes a `CrossAttention`."""

    heads: int
    states: int

    def __call__(self, ctx: BuildContext, place: Place) -> CrossAttention:
        size = place.hidden_size // self.heads
        spec = AttentionSpec(place.pool, self.heads, self.heads, size, size**-0.5)
        return CrossAttention(ctx.child("encoder_attn"), spec, place.hidden_size, self.states)


class Whisper(Decoder):
    """Each layer of a checkpoint's decoder is two of ours: self-attention, then cross-attention and the MLP."""

    def __init__(self, ctx: BuildContext, config: DecoderConfig, ears: EarsConfig, max_positions: int) -> None:
        super().__init__(ctx, config, max_positions)
        self.ears = Ears(ctx.child("model").child("encoder"), ears)
        self.hears = ears.bands, 2 * ears.states
        mixers = [layer.mixer for layer in self.layers if isinstance(layer, MixerAlone)]
        self.crossed = [mixer for mixer in mixers if isinstance(mixer, CrossAttention)]
        keys_without_bias(self.weights())
        self.index = WeightIndex(self.weights(), ctx, self.embed.weight.names[0])

    def encode(self, mel_nBF: Tensor, pack: Pack) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As `models.HearingModel`."""
        with torch.inference_mode():
            states_TN = self.ears(list(mel_nBF), pack)
            for mixer in self.crossed:
                k, v = mixer.keys_values(states_TN)
                count = len(mel_nBF)
                yield mixer.spec.pool, k.unflatten(0, (count, -1)), v.unflatten(0, (count, -1))

    def checkpoint_name(self, name: str) -> str | None:
        if name.startswith("proj_out."):
            return None  # the embedding once more
        if name.startswith(_LAYER):
            number, _, rest = name.removeprefix(_LAYER).partition(".")
            return f"model.layers.{2 * int(number) + (not rest.startswith('self_attn'))}.{rest}"
        return renamed(name, _BODY) or name

    def load(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        super().load(checkpoint, progress)
        self.settle()

    def settle(self) -> None:
        self.ears.settle()


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("scale_embedding"):
        raise ModelLoadError("scale_embedding: Whisper's embeddings are not scaled")
    own = {**config, "num_key_value_heads": None, "head_dim": None}
    attention = usual_attention(own, rope=None, o_proj="out_proj", qkv_bias=True, out_bias=True)
    feed = Plain(config["intermediate_size"], config["activation_function"], True, ("fc1", "fc2"), name="")
    alone = LayerKind(attention, None, "alone", ("self_attn_layer_norm",))
    crossed = LayerKind(
        Crosswise(config["num_attention_heads"], config["max_source_positions"]),
        feed,
        norm_names=("encoder_attn_layer_norm", "final_layer_norm"),
    )
    whole = usual(
        config,
        layers=(alone, crossed) * config["decoder_layers"],
        eps=_EPS,
        tied=True,
        norms="layer",
        norm_name="layer_norm",
        positions=(config["max_target_positions"], 0),
    )
    ears = EarsConfig(
        bands=config["num_mel_bins"],
        states=config["max_source_positions"],
        hidden_size=config["hidden_size"],
        inner_size=config["encoder_ffn_dim"],
        layers=config["encoder_layers"],
        heads=config["encoder_attention_heads"],
        activation=config["activation_function"],
        eps=_EPS,
    )
    return Whisper(ctx, whole, ears, max_positions)
