"""What step caches of pictures save, and what they cost: pictures with each beside the same ones without.

A folder with a `judge.safetensors` (`examples/digits/train.py` writes one) draws digits, and its classifier says of how
many pictures it sees the digit that was asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.bench._report import context, write_line
from phloem.checkpoint.pictures import pictures_of
from phloem.core.caching import NONE
from phloem.core.errors import BadRequest
from phloem.core.messages import Draw, FromEngine, Painted
from phloem.diffusion import models
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import Family
from phloem.launch.pictures import defaults
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.caching import StepCaching
    from phloem.core.config import Config

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEW = 5  # pictures of models without a classifier
SIDE = 8  # pixels of a side that the classifier sees


class Judge:
    """The classifier of a folder that draws digits."""

    def __init__(self, file: Path) -> None:
        from safetensors.torch import load_file

        self._weights = load_file(file)

    @staticmethod
    def of(folder: Path) -> Judge | None:
        file = folder / "judge.safetensors"
        return Judge(file) if file.is_file() else None

    def draws(self, draws: Sequence[Draw]) -> list[Draw]:
        """The same with digits in turn as their prompts."""
        for at, draw in enumerate(draws):
            draw.prompt = f"draw a {DIGITS[at % len(DIGITS)]}"
        return list(draws)

    def seen(self, pixels_HWC: np.ndarray) -> int:
        """The digit that it sees in a picture of bytes, made grey and small."""
        grey = torch.from_numpy(pixels_HWC.astype(np.float32)).mean(-1)
        small = torch.nn.functional.adaptive_avg_pool2d(grey[None, None], SIDE)[0, 0] / 127.5 - 1
        first = torch.relu(small.flatten() @ self._weights["first.weight"].T + self._weights["first.bias"])
        return int((first @ self._weights["last.weight"].T + self._weights["last.bias"]).argmax())

    def right(self, made: Sequence[Made]) -> int:
        """How many of them are the digits that were asked for."""
        return sum(self.seen(one.pixels) == at % len(DIGITS) for at, one in enumerate(made))


@dataclass(frozen=True)
class Made:
    """A picture as it has become. `pixels`: bytes [height, width, 3]."""

    latents: Tensor
    pixels: np.ndarray


def compare(config: Config, draws: list[Draw], rules: Sequence[StepCaching], output: str | None) -> None:
    """Print for each rule what was not computed, and how far pictures are from those without a cache.

    Raises:
        BadRequest: the model has none.
    """
    folder = Path(config.model.model_path)
    found = pictures_of(folder)
    if found is None:
        raise BadRequest("step_caches: the model path is no folder with a model_index.json")
    torch.set_num_threads(config.runtime.threads or available_cores())
    cpu, wanted = torch.device("cpu"), defaults(config.images.image_defaults)
    painter, why = models.choose(models.load(found, cpu, torch.float32, False), cpu, torch.float32, wanted)
    if not isinstance(painter, Family) or not painter.facts.caches:
        raise BadRequest(f"step_caches: {why.reason}; it has no step cache")
    judge = Judge.of(folder)
    draws = draws[:FEW] if judge is None else judge.draws(draws)
    exact, base, base_cpu = _drawn(painter, draws, NONE)
    first = draws[0]
    size = f"{first.width}x{first.height}"
    told = "" if judge is None else f", {judge.right(exact)} recognised"
    took = f"{base:.2f} s, {base_cpu:.2f} of processors"
    print(f"{len(draws)} pictures of {size}, {first.steps} steps, without a cache: {took}{told}")
    for rule in rules:
        for cache in painter.step_caches:
            cache.saved = cache.asked = cache.steps = cache.idle = 0
        made, seconds, cpu = _drawn(painter, draws, rule)
        record = {**_record(painter, rule, made, exact), "seconds": seconds, "seconds_without": base}
        record |= {"cpu_seconds": cpu, "cpu_seconds_without": base_cpu}
        if judge is not None:
            record |= {"recognised": judge.right(made), "recognised_without": judge.right(exact)}
        _show(record)
        if output:
            write_line(Path(output), {**record, **context(), "model": str(folder)})


def _record(painter: Family, rule: StepCaching, made: Sequence[Made], exact: Sequence[Made]) -> dict[str, Any]:
    caches, both = painter.step_caches, list(zip(made, exact, strict=True))
    off = [np.abs(one.pixels.astype(float) - other.pixels) for one, other in both]
    psnr = [_psnr(one.pixels, other.pixels) for one, other in both]
    far = [float((one.latents - other.latents).norm() / other.latents.norm()) for one, other in both]
    return {
        "kind": rule.kind,
        "threshold": rule.threshold,
        "pictures": len(both),
        "saved_blocks": sum(one.saved for one in caches),
        "blocks": sum(one.asked for one in caches),
        "steps": sum(one.steps for one in caches),
        "cached_steps": sum(one.idle for one in caches),
        "latent_difference": max(far),
        "mean_pixel_difference": float(np.mean([one.mean() for one in off])),
        "most_pixel_difference": float(max(one.max() for one in off)),
        "psnr_db": min(psnr),
        "median_psnr_db": float(np.median(psnr)),
    }


def _show(record: dict[str, Any]) -> None:
    seen = f", {record['recognised']} of {record['pictures']} recognised" if "recognised" in record else ""
    print(
        f"{record['kind']} {record['threshold']:g}: {record['cached_steps'] / max(1, record['steps']):6.1%} of steps "
        f"cached, {record['saved_blocks'] / max(1, record['blocks']):6.1%} of blocks saved, latents differ by "
        f"{record['latent_difference']:.4f}, pixels by {record['mean_pixel_difference']:.2f} of 255, PSNR "
        f"{record['psnr_db']:.1f} dB (median {record['median_psnr_db']:.1f}), {record['seconds']:.2f} s, "
        f"{record['cpu_seconds']:.2f} of processors{seen}"
    )
    print(json.dumps(record), flush=True)


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB, of bytes."""
    error = float(((one.astype(float) - other.astype(float)) ** 2).mean())
    return inf if error == 0 else 10 * log10(255**2 / error)


def _drawn(painter: Family, draws: Sequence[Draw], rule: StepCaching) -> tuple[list[Made], float, float]:
    """(what each has become, seconds, those of processors); one after the other."""
    found: dict[str, Tensor] = {}
    pixels: dict[str, np.ndarray] = {}
    errors: list[str] = []
    studio = Studio(painter, Settings(1, step_cache=rule), lambda told: _note(told, errors, pixels))
    begun, cpu = perf_counter(), process_time()
    for draw in draws:
        studio.submit(draw)
    while studio.step():
        found |= {job.id: job.latents for job in studio.jobs.values() if job.latents is not None}
    if errors:
        raise BadRequest(errors[0])
    made = [Made(found[draw.id], pixels[draw.id]) for draw in draws]
    return made, perf_counter() - begun, process_time() - cpu


def _note(told: FromEngine, errors: list[str], pixels: dict[str, np.ndarray]) -> None:
    if isinstance(told, Painted) and told.error:
        errors.append(told.error)
    elif isinstance(told, Painted) and told.pixels:
        pixels[told.id] = np.frombuffer(told.pixels, np.uint8).reshape(told.height, told.width, 3)
