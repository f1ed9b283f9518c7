"""Pictures in a step: what stands in for the embeddings of their tokens, and where these tokens are.

A tower runs in the step that first computes a token of a picture, for all such pictures of the step together. What it
gives is kept by content, up to a number of bytes, so that later chunks, other requests and those that come back after a
preemption find it. A picture whose tokens all come from the prefix tree is never looked at.

Legend: T packed new tokens, n of them of pictures, N hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.attention._packed import PackedMemory
from phloem.core.media import FIRST, places, real_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Admission, Batch
    from phloem.core.media import Media
    from phloem.kernels.ops import Ops
    from phloem.models import Tower


_WORDS = {2: np.dtype("<i2"), 4: np.dtype("<i4")}  # by bytes of a value: numpy does not know all types


class EncoderCache:
    """What the tower made of pictures, by digest; the least recently used go first beyond `budget` bytes.

    The last one stays, however large: the next chunk of its request needs it.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: bytes) -> Tensor | None:
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
        return found

    def put(self, digest: bytes, features: Tensor) -> None:
        # A part of what the tower made of several pictures would keep all of it alive.
        if features.untyped_storage().nbytes() > features.nbytes:
            features = features.clone()
        self._kept[digest] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.budget and len(self._kept) > 1:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0


@dataclass(slots=True)
class Pictures:
    """A step's tokens of pictures."""

    index: Tensor  # [n] int64: among the step's T tokens
    values: Tensor  # [n, N, or a multiple of it: further parts are added behind the first layers]
    hidden_size: int  # N
    spans: list[tuple[int, int, int]]  # of each picture that sees itself both ways: first token, how many, end
    canvases: bool = False  # they are no pictures, but canvases that are drawn anew (`engine.canvases.refill`)


@dataclass(slots=True)
class _Seen:
    media: tuple[Media, ...]
    places: NDArray[np.int64] | None  # [3, end of the last picture]; None: places are those of the tokens
    tokens: NDArray[np.int32]  # [end]: the placeholders as the model knows them


class Desk:
    """The pictures of the running requests, by slot. Used by the thread that runs steps alone."""

    def __init__(
        self,
        tower: Tower,
        ops: Ops,
        slots: int,
        budget: int,
        up: Callable[[list[NDArray[Any]]], Sequence[Tensor]],
    ) -> None:
        self.tower, self.cache = tower, EncoderCache(budget)
        self._pack = partial(PackedMemory, ops)
        self._up = up
        self._seen: dict[int, _Seen] = {}
        self._end = np.zeros(slots, dtype=np.int32)  # of the last picture
        self._shift = np.zeros(slots, dtype=np.int64)  # how far the places behind it are from those of the tokens
        self.encoded = self.found = 0  # pictures: of the tower, and of the cache instead

    def counted(self) -> tuple[int, int]:
        """Pictures of the tower and of the cache since the last call."""
        found, self.encoded, self.found = (self.encoded, self.found), 0, 0
        return found

    def forget(self) -> None:
        """Every request; what was made of pictures goes too, its memory may be what was lacking."""
        self._seen.clear()
        self._end[:] = 0
        self._shift[:] = 0
        self.cache.clear()

    def admit(self, batch: Batch) -> Batch:
        """The batch with the tokens that the model knows."""
        admissions = [self._admit(one) for one in batch.admissions] if batch.admissions else batch.admissions
        if not self._seen or not ((batch.input_ids >= FIRST).any() or batch.prompt_targets):
            return batch if not batch.admissions else replace(batch, admissions=admissions)
        return replace(
            batch,
            admissions=admissions,
            input_ids=real_ids(batch.input_ids, self.tower.token),  # their embeddings are never read
            prompt_targets={row: self._targets(batch, row, ids) for row, ids in batch.prompt_targets.items()},
        )

    def _targets(self, batch: Batch, row: int, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Targets of a row with its placeholders: the one behind each of its tokens."""
        seen = self._seen.get(int(batch.slots[row]))
        if seen is None or not len(ids):
            return ids
        last = len(seen.tokens) - 1
        behind = int(batch.prefix_lens[row]) + int(batch.query_lens[row]) - len(ids) + 1 + np.arange(len(ids))
        return np.where(ids >= FIRST, seen.tokens[np.minimum(behind, last)], ids).astype(np.int32)

    def _admit(self, admission: Admission) -> Admission:
        slot, media = admission.slot, admission.media
        self._seen.pop(slot, None)
        self._end[slot] = self._shift[slot] = 0
        if not media:
            return admission
        ordered = tuple(sorted(media, key=lambda item: item.end))
        end, turned = ordered[-1].end, None
        if self.tower.turns:
            turned, after = places(ordered)
            end = turned.shape[1]
            self._shift[slot] = after - end
        tokens = np.full(end, self.tower.token, dtype=np.int32)
        for item in ordered:
            for start, count in item.spans:
                tokens[start : start + count] = item.token
        self._end[slot] = end
        self._seen[slot] = _Seen(ordered, turned, tokens)
        known = admission.tokens
        tokens = np.append(tokens, np.full(max(0, len(known) - end), self.tower.token, np.int32))[: len(known)]
        return replace(admission, tokens=np.where(known >= FIRST, tokens, known).astype(np.int32))

    def dress(self, batch: Batch) -> tuple[Batch, Pictures | None]:
        """The batch with the places of its tokens, and what stands in for their embeddings."""
        if not self._seen:
            return batch, None
        inside = np.flatnonzero(batch.prefix_lens < self._end[batch.slots]).tolist()
        shifts = self._shift[batch.slots]
        if not inside and not shifts.any():
            return batch, None
        starts = np.cumsum(batch.query_lens) - batch.query_lens
        if self.tower.turns:
            batch = replace(batch, positions=self._positions(batch, starts, shifts, inside))
        return batch, self._pictures(batch, starts, inside) if inside else None

    def _positions(
        self, batch: Batch, starts: NDArray[np.int32], shifts: NDArray[np.int64], inside: list[int]
    ) -> NDArray[np.int64]:
        """[T], or [3, T] where some are of a picture."""
        own = np.arange(batch.num_tokens) - np.repeat(starts - batch.prefix_lens, batch.query_lens)
        flat_T = own.astype(np.int64) + np.repeat(shifts, batch.query_lens)
        if not inside:
            return flat_T
        found_3T = np.repeat(flat_T[None], 3, axis=0)
        for row in inside:
            seen, first = self._seen[int(batch.slots[row])], int(batch.prefix_lens[row])
            assert seen.places is not None
            known = seen.places[:, first : first + int(batch.query_lens[row])]
            at = int(starts[row])
            found_3T[:, at : at + known.shape[1]] = known
        return found_3T

    def _pictures(self, batch: Batch, starts: NDArray[np.int32], inside: list[int]) -> Pictures | None:
        found: list[tuple[int, int, int]] = []  # row, at, how many
        pieces: list[tuple[int, int, Media, int]] = []  # at, how many, of whom, from where among its embeddings
        for row in inside:
            first = int(batch.prefix_lens[row])
            last, at = first + int(batch.query_lens[row]), int(starts[row])
            for item in self._seen[int(batch.slots[row])].media:
                done = 0
                for start, count in item.spans:
                    low, high = max(start, first), min(start + count, last)
                    if low < high:
                        found.append((row, at + low - first, high - low))
                        pieces.append((at + low - first, high - low, item, done + low - start))
                    done += count
        if not pieces:
            return None
        ends = [(at, count, int(batch.prefix_lens[row] - starts[row]) + at + count) for row, at, count in found]
        spans = ends if self.tower.whole else []
        features = self._features({item.digest: item for _, _, item, _ in pieces})
        values = [features[item.digest][skip : skip + count] for _, count, item, skip in pieces]
        index = np.concatenate([np.arange(at, at + count) for at, count, _, _ in pieces])
        (index_n,) = self._up([index])
        return Pictures(index_n, values[0] if len(values) == 1 else torch.cat(values), self.tower.hidden_size, spans)

    def _given(self, item: Media) -> Tensor:
        """What an encoder server has made of it [tokens, N, or a multiple of it]."""
        kind: torch.dtype = getattr(torch, item.kind)
        words = np.frombuffer(item.features, dtype=_WORDS[kind.itemsize])
        (values,) = self._up([words.copy()])  # torch wants memory that may be written
        return values.view(kind).view(item.count, -1)

    def _features(self, wanted: dict[bytes, Media]) -> dict[bytes, Tensor]:
        found = {digest: kept for digest in wanted if (kept := self.cache.get(digest)) is not None}
        self.found += len(found)
        fresh = [item for digest, item in wanted.items() if digest not in found and not item.features]
        for digest, item in wanted.items():
            if digest not in found and item.features:
                found[digest] = self._given(item)
                self.cache.put(digest, found[digest])
        if fresh:
            made = self.tower.encode(fresh, self._pack)
            for item, features in zip(fresh, made, strict=True):
                if len(features) != item.count:
                    raise ValueError(f"a picture of {item.count} tokens became {len(features)} embeddings")
                found[item.digest] = features
                self.cache.put(item.digest, features)
            self.encoded += len(fresh)
        return found
