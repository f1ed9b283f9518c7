"""Tiny FLUX.2 pipelines with random weights: Klein as a folder too, dev as a pipeline (its processor needs more)."""

from __future__ import annotations

from typing import Any

from phloem.testing.pictures import QWEN, qwen_tokenizer, randomise


class TextProcessor:
    """What PixtralProcessor makes of messages without pictures."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def apply_chat_template(self, batch: list[Any], **options: Any) -> Any:
        texts = [" ".join(part["text"] for message in one for part in message["content"]) for one in batch]
        names = ("padding", "truncation", "max_length", "return_tensors")
        return self._tokenizer(texts, **{name: options[name] for name in names})


def flux_2(kind: str = "Flux2KleinPipeline", **options: Any) -> Any:
    """A pipeline of diffusers; `kind`: Flux2KleinPipeline or Flux2Pipeline."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer, klein = qwen_tokenizer(), kind == "Flux2KleinPipeline"
    text = {**QWEN, "vocab_size": len(tokenizer), "num_hidden_layers": 31}  # three of whose states are read
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "vae": vae,
        "text_encoder": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text)),
        "tokenizer": tokenizer if klein else TextProcessor(tokenizer),
        "transformer": transformer,
    }
    made = getattr(diffusers, kind)(**parts, **options)
    with torch.no_grad():
        for part in made.components.values():
            if isinstance(part, torch.nn.Module):
                randomise(part.eval())
        vae.bn.running_mean.normal_(0, 0.2)
        vae.bn.running_var.uniform_(0.5, 2.0)
    made.set_progress_bar_config(disable=True)
    return made
