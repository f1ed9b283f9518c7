"""Batches as bytes, for ranks that execute them: each is told only what differs from the batch before.

While the same requests decode, the scheduler gives the same arrays with every batch, as nothing changes them after a
launch: what is the same object needs no look. Where rows have new pages the tables are other ones: a small one is told
whole, for looking where two differ takes longer than copying one; of a large one the cells that differ are told. Both
ends see all batches in one order, those that never run among them.

Token ids are not told: they come with the word to go, when those that the step before has chosen are known.

Legend: R rows, P pages of the widest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from phloem.core.batch import FROM_DEVICE, Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Table = NDArray[np.int32]


WHOLE = 32 << 10  # bytes of a table that is told whole: see `docs/parallel.md`
_INT32 = np.dtype(np.int32)


class Cells(msgspec.Struct, frozen=True, array_like=True):
    """What differs from the table before, of as many rows: which cells of the new one, and their values, int32. It is
    `pages` wide; where it was narrower, new cells are 0 unless told."""

    pages: int
    at: bytes
    values: bytes


class Plan(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A `Batch` as bytes, int32 all: what a rank needs to execute it. None: as in the plan before."""

    step: int
    epoch: int
    prefix_lens: bytes
    slots: bytes | None = None
    query_lens: bytes | None = None
    outputs: bytes | None = None
    tables: list[bytes | Cells] | None = None  # [R, P] each
    targets: dict[int, bytes] = {}
    adapters: bytes | None = None  # None: of no row


@dataclass(slots=True)
class Packing:
    """The end that sends."""

    _last: Batch | None = None  # as the other end has it
    _slots: bytes = b""  # of it

    def pack(self, batch: Batch) -> Plan:
        """What the other ranks need of a batch. Raises ValueError for one that they cannot execute."""
        last = self._last
        same = last is not None and batch.outputs is last.outputs
        alone = batch.positions, batch.drafting, batch.parents, batch.places
        if batch.embeds or any(part is not None for part in alone):
            raise ValueError("a batch with pictures, or drafts of a model runs on one rank alone")
        self._last = batch
        slots, rows = None, last is not None and batch.slots is last.slots
        if not rows:  # as bytes, which are compared in a tenth of the time that numpy takes
            before, slots = self._slots, raw(batch.slots)
            rows, self._slots = last is not None and slots == before, slots
        tables: list[bytes | Cells] | None = None
        if last is None or not rows or len(last.tables) != len(batch.tables):
            tables = [raw(table) for table in batch.tables]
        elif batch.tables is not last.tables:
            both = zip(last.tables, batch.tables, strict=True)
            tables = [raw(new) if new.nbytes <= WHOLE else _news(old, new) for old, new in both]
        return Plan(
            batch.step,
            batch.epoch,
            raw(batch.prefix_lens),
            None if rows else slots,
            None if last is not None and batch.query_lens is last.query_lens else raw(batch.query_lens),
            None if same else raw(batch.outputs),
            tables,
            {row: raw(targets) for row, targets in batch.prompt_targets.items()},
            None if batch.adapters is None else raw(batch.adapters),
        )


def _news(old: Table, new: Table) -> bytes | Cells:
    """Of the same rows."""
    pages = new.shape[1]
    at = ((old if old.shape[1] == pages else _of_width(old, pages)) != new).reshape(-1).nonzero()[0]
    if 2 * len(at) >= new.size > 0:  # they would take as many bytes
        return raw(new)
    return Cells(pages, raw(at), raw(new.take(at)))


def _of_width(table: Table, pages: int) -> Table:
    """A copy with so many columns, of which new ones are 0."""
    found = np.zeros((len(table), pages), np.int32)
    kept = min(pages, table.shape[1])
    found[:, :kept] = table[:, :kept]
    return found


@dataclass(slots=True)
class Unpacking:
    """The end that receives."""

    _last: Batch | None = None

    def unpack(self, plan: Plan) -> Batch:
        """The batch again, without admissions, and without token ids, which are said when it runs. Raises ValueError
        for what differs from nothing that was told."""
        last = self._last
        if last is None:
            if plan.slots is None or plan.query_lens is None or plan.outputs is None or plan.tables is None:
                raise ValueError("a plan differs from one that was never told")
            last = _NOTHING
        slots = last.slots if plan.slots is None else ints(plan.slots)
        query_lens = last.query_lens if plan.query_lens is None else ints(plan.query_lens)
        tables = last.tables
        if plan.tables is not None:
            tables = tuple(_table(last, number, told, len(slots)) for number, told in enumerate(plan.tables))
        found = self._last = Batch(
            plan.step,
            slots,
            query_lens,
            ints(plan.prefix_lens),
            np.full(int(query_lens.sum()), FROM_DEVICE, np.int32),
            tables,
            last.outputs if plan.outputs is None else ints(plan.outputs),
            prompt_targets={row: ints(targets) for row, targets in plan.targets.items()},
            epoch=plan.epoch,
            adapters=None if plan.adapters is None else ints(plan.adapters),
        )
        return found


def _table(last: Batch, number: int, told: bytes | Cells, rows: int) -> Table:
    if isinstance(told, bytes):
        return ints(told).reshape(rows, -1)
    if number >= len(last.tables) or len(last.tables[number]) != rows:
        raise ValueError(f"a table of {rows} rows differs from one that was never told")
    table = _of_width(last.tables[number], told.pages)  # the batch before may still wait for its turn
    table.reshape(-1)[ints(told.at)] = ints(told.values)
    return table


def raw(array: NDArray[np.integer[Any]]) -> bytes:
    """As int32, row by row."""
    return (array if array.dtype is _INT32 else array.astype(np.int32)).tobytes()


def ints(data: bytes) -> NDArray[np.int32]:
    """Those of `raw`, in memory that may be written to: torch wants that."""
    return np.frombuffer(data, np.int32).copy()


_NONE = np.zeros(0, np.int32)
_NOTHING = Batch(-1, _NONE, _NONE, _NONE, _NONE, (), _NONE)
