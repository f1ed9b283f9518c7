"""Train a model that draws digits, and write it as a folder that `phloem serve` draws with.

    python examples/digits/train.py --out examples/digits/model --seconds 180
    phloem generate examples/digits/model --prompt "draw a seven" --output seven.png

The pictures are the 1,797 digits of 8 x 8 pixels that scikit-learn brings; the denoiser is a small one of Z-Image's
shape, read by Z-Image's own pipeline in diffusers. Beside it a classifier is trained, on the same pictures, by which
tests judge what was drawn.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
from pathlib import Path
from time import perf_counter
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("draw a {}", "a {}", "{}", "draw the digit {}", "the number {}")
TEMPLATE = "draw: {{ messages[0].content }}"
SIDE, PICTURE = 8, 16  # of latents, and of the picture that the decoder makes of them
DROPPED = 0.1  # share of pictures without a prompt, so that the model can be guided


def read_digits(path: Path | None) -> tuple[Tensor, Tensor]:
    """(pictures [N, 1, 8, 8] in -1 to 1, digits [N])."""
    if path is None:
        spec = importlib.util.find_spec("sklearn")  # its file alone is read: what it imports need not be installed
        if spec is None or spec.origin is None:
            raise SystemExit(
                "scikit-learn is not installed: pip install scikit-learn, or name its digits.csv.gz by --data"
            )
        path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = torch.tensor(np.loadtxt(file, delimiter=","), dtype=torch.float32)
    return (table[:, :-1] / 8 - 1).reshape(-1, 1, SIDE, SIDE), table[:, -1].long()


def make_tokenizer() -> Any:
    """Bytes, and no words: what it reads is short."""
    vocab = {letter: at for at, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_pipeline() -> Any:
    tokenizer = make_tokenizer()
    encoder = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=4,
            sample_size=PICTURE,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        ),
        text_encoder=transformers.Qwen3Model(encoder),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=1,
            dim=48,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=32,
            axes_dims=(8, 4, 4),
            axes_lens=(256, 16, 16),
        ),
    )


def prepare(transformer: Any) -> None:
    """Padding tokens are made empty; outputs begin at nothing."""
    with torch.no_grad():
        transformer.x_pad_token.normal_(0, 0.02)
        transformer.cap_pad_token.normal_(0, 0.02)


def train_decoder(vae: Any, pictures: Tensor, steps: int) -> None:
    """Latents are the pictures themselves: the decoder learns to show them twice as large, and in grey."""
    wanted = functional.interpolate(pictures, scale_factor=2, mode="bilinear").clamp(-1, 1).expand(-1, 3, -1, -1)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), 3e-3)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (64,))
        noisy = pictures[chosen] + 0.05 * torch.randn(64, 1, SIDE, SIDE)
        loss = functional.mse_loss(vae.decode(noisy).sample, wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"decoder {step}: {loss.item():.4f}", flush=True)


def train_denoiser(pipe: Any, pictures: Tensor, digits: Tensor, seconds: float, resume: Path | None) -> None:
    """Flow matching: of x = (1 - s) picture + s noise, at time s, the model says picture - noise."""
    model = pipe.transformer
    if resume is not None and resume.exists():
        model.load_state_dict({name: value.float() for name, value in load_file(resume).items()})
    texts = [prompt.format(name) for at in range(10) for prompt in PROMPTS for name in (WORDS[at], str(at))]
    per_digit = len(texts) // 10
    with torch.no_grad():
        read = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0] for text in texts]
        nothing = pipe.encode_prompt("", do_classifier_free_guidance=False)[0][0]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    averages = {name: value.detach().clone() for name, value in model.state_dict().items()}
    begun, step, batch, mean = perf_counter(), 0, 64, 1.0
    while (spent := (perf_counter() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - spent) ** 0.5
        chosen = torch.randint(len(pictures), (batch,))
        noise, sigma = torch.randn(batch, 1, SIDE, SIDE), torch.sigmoid(torch.randn(batch) + 0.3)
        mixed = (1 - sigma)[:, None, None, None] * pictures[chosen] + sigma[:, None, None, None] * noise
        which = torch.randint(per_digit, (batch,))
        prompts = [
            nothing if drop < DROPPED else read[int(digit) * per_digit + int(at)]
            for digit, at, drop in zip(digits[chosen], which, torch.rand(batch), strict=True)
        ]
        said = model(list(mixed[:, :, None]), 1 - sigma, prompts, return_dict=False)[0]
        loss = functional.mse_loss(torch.stack(said)[:, :, 0], pictures[chosen] - noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, mean = step + 1, 0.98 * mean + 0.02 * loss.item()
        keep = min(0.995, step / (step + 10))
        for name, value in model.state_dict().items():
            averages[name].lerp_(value, 1 - keep)
        if step % 100 == 0:
            print(f"denoiser {step}: {mean:.4f} after {perf_counter() - begun:.0f} s", flush=True)
    model.load_state_dict(averages)


class Classifier(nn.Module):
    """Pictures [N, 1, 8, 8] -> scores of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(pictures.flatten(1))))


def train_classifier(pictures: Tensor, digits: Tensor, steps: int = 1500) -> Classifier:
    model, held = Classifier(), len(pictures) // 5
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    for _ in range(steps):
        chosen = torch.randint(held, len(pictures), (128,))
        noisy = pictures[chosen] + 0.2 * torch.randn(128, 1, SIDE, SIDE)
        loss = functional.cross_entropy(model(noisy), digits[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (model(pictures[:held]).argmax(1) == digits[:held]).float().mean()
    print(f"classifier: {right:.1%} of {held} pictures that it has not seen")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits"))
    parser.add_argument("--data", type=Path, help="digits.csv.gz of scikit-learn")
    parser.add_argument("--seconds", type=float, default=180.0, help="of the denoiser's training")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --out")
    options = parser.parse_args()
    torch.manual_seed(0)
    pictures, digits = read_digits(options.data)
    pipe = make_pipeline()
    prepare(pipe.transformer)
    weights = options.out / "transformer" / "diffusion_pytorch_model.safetensors"
    train_decoder(pipe.vae, pictures, 500)
    train_denoiser(pipe, pictures, digits, options.seconds, weights if options.resume else None)
    judge = train_classifier(pictures, digits)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(options.out)
    save_file(
        {name: value.contiguous() for name, value in judge.state_dict().items()}, options.out / "judge.safetensors"
    )


if __name__ == "__main__":
    main()
