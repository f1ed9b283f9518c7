"""Rows of a pass as bytes, for ranks that are processes of their own.

What rows share with others and with later steps (conditions, pictures, adapters) is sent once and has a number; a
number is taken back when its sender forgets the thing.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from phloem.diffusion.family import Row
from phloem.diffusion.lora import Layer, Lora
from phloem.diffusion.request import Condition, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

NONE = -1  # the number of what a row does not have


class Block(msgspec.Struct, frozen=True):
    """A tensor's values."""

    data: bytes
    kind: str
    shape: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Block:
        flat = x.detach().cpu().contiguous().reshape(-1)
        return Block(flat.view(torch.uint8).numpy().tobytes(), str(x.dtype).removeprefix("torch."), tuple(x.shape))

    def at(self, device: torch.device) -> Tensor:
        kind: torch.dtype = getattr(torch, self.kind)
        if not self.data:
            return torch.empty(self.shape, dtype=kind, device=device)
        return torch.frombuffer(bytearray(self.data), dtype=kind).view(self.shape).to(device)


class TextBlocks(msgspec.Struct, frozen=True, tag=True):
    """A `Condition`."""

    states: Block
    pooled: Block | None
    tokens: int


class SeenBlocks(msgspec.Struct, frozen=True, tag=True):
    """A `Seen`."""

    latents: Block
    shapes: tuple[tuple[int, int], ...]
    embeds: Block | None


class LoraBlocks(msgspec.Struct, frozen=True, tag=True):
    """A `Lora`: of each layer both matrices, their scale and a bias."""

    name: str
    path: str
    layers: dict[str, tuple[Block, Block, float, Block | None]]


Thing = TextBlocks | SeenBlocks | LoraBlocks


class SentRow(msgspec.Struct, frozen=True):
    """A `Row`; numbers stand for what was sent before or beside it."""

    latents: Block
    time: float
    condition: int
    embedded: float
    width: int
    height: int
    seen: int
    worn: list[tuple[int, float]]
    last: bool
    fps: float


class Pass(msgspec.Struct, frozen=True, tag=True):
    """Compute these rows. `new`: things by number, kept until they are `gone`, which is before this pass."""

    number: int
    rows: list[SentRow]
    new: dict[int, Thing]
    gone: list[int]


class Meet(msgspec.Struct, frozen=True, tag=True):
    """Find the other ranks at this place; what was sent before is forgotten."""

    place: str


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Another rank has failed of the pass: whoever waits for it in there is to leave. It is heard meanwhile."""


class End(msgspec.Struct, frozen=True, tag=True):
    """Nothing comes any more."""


Order = Pass | Meet | End | Leave
encode: Callable[[Order], bytes] = msgspec.msgpack.Encoder().encode
decode: Callable[[bytes], Order] = msgspec.msgpack.Decoder(Order).decode


class Sender:
    """Makes passes of rows, for ranks that have read all passes before."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # by the thing's id, as long as it lives
        self._gone: list[int] = []
        self._count = 0

    def order(self, number: int, rows: Sequence[Row]) -> Pass:
        new: dict[int, Thing] = {}

        def of(thing: Condition | Seen | Lora | None) -> int:
            if thing is None:
                return NONE
            found = self._numbers.get(id(thing))
            if found is None:
                found, self._count = self._count, self._count + 1
                self._numbers[id(thing)] = found
                new[found] = _blocks(thing)
                # Whichever thread forgets it; an id may be another's right after.
                weakref.finalize(thing, self._forget, id(thing), found).atexit = False
            return found

        gone, self._gone = self._gone, []
        sent = [
            SentRow(
                Block.of(row.latents),
                row.time,
                of(row.condition),
                row.embedded,
                row.width,
                row.height,
                of(row.seen),
                [(of(adapter), scale) for adapter, scale in row.worn],
                row.last,
                row.fps,
            )
            for row in rows
        ]
        return Pass(number, sent, new, gone)

    def _forget(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._gone.append(number)


class Reader:
    """Reads them. Args: where rows are computed, in which type adapters are, and what makes a model ready for one."""

    def __init__(self, device: torch.device, dtype: torch.dtype, prepare: Callable[[Lora], None]) -> None:
        self._device, self._dtype, self._prepare = device, dtype, prepare
        self._things: dict[int, Any] = {}

    def rows(self, order: Pass) -> list[Row]:
        for number in order.gone:
            self._things.pop(number, None)
        for number, blocks in order.new.items():
            self._things[number] = self._thing(blocks)
        things = self._things
        return [
            Row(
                row.latents.at(self._device),
                row.time,
                things[row.condition],
                row.embedded,
                row.width,
                row.height,
                seen=None if row.seen == NONE else things[row.seen],
                worn=tuple((things[number], scale) for number, scale in row.worn),
                last=row.last,
                fps=row.fps,
            )
            for row in order.rows
        ]

    def forget(self) -> None:
        self._things.clear()

    def _thing(self, blocks: Thing) -> Condition | Seen | Lora:
        device = self._device
        if isinstance(blocks, TextBlocks):
            pooled = None if blocks.pooled is None else blocks.pooled.at(device)
            return Condition(blocks.states.at(device), pooled, blocks.tokens)
        if isinstance(blocks, SeenBlocks):
            embeds = None if blocks.embeds is None else blocks.embeds.at(device)
            return Seen(blocks.latents.at(device), blocks.shapes, embeds)
        layers = {
            name: Layer(a.at(device), b.at(device), scale, None if bias is None else bias.at(device))
            for name, (a, b, scale, bias) in blocks.layers.items()
        }
        adapter = Lora(blocks.name, blocks.path, layers).at(device, self._dtype)
        self._prepare(adapter)
        return adapter


def _blocks(thing: Condition | Seen | Lora) -> Thing:
    if isinstance(thing, Condition):
        return TextBlocks(Block.of(thing.states_SE), _maybe(thing.pooled_E), thing.text_tokens)
    if isinstance(thing, Seen):
        return SeenBlocks(Block.of(thing.latents), thing.shapes, _maybe(thing.embeds_SE))
    layers = {
        name: (Block.of(one.a_RI), Block.of(one.b_OR), one.scale, _maybe(one.bias_O))
        for name, one in thing.layers.items()
    }
    return LoraBlocks(thing.name, thing.path, layers)


def _maybe(x: Tensor | None) -> Block | None:
    return None if x is None else Block.of(x)
