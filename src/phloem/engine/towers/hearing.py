"""What requests hear: their audio is encoded once, when they enter a slot, into the cross memory of that slot.

It lies beside the pages, not in them: it has a fixed size, all of it is there from the first token on, it never grows
and is never shared by a prefix, so neither allocator nor tree has anything to decide. Its life is that of a slot: from
admission to the next one. After a preemption, or a step without memory, the request is admitted again and encoded
again, unless its audio still lies in some slot: then that is taken.

Legend: n audios, K kv heads, D head size.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from phloem.attention._packed import PackedMemory
from phloem.engine.towers.aligning import alignment
from phloem.models import HearingModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.batch import Admission, Batch
    from phloem.core.request import Align
    from phloem.engine.towers.aligning import Crossed
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model

TOGETHER = 8  # audios in one pass of the encoder: more bring no speed, and each takes memory for its activations


class Ears:
    """Used by the thread that runs the steps alone."""

    def __init__(self, model: HearingModel, pool: KVPool, ops: Ops, max_slots: int) -> None:
        (group,) = [group for group in pool.groups if group.kind == "cross"]
        self._model, self._pool, self._ops, self._group = model, pool, ops, group
        self._heard: list[bytes] = [b""] * max_slots  # digest of the audio that lies in each slot's memory
        self._each = group.pages_each(pool.page_size)
        self.encoded = self.found = 0
        self.aligned: dict[int, NDArray[np.float32]] = {}  # by slot, of requests that ask (`core.request.Align`)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Bring what each of them hears into its slot."""
        wanted = {one.slot: hashlib.blake2b(one.audio, digest_size=16).digest() for one in admissions}
        fresh: dict[bytes, list[Admission]] = {}
        for admission in admissions:
            digest = wanted[admission.slot]
            if digest in fresh:
                fresh[digest].append(admission)
                continue
            source = self._source(digest, admission.slot, wanted)
            if source is None:
                fresh[digest] = [admission]
                continue
            self.found += 1
            if source != admission.slot:
                self._copy(source, admission.slot)
                self._heard[admission.slot] = digest
        waiting = list(fresh.items())
        for at in range(0, len(waiting), TOGETHER):
            self._encode(waiting[at : at + TOGETHER])
        for admission in admissions:
            self.aligned.pop(admission.slot, None)
            if admission.align is not None:
                self.aligned[admission.slot] = self._aligned(admission, admission.align)

    def of(self, batch: Batch) -> dict[int, NDArray[np.float32]]:
        """By row of a batch: where the tokens of those attend that ask."""
        return {row: self.aligned[slot] for row, slot in enumerate(batch.slots.tolist()) if slot in self.aligned}

    def _aligned(self, admission: Admission, align: Align) -> NDArray[np.float32]:
        stored = self._stored(admission.slot) if self._pool.dtype.is_floating_point else self._again(admission.audio)
        model, device, pools = self._model, self._pool.device, self._group.layers
        return alignment(model, self._ops, device, pools, stored, admission.tokens, align)

    def _stored(self, slot: int) -> Crossed:
        """Keys and values of each layer as they lie in a slot."""
        pages = slice(1 + slot * self._each, 1 + (slot + 1) * self._each)

        def crossed(pool: int) -> tuple[torch.Tensor, torch.Tensor]:
            scales = self._pool.scales.get(pool)
            k, v = (x[pages].transpose(1, 2).flatten(0, 1) for x in (self._pool.keys[pool], self._pool.values[pool]))
            k, v = k[: self._group.tokens], v[: self._group.tokens]
            return (k, v) if scales is None else (k.float() * scales.k[:, None], v.float() * scales.v[:, None])

        return crossed

    def _again(self, audio: bytes) -> Crossed:
        """The same of an audio, encoded once more: where they lie as whole numbers with scales."""
        found = {pool: (k[0], v[0]) for pool, k, v in self._model.encode(self._features([audio]), self._pack)}
        return found.__getitem__

    def _source(self, digest: bytes, slot: int, wanted: dict[int, bytes]) -> int | None:
        """A slot in which this audio lies and stays; `slot` itself, if it can be."""
        if self._heard[slot] == digest:
            return slot
        found = (at for at, heard in enumerate(self._heard) if heard == digest and wanted.get(at, digest) == digest)
        return next(found, None)

    def _encode(self, waiting: list[tuple[bytes, list[Admission]]]) -> None:
        for _, admissions in waiting:
            for admission in admissions:
                self._heard[admission.slot] = b""  # until all of it is written
        features = self._features([same[0].audio for _, same in waiting])
        for pool, k, v in self._model.encode(features, self._pack):
            for number, (_, admissions) in enumerate(waiting):
                for admission in admissions:
                    self._write(pool, admission.slot, k[number], v[number])
        for digest, admissions in waiting:
            for admission in admissions:
                self._heard[admission.slot] = digest
        self.encoded += len(waiting)

    def _features(self, audios: Sequence[bytes]) -> torch.Tensor:
        mels, frames = self._model.hears
        each = [torch.frombuffer(bytearray(audio), dtype=torch.float32).view(mels, frames) for audio in audios]
        return torch.stack(each).to(self._pool.device)

    def _pack(self, lengths: Sequence[int]) -> PackedMemory:
        return PackedMemory(self._ops, lengths)

    def _write(self, pool: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [tokens, K, D]."""
        size = self._pool.page_size
        first = (1 + slot * self._each) * size
        places = torch.arange(first, first + len(k), dtype=torch.int32, device=k.device)
        self._ops.write_kv(k, v, self._pool.keys[pool], self._pool.values[pool], places)

    def _copy(self, source: int, target: int) -> None:
        self._heard[target] = b""
        here, there = (slice(1 + slot * self._each, 1 + (slot + 1) * self._each) for slot in (source, target))
        for pool in self._group.layers:
            for tensor in (self._pool.keys[pool], self._pool.values[pool]):
                tensor[there] = tensor[here]


def ears_of(model: Model, pool: KVPool, ops: Ops, max_slots: int) -> Ears | None:
    """None for a model that hears nothing."""
    return Ears(model, pool, ops, max_slots) if isinstance(model, HearingModel) else None
