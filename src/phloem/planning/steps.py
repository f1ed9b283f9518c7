"""How long a step takes: a sum of terms, each bound by memory, by arithmetic, by a link or by launching.

docs/planning.md states the formulae with the sources of their constants. A term's time is the larger of what reading
takes and what computing takes; terms follow one another, but for the share of `overlap` of exchanges between experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phloem.planning.layouts import shared

if TYPE_CHECKING:
    from phloem.planning.layouts import Layout, Stage
    from phloem.planning.machines import Kind, Machine
    from phloem.planning.shape import Amount, Reads, Shape


@dataclass(frozen=True)
class Efficiency:
    """What of the makers' figures is reached. One set for all models and machines."""

    bandwidth: float = 0.80  # of memory
    products: float = 0.46  # of arithmetic, by products of many rows
    half: float = 48.0  # rows at which products reach half of that
    attention: float = 0.55  # of bf16 arithmetic
    link: float = 0.80  # of links inside a domain
    net: float = 0.85  # and of those between domains
    imbalance: float = 1.10  # the fullest expert rank against the mean
    overlap: float = 0.0  # share of exchanges between experts that is hidden behind products
    layer: float = 20e-6  # seconds of launching and of small kernels, a layer
    step: float = 300e-6  # and a step
    near: float = 8e-6  # seconds that an exchange takes at least, inside a domain
    far: float = 25e-6  # and between domains


@dataclass(frozen=True, slots=True)
class Work:
    """What a step does on one rank of attention. `decodes` rows have read `read` tokens between them; prompts bring the
    other tokens, in `pairs` pairs of a new token and one before it, each of which reads `reach` tokens at once."""

    tokens: float
    yields: float
    decodes: float = 0.0
    read: float = 0.0
    pairs: float = 0.0
    reach: float = 0.0

    @staticmethod
    def decode(rows: float, context: float) -> Work:
        return Work(rows, rows, rows, rows * context)

    @staticmethod
    def prefill(tokens: float, context: float, prompts: float = 1.0) -> Work:
        """A chunk of prompts, whose tokens each have `context` before them in the mean."""
        return Work(tokens, prompts, pairs=tokens * context, reach=2 * context)


@dataclass
class Terms:
    """Seconds by term, and what bounds each."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    bounds: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def add(self, name: str, seconds: float, bound: str) -> None:
        if seconds <= 0:
            return
        if seconds > self.seconds.get(name, 0.0):
            self.bounds[name] = bound
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def roof(self, name: str, reading: float, computing: float) -> None:
        self.add(name, max(reading, computing), "memory" if reading >= computing else "arithmetic")

    @property
    def largest(self) -> str:
        """The term that takes longest, and its bound."""
        name = max(self.seconds, key=lambda key: self.seconds[key])
        return f"{name} ({self.bounds[name]})"


class Costs:
    """The formulae for one model, layout and machine."""

    def __init__(
        self, shape: Shape, layout: Layout, stages: list[Stage], machine: Machine, rates: Efficiency, redundant: int = 0
    ) -> None:
        self.shape, self.layout, self.stages, self.machine, self.rates = shape, layout, stages, machine, rates
        self.redundant = redundant if layout.ep > 1 else 0
        self._read = machine.bandwidth * 1e9 * rates.bandwidth
        self._touched: dict[float, float] = {}

    def slowest(self, work: Work) -> Terms:
        """The stage that the others wait for."""
        return max((self.stage(stage, work) for stage in self.stages), key=lambda terms: terms.total)

    def seconds(self, work: Work) -> float:
        """Of a step through all stages, one after another."""
        return sum(self.stage(stage, work).total for stage in self.stages)

    def stage(self, stage: Stage, work: Work) -> Terms:
        terms, attn_tp = Terms(), self.layout.attn_tp
        kv_share = min(attn_tp, self.shape.kv_heads) if self.shape.kv_heads > 1 else attn_tp
        self._product(terms, "attention weights", stage.weights["attention"], work.tokens, attn_tp)
        self._product(terms, "attention weights", stage.weights["kv"], work.tokens, kv_share)
        self._product(terms, "attention weights", stage.weights["whole"], work.tokens, 1)
        self._product(terms, "dense weights", stage.weights["dense"], work.tokens, attn_tp)
        if stage.sparse:
            self._experts(terms, stage, work)
        for reads in stage.reads:
            self._attention(terms, reads, work)
        if stage.state:
            rows = work.decodes + (work.tokens - work.decodes) / 64  # prompts write a state a chunk of 64
            terms.add("states", 2 * rows * stage.state / attn_tp / self._read, "memory")
        if stage.last:
            for amount in stage.head.values():
                self._product(terms, "head", amount, work.yields, attn_tp)
        self._exchanges(terms, stage, work)
        terms.add("launch", stage.layers * self.rates.layer + self.rates.step / len(self.stages), "launch")
        return terms

    # products

    def _flops(self, kind: Kind, rows: float) -> float:
        return self.machine.rate(kind) * self.rates.products * rows / (rows + self.rates.half)

    def _product(self, terms: Terms, name: str, amount: Amount, rows: float, share: float) -> None:
        if not amount.count or not rows:
            return
        computing = 2 * amount.count / share * rows / self._flops(amount.kind, rows)
        terms.roof(name, amount.bytes / share / self._read, computing)

    def _experts(self, terms: Terms, stage: Stage, work: Work) -> None:
        shape, layout, amount = self.shape, self.layout, stage.weights["experts"]
        tokens = work.tokens * layout.attn_dp
        places = (shape.experts + self.redundant) / layout.ep
        # Of each token's k choices, those that fall on this rank; and the experts that anybody has chosen.
        chosen = tokens * shape.top_k / layout.ep * self.rates.imbalance
        touched = places * (1 - (1 - 1 / places) ** chosen) if places > 1 else min(1.0, chosen)
        one = 1 / shape.experts / layout.expert_tp
        computing = 2 * amount.count * one * chosen / self._flops(amount.kind, chosen / max(touched, 1e-9))
        terms.roof("experts", amount.bytes * one * touched / self._read, computing)

    def _attention(self, terms: Terms, reads: Reads, work: Work) -> None:
        layout = self.layout
        held = reads.bytes / shared(reads.heads, layout)
        flops = self.machine.rate("bf16") * self.rates.attention * layout.attn_tp
        if work.decodes:
            seen = reads.seen(work.read / work.decodes) * work.decodes
            reading = (seen * held + work.read * reads.scan) / self._read
            terms.roof("attention", reading, seen * reads.decode / flops)
        if work.pairs:
            tokens = work.tokens - work.decodes
            seen = reads.seen(work.pairs / tokens) * tokens
            # A chunk reads what is before it once, and a tile of 128 queries at a time again from the cache.
            reading = reads.seen(work.reach) * max(1.0, tokens / 4096) * held / self._read
            terms.roof("attention", reading, seen * reads.prefill / flops)

    # exchanges

    def _exchanges(self, terms: Terms, stage: Stage, work: Work) -> None:
        layout, width = self.layout, 2.0 * self.shape.hidden
        plain = stage.layers - stage.sparse
        # One sum behind attention in every layer, and one behind a dense block.
        self._sum(terms, stage.layers + plain, work.tokens * width, layout.attn_tp)
        if stage.sparse and layout.attn_dp == 1:
            self._sum(terms, stage.sparse, work.tokens * width, layout.tp)
        elif stage.sparse and layout.ep == 1:
            self._sum(terms, stage.sparse, work.tokens * layout.attn_dp * width, layout.tp)
        elif stage.sparse:
            self._sum(terms, stage.sparse, work.tokens * width, layout.expert_tp)
            self._all_to_all(terms, stage, work)
        if len(self.stages) > 1:
            far = layout.tp * layout.pp > self.machine.domain
            link, least = self._link(far)
            terms.add("pipeline", work.tokens / layout.attn_tp * width / link + least, "link")

    def _link(self, far: bool) -> tuple[float, float]:
        """Bytes a second, and the least time of an exchange."""
        rates, machine = self.rates, self.machine
        return (machine.net * 1e9 * rates.net, rates.far) if far else (machine.link * 1e9 * rates.link, rates.near)

    def _sum(self, terms: Terms, count: int, size: float, ranks: int) -> None:
        if ranks == 1 or not count:
            return
        link, least = self._link(ranks > self.machine.domain)
        moved = 2 * (ranks - 1) / ranks * size / link
        terms.add("all-reduce", count * max(moved, least), "link" if moved > least else "launch")

    def _all_to_all(self, terms: Terms, stage: Stage, work: Work) -> None:
        """Dispatch in the experts' own type, combine in two bytes. Of long exchanges a token crosses to each other
        domain once and is copied there; short ones send every copy."""
        shape, layout, machine, rates = self.shape, self.layout, self.machine, self.rates
        tokens = work.tokens / layout.attn_tp
        one = shape.hidden * (2 + {"bf16": 2, "fp8": 1, "fp4": 0.5}[stage.weights["experts"].kind])
        near = min(machine.domain, layout.ep)
        domains = layout.ep / near
        outside = shape.top_k * (1 - near / layout.ep)
        if work.pairs and domains > 1:
            met = domains * (1 - (1 - 1 / domains) ** shape.top_k)
            outside = min(outside, (min(met, shape.spread) if shape.spread else met) * (1 - 1 / domains))
        inside = shape.top_k * (near - 1) / near if work.pairs else shape.top_k * (near - 1) / layout.ep
        fast, slow = (self._link(False), self._link(True))
        moved = max(tokens * inside * one / fast[0], tokens * outside * one / slow[0]) * rates.imbalance
        least = 2 * (slow[1] if domains > 1 else fast[1])
        found = stage.sparse * max(moved, least) * (1 - rates.overlap)
        terms.add("all-to-all", found, "link" if moved > least else "launch")
