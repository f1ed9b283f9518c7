"""Batches as bytes, for ranks that execute them: each is told of its tables only what differs from the batch before.

In a step that decodes the rows of the one before it few rows have a new page; with many rows of long requests the
tables are most of a batch. Both ends see all batches in one order, those that never run among them.

Legend: R rows, P pages of the widest row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from phloem.core.batch import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Table = NDArray[np.int32]


class Cells(msgspec.Struct, frozen=True, array_like=True):
    """What differs from the table before, of as many rows and pages: which cells of it, and their values, int32."""

    at: bytes
    values: bytes


class Plan(msgspec.Struct, frozen=True, tag=True):
    """A `Batch` as bytes, int32 all: what a rank needs to execute it."""

    step: int
    epoch: int
    slots: bytes
    query_lens: bytes
    prefix_lens: bytes
    input_ids: bytes
    outputs: bytes
    tables: list[bytes | Cells]  # [R, P] each
    targets: dict[int, bytes]
    adapters: bytes | None = None


@dataclass(slots=True)
class Packing:
    """The end that sends."""

    _tables: list[Table] = field(default_factory=list["Table"])  # as the other end has them

    def pack(self, batch: Batch) -> Plan:
        """What the other ranks need of a batch. Raises ValueError for one that they cannot execute."""
        if batch.embeds or batch.positions is not None or (batch.outputs > 1).any():
            raise ValueError("a batch with pictures or drafts runs on one rank alone")
        return Plan(
            step=batch.step,
            epoch=batch.epoch,
            slots=raw(batch.slots),
            query_lens=raw(batch.query_lens),
            prefix_lens=raw(batch.prefix_lens),
            input_ids=raw(batch.input_ids),
            outputs=raw(batch.outputs),
            tables=self._told(batch.tables),
            targets={row: raw(targets) for row, targets in batch.prompt_targets.items()},
            adapters=None if batch.adapters is None else raw(batch.adapters),
        )

    def _told(self, tables: tuple[Table, ...]) -> list[bytes | Cells]:
        if [table.shape for table in tables] != [table.shape for table in self._tables]:
            self._tables = [np.array(table, np.int32, order="C") for table in tables]
            return [table.tobytes() for table in self._tables]
        return [self._news(kept, table) for kept, table in zip(self._tables, tables, strict=True)]

    @staticmethod
    def _news(kept: Table, table: Table) -> bytes | Cells:
        at = np.flatnonzero(kept != table).astype(np.int32)
        if 2 * len(at) >= kept.size > 0:  # they would take as many bytes
            kept[:] = table
            return kept.tobytes()
        values = table.reshape(-1)[at]
        kept.reshape(-1)[at] = values
        return Cells(at.tobytes(), values.tobytes())


@dataclass(slots=True)
class Unpacking:
    """The end that receives."""

    _tables: list[Table] = field(default_factory=list["Table"])  # of the last batch

    def unpack(self, plan: Plan) -> Batch:
        """The batch again, without admissions. Raises ValueError for what differs from nothing that was told."""
        slots = ints(plan.slots)
        tables = [self._table(number, told, len(slots)) for number, told in enumerate(plan.tables)]
        self._tables = tables
        return Batch(
            plan.step,
            slots,
            ints(plan.query_lens),
            ints(plan.prefix_lens),
            ints(plan.input_ids),
            tuple(tables),
            ints(plan.outputs),
            prompt_targets={row: ints(targets) for row, targets in plan.targets.items()},
            epoch=plan.epoch,
            adapters=None if plan.adapters is None else ints(plan.adapters),
        )

    def _table(self, number: int, told: bytes | Cells, rows: int) -> Table:
        if isinstance(told, bytes):
            return ints(told).reshape(rows, -1)
        if number >= len(self._tables) or len(self._tables[number]) != rows:
            raise ValueError(f"a table of {rows} rows differs from one that was never told")
        table = self._tables[number].copy()  # the batch before may still wait for its turn
        table.reshape(-1)[ints(told.at)] = ints(told.values)
        return table


def raw(array: NDArray[np.integer[Any]]) -> bytes:
    """As int32."""
    return np.ascontiguousarray(array, np.int32).tobytes()


def ints(data: bytes) -> NDArray[np.int32]:
    """Those of `raw`, in memory that may be written to: torch wants that."""
    return np.frombuffer(data, np.int32).copy()
