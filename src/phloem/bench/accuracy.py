"""Perplexity of English prose under the served weights, next to the same weights in the plain torch ops.

The text is the language reference that ships with Python. It is cut into windows; the perplexity is e to the mean
negative log-probability of every token but each window's first. A model that scales its embedding (Gemma) rounds the
scale to its own type: serve it with `--dtype float32` to see the kernels alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from phloem.bench._report import context, write_line
from phloem.bench._text import sentences
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest


@dataclass(frozen=True)
class Options:
    tokens: int = opt(20_000, "Length of the text in tokens.")
    window: int = opt(512, "Tokens that are scored together; each sees those before it in its window.")
    against: str = opt("reference", "Op table to compare with, in float32; 'none' measures the served one alone.")
    limit: float = opt(1.0, "Exit with status 1 when the perplexities differ by more percent.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench accuracy", argv, Options, skip=("server",), description=__doc__ or "")
    if options.window < 2 or options.tokens < options.window:
        raise BadRequest("--window must be at least 2, and --tokens at least --window")
    settings = {name: value for name, value in config.flat().items() if value is not None}
    served = perplexity(settings, options)
    _show("served", served)
    record: dict[str, Any] = {**context(), "model": config.model.model_path, "served": served}
    worse = 0.0
    if options.against != "none":
        # The KV cache too: a float32 model has a float32 cache.
        plain = {**settings, "ops": options.against, "dtype": "float32", "kv_cache_dtype": "auto"}
        record["plain"] = perplexity(plain, options)
        _show(options.against, record["plain"])
        worse = 100.0 * (served["perplexity"] / record["plain"]["perplexity"] - 1.0)
        record["difference_percent"] = worse
        print(f"difference: {worse:+.2f} %")
    if options.output:
        write_line(Path(options.output), record)
    return int(abs(worse) > options.limit)


def perplexity(settings: dict[str, Any], options: Options) -> dict[str, Any]:
    """Score the text with an engine of these settings."""
    from phloem.llm import Engine

    with Engine(**settings) as engine:
        if engine.tokenizer is None:
            raise BadRequest("the text needs a tokenizer: leave --skip-tokenizer-init out")
        windows = cut(engine.tokenizer.encode(" ".join(sentences())), options.tokens, options.window)
        start = perf_counter()
        answers: Any = engine.generate(
            input_ids=windows,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=0,
        )
        seconds = perf_counter() - start
    found: list[float] = [
        value for answer in answers for value, *_ in answer["meta_info"]["input_token_logprobs"] if value is not None
    ]
    return {"perplexity": math.exp(-sum(found) / len(found)), "tokens": len(found), "seconds": seconds}


def cut(ids: list[int], tokens: int, window: int) -> list[list[int]]:
    """Whole windows of the first `tokens` ids."""
    ids = ids[:tokens]
    return [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]


def _show(name: str, result: dict[str, Any]) -> None:
    print(
        f"{name:>10}: perplexity {result['perplexity']:.4f} over {result['tokens']} tokens ({result['seconds']:.1f} s)"
    )
