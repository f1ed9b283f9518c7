"""Every automatic choice, as a pure function from the configuration and facts to a choice with its reason.

The engine gathers the facts (`engine/worker.py`), calls these, prints the decisions once and serves them by the
server-info endpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phloem.core.config import CacheConfig, parse_bytes
from phloem.core.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Decision:
    """One choice: which setting, what it became, why."""

    name: str
    value: Any
    reason: str


def threads(requested: int | None, cores: int) -> Decision:
    if requested is not None:
        return Decision("threads", requested, "as asked")
    return Decision("threads", cores, f"one for each of the {cores} cores this process may use")


def context_length(requested: int | None, model: int) -> Decision:
    """Raises ConfigError when more is asked for than the model was trained for."""
    if requested is None:
        return Decision("context_length", model, "the model's own limit")
    if requested > model:
        raise ConfigError(
            f"context_length: {requested} is more than the {model} tokens this model can attend to",
            param="context_length",
        )
    return Decision("context_length", requested, "as asked")


def page_size(requested: int | None, backend: str, preferred: int) -> Decision:
    if requested is not None:
        return Decision("page_size", requested, "as asked")
    return Decision("page_size", preferred, f"preferred by the attention backend {backend!r}")


def running_requests(requested: int | None, default: int, device: str) -> Decision:
    if requested is not None:
        return Decision("max_running_requests", requested, "as asked")
    return Decision("max_running_requests", default, f"usual for device {device!r}")


def chunk(requested: int | None, default: int, running: int) -> Decision:
    """Tokens of one step. It must hold one token of every running request."""
    if requested is not None:
        return Decision("chunked_prefill_size", requested, "as asked")
    if default < running:
        return Decision("chunked_prefill_size", running, "one token for every running request")
    return Decision("chunked_prefill_size", default, "keeps steps short enough for smooth streaming")


def mixed_chunk(default: int, chunk: int) -> Decision:
    """Prompt tokens of a step that also decodes."""
    if chunk <= default:
        return Decision("mixed_prefill_size", chunk, "as the whole step")
    return Decision("mixed_prefill_size", default, "running requests wait for no more prompt tokens at a time")


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes, on the device of the KV pool, after the weights were loaded."""

    free: int
    total: int
    weights: int
    bytes_per_token: int
    default_fraction: float


def pool_tokens(cache: CacheConfig, facts: MemoryFacts, page: int, context: int, running: int) -> Decision:
    """KV pool size in tokens, a multiple of the page size, without the scratch page.

    Raises:
        ConfigError: if not even a few pages fit.
    """
    if cache.max_total_tokens is not None:
        tokens, reason = cache.max_total_tokens, "as asked"
        if tokens * facts.bytes_per_token > facts.free:
            raise ConfigError(
                f"max_total_tokens: {tokens} tokens need {tokens * facts.bytes_per_token / GIB:.2f} GiB, "
                f"{facts.free / GIB:.2f} GiB are free",
                param="max_total_tokens",
            )
    elif cache.kv_memory is not None:
        tokens, reason = parse_bytes(cache.kv_memory) // facts.bytes_per_token, f"{cache.kv_memory} of KV memory"
        if parse_bytes(cache.kv_memory) > facts.free:
            raise ConfigError(f"kv_memory: {cache.kv_memory} is more than is free", param="kv_memory")
    else:
        tokens, reason = _from_fraction(cache.mem_fraction_static, facts, context, running)
    tokens = tokens // page * page
    if tokens < 2 * page:
        raise ConfigError(
            f"the KV pool would hold {max(tokens, 0)} tokens ({reason}; {facts.bytes_per_token} bytes a token, "
            f"{facts.free / GIB:.2f} GiB free); give it more with kv_memory, max_total_tokens or mem_fraction_static",
            param="max_total_tokens",
        )
    return Decision("max_total_num_tokens", tokens, reason)


def _from_fraction(requested: float | None, facts: MemoryFacts, context: int, running: int) -> tuple[int, str]:
    fraction = requested if requested is not None else facts.default_fraction
    before = min(facts.total, facts.free + facts.weights)
    budget = int(before * fraction) - facts.weights
    tokens = budget // facts.bytes_per_token
    useful = running * context
    if requested is None and tokens > useful:
        return useful, f"{running} running requests of {context} tokens"
    return tokens, f"{fraction:g} of {before / GIB:.1f} GiB, less {facts.weights / GIB:.2f} GiB of weights"
