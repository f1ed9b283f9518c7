"""Tiny folders that make films, with random weights, in the layout of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.testing.pictures import WORDS, clip_text, word_tokenizer, written

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def tiny_films(path: Path, family: str = "wan", seed: int = 0) -> Path:
    """As `tiny_pictures`; `family` is a key of `KINDS`."""
    import torch

    torch.manual_seed(seed)
    return written(KINDS[family](), path)


def _transformer(in_channels: int = 4, image_dim: int | None = None) -> Any:
    import diffusers

    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=image_dim,
    )


def _parts() -> dict[str, Any]:
    import diffusers
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = 64
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.UMT5EncoderModel(config),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.2, 1.0],
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _wan() -> Any:
    import diffusers

    return diffusers.WanPipeline(**_parts(), transformer=_transformer())


def _wan_two() -> Any:
    """Of 2.2 A14B: another transformer for the later steps."""
    import diffusers

    parts = _parts()
    return diffusers.WanPipeline(
        **parts, transformer=_transformer(), transformer_2=_transformer(), boundary_ratio=0.875
    )


def _wan_first_frame() -> Any:
    """Of 2.2 5B: the first frame may be given."""
    import diffusers

    return diffusers.WanPipeline(**_parts(), transformer=_transformer(), expand_timesteps=True)


def _wan_image_to_video() -> Any:
    """Of 2.1: with what CLIP sees."""
    import diffusers
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return diffusers.WanImageToVideoPipeline(
        **_parts(),
        transformer=_transformer(in_channels=12, image_dim=16),
        image_encoder=transformers.CLIPVisionModel(config),
        image_processor=processor,
    )


def _ltx(timestep_conditioning: bool = False) -> Any:
    import diffusers
    import transformers

    parts = _parts()
    config = transformers.T5Config(
        vocab_size=len(parts["tokenizer"]), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    four, five = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=four,
        decoder_block_out_channels=four,
        layers_per_block=five,
        decoder_layers_per_block=five,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        timestep_conditioning=timestep_conditioning,
        patch_size=1,
    )
    vae.latents_mean.normal_(0, 0.1)
    vae.latents_std.uniform_(0.8, 1.2)
    return diffusers.LTXPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=transformers.T5EncoderModel(config),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
    )


def _ltx_last_step() -> Any:
    """Of 0.9.1 and later: a VAE that is told how much noise is left."""
    return _ltx(timestep_conditioning=True)


def _ltx_image_to_video() -> Any:
    import diffusers

    return diffusers.LTXImageToVideoPipeline(**_ltx().components)


def _template_tokenizer() -> Any:
    """Each word and mark of what HunyuanVideo asks its language model is one token, as is each of `WORDS`."""
    import transformers
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    parts = [word for word, _ in Whitespace().pre_tokenize_str(str(DEFAULT_PROMPT_TEMPLATE["template"]))]
    names = dict.fromkeys(["<pad>", "<unk>", *parts, *WORDS])
    made = Tokenizer(WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def _hunyuan_video() -> Any:
    import diffusers
    import transformers

    tokenizer, words = _template_tokenizer(), word_tokenizer(length=77)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    eight = (8, 8, 8, 8)
    return diffusers.HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.LlamaModel(config),
        tokenizer_2=words,
        text_encoder_2=clip_text(words, 8, projected=False),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=eight,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 4, 8),
        ),
    )


KINDS: dict[str, Callable[[], Any]] = {
    "hunyuan_video": _hunyuan_video,
    "wan": _wan,
    "wan_two": _wan_two,
    "wan_first_frame": _wan_first_frame,
    "wan_image_to_video": _wan_image_to_video,
    "ltx": _ltx,
    "ltx_last_step": _ltx_last_step,
    "ltx_image_to_video": _ltx_image_to_video,
}
