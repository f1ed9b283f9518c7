"""What a step answers: the tokens that count, and what was asked for beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.batch import PositionLogprobs, StepOutput
from phloem.core.errors import BadRequest
from phloem.engine.inputs import prompt_rows
from phloem.engine.sampling.logprobs import Later, logprob_tensors, read
from phloem.engine.wanted import Branching, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch
    from phloem.engine.sampling.slots import Slot, Slots
    from phloem.engine.transfer import Coming, LastTokens
    from phloem.engine.wearing import Ends
    from phloem.kernels.ops import Ops

    Down = Callable[[Sequence[Tensor]], Coming]

# Logits of prompt positions are made in pieces of this many, so that a long prompt's do not all exist at once.
HEAD_ROWS = 256


def empty(batch: Batch) -> StepOutput:
    """Of a step that yields nothing, or nothing yet."""
    return StepOutput(batch.step, np.zeros(batch.num_rows, np.int32), np.zeros(0, np.int32))


def give_out(output: StepOutput, wanted: Wanted, slots: Sequence[Slot], coming: Coming) -> None:
    """Wait for the tokens and put those that count into the output, and into what follows them.

    A row that is not sound fails alone: its weights or its cache are damaged.
    """
    tokens_L, damaged_L, *late = coming.wait()
    if late:
        (wanted.drafts,) = late
    _note_failures(output, wanted)
    if wanted.starts is None and not output.failed and not damaged_L.any():
        output.counts[wanted.rows] = 1
        output.tokens = tokens_L.astype(np.int32)
        for slot, token in zip(slots, tokens_L.tolist() if slots else (), strict=bool(slots)):
            _follow(slot, [token])
        return
    kept: list[NDArray[np.int32]] = []
    for (start, _), way in zip(wanted.spans(), wanted.kept(tokens_L), strict=True):
        row = int(wanted.rows[start])
        if damaged_L[way].any():
            output.failed.setdefault(row, "the model's logits are not numbers (NaN)")
        if row in output.failed:
            way = way[:0]
        output.counts[row] = len(way)
        kept.append(tokens_L[way].astype(np.int32))
        places = way - start
        if isinstance(wanted, Branching):
            output.branches[row] = (places[1:] - 1).tolist()
        if slots:
            _follow(slots[start], kept[-1].tolist())
        if row in output.logprobs:
            output.logprobs[row] = [output.logprobs[row][place] for place in places.tolist()]
        if row in output.hidden:
            output.hidden[row] = output.hidden[row][places]
    output.tokens = np.concatenate(kept)


def _note_failures(output: StepOutput, wanted: Wanted) -> None:
    for position, error in wanted.errors.items():
        row = int(wanted.rows[position])
        if isinstance(error, BadRequest):
            output.failed[row] = error.message
            output.refused.add(row)
        else:
            output.failed[row] = f"{type(error).__name__}: {error}"


def _follow(slot: Slot, tokens: list[int]) -> None:
    if slot.follower is not None:
        slot.untold += tokens
    if slot.params.processors:
        slot.output += tokens


def keep_hidden(
    output: StepOutput, wanted: Wanted, slots: Sequence[Slot], hidden_LN: Tensor, down: Down
) -> list[Later]:
    """The states that tokens are chosen from, of the rows that want them, on their way to the host."""
    if not any(slot.return_hidden for slot in slots):
        return []
    spans = [(start, end) for start, end in wanted.spans() if slots[start].return_hidden]

    def fill(arrays: list[NDArray[Any]]) -> None:
        for (start, _), states in zip(spans, arrays, strict=True):
            output.hidden[int(wanted.rows[start])] = states

    # Copies: the next step writes its states where these are.
    kept = [hidden_LN[start:end].to(torch.float32, copy=True) for start, end in spans]
    return [Later(down(kept), fill)]


def prompt_logprobs(
    output: StepOutput, batch: Batch, slots: Slots, hidden_LN: Tensor, ends: Ends, ops: Ops, last: LastTokens
) -> list[Later]:
    """Of the prompt positions that the batch wants, on their way to the host; `hidden_LN` are theirs, in the order of
    `prompt_positions`."""
    start = 0
    coming: list[Later] = []
    for row in prompt_rows(batch):
        targets = batch.prompt_targets[row]
        slot = slots[int(batch.slots[row])]
        ids = slot.token_ids_logprob
        entry = 0 if batch.adapters is None else int(batch.adapters[row])
        (wanted, *chosen) = last.up([targets[targets >= 0], *([np.array([ids], np.int64)] if ids else [])])
        found: list[PositionLogprobs] = []
        for piece in range(0, len(wanted), HEAD_ROWS):
            tokens_L = wanted[piece : piece + HEAD_ROWS]
            logits_LV = ends.of_row(hidden_LN[start + piece : start + piece + len(tokens_L)], entry)
            top = min(slot.top_logprobs, logits_LV.shape[1])
            ids_LC = chosen[0].expand(len(tokens_L), -1) if chosen else None
            tensors = logprob_tensors(logits_LV, tokens_L, top, ids_LC, ops)
            coming.append(Later(last.down(tensors), _appended(found, len(tokens_L), top, ids)))
        output.prompt_logprobs[row] = found
        start += len(wanted)
    return coming


def _appended(
    found: list[PositionLogprobs], count: int, top: int, chosen: Sequence[int]
) -> Callable[[list[NDArray[Any]]], None]:
    return lambda arrays: found.extend(read(arrays, [top] * count, [chosen] * count))
