"""Measure speech to text: ours beside transformers, round after round in turn, and the words that are wrong.

The text of FILE.wav is read from FILE.txt, if that is there. Both hear the same samples with the same number of
threads, and take the most likely token.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

import phloem
from phloem.bench._report import context, write_line
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.multimodal._audio import RATE, decode
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[[bytes], str]

_WORD = re.compile(r"[\w']+")


@dataclass(frozen=True)
class Options:
    file: tuple[str, ...] = opt((), "Sound files.")
    language: str = opt("en", "What is spoken.")
    rounds: int = opt(3, "Rounds; the median counts.")
    parallel: bool = opt(False, "Also ours with long files cut where they are quiet.")
    against: bool = opt(True, "Beside transformers.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench transcribe", argv, Options, skip=("server",), description=__doc__ or "")
    if not options.file:
        raise BadRequest("name sound files: --file FILE ..")
    settings = {**config.flat(), "log_level": "warning"}
    threads = config.runtime.threads or available_cores()
    with phloem.Engine(**settings) as engine:
        runs: dict[str, Run] = {"phloem": lambda data: engine.transcribe(data, language=options.language)["text"]}
        if options.parallel:
            runs["phloem, parallel"] = lambda data: engine.transcribe(
                data, language=options.language, chunking_strategy="auto"
            )["text"]
        if options.against:
            runs["transformers"] = theirs(Path(engine.config.model.model_path), engine.tokenizer, options, threads)
        for name in options.file:
            for record in _measured(Path(name), runs, options.rounds):
                record |= {**context(), "threads": threads}
                _show(record)
                if options.output:
                    write_line(Path(options.output), record)
    return 0


def _measured(path: Path, runs: dict[str, Run], rounds: int) -> list[dict[str, Any]]:
    data = path.read_bytes()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    texts = {name: run(data) for name, run in runs.items()}  # and everything is warm
    for _ in range(rounds):
        for name, run in runs.items():
            begun = perf_counter()
            run(data)
            seconds[name].append(perf_counter() - begun)
    duration = len(decode(data, 1e9)) / RATE
    reference = path.with_suffix(".txt")
    spoken = reference.read_text("utf-8") if reference.exists() else None
    last = statistics.median(seconds[list(runs)[-1]])
    return [
        {
            "engine": name,
            "file": path.name,
            "audio_s": duration,
            "seconds": statistics.median(times),
            "times_real_time": duration / statistics.median(times),
            "faster": last / statistics.median(times),
            "same_text": texts[name] == texts[list(runs)[-1]],
            "word_error_rate": None if spoken is None else word_error_rate(spoken, texts[name]),
            "text": texts[name],
        }
        for name, times in seconds.items()
    ]


def word_error_rate(spoken: str, heard: str) -> float:
    """Words to be replaced, left out or put in, for each word that was spoken; case and punctuation do not count."""
    want, got = (_WORD.findall(text.lower()) for text in (spoken, heard))
    row = np.arange(len(got) + 1)
    for number, word in enumerate(want, 1):
        kept = row[:-1] + np.array([word != other for other in got], dtype=np.int64)
        best = np.minimum(kept, row[1:] + 1)
        fresh = [number]
        for value in best.tolist():
            fresh.append(min(value, fresh[-1] + 1))
        row = np.array(fresh)
    return float(row[-1]) / max(1, len(want))


def theirs(path: Path, tokenizer: Any, options: Options, threads: int) -> Run:
    """Transformers' own long-form decoding, in float32."""
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.set_num_threads(threads)
    model: Any = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    model.eval()
    extract: Any = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    asked = {"language": options.language, "task": "transcribe"} if model.generation_config.is_multilingual else {}

    def run(data: bytes) -> str:
        samples = decode(data, 1e9)
        long = len(samples) > 30 * RATE
        padding = "longest" if long else "max_length"
        given = extract(
            samples, sampling_rate=RATE, return_tensors="pt", truncation=False, padding=padding,
            return_attention_mask=True,
        )  # fmt: skip
        with torch.inference_mode():
            found = model.generate(
                given.input_features, attention_mask=given.attention_mask, return_timestamps=True, do_sample=False,
                num_beams=1, **asked,
            )  # fmt: skip
        end = model.config.eos_token_id
        return tokenizer.decode([token for token in found[0].tolist() if token < end]).strip()

    return run


def _show(record: dict[str, Any]) -> None:
    wrong = record["word_error_rate"]
    print(
        f"{record['file']:<14} {record['engine']:<17} {record['seconds']:6.2f} s for {record['audio_s']:5.1f} s, "
        f"{record['times_real_time']:5.1f}x real time, {record['faster']:5.2f}x the last one's speed, "
        f"{'same' if record['same_text'] else 'other'} text"
        + ("" if wrong is None else f", {wrong:.1%} of words wrong")
    )
    print(json.dumps(record), flush=True)
