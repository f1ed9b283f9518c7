"""Every automatic choice, as a pure function from the configuration and facts to a choice with its reason.

The engine gathers the facts (`engine/worker.py`), calls these, prints the decisions once and serves them by the
server-info endpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phloem.core.config import CacheConfig
from phloem.core.errors import ConfigError
from phloem.core.ranges import parse_bytes

GIB = 2**30
# Of the machine's memory for each position that may be served: its rows in tables of rotations, and what those are made
# of; and what is left for it where nobody asked for so many.
_TABLES, _POSITION = 2**11, 2**14


@dataclass(frozen=True)
class Decision:
    """One choice: which setting, what it became, why."""

    name: str
    value: Any
    reason: str


def threads(requested: int | None, cores: int) -> Decision:
    if requested is not None:
        slow = f", though more than the {cores} cores there are for them: they wait for one another"
        return Decision("threads", requested, "as asked" + slow * (requested > cores))
    return Decision("threads", cores, f"one for each of the {cores} cores this process may use")


def context_length(requested: int | None, model: int, memory: int) -> Decision:
    """`memory`: bytes of the machine. Raises ConfigError when more is asked for than the model was trained for, or
    than tables of positions fit."""
    if requested is None:
        if model > memory // _POSITION:
            reason = f"what {memory / GIB:.1f} GiB of memory may hold; the model's own limit is {model}"
            return Decision("context_length", max(1, memory // _POSITION), reason)
        return Decision("context_length", model, "the model's own limit")
    if requested > model:
        raise ConfigError(
            f"context_length: {requested} is more than the {model} tokens this model can attend to",
            param="context_length",
        )
    if requested > memory // _TABLES:
        raise ConfigError(
            f"context_length: tables of {requested} positions do not fit in {memory / GIB:.1f} GiB of memory: "
            f"set it to at most {memory // _POSITION}",
            param="context_length",
        )
    return Decision("context_length", requested, "as asked")


def page_size(requested: int | None, backend: str, preferred: int, block: int = 0) -> Decision:
    """`block`: of a model of diffusion, whose blocks lie in one page each. Raises ConfigError: they cannot."""
    if requested is not None and block and requested % block:
        raise ConfigError(f"page_size: {requested} is no multiple of the model's blocks of {block}", param="page_size")
    if requested is not None:
        return Decision("page_size", requested, "as asked")
    if block and preferred % block:
        return Decision("page_size", -(-preferred // block) * block, f"whole blocks of {block} tokens")
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


PIECEWISE_TOKENS = 2048


def piecewise_tokens(refusal: str | None, requested: int | None, chunk: int) -> Decision:
    """Most tokens of a prefill or mixed step that runs in recorded pieces; "off" with the reason `refusal`."""
    name = "piecewise_graphs"
    if refusal is not None:
        return Decision(name, "off", refusal)
    if requested is not None and requested <= chunk:
        return Decision(name, requested, "tokens, as asked; recorded on first use or while idle")
    if chunk <= (requested or PIECEWISE_TOKENS):
        return Decision(name, chunk, "tokens: no step has more; recorded on first use or while idle")
    why = "tokens: a longer step computes longer than it takes to launch; recorded on first use or while idle"
    return Decision(name, PIECEWISE_TOKENS, why)


def mixed_chunk(default: int, chunk: int) -> Decision:
    """Prompt tokens of a step that also decodes."""
    if chunk <= default:
        return Decision("mixed_prefill_size", chunk, "as the whole step")
    return Decision("mixed_prefill_size", default, "running requests wait for no more prompt tokens at a time")


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes, on the device of the KV pool, after the weights were loaded.

    `activations` is None where the memory is shared with everything else on the machine: nothing is measured there,
    and the pool is a share of it.
    """

    free: int
    total: int
    weights: int
    bytes_per_token: int
    default_fraction: float
    activations: int | None = None  # what the largest step held at most, beyond the weights
    graphs: int = 0  # what step graphs may take
    reserve: int = 0  # for what no measurement has seen: fragments, libraries, other steps' odd shapes
    largest_step: str = ""  # what was measured, for people
    fixed: int = 0  # windows and states of running requests, which no token of the pool adds to

    @property
    def rest(self) -> int:
        """What is left for the pool."""
        return self.free - (self.activations or 0) - self.graphs - self.reserve - self.fixed


GRAPH_SHARE = 32  # a device's memory over this is what step graphs may take
MOST_GRAPHS = 4 * GIB


def graph_budget(total: int) -> int:
    """Bytes that step graphs may take on a device with `total` bytes of its own."""
    return min(MOST_GRAPHS, total // GRAPH_SHARE)


def pool_tokens(cache: CacheConfig, facts: MemoryFacts, page: int, context: int, running: int) -> Decision:
    """KV pool size in tokens, a multiple of the page size, without the scratch page.

    What the user says wins; else the rest of a device's own memory, or a share of the machine's.

    Raises:
        ConfigError: if not even a few pages fit, or, where we choose, not one request of the context length.
    """
    if cache.max_total_tokens is not None:
        tokens, reason = cache.max_total_tokens, "as asked"
        needed = tokens * facts.bytes_per_token + facts.fixed
        if needed > facts.free:
            raise ConfigError(
                f"max_total_tokens: {tokens} tokens need {needed / GIB:.2f} GiB, {facts.free / GIB:.2f} GiB are free",
                param="max_total_tokens",
            )
    elif cache.kv_memory is not None:
        left = max(0, parse_bytes(cache.kv_memory) - facts.fixed)
        tokens, reason = left // facts.bytes_per_token, f"{cache.kv_memory} of KV memory"
        if parse_bytes(cache.kv_memory) > facts.free:
            raise ConfigError(f"kv_memory: {cache.kv_memory} is more than is free", param="kv_memory")
    elif cache.mem_fraction_static is not None or facts.activations is None:
        tokens, reason = _from_fraction(cache.mem_fraction_static, facts, context, running)
    else:
        tokens, reason = _from_rest(facts, page, context)
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
    budget = int(before * fraction) - facts.weights - facts.fixed
    tokens = budget // facts.bytes_per_token
    useful = running * context
    if requested is None and tokens > useful:
        return useful, f"{running} running requests of {context} tokens"
    return tokens, f"{fraction:g} of {before / GIB:.1f} GiB, less {facts.weights / GIB:.2f} GiB of weights"


def _from_rest(facts: MemoryFacts, page: int, context: int) -> tuple[int, str]:
    """All that the other parts leave; at least one request of the context length must fit."""
    # Steps carry cache slots as int32, so the last slot must be one; and page 0 is scratch.
    tokens = min(facts.rest // facts.bytes_per_token, 2**31 - 1) - page
    fitting = max(0, tokens // page * page)
    if fitting < context:
        needed = -(-context // page) * page * facts.bytes_per_token
        remedy = f"set context_length to at most {fitting}, " if fitting >= 2 * page else ""
        raise ConfigError(
            f"one request of context_length {context} needs {needed / GIB:.2f} GiB of KV memory, "
            f"{max(0, facts.rest) / GIB:.2f} GiB are left of {facts.total / GIB:.2f} GiB ({_parts(facts)}): {remedy}"
            "lower chunked_prefill_size or max_running_requests, choose a smaller kv_cache_dtype, "
            "or say what the pool gets with kv_memory",
            param="context_length",
        )
    return tokens, "what weights, activations, graphs and the reserve leave"


def _parts(facts: MemoryFacts) -> str:
    parts = [f"weights {facts.weights / GIB:.2f} GiB"]
    if facts.activations is not None:
        parts.append(f"activations {facts.activations / GIB:.2f} GiB ({facts.largest_step})")
        parts.append(f"graphs up to {facts.graphs / GIB:.2f} GiB")
        parts.append(f"reserve {facts.reserve / GIB:.2f} GiB")
    if facts.fixed:
        parts.append(f"windows and states of what runs {facts.fixed / GIB:.2f} GiB")
    return ", ".join(parts)


def memory_parts(facts: MemoryFacts, tokens: int) -> Decision:
    """Where the memory goes, each part named; `tokens` is the pool's size."""
    pool = tokens * facts.bytes_per_token
    text = f"{_parts(facts)}, KV {pool / GIB:.2f} GiB ({tokens} tokens of {facts.bytes_per_token} bytes)"
    if facts.activations is None:
        left = max(0, facts.free - pool - facts.fixed)
        text += f"; activations, not measured, come from the other {left / GIB:.2f} GiB that are free"
    return Decision("memory", f"{facts.total / GIB:.1f} GiB", text)
