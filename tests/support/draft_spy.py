"""What an engine's models draft, kept as they do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

    from phloem.core.batch import Batch
    from phloem.engine.drafts.drafting import DraftWork


@dataclass
class Said:
    """What was drafted: (known tokens of a row, how many drafts there was room for, the drafts), by what stands
    before."""

    found: list[tuple[int, int, list[int]]] = field(default_factory=list)


def spy_on(work: type[DraftWork], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Keep what this kind of work drafts from now on."""
    kept, run = Said(), work.run

    def spied(self: DraftWork, batch: Batch, late: bool = False) -> tuple[Batch, float]:
        sent, seconds = run(self, batch, late)
        ends = sent.query_lens.cumsum()
        for row in range(batch.num_rows):
            more = int(sent.outputs[row] - batch.outputs[row])
            if more:
                known = int(batch.prefix_lens[row] + batch.query_lens[row])
                assert batch.drafts is not None
                drafts = sent.input_ids[ends[row] - more : ends[row]].tolist()
                kept.found.append((known, int(batch.drafts[row]), drafts))
        return sent, seconds

    monkeypatch.setattr(work, "run", spied)
    return kept
