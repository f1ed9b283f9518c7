"""What clients do to a server: lists of sessions, each a sequence of requests that one client sends one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from phloem.bench._text import Texts


@dataclass
class Turn:
    """One request: what is added to the session's text so far, and how many tokens are wanted."""

    text: str
    output_tokens: int


@dataclass
class Session:
    """Turns of one client; each turn's prompt is everything said so far, answers included."""

    turns: list[Turn]


@dataclass
class Workload:
    """`concurrency` sessions in flight at once; with `rate`, sessions begin at random (Poisson), that many a second."""

    name: str
    sessions: list[Session]
    concurrency: int
    rate: float | None = None
    greedy: bool = True
    extra: dict[str, object] = field(default_factory=dict)


@dataclass
class Sizes:
    """How large a workload is; None takes the workload's own default."""

    requests: int | None = None
    concurrency: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    groups: int = 8
    turns: int = 6
    rate: float = 4.0


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def single(texts: Texts, sizes: Sizes) -> Workload:
    """One stream at a time: short prompts, long answers (W1)."""
    prompt, output = _or(sizes.input_tokens, 32), _or(sizes.output_tokens, 256)
    sessions = [Session([Turn(texts.draw(prompt), output)]) for _ in range(_or(sizes.requests, 3))]
    return Workload("single", sessions, 1)


def prefill(texts: Texts, sizes: Sizes) -> Workload:
    """Long prompts, one token out, one at a time (W2)."""
    prompt = _or(sizes.input_tokens, 1800)
    sessions = [Session([Turn(texts.draw(prompt), 1)]) for _ in range(_or(sizes.requests, 6))]
    return Workload("prefill", sessions, 1)


def throughput(texts: Texts, sizes: Sizes) -> Workload:
    """Many requests in flight, nothing shared (W3)."""
    prompt, output = _or(sizes.input_tokens, 256), _or(sizes.output_tokens, 128)
    sessions = [Session([Turn(texts.draw(prompt), output)]) for _ in range(_or(sizes.requests, 64))]
    return Workload("throughput", sessions, _or(sizes.concurrency, 32))


def shared_prefix(texts: Texts, sizes: Sizes) -> Workload:
    """Groups of requests with a long common prefix, interleaved (W4). `requests` counts those of one group."""
    prefix, output = _or(sizes.input_tokens, 1024), _or(sizes.output_tokens, 64)
    prefixes = [texts.draw(prefix) for _ in range(sizes.groups)]
    sessions = [
        Session([Turn(f"{start} {texts.draw(32)}", output)])
        for _ in range(_or(sizes.requests, 8))
        for start in prefixes
    ]
    return Workload("shared-prefix", sessions, _or(sizes.concurrency, 16))


def conversations(texts: Texts, sizes: Sizes) -> Workload:
    """Conversations whose every turn sends all that was said before (W5). `requests` counts conversations."""
    added, output = _or(sizes.input_tokens, 64), _or(sizes.output_tokens, 64)
    sessions = [
        Session([Turn(("\n" if turn else "") + texts.draw(added), output) for turn in range(sizes.turns)])
        for _ in range(_or(sizes.requests, 8))
    ]
    return Workload("conversations", sessions, _or(sizes.concurrency, 8))


def rate(texts: Texts, sizes: Sizes) -> Workload:
    """Requests that arrive at random, so many a second on average, as those of independent users do."""
    prompt, output = _or(sizes.input_tokens, 256), _or(sizes.output_tokens, 128)
    sessions = [Session([Turn(texts.draw(prompt), output)]) for _ in range(_or(sizes.requests, 32))]
    return Workload("rate", sessions, _or(sizes.concurrency, 10**6), rate=sizes.rate)


WORKLOADS: dict[str, Callable[[Texts, Sizes], Workload]] = {
    "single": single,
    "prefill": prefill,
    "throughput": throughput,
    "shared-prefix": shared_prefix,
    "conversations": conversations,
    "rate": rate,
}
