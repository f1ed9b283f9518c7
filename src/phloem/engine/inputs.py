"""From a `Batch` (numpy, host) to what a forward pass reads (tensors, device). No loop over rows or tokens.

A step's inputs are one list of arrays in a fixed order. On their way they are arrays, then tensors, or they are written
into the fixed tensors of a recorded step; all of that is the same list.

Legend: R rows, T packed new tokens, P pages per row, L positions whose hidden states are wanted, G groups of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from phloem.attention import StateRows
from phloem.attention._cascade import find, fixed_sizes
from phloem.kernels.ops import PagedBatch, SharedPages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.attention import Sharing
    from phloem.attention._cascade import Shared
    from phloem.core.batch import Batch
    from phloem.core.memory import Group
    from phloem.engine.transfer import LastTokens
    from phloem.engine.wanted import Wanted
    from phloem.kvcache.pool import KVPool


@dataclass(slots=True)
class StepInputs:
    """A step's tensors on the device: of its own sizes, or fixed ones of the largest sizes that a recorded step has."""

    # input_ids [T] int64, positions [T] or [3, T] int64, query_start [R + 1] int32, seq_lens [R] int32,
    # logit_index [L] int64; then of each group of pages: page_table [R, P] int32, token_slots [T] int32; of states:
    # reads [R] int64, writes [R] int64, fresh [R] bool, prefix_lens [R] int32.
    tensors: list[Tensor]
    groups: tuple[Group, ...]
    max_query_len: int
    max_seq_len: int
    adapters: Tensor | None = None  # [T] int32
    embeds: tuple[Tensor, Tensor] | None = None
    shared: dict[int, SharedPages] = field(default_factory=dict)  # by group

    @property
    def input_ids(self) -> Tensor:
        return self.tensors[0]

    @property
    def positions(self) -> Tensor:
        return self.tensors[1]

    @property
    def logit_index(self) -> Tensor:
        return self.tensors[4]

    def rows(self) -> list[PagedBatch | StateRows]:
        """The step's rows in each group."""
        _, _, starts, lens, _, *rest = self.tensors
        found: list[PagedBatch | StateRows] = []
        for number, group in enumerate(self.groups):
            if group.kind == "state":
                reads, writes, fresh, prefix, *rest = rest
                found.append(StateRows(reads, writes, fresh, starts, prefix, self.max_query_len))
            else:
                table, slots, *rest = rest
                sizes = self.max_query_len, self.max_seq_len
                found.append(PagedBatch(starts, lens, table, slots, *sizes, self.shared.get(number)))
        return found

    def part(self, tokens: int, rows: int, wanted: int) -> StepInputs:
        """The first tokens, rows and wanted positions of fixed inputs, as a step of these sizes."""
        sizes = [tokens, tokens, rows + 1, rows, wanted]
        for group in self.groups:
            sizes += [rows] * 4 if group.kind == "state" else [rows, tokens]
        parts = [tensor[:size] for tensor, size in zip(self.tensors, sizes, strict=True)]
        return replace(self, tensors=parts, max_query_len=min(self.max_query_len, tokens))


class FixedInputs:
    """The inputs of a recorded step: tensors that stay where they are, of the largest sizes that it serves.

    As they come every row is on page 0 and has one token, so that recording may run the step. `shared`: which rows of
    a decode step share pages is among them, in each group of pages.
    """

    def __init__(
        self, pool: KVPool, tokens: int, rows: int, wanted: int, pages: int, *, on_host: bool, shared: bool = False
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=pool.device)

        long = torch.int64
        tensors = [
            zeros(tokens, dtype=long),
            zeros(tokens, dtype=long),
            torch.arange(rows + 1, dtype=torch.int32, device=pool.device),
            torch.ones(rows, dtype=torch.int32, device=pool.device),
            zeros(wanted, dtype=long),
        ]
        for group in pool.groups:
            if group.kind == "state":
                tensors += [
                    zeros(rows, dtype=long),
                    zeros(rows, dtype=long),
                    zeros(rows, dtype=torch.bool),
                    zeros(rows),
                ]
            else:
                tensors += [zeros(rows, pages), zeros(tokens)]
        longest = 1 if tokens == rows else tokens
        self.inputs = StepInputs(tensors, pool.groups, longest, pages * pool.page_size)
        if shared:
            for number, group in enumerate(pool.groups):
                if group.kind == "pages":
                    arrays = [zeros(*shape) for shape in fixed_sizes(rows)]
                    self.inputs.shared[number] = SharedPages(*arrays)
                    tensors += arrays
        # On the host a step is written in place, as arrays: cheaper than one tensor after the other.
        self._targets: list[Any] = [tensor.numpy() for tensor in tensors] if on_host else list(tensors)
        if longest == 1:  # rows of one token each, all of them wanted: always the same
            self._targets[2] = self._targets[4] = None

    def write(self, arrays: Sequence[Any]) -> None:
        """Copy a step into the first tokens, rows and wanted positions; what lies behind them stays."""
        for target, source in zip(self._targets, arrays, strict=True):
            if target is None:
                continue
            if source.ndim == 1:
                target[: len(source)] = source
            else:
                rows, pages = source.shape
                target[:rows, :pages] = source


class Step:
    """A batch on its way through the ways of running it; what they share is made once."""

    def __init__(
        self, batch: Batch, wanted: Wanted, pool: KVPool, last: LastTokens, sharing: Sharing | None = None
    ) -> None:
        self.batch = batch
        self.wanted = wanted
        self._sharing = sharing
        self._shared: dict[int, Shared] | None = None
        self._pool, self._last = pool, last
        self._arrays: Sequence[Any] | None = None
        self._inputs: StepInputs | None = None

    @property
    def recordable(self) -> bool:
        """Nothing in it but what the fixed inputs of a recorded step have."""
        batch = self.batch
        turned = batch.positions is not None and batch.positions.ndim > 1
        return not batch.embeds and batch.adapters is None and not turned

    @property
    def pages(self) -> int:
        """The most pages of a row's table."""
        return max(table.shape[1] for table in self.batch.tables)  # of states: 2

    @property
    def logit_index(self) -> NDArray[np.int64]:
        """[L]: which tokens' hidden states are wanted: those that yield, then those for prompt logprobs."""
        if not self.batch.prompt_targets:
            return self.wanted.at
        return np.concatenate([self.wanted.at, prompt_positions(self.batch)])

    @property
    def shared(self) -> dict[int, Shared]:
        """Group -> which rows share pages there, where attending to those once for all of them saves time."""
        if self._shared is None:
            self._shared = {} if self._sharing is None else self._find(self._sharing)
        return self._shared

    def _find(self, sharing: Sharing) -> dict[int, Shared]:
        batch, size, found = self.batch, self._pool.page_size, {}
        for number, (group, table) in enumerate(zip(self._pool.groups, batch.tables, strict=True)):
            if group.kind == "pages":
                one = find(table, batch.query_lens, batch.prefix_lens, size, group.window, sharing)
                if one is not None:
                    found[number] = one
        return found

    def shared_arrays(self, rows: int) -> Sequence[Any]:
        """`arrays`, and behind them for each group of pages which of the rows share some."""
        nobody = [np.zeros(shape, np.int32) for shape in fixed_sizes(rows)]
        more: list[Any] = []
        for number, group in enumerate(self._pool.groups):
            if group.kind == "pages":
                one = self.shared.get(number)
                more += nobody if one is None else one.padded(rows)
        batch = self.batch if rows == self.batch.num_rows else _padded(self.batch, rows)
        return self._moved(batch, np.arange(rows), more)

    def arrays(self, rows: int) -> Sequence[Any]:
        """The step padded to so many rows of one token: arrays on a host, tensors on a device."""
        if rows != self.batch.num_rows:
            return self._moved(_padded(self.batch, rows), np.arange(rows))
        if self._arrays is None:
            self._arrays = self._moved(self.batch, self.logit_index)
        return self._arrays

    @property
    def inputs(self) -> StepInputs:
        """Its tensors."""
        if self._inputs is None:
            self._inputs = self._tensors()
        return self._inputs

    def _tensors(self) -> StepInputs:
        batch, up = self.batch, self._last.up
        more = [array for one in self.shared.values() for array in one.arrays]
        arrays = self._moved(batch, self.logit_index, more) if more else self.arrays(batch.num_rows)
        tensors = up(arrays) if self._last.host is not None else list(arrays)
        rest, tensors = iter(tensors[len(tensors) - len(more) :]), tensors[: len(tensors) - len(more)]
        shared = {number: SharedPages(*(next(rest) for _ in one.arrays)) for number, one in self.shared.items()}
        longest, most = int(batch.query_lens.max()), int((batch.prefix_lens + batch.query_lens).max())
        inputs = StepInputs(tensors, self._pool.groups, longest, most, shared=shared)
        if batch.adapters is not None:
            (inputs.adapters,) = up([np.repeat(batch.adapters, batch.query_lens).astype(np.int32)])
        if batch.embeds:
            index = [np.arange(one.start, one.start + len(one.values)) for one in batch.embeds]
            rows, values = up([np.concatenate(index), np.concatenate([one.values for one in batch.embeds])])
            inputs.embeds = rows, values
        return inputs

    def _moved(self, batch: Batch, index: NDArray[np.int64], more: Sequence[Any] = ()) -> Sequence[Any]:
        last, pool = self._last, self._pool
        single = batch.num_tokens == batch.num_rows
        rows = np.arange(batch.num_rows)
        rows = rows if single else np.repeat(rows, batch.query_lens)  # of each token
        arrays = host_arrays(batch, rows, index, pool.page_size, pool.groups) + list(more)
        slots = batch.slots if single else batch.slots[rows]
        if last.host is not None:
            arrays[0] = np.where(batch.input_ids < 0, last.host[slots], batch.input_ids)
            return arrays
        arrays[0] = batch.input_ids.astype(np.int64)
        late = np.flatnonzero(batch.input_ids < 0)
        *tensors, places, late_slots = last.up([*arrays, late, slots[late].astype(np.int64)])
        if len(late):
            tensors[0][places] = last.values[late_slots]
        return tensors


def host_arrays(
    batch: Batch, rows: NDArray[np.int64], index: NDArray[np.int64], page_size: int, groups: tuple[Group, ...]
) -> list[NDArray[Any]]:
    """What `StepInputs.tensors` holds, before it goes to the device, with token ids as the batch has them.

    `rows`: of each token; `index`: the wanted positions.
    """
    count, prefix = batch.num_rows, batch.prefix_lens
    if batch.num_tokens == count:
        starts = np.arange(count + 1, dtype=np.int32)
        places = prefix
    else:
        starts = np.zeros(count + 1, np.int32)
        np.cumsum(batch.query_lens, out=starts[1:])
        places = np.arange(batch.num_tokens, dtype=np.int32) - np.repeat(starts[:-1] - prefix, batch.query_lens)
    positions = places.astype(np.int64) if batch.positions is None else batch.positions
    arrays: list[NDArray[Any]] = [batch.input_ids, positions, starts, prefix + batch.query_lens, index]
    pages, offsets = np.divmod(places, np.int32(page_size))
    for group, table in zip(groups, batch.tables, strict=True):
        if group.kind == "state":
            reads, writes = table.T.astype(np.int64)
            arrays += [reads, writes, prefix == 0, prefix]
        else:
            arrays += [table, table[rows, pages] * np.int32(page_size) + offsets]
    return arrays


def _padded(batch: Batch, rows: int) -> Batch:
    """A decode step with more rows behind its own: each one token at position 0 of scratch memory."""
    more = rows - batch.num_rows

    def longer(array: NDArray[Any], value: int = 0) -> NDArray[Any]:
        return np.concatenate([array, np.full((more, *array.shape[1:]), value, array.dtype)])

    return replace(
        batch,
        slots=longer(batch.slots),
        query_lens=longer(batch.query_lens, 1),
        prefix_lens=longer(batch.prefix_lens),
        input_ids=longer(batch.input_ids),
        tables=tuple(longer(table) for table in batch.tables),
        outputs=longer(batch.outputs, 1),
        positions=None if batch.positions is None else longer(batch.positions),
    )


def prompt_positions(batch: Batch) -> NDArray[np.int64]:
    """Packed indices of the tokens whose logits are wanted for prompt logprobs, row by row in row order."""
    starts = np.cumsum(batch.query_lens) - batch.query_lens
    return np.concatenate([starts[row] + np.flatnonzero(batch.prompt_targets[row] >= 0) for row in prompt_rows(batch)])


def prompt_rows(batch: Batch) -> list[int]:
    """Rows with prompt logprobs, in the order in which their positions are packed."""
    return sorted(batch.prompt_targets)
