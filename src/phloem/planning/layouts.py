"""Ways to lay a model over devices, and the memory that each takes of one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError
from phloem.planning.machines import GIB
from phloem.planning.shape import CLASSES, Amount, Reads

if TYPE_CHECKING:
    from phloem.planning.shape import Shape

RUNTIME = 1.5 * GIB  # the device's context, communicators and recorded steps
WIDE = 12  # rows of `hidden` values, of two bytes, that a step holds of each token at its fullest


@dataclass(frozen=True, slots=True)
class Layout:
    """World = dp * pp * tp. Of the `tp` ranks of a stage, attention is cut over tp / attn_dp; experts lie over `ep`,
    each cut over tp / ep."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    attn_dp: int = 1

    @property
    def attn_tp(self) -> int:
        return self.tp // self.attn_dp

    @property
    def expert_tp(self) -> int:
        return self.tp // self.ep

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return " ".join(f"{item.name} {getattr(self, item.name)}" for item in fields(self))

    @staticmethod
    def parse(text: str) -> Layout:
        """From `tp=8,ep=8,attn_dp=8`; what is not said is 1. Raises ConfigError."""
        found: dict[str, int] = {}
        known = [item.name for item in fields(Layout)]
        for part in text.replace(" ", "").split(","):
            name, _, value = part.partition("=")
            if name not in known or not value.isdigit() or not int(value):
                raise ConfigError(f"layout {part!r:.60}: expected one of {', '.join(known)} = a number", param="layout")
            found[name] = int(value)
        return Layout(**found)


def refusal(shape: Shape, layout: Layout, redundant: int = 0) -> str:
    """Why a model cannot be laid out so, with the sizes that would do; "": it can."""
    attn_tp, heads, kv_heads = layout.attn_tp, shape.heads, shape.kv_heads
    if layout.tp % layout.attn_dp or layout.tp % layout.ep:
        return f"attn_dp {layout.attn_dp} and ep {layout.ep} must divide tp {layout.tp}"
    if heads % attn_tp:
        return f"{heads} heads over {attn_tp} ranks of attention; valid: {_divisors_text(heads)}"
    if kv_heads > 1 and kv_heads % attn_tp and attn_tp % kv_heads:
        return f"{kv_heads} KV heads over {attn_tp} ranks of attention; valid: {_divisors_text(kv_heads)} and multiples"
    if layout.pp > len(shape.layers):
        return f"pp {layout.pp} of {len(shape.layers)} layers"
    if not shape.experts:
        return "ep and attn_dp are for sparse models" if layout.ep > 1 or layout.attn_dp > 1 else ""
    if (shape.experts + redundant) % layout.ep:
        all_of_them = shape.experts + redundant
        return f"{all_of_them} experts over ep {layout.ep}; valid: {_divisors_text(all_of_them)}"
    if shape.inner % layout.expert_tp:
        return f"an expert's inner size {shape.inner} over {layout.expert_tp}; valid: {_divisors_text(shape.inner)}"
    return ""


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _divisors_text(number: int) -> str:
    return ", ".join(str(size) for size in divisors(number)[:12])


def layouts(shape: Shape, gpus: int, redundant: int = 0) -> Iterator[Layout]:
    """Every layout of so many devices that the model's sizes allow."""
    for tp in divisors(gpus):
        for pp in divisors(gpus // tp):
            for ep in divisors(tp) if shape.experts else [1]:
                for attn_dp in divisors(tp) if shape.experts else [1]:
                    found = Layout(tp, pp, ep, gpus // tp // pp, attn_dp)
                    if not refusal(shape, found, redundant if ep > 1 else 0):
                        yield found


# what a stage of a pipeline holds


@dataclass(frozen=True)
class Stage:
    """The sums over one stage's layers. `reads` are those of all layers, alike ones added up."""

    weights: dict[str, Amount]
    reads: tuple[Reads, ...]
    kept: tuple[tuple[float, int, int], ...]  # bytes a token, window, heads that share them
    state: float
    layers: int
    sparse: int
    first: bool
    last: bool
    embedding: Amount
    head: dict[str, Amount]


def stages(shape: Shape, pp: int) -> list[Stage]:
    """Layers in even shares, the larger ones first, as the engine cuts them."""
    count, found, start = len(shape.layers), list[Stage](), 0
    for number in range(pp):
        end = start + count // pp + (number < count % pp)
        found.append(_stage(shape, start, end, number == 0, number == pp - 1))
        start = end
    return found


def _stage(shape: Shape, start: int, end: int, first: bool, last: bool) -> Stage:
    weights = {name: Amount() for name in CLASSES}
    reads: dict[tuple[int, int], Reads] = {}
    kept: dict[tuple[int, int], float] = {}
    part = shape.layers[start:end]
    for layer in part:
        for name, amount in layer.weights.items():
            _sum(weights[name], amount)
        for one in layer.reads:
            at = reads.get((one.window, one.heads))
            reads[one.window, one.heads] = one if at is None else _joined(at, one)
        for size, window, heads in layer.kept:
            kept[window, heads] = kept.get((window, heads), 0.0) + size
    return Stage(
        weights, tuple(reads.values()), tuple((size, *key) for key, size in kept.items()),
        sum(layer.state for layer in part), len(part), sum(layer.sparse for layer in part), first, last,
        shape.ends[0].get("vocab", Amount()), shape.head,
    )  # fmt: skip


def _sum(into: Amount, more: Amount) -> None:
    if more.count > into.count:
        into.kind = more.kind
    into.count, into.bytes = into.count + more.count, into.bytes + more.bytes


def _joined(one: Reads, other: Reads) -> Reads:
    return replace(
        one,
        bytes=one.bytes + other.bytes,
        decode=one.decode + other.decode,
        prefill=one.prefill + other.prefill,
        scan=one.scan + other.scan,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest device. `kv`: left for pages and states; `request`: what one of the context takes."""

    weights: float
    work: float
    kv: float
    request: float
    per_token: float

    @cached_property
    def rows(self) -> int:
        """Requests of the context that its KV memory holds."""
        return int(self.kv // self.request) if self.kv > 0 and self.request else 0


def memory(
    shape: Shape, layout: Layout, all_stages: list[Stage], usable: float, context: float, chunk: int, redundant: int = 0
) -> Memory:
    """Of the stage with the least room for requests. `usable`: bytes of a device that may be taken."""
    found: list[Memory] = []
    for stage in all_stages:
        shares = _shares(shape, layout, redundant)
        weights = sum(amount.bytes * shares[name] for name, amount in stage.weights.items())
        ends = ([stage.embedding] if stage.first else []) + (list(stage.head.values()) if stage.last else [])
        weights += sum(amount.bytes for amount in {id(amount): amount for amount in ends}.values()) / layout.attn_tp
        work = (
            RUNTIME
            + 2.0 * WIDE * chunk * shape.hidden
            + (4.0 * 512 * shape.vocab / layout.attn_tp if stage.last else 0)
        )
        per_token = sum(size / shared(heads, layout) for size, _, heads in stage.kept)
        request = stage.state / layout.attn_tp
        for size, window, heads in stage.kept:
            request += size / shared(heads, layout) * (min(context, window) if window else context)
        found.append(Memory(weights, work, usable - weights - work, request, per_token))
    return min(found, key=lambda item: (item.rows, item.kv))


def shared(heads: int, layout: Layout) -> int:
    """Ranks that each keep a part of these KV heads."""
    return min(layout.attn_tp, heads)


def _shares(shape: Shape, layout: Layout, redundant: int) -> dict[str, float]:
    """Which share of each class of weights a rank keeps."""
    more = 1 + redundant / shape.experts if shape.experts and layout.ep > 1 else 1.0
    return {
        "attention": 1 / layout.attn_tp,
        "kv": 1 / min(layout.attn_tp, shape.kv_heads) if shape.kv_heads > 1 else 1 / layout.attn_tp,
        "dense": 1 / layout.attn_tp,
        "whole": 1.0,
        "experts": more / layout.tp,
        "vocab": 1 / layout.attn_tp,
    }
