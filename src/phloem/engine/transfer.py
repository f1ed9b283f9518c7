"""Values between host and device: a step's inputs on their way up, its tokens on their way down.

The last token of each slot stays on the device, where the next step takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from phloem.core.batch import FROM_DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch
    from phloem.engine.wanted import Wanted
    from phloem.kernels.ops import Ops
    from phloem.platforms._streams import Streams


class Up(Protocol):
    """Brings host arrays to the device, all of them at once."""

    def __call__(self, arrays: Sequence[NDArray[Any]], /) -> Sequence[Tensor]: ...


class Coming(Protocol):
    """Device values on their way to the host."""

    def done(self) -> bool: ...

    def wait(self) -> list[NDArray[Any]]: ...


@dataclass(slots=True)
class Here:
    """Values that are waited for where they are read: the counterpart of `Streams.down` without streams."""

    tensors: Sequence[Tensor]

    def done(self) -> bool:
        return True

    def wait(self) -> list[NDArray[Any]]:
        return [tensor.cpu().numpy() for tensor in self.tensors]


@dataclass(slots=True)
class Known:
    """Values that the host has."""

    values: list[NDArray[Any]]

    def done(self) -> bool:
        return True

    def wait(self) -> list[NDArray[Any]]:
        return self.values


def plain_up(device: torch.device) -> Callable[[Sequence[NDArray[Any]]], list[Tensor]]:
    """Host arrays to the device one by one: the counterpart of `Streams.up` without streams."""

    def up(arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True) for array in arrays]

    return up


def plain_into(target: Tensor, parts: Sequence[tuple[int, NDArray[Any]]]) -> None:
    """The counterpart of `Streams.into` without streams."""
    for at, array in parts:
        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        target[at : at + array.nbytes].copy_(flat)


def late_tokens_(ids_T: Tensor, last_S: Tensor, slots_T: Tensor) -> None:
    """`Ops.late_tokens_` in torch code."""
    ids_T.copy_(torch.where(ids_T < 0, last_S[slots_T], ids_T))


def keep_tokens_(last_S: Tensor, slots_L: Tensor, tokens_L: Tensor, sound_L: Tensor) -> Tensor:
    """`Ops.keep_tokens_` in torch code."""
    last_S[slots_L] = tokens_L.long()
    tokens_L = tokens_L.to(torch.int32)
    return torch.where(torch.isnan(sound_L), -1 - tokens_L, tokens_L)


@dataclass(slots=True)
class Packed:
    """Tokens with a mark on the damaged ones (`Ops.keep_tokens_`), as (tokens, whether each is damaged)."""

    coming: Coming

    def done(self) -> bool:
        return self.coming.done()

    def wait(self) -> list[NDArray[Any]]:
        (packed,) = self.coming.wait()
        return [np.maximum(packed, -1 - packed), packed < 0]


class LastTokens:
    """The last sampled token of each slot, and behind those of all slots what was drafted, depth by depth. `host`: the
    same memory as an array, where the device is the host.

    `at`: the slots of the positions that yield in the step that was given to the device last, where its inputs
    brought them along.
    """

    def __init__(
        self,
        slots: int,
        device: torch.device,
        on_host: bool,
        streams: Streams | None,
        ops: Ops | None = None,
        *,
        drafts: int = 0,
    ) -> None:
        """`drafts`: of a slot, at most, that the device alone knows."""
        self._slots = slots
        self.values = torch.zeros(slots * (1 + drafts), dtype=torch.int64, device=device)
        self.host: NDArray[np.int64] | None = self.values.numpy() if on_host else None
        self.at: Tensor | None = None
        self.up = streams.up if streams is not None else plain_up(device)
        self.into = streams.into if streams is not None else plain_into
        self.down: Callable[[Sequence[Tensor]], Coming] = streams.down if streams is not None else Here
        fused = None if ops is None or ops.late_tokens_ is None or ops.keep_tokens_ is None else ops
        # Brings resolved tokens to the other ranks, and theirs here: all call it together.
        self.spread: Callable[[Tensor], object] | None = None
        self._late = late_tokens_ if fused is None or fused.late_tokens_ is None else fused.late_tokens_
        self._keep = keep_tokens_ if fused is None or fused.keep_tokens_ is None else fused.keep_tokens_

    def places(self, slots: NDArray[np.integer], ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where in `values` the tokens are that these ids below 0 stand for; of other ids, any place."""
        return slots.astype(np.int64) + self._slots * np.maximum(FROM_DEVICE - ids.astype(np.int64), 0)

    def put(self, slots: NDArray[np.integer], ids: NDArray[np.integer], tokens_n: Tensor) -> None:
        """These tokens are what those ids stand for from now on."""
        (at,) = self.up([self.places(slots, ids)])
        self.values.index_copy_(0, at, tokens_n)

    def resolve_(self, ids_T: Tensor, places_T: Tensor) -> None:
        """In place: ids below 0 become what they stand for."""
        self._late(ids_T, self.values, places_T)
        if self.spread is not None:
            self.spread(ids_T)

    def known(self, batch: Batch) -> NDArray[np.int64]:
        """The ids of its tokens [T], those that only the device has among them: they are waited for."""
        late = batch.input_ids < 0
        if not late.any():
            return batch.input_ids.astype(np.int64)
        (values,) = self.down([self.values]).wait()
        each = np.repeat(batch.slots, batch.query_lens)
        return np.where(late, values[self.places(each, batch.input_ids)], batch.input_ids)

    def keep(self, wanted: Wanted, tokens_L: Tensor, sound_L: Tensor) -> Coming:
        """Keep what the next step begins with, and send all tokens and whether each is damaged on their way; behind
        them the drafts, if the device alone knows those.

        `sound_L`: a number of each position that is NaN where its logits are.
        """
        if self.host is not None:
            damaged_L = torch.isnan(sound_L)
            values = tokens_L.numpy()
            if wanted.drafts is None:
                self.host[wanted.slots] = values
            else:
                last = wanted.last(values)
                self.host[wanted.slots[last]] = values[last]
            return Known([values, damaged_L.numpy()])
        if wanted.starts is None:
            at, self.at = self.at, None
            if at is None or len(at) != len(wanted.slots):
                (at,) = self.up([wanted.slots.astype(np.int64)])
            return Packed(self.down([self._keep(self.values, at, tokens_L, sound_L)]))
        late_L = self._late_drafts(wanted) if wanted.late else None
        (index,) = self.up([wanted.slots[wanted.starts].astype(np.int64)])
        self.values[index] = tokens_L[wanted.last_on_device(tokens_L, self.up, late_L)[0]].long()
        drafts = [] if late_L is None else [late_L.to(torch.int32)]
        return self.down([tokens_L.to(torch.int32), torch.isnan(sound_L), *drafts])

    def _late_drafts(self, wanted: Wanted) -> Tensor:
        """[L] its drafts, on the device."""
        assert wanted.drafts is not None
        drafts_L, at_L = self.up([wanted.drafts.astype(np.int64), self.places(wanted.slots, wanted.drafts)])
        return torch.where(drafts_L < FROM_DEVICE, self.values[at_L], drafts_L)
