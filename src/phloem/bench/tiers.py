"""What cache tiers save and cost, next to an engine without them, turn by turn: time to the first token of
conversations whose pages exceed the pool, of their next turns after a restart, and the time of texts of which nothing
comes again.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import phloem
from phloem.bench._report import context, write_line
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest

FIRST, LAST = 1000, 8000  # token ids
COUNTS = "conversations", "turns", "first_tokens", "turn_tokens", "output_tokens", "fresh", "fresh_tokens"


@dataclass(frozen=True)
class Options:
    conversations: int = opt(8, "Conversations, whose turns come in turn.")
    turns: int = opt(6, "Turns of each.")
    first_tokens: int = opt(512, "Tokens that a conversation begins with.")
    turn_tokens: int = opt(64, "Tokens that each further turn brings.")
    output_tokens: int = opt(16, "Tokens of an answer.")
    excess: float = opt(4.0, "How many times the pool all conversations take at their end.")
    fresh: int = opt(12, "Texts of which nothing comes again.")
    fresh_tokens: int = opt(512, "Tokens of each.")
    fresh_output: int = opt(64, "Tokens of an answer to each.")
    seed: int = opt(1, "Seed of the texts.")
    output: str | None = opt(None, "File to append a JSON line to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench tiers", argv, Options, skip=("server",), description=__doc__ or "")
    if options.turns < 2:
        raise BadRequest("turns must be at least 2: the first of each conversation has nothing behind it")
    if min(vars(options)[name] for name in COUNTS) < 1:
        raise BadRequest(f"{', '.join(COUNTS)} must be at least 1")
    length = options.first_tokens + options.turns * (options.turn_tokens + options.output_tokens)
    pool = max(int(options.conversations * length / options.excess), length + 2 * options.turn_tokens)
    with tempfile.TemporaryDirectory() as folder:
        flat = {**config.flat(), "log_level": "error", "skip_tokenizer_init": True, "grammar_backend": None}
        flat["max_total_tokens"] = config.cache.max_total_tokens or pool
        plain = {**flat, "enable_hierarchical_cache": False}
        plain |= dict.fromkeys(("hicache_storage_backend", "hicache_storage_backend_extra_config", "hicache_ratio"))
        tiered = {**flat, "enable_hierarchical_cache": True}
        if config.cache.hicache_storage_backend is None:
            tiered |= {
                "hicache_storage_backend": "file",
                "hicache_storage_backend_extra_config": json.dumps({"path": folder}),
            }
        found = measure(plain, {**tiered, "hicache_size": config.cache.hicache_size}, options)
    record = {
        **context(),
        "model": Path(config.model.model_path).name,
        "pool_tokens": flat["max_total_tokens"],
        **found,
    }
    print(json.dumps(record))
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(plain: dict[str, Any], tiered: dict[str, Any], options: Options) -> dict[str, Any]:
    """Ratios of the engine with tiers to the one without, and the seconds behind them."""
    rng = random.Random(options.seed)
    texts = [_ids(rng, options.first_tokens) for _ in range(options.conversations)]
    with phloem.Engine(**{**plain, "hicache_size": 0.0}) as without:
        with phloem.Engine(**tiered) as engine:
            for one in (without, engine):
                _ask(one, _ids(rng, options.turn_tokens), 2)
                _ask(one, _ids(rng, options.fresh_tokens), 2)
            seen = _conversations(without, engine, texts, options, rng)
            fresh = _fresh(without, engine, options, rng)
            tiers = engine.get_server_info()["internal_states"][0]["tiers"]
        with phloem.Engine(**tiered) as again:
            _ask(again, _ids(rng, options.turn_tokens), 2)
            restart = _restarted(without, again, texts)
    return {
        "ttft_ratio": statistics.mean(seen[1]) / statistics.mean(seen[0]),
        "restart_ratio": statistics.mean(restart[1]) / statistics.mean(restart[0]),
        "no_reuse_ratio": statistics.median(b / a for a, b in zip(*fresh, strict=True)),
        "ttft_ms": [statistics.mean(part) * 1e3 for part in seen],
        "restart_ttft_ms": [statistics.mean(part) * 1e3 for part in restart],
        "no_reuse_s": [sum(part) for part in fresh],
        "tiers": tiers,
    }


def _conversations(
    without: Any, engine: Any, texts: list[list[int]], options: Options, rng: random.Random
) -> tuple[list[float], list[float]]:
    """Seconds to the first token of all turns but the first; both engines are given the same texts."""
    seen: tuple[list[float], list[float]] = [], []
    for turn in range(options.turns):
        for text in texts:
            answer = list[int]()
            for at, one in enumerate(_in_turn(turn, without, engine)):
                place = at if turn % 2 == 0 else 1 - at
                seconds, ids = _ask(one, text, options.output_tokens)
                if turn:
                    seen[place].append(seconds)
                if place == 0:
                    answer = ids
            text += answer + _ids(rng, options.turn_tokens)
    return seen


def _fresh(without: Any, engine: Any, options: Options, rng: random.Random) -> tuple[list[float], list[float]]:
    """Seconds of whole answers to texts that nobody has seen."""
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(options.fresh):
        ids = _ids(rng, options.fresh_tokens)
        for at, one in enumerate(_in_turn(turn, without, engine)):
            begun = perf_counter()
            _ask(one, ids, options.fresh_output)
            seconds[at if turn % 2 == 0 else 1 - at].append(perf_counter() - begun)
    return seconds


def _restarted(without: Any, again: Any, texts: list[list[int]]) -> tuple[list[float], list[float]]:
    """Seconds to the first token of each conversation's next turn: all of it computed, and after a restart."""
    seconds: tuple[list[float], list[float]] = [], []
    for text in texts:
        without.flush_cache(timeout=10.0)
        for at, one in enumerate((without, again)):
            seconds[at].append(_ask(one, text, 2)[0])
    return seconds


def _in_turn(turn: int, *engines: Any) -> tuple[Any, ...]:
    return engines if turn % 2 == 0 else engines[::-1]


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST, LAST) for _ in range(count)]


def _ask(engine: Any, ids: list[int], count: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and the answer."""
    params = {"max_new_tokens": count, "temperature": 0.0, "ignore_eos": True}
    begun, first, told = perf_counter(), 0.0, list[int]()
    for news in engine.generate(input_ids=list(ids), sampling_params=params, stream=True):
        first, told = first or perf_counter() - begun, news["output_ids"]
    return first, told
