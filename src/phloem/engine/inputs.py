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
from phloem.attention._both_ways import Spans
from phloem.attention._cascade import MOST_TOKENS, find, fixed_sizes
from phloem.kernels.ops import PagedBatch, SharedPages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.attention import Sharing
    from phloem.attention._cascade import Shared
    from phloem.core.batch import Batch
    from phloem.core.memory import Group
    from phloem.engine.drafts.branches import Echoes
    from phloem.engine.towers.media import Pictures
    from phloem.engine.transfer import LastTokens
    from phloem.engine.wanted import Wanted
    from phloem.kvcache.pool import KVPool

ALIGNMENT = 16  # bytes: kernels load aligned vectors
DIRECT = 64 << 10  # bytes of a page table up to which all of it is sent, used or not


@dataclass(slots=True)
class StepInputs:
    """A step's tensors on the device: of its own sizes, or fixed ones of the largest sizes that a recorded step has."""

    # input_ids [T] int64, positions [T] or [3, T] int64, query_start [R + 1] int32, seq_lens [R] int32,
    # logit_index [L] int64; then of each group of pages: page_table [R, P] int32, token_slots [T] int32; of states:
    # reads [R] int64, writes [R] int64, fresh [R] bool, prefix_lens [R] int32; of cross: as `cross_arrays`.
    tensors: list[Tensor]
    groups: tuple[Group, ...]
    max_query_len: int
    max_seq_len: int
    adapters: tuple[Tensor, Tensor] | None = None  # of the tokens [T] and of the wanted positions [L], int32
    embeds: tuple[Tensor, Tensor] | None = None
    deep: Tensor | None = None  # as in `ForwardBatch`
    spans: Spans | None = None  # pictures that see themselves both ways
    shared: dict[int, SharedPages] = field(default_factory=dict)  # by group
    # Where some of its tokens are written more than once: the rows of all that is written in each group, and which of
    # the step's tokens each of those is, int64.
    echo: tuple[list[PagedBatch | StateRows], Tensor] | None = None

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
            elif group.kind == "cross":
                each, whole, table, *rest = rest
                found.append(PagedBatch(each, whole, table, whole, 1, group.tokens))
            else:
                table, slots, *rest = rest
                sizes = self.max_query_len, self.max_seq_len
                found.append(PagedBatch(starts, lens, table, slots, *sizes, self.shared.get(number)))
        return found

    def part(self, tokens: int, rows: int, wanted: int) -> StepInputs:
        """The first tokens, rows and wanted positions of fixed inputs, as a step of these sizes."""
        sizes = [tokens, tokens, rows + 1, rows, wanted]
        for group in self.groups:
            if group.kind == "cross":
                sizes += [tokens + 1, tokens, tokens]
            else:
                sizes += [rows] * 4 if group.kind == "state" else [rows, tokens]
        sizes += [tokens, wanted] if self.adapters is not None else []
        parts = [tensor[:size] for tensor, size in zip(self.tensors, sizes, strict=True)]
        adapters = None if self.adapters is None else (parts[-2], parts[-1])
        return replace(self, tensors=parts, adapters=adapters, max_query_len=min(self.max_query_len, tokens))


def no_shared_pages(pool: KVPool, tokens: int, rows: int) -> dict[int, SharedPages]:
    """Of a step of dummy rows that share nothing, for each group of pages."""
    sizes = [*fixed_sizes(rows)[:3], (min(tokens, MOST_TOKENS),), (min(tokens, MOST_TOKENS),), (tokens,)]
    numbers = [number for number, group in enumerate(pool.groups) if group.kind == "pages"]
    none = [torch.zeros(size, dtype=torch.int32, device=pool.device) for size in sizes]
    none[-1].sub_(1)
    return {number: SharedPages(*none) for number in numbers}


class FixedInputs:
    """The inputs of a recorded step: tensors that stay where they are, of the largest sizes that it serves.

    As they come every row is on page 0 and has one token, so that recording may run the step. On a device they lie in
    one buffer, which one transfer fills (`fill`). `shared`: which rows of a decode step share pages is among them, in
    each group of pages; `adapted`: so are the adapters, of a step on the host.
    """

    def __init__(
        self,
        pool: KVPool,
        tokens: int,
        rows: int,
        wanted: int,
        pages: int,
        *,
        on_host: bool,
        shared: bool = False,
        adapted: bool = False,
    ) -> None:
        long, short = torch.int64, torch.int32
        single = tokens == rows  # rows of one token each, all of them wanted: which those are is always the same
        wants: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((tokens,), long), ((tokens,), long), ((rows + 1,), short), ((rows,), short), ((wanted,), long)
        ]  # fmt: skip
        crossed: list[int] = []
        for group in pool.groups:
            if group.kind == "state":
                wants += [((rows,), long), ((rows,), long), ((rows,), torch.bool), ((rows,), short)]
            elif group.kind == "cross":
                each = group.pages_each(pool.page_size)
                crossed.append(len(wants))
                wants += [((tokens + 1,), short), ((tokens,), short), ((tokens, each), short)]
            else:
                wants += [((rows, pages), short), ((tokens,), short)]
        told = [number for number, group in enumerate(pool.groups) if shared and group.kind == "pages"]
        sharing = [(shape, short) for shape in fixed_sizes(rows)] if told else []
        wants += sharing * len(told)
        wants += [((tokens,), short), ((wanted,), short)] if adapted else []
        constant = {2, 4} if single else set[int]()
        self._layout = _Layout(wants if on_host or not single else [*wants, ((rows,), long)], constant, pool.device)
        tensors = self._layout.tensors[: len(wants)]
        tensors[2].copy_(torch.arange(rows + 1))
        tensors[3].fill_(1)
        for place in crossed:
            tensors[place].copy_(torch.arange(tokens + 1))
            tensors[place + 1].fill_(1)
        self.slots: Tensor | None = None if on_host or not single else self._layout.tensors[-1]
        rest = iter(tensors[len(tensors) - len(sharing) * len(told) :])
        pages_of = {number: SharedPages(*(next(rest) for _ in sharing)) for number in told}
        longest = 1 if single else tokens
        adapters = (tensors[-2], tensors[-1]) if adapted else None
        self.routes: dict[int, Tensor] = {}  # where replays have the experts that were chosen, if anybody asks
        self.inputs = StepInputs(tensors, pool.groups, longest, pages * pool.page_size, adapters, shared=pages_of)
        # On the host a step is written in place, as arrays: cheaper than one tensor after the other.
        self._targets: list[Any] = [tensor.numpy() for tensor in tensors] if on_host else list(tensors)
        if single:
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

    def fill(self, arrays: Sequence[NDArray[Any]], slots: NDArray[np.int64], last: LastTokens) -> None:
        """Put a step of as many rows as this has, of one token each, here by one transfer; tokens that only the
        device knows are taken from `last`, from these places: their slots, unless they are drafts."""
        assert self.slots is not None
        parts = [(number, a) for number, a in enumerate(arrays) if self._targets[number] is not None]
        self._layout.fill([*parts, (len(arrays), slots)], last.into)
        if (arrays[0] < 0).any():
            last.resolve_(self.inputs.input_ids, self.slots)


class _Layout:
    """Tensors in one buffer; those that are `constant` stand apart, as nothing is sent to them. A large table is sent
    as narrow as it is, behind the others, and spread on the device."""

    def __init__(
        self, wants: Sequence[tuple[tuple[int, ...], torch.dtype]], constant: set[int], device: torch.device
    ) -> None:
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in wants]
        wide = [len(shape) > 1 and size > DIRECT for (shape, _), size in zip(wants, sizes, strict=True)]
        apart = [wide[number] or number in constant for number in range(len(wants))]
        starts = np.cumsum([0, *(0 if alone else _aligned(size) for size, alone in zip(sizes, apart, strict=True))])
        room = sum(_aligned(size) for size, table in zip(sizes, wide, strict=True) if table)
        self._end = int(starts[-1])
        self._flat = torch.zeros(self._end + room, dtype=torch.uint8, device=device)
        self._places = [None if alone else int(start) for start, alone in zip(starts[:-1], apart, strict=True)]
        self.tensors: list[Tensor] = [
            torch.zeros(shape, dtype=dtype, device=device)
            if place is None
            else self._flat[place : place + size].view(dtype).view(shape)
            for (shape, dtype), size, place in zip(wants, sizes, self._places, strict=True)
        ]

    def fill(self, arrays: Sequence[tuple[int, NDArray[Any]]], into: Callable[..., None]) -> None:
        """Arrays of whole tensors by their numbers; tables may be narrower."""
        parts: list[tuple[int, NDArray[Any]]] = []
        spread: list[tuple[Tensor, int, NDArray[Any]]] = []
        end = self._end
        for number, array in arrays:
            target, place = self.tensors[number], self._places[number]
            if place is None:
                parts.append((end, array))
                spread.append((target, end, array))
                end += _aligned(array.nbytes)
            elif array.ndim > 1 and array.shape[1] < target.shape[1]:
                whole = np.zeros(target.shape, array.dtype)
                whole[:, : array.shape[1]] = array
                parts.append((place, whole))
            else:
                parts.append((place, array))
        into(self._flat, parts)
        for target, start, array in spread:
            source = self._flat[start : start + array.nbytes].view(target.dtype).view(array.shape)
            target[:, : array.shape[1]] = source


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Step:
    """A batch on its way through the ways of running it; what they share is made once."""

    def __init__(
        self,
        batch: Batch,
        wanted: Wanted,
        pool: KVPool,
        last: LastTokens,
        sharing: Sharing | None = None,
        pictures: Pictures | None = None,
        echoes: Echoes | None = None,
    ) -> None:
        self.batch, self._echoes = batch, echoes
        self.wanted = wanted
        self._sharing = sharing
        self.pictures = pictures
        self._shared: dict[int, Shared] | None = None
        self._pool, self.last = pool, last
        self._arrays: Sequence[Any] | None = None
        self._inputs: StepInputs | None = None

    @property
    def recordable(self) -> bool:
        """Nothing in it but what the fixed inputs of a recorded step have, without adapters."""
        return self.batch.adapters is None and self.flat

    @property
    def flat(self) -> bool:
        """Its tokens are all of the vocabulary, at one position each, in one place of memory."""
        batch = self.batch
        turned = batch.positions is not None and batch.positions.ndim > 1
        return not batch.embeds and not turned and self.pictures is None and self._echoes is None

    @property
    def known(self) -> Batch:
        """The batch with the tokens that the step before gave, where the host has them."""
        batch, host = self.batch, self.last.host
        if host is None or not (batch.input_ids < 0).any():
            return batch
        each = batch.slots if batch.num_tokens == batch.num_rows else np.repeat(batch.slots, batch.query_lens)
        return replace(batch, input_ids=np.where(batch.input_ids < 0, host[each], batch.input_ids).astype(np.int32))

    def adapter_arrays(self) -> list[NDArray[np.int32]]:
        """The adapters of its tokens [T] and of its wanted positions [L], where it has any."""
        batch = self.batch
        if batch.adapters is None:
            return []
        each = batch.adapters
        if batch.num_tokens != batch.num_rows:
            each = np.repeat(each, batch.query_lens)
        return [each, each[self.logit_index]]

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
        for number, (group, table) in enumerate(zip(self._pool.groups, batch.tables, strict=False)):
            if group.kind == "pages":
                one = find(table, batch.query_lens, batch.prefix_lens, size, group.window, sharing)
                if one is not None:
                    found[number] = one
        return found

    def _sharing_arrays(self, rows: int) -> list[NDArray[np.int32]]:
        """For each group of pages which of the rows share some, in the sizes of a recorded step."""
        nobody = [np.zeros(shape, np.int32) for shape in fixed_sizes(rows)]
        more: list[NDArray[np.int32]] = []
        for number, group in enumerate(self._pool.groups):
            if group.kind == "pages":
                one = self.shared.get(number)
                more += nobody if one is None else one.padded(rows)
        return more

    def arrays(self, rows: int) -> Sequence[Any]:
        """The step padded to so many rows of one token: arrays on a host, tensors on a device."""
        if rows != self.batch.num_rows:
            return self._moved(padded(self.batch, rows), np.arange(rows))
        if self._arrays is None:
            self._arrays = self._moved(self.batch, self.logit_index)
        return self._arrays

    def put(self, fixed: FixedInputs, rows: int) -> None:
        """Into the inputs of a recorded step of so many rows of one token."""
        more = self._sharing_arrays(rows) if fixed.inputs.shared else []
        if fixed.slots is None:
            fixed.write([*self.arrays(rows), *more])
            return
        batch, pool, count = self.batch, self._pool, self.batch.num_rows
        whole = batch if rows == count else padded(batch, rows)
        each = np.arange(rows)
        arrays = host_arrays(whole, each, each, pool.page_size, pool.groups)
        arrays[0] = arrays[0].astype(np.int64)
        fixed.fill([*arrays, *more], self.last.places(whole.slots, whole.input_ids), self.last)
        self.last.at = fixed.slots[:count] if (batch.outputs == 1).all() else None

    @property
    def inputs(self) -> StepInputs:
        """Its tensors."""
        if self._inputs is None:
            self._inputs = self._tensors()
        return self._inputs

    def _tensors(self) -> StepInputs:
        batch, up = self.batch, self.last.up
        if self._echoes is not None:
            return self._echoed(self._echoes)
        more = [array for one in self.shared.values() for array in one.arrays]
        arrays = self._moved(batch, self.logit_index, more) if more else self.arrays(batch.num_rows)
        tensors = up(arrays) if self.last.host is not None else list(arrays)
        rest, tensors = iter(tensors[len(tensors) - len(more) :]), tensors[: len(tensors) - len(more)]
        shared = {number: SharedPages(*(next(rest) for _ in one.arrays)) for number, one in self.shared.items()}
        longest, most = int(batch.query_lens.max()), int((batch.prefix_lens + batch.query_lens).max())
        inputs = StepInputs(tensors, self._pool.groups, longest, most, shared=shared)
        if batch.adapters is not None:
            each, kept = up(self.adapter_arrays())
            inputs.adapters = each, kept
        if batch.embeds:
            index = [np.arange(one.start, one.start + len(one.values)) for one in batch.embeds]
            rows, values = up([np.concatenate(index), np.concatenate([one.values for one in batch.embeds])])
            inputs.embeds = rows, values
        if self.pictures is not None:
            values_nN, *more = self.pictures.values.split(self.pictures.hidden_size, -1)
            inputs.embeds = self.pictures.index, values_nN
            inputs.deep = torch.stack(more) if more else None
            spans = self.pictures.spans
            inputs.spans = self._spans(spans, self.pictures.canvases) if spans else None
        return inputs

    def _echoed(self, echoes: Echoes) -> StepInputs:
        """Its tensors, where some tokens are written more than once. Those rows see one token: nobody reads what they
        find."""
        batch, count = echoes.batch, self.batch.num_tokens
        moved = self._moved(batch, self.logit_index, [echoes.source])
        *tensors, source = self.last.up(moved) if self.last.host is not None else list(moved)
        tensors[3][self.batch.num_rows :] = 1
        sizes = int(batch.query_lens.max()), int((batch.prefix_lens + batch.query_lens).max())
        whole = StepInputs(tensors, self._pool.groups, *sizes)
        tensors = [tensors[0][:count], tensors[1][:count], *tensors[2:]]
        return replace(whole, tensors=tensors, echo=(whole.rows(), source))

    def _spans(self, spans: list[tuple[int, int, int]], canvases: bool) -> Spans:
        first, counts, ends = (np.array(each) for each in zip(*spans, strict=True))
        index = np.concatenate([np.arange(at, at + count) for at, count, _ in spans])
        rows = np.searchsorted(np.cumsum(self.batch.query_lens), first, side="right")
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        index_n, rows_S, starts_S, ends_S = self.last.up([index, rows, starts, ends.astype(np.int32)])
        return Spans(index_n, rows_S, starts_S, ends_S, int(counts.max()), int(ends.max()), canvases)

    def _moved(self, batch: Batch, index: NDArray[np.int64], more: Sequence[Any] = ()) -> Sequence[Any]:
        last, pool = self.last, self._pool
        single = batch.num_tokens == batch.num_rows
        rows = np.arange(batch.num_rows)
        rows = rows if single else np.repeat(rows, batch.query_lens)  # of each token
        arrays = host_arrays(batch, rows, index, pool.page_size, pool.groups) + list(more)
        slots = batch.slots if single else batch.slots[rows]
        if last.host is not None:
            arrays[0] = np.where(batch.input_ids < 0, last.host[slots], batch.input_ids)
            return arrays
        arrays[0] = batch.input_ids.astype(np.int64)
        late = bool((batch.input_ids < 0).any())
        own = last.places(slots, batch.input_ids) if late else np.zeros(0, np.int64)
        *tensors, places_T, at = last.up([*arrays, own, self.wanted.slots.astype(np.int64)])
        if late:
            last.resolve_(tensors[0], places_T)
        last.at = at if self.wanted.starts is None else None
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
    crossed = [group for group in groups if group.kind == "cross"]  # behind the others; no table of a batch is theirs
    for group, table in zip(groups[: len(groups) - len(crossed)], batch.tables, strict=True):
        if group.kind == "state":
            reads, writes = table.T.astype(np.int64)
            arrays += [reads, writes, prefix == 0, prefix]
        else:
            arrays += [table, table[rows, pages] * np.int32(page_size) + offsets]
    for group in crossed:
        arrays += cross_arrays(batch.slots[rows], group, page_size)
    return arrays


def cross_arrays(slots: NDArray[np.int32], group: Group, page_size: int) -> list[NDArray[np.int32]]:
    """Each token as a row of its own that sees all the positions of its slot: where rows start, how many they see, and
    their pages. So the attention of earlier tokens serves, whose last token sees everything."""
    count, each = len(slots), group.pages_each(page_size)
    table = slots[:, None] * np.int32(each) + np.arange(1, each + 1, dtype=np.int32)
    return [np.arange(count + 1, dtype=np.int32), np.full(count, group.tokens, np.int32), table]


def padded(batch: Batch, rows: int) -> Batch:
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
