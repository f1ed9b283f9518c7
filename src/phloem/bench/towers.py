"""Measure what makes embeddings of pictures: our tower beside transformers' own, round after round in turn.

Both see the same pictures, decoded and resized before, with the same number of threads; what they make is compared.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from phloem.attention._packed import PackedMemory
from phloem.bench._report import context, write_line
from phloem.bench.pictures import draw
from phloem.cli._options import parse
from phloem.client.start import make_client
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.engine import worker
from phloem.models._vision import VisionTower
from phloem.multimodal._reader import Source
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.core.config import Config

    Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Options:
    pictures: int = opt(2, "That are encoded together.")
    width: int = opt(448, "Of each picture, in pixels.")
    height: int = opt(448, "Of each picture, in pixels.")
    rounds: int = opt(7, "Rounds; the median counts.")
    against: bool = opt(True, "Beside transformers, in float32.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench towers", argv, Options, skip=("server",), description=__doc__ or "")
    if min(options.pictures, options.width, options.height, options.rounds) < 1:
        raise BadRequest("pictures, width, height and rounds must be above 0")
    record = {**context(), "model": Path(config.model.model_path).name, **measure(config, options)}
    _show(record)
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Median milliseconds of both, and how far what they make is apart (None: it is cut otherwise)."""
    files = [draw(seed, options.width, options.height) for seed in range(options.pictures)]
    threads = config.runtime.threads or available_cores()
    run, close, dtype = _ours(config, files)
    try:
        runs: dict[str, Run] = {"phloem": run}
        if options.against:
            runs["transformers"] = _theirs(config.model.model_path, files, threads)
        made = {name: one() for name, one in runs.items()}  # and everything is warm
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, one in runs.items():
                begun = perf_counter()
                one()
                seconds[name].append(perf_counter() - begun)
    finally:
        close()
    times = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
    ratios = [theirs / ours for theirs, ours in zip(seconds.get("transformers", ()), seconds["phloem"], strict=False)]
    return {
        "pictures": options.pictures,
        "picture": [options.width, options.height],
        "tokens": sum(map(len, made["phloem"])),
        "dtype": dtype,
        "threads": threads,
        "ms": times,
        "faster": statistics.median(ratios) if ratios else None,
        "apart": _apart(made["phloem"], made["transformers"]) if ratios else None,
    }


def _ours(config: Config, files: list[bytes]) -> tuple[Run, Callable[[], None], str]:
    """What runs the engine's own tower (no scheduler, no cache), what ends it, and the type it computes in."""
    client, _, checkpoint = make_client(config)
    reader, tokenizer = client.pictures, client.tokenizer
    if reader is None or tokenizer is None or "image" not in reader.processors:
        raise BadRequest("a model that takes pictures is needed, with its tokenizer")
    try:
        made = asyncio.run(reader.read([Source("", "picture", data) for data in files]))
        text, made = reader.with_places(reader.processors["image"].mark * len(files), made, "picture")
        media = reader.grown(list(tokenizer.encode(text)), made, "picture")[1]
    finally:
        reader.close()
    config = config.with_(max_total_tokens=config.cache.max_total_tokens or 1024)
    built = worker.build(config, checkpoint, lambda phase, seconds: None)
    tower = built.tower
    if not isinstance(tower, VisionTower):
        built.runner.close()
        raise BadRequest("this model's tower is transformers' own code, there is nothing to compare")
    pack = partial(PackedMemory, tower.ops)

    @torch.inference_mode()
    def run() -> list[Tensor]:
        return tower.encode(media, pack)

    return run, built.runner.close, str(built.info["dtype"])


def _theirs(path: str, files: list[bytes], threads: int) -> Run:
    import transformers
    from PIL import Image

    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    images = [Image.open(BytesIO(data)).convert("RGB") for data in files]
    given = dict(processor(images=images, return_tensors="pt"))

    @torch.inference_mode()
    def run() -> list[Tensor]:
        found = model.eval().get_image_features(**given).pooler_output
        return list(found)

    return run


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> float | None:
    mine, other = (torch.cat([one.flatten(0, -2) for one in found]).float() for found in (ours, theirs))
    if len(mine) != len(other):
        return None
    return float((mine[:, : other.shape[1]] - other).abs().max() / other.abs().max())


def _show(record: dict[str, Any]) -> None:
    each = ", ".join(f"{name} {ms:.1f} ms" for name, ms in record["ms"].items())
    print(f"{record['pictures']} pictures of {record['picture']}, {record['tokens']} tokens: {each}")
    if record["faster"] is not None:
        print(f"{record['faster']:.2f}x transformers' speed, apart by {record['apart']}")
    print(json.dumps(record), flush=True)
