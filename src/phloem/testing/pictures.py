"""Tiny folders that draw, with random weights, in the layout of diffusers: one for each family, and one of none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = [
    "a",
    "an",
    "the",
    "of",
    "in",
    "on",
    "with",
    "and",
    "draw",
    "picture",
    "cat",
    "dog",
    "tree",
    "house",
    "river",
    "leaf",
    "root",
    "seven",
    "red",
    "green",
    "blue",
    "small",
    "large",
]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
MARKS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_pictures(path: Path, family: str = "flux", seed: int = 0, **overrides: Any) -> Path:
    """Write a pipeline of a few thousand weights.

    Args:
        path: the folder, made where it is missing.
        family: a key of `KINDS`.
        seed: of the weights.
        overrides: of the denoiser's configuration.

    Returns:
        `path`. Needs `diffusers` and `transformers`.
    """
    import torch

    torch.manual_seed(seed)
    return written(KINDS[family](overrides), path)


def written(pipe: Any, path: Path) -> Path:
    """A pipeline as a folder, its weights drawn anew."""
    import torch

    with torch.no_grad():
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                randomise(part.eval())
    pipe.save_pretrained(path)
    return path


def _diffusers() -> Any:
    import diffusers

    return diffusers


def randomise(module: Any) -> None:
    """Layers that begin at 0 or empty would hide mistakes, and NaN would hide all else."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 1.0 / max(1, parameter[0].numel()) ** 0.5)
        else:
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)


def word_tokenizer(words: tuple[str, ...] | list[str] = tuple(WORDS), length: int = 16) -> Any:
    """A CLIP tokenizer to which each of these words is one token."""
    from transformers import CLIPTokenizer

    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"))
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges: list[Any] = []
    for letter in letters:
        vocab[letter] = len(vocab)
        vocab[letter + "</w>"] = len(vocab)
    for word in words:
        built = word[0]
        for at in range(1, len(word)):
            last = at == len(word) - 1
            part = word[at] + ("</w>" if last else "")
            if built + part not in vocab:
                vocab[built + part] = len(vocab)
            if (built, part) not in merges:
                merges.append((built, part))
            built += part
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def clip_text(tokenizer: Any, width: int, projected: bool, layers: int = 2) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config)


def _t5(width: int) -> tuple[Any, Any]:
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [
        (letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"
    ]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, transformers.T5EncoderModel(config)


def tiny_vae(channels: int, blocks: tuple[int, ...] = (8, 8)) -> Any:
    """An autoencoder whose latents have half the sides of a picture, or less with more blocks."""
    diffusers = _diffusers()

    return diffusers.AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.9,
        shift_factor=0.1,
    )


def _flux(overrides: dict[str, Any]) -> Any:
    diffusers = _diffusers()

    words = word_tokenizer()
    t5_tokenizer, t5 = _t5(32)
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(4),
        text_encoder=clip_text(words, 32, projected=False),
        tokenizer=words,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=diffusers.FluxTransformer2DModel(**{**settings, **overrides}),
    )


def _flux_kontext(overrides: dict[str, Any]) -> Any:
    parts = _flux(overrides).components
    return _diffusers().FluxKontextPipeline(**{name: part for name, part in parts.items() if part is not None})


class SeeingProcessor:
    """What Qwen2VLProcessor makes of texts and pictures, without the package that its part for videos needs."""

    def __init__(self, tokenizer: Any) -> None:
        import transformers

        self._tokenizer = tokenizer
        self._pictures = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)

    def __call__(self, text: list[str], images: Any, **options: Any) -> Any:
        import transformers

        shown = self._pictures(images=images, return_tensors="pt")
        counts = [int(grid.prod()) // self._pictures.merge_size**2 for grid in shown["image_grid_thw"]]
        for at, one in enumerate(text):
            first, *rest = one.split("<|image_pad|>")
            spread = zip(counts, rest, strict=True)
            text[at] = first + "".join("<|image_pad|>" * count + more for count, more in spread)
        return transformers.BatchFeature({**self._tokenizer(text, **options), **shown})


def qwen_image_edit(kind: str = "QwenImageEditPipeline") -> Any:
    """A pipeline, not a folder: the part that reads pictures cannot be read again where a package is missing."""
    import torch

    torch.manual_seed(0)
    parts = _qwen_image({}).components
    made = getattr(_diffusers(), kind)(**parts, processor=SeeingProcessor(parts["tokenizer"]))
    with torch.no_grad():
        for part in made.components.values():
            if isinstance(part, torch.nn.Module):
                randomise(part.eval())
    made.set_progress_bar_config(disable=True)
    return made


def _stable_diffusion_3(overrides: dict[str, Any]) -> Any:
    diffusers = _diffusers()

    words = word_tokenizer()
    t5_tokenizer, t5 = _t5(32)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
    }
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**{**settings, **overrides}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4),
        text_encoder=clip_text(words, 16, projected=True),
        tokenizer=words,
        text_encoder_2=clip_text(words, 16, projected=True),
        tokenizer_2=words,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def qwen_tokenizer() -> Any:
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {letter: at for at, letter in enumerate(sorted(ByteLevel.alphabet()))}
    marks = ["<|im_start|>", "<|im_end|>", *VISION]
    for special in ("<|endoftext|>", *marks):
        vocab[special] = len(vocab)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


QWEN: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}


def _z_image(overrides: dict[str, Any]) -> Any:
    diffusers = _diffusers()
    import transformers

    tokenizer = qwen_tokenizer()
    settings: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": (8, 4, 4),
        "axes_lens": (1024, 64, 64),
    }
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=len(tokenizer), **QWEN)),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(**{**settings, **overrides}),
    )


def _qwen_image(overrides: dict[str, Any]) -> Any:
    diffusers = _diffusers()
    import transformers

    tokenizer = qwen_tokenizer()
    text: dict[str, Any] = {**QWEN, "vocab_size": len(tokenizer)}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    marks = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(VISION), strict=True))
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    settings: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.2, 1.0],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(**{**settings, **overrides}),
    )


def _stable_diffusion(overrides: dict[str, Any]) -> Any:
    """A family that is not ours: noise prediction by a UNet."""
    diffusers = _diffusers()

    words = word_tokenizer()
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    vae = tiny_vae(4)
    vae.register_to_config(shift_factor=None)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip_text(words, 32, projected=False),
        tokenizer=words,
        unet=diffusers.UNet2DConditionModel(**{**settings, **overrides}),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_img2img(overrides: dict[str, Any]) -> Any:
    parts = _stable_diffusion(overrides).components
    return _diffusers().StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "flux": _flux,
    "flux_kontext": _flux_kontext,
    "qwen_image": _qwen_image,
    "stable_diffusion": _stable_diffusion,
    "stable_diffusion_img2img": _stable_diffusion_img2img,
    "stable_diffusion_3": _stable_diffusion_3,
    "z_image": _z_image,
}
