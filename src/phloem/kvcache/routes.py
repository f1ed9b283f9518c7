"""Which experts computed each token, kept beside the pages of its keys and values.

A page that requests share so has its tokens' experts too: they are known without computing anything again. A page's are
written by the step that writes its keys, and are those of whoever holds the page.

Legend: T packed new tokens, S places of the pool (page by page), E layers, k experts of a token in a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch
    from phloem.core.memory import Group


def group_of(groups: tuple[Group, ...]) -> tuple[int, bool] | None:
    """(The group by whose pages tokens are found, whether these stay until their request ends): the first whose pages
    stay, or where all give them back behind a window the first. None: no group has pages."""
    paged = [at for at, group in enumerate(groups) if group.kind == "pages"]
    lasting = [at for at in paged if not groups[at].window]
    return None if not paged else (lasting[0], True) if lasting else (paged[0], False)


class Routes:
    """Used by the thread that runs the steps alone.

    Args:
        notes: the layers' choices in the step that ran last, int32 [T, k] or longer, by the layer's number.
        layers: of the model, dense ones too: theirs are zeros.
        group: by whose tables tokens find their places, and whether all of a request's are there until its end
            (`group_of`). Otherwise only new tokens are told: whoever asks must compute all of its own.
    """

    def __init__(
        self, notes: Mapping[int, Tensor], layers: int, k: int, group: tuple[int, bool], pages: int, page_size: int
    ) -> None:
        self._notes, self._page = notes, page_size
        self._group, self._lasting = group
        self._shown: Mapping[int, Tensor] | None = None
        self._kept = False
        self.values_SEk: NDArray[np.int16] = np.zeros((pages * page_size, layers, k), np.int16)

    def noted(self) -> dict[int, Tensor]:
        """Where the step that runs now, and each replay of it if it is being recorded, has the choices."""
        return dict(self._notes)

    def show(self, notes: Mapping[int, Tensor] | None) -> None:
        """The step that ran last was a replay, whose choices are here."""
        self._shown = notes

    def keep(self, batch: Batch) -> None:
        """Take over the choices of a step that has run."""
        if self._kept:
            self._kept = False
            return
        notes, self._shown = self._notes if self._shown is None else self._shown, None
        rows = np.repeat(np.arange(batch.num_rows), batch.query_lens)
        starts = np.cumsum(batch.query_lens) - batch.query_lens
        positions = np.arange(batch.num_tokens) - (starts - batch.prefix_lens)[rows]
        places_T = self._places(batch, rows, positions)
        for layer, ids_Tk in notes.items():
            self.values_SEk[places_T, layer, : ids_Tk.shape[1]] = ids_Tk[: batch.num_tokens].cpu().numpy()

    def kept(self) -> None:
        """The step that ran last ran in parts, of each of which the choices were taken over: nothing is left of it."""
        self._kept = True

    def of(self, batch: Batch, wanted: NDArray[np.bool_]) -> dict[int, tuple[int, NDArray[np.int16]]]:
        """Row -> (first position, [tokens, E, k]) of the rows of these slots: of their new tokens, and of those before
        them when they enter a slot."""
        fresh = {admission.slot for admission in batch.admissions} if self._lasting else set[int]()
        found: dict[int, tuple[int, NDArray[np.int16]]] = {}
        for row in np.flatnonzero(wanted[batch.slots]).tolist():
            prefix = int(batch.prefix_lens[row])
            start, end = 0 if int(batch.slots[row]) in fresh else prefix, prefix + int(batch.query_lens[row])
            found[row] = start, self.values_SEk[self._places(batch, row, np.arange(start, end))]
        return found

    def _places(self, batch: Batch, rows: Any, positions: NDArray[Any]) -> NDArray[Any]:
        pages, offsets = np.divmod(positions, self._page)
        return batch.tables[self._group][rows, pages].astype(np.int64) * self._page + offsets


def noting(routes: Routes | None, tell: Callable[[dict[int, Tensor]], None], step: Callable[..., Any]) -> Any:
    """A step that is about to be recorded: where its choices will be is told when it first runs."""
    if routes is None:
        return step
    told = list[bool]()

    def run(*sizes: Any) -> Any:
        found = step(*sizes)
        if not told:
            told.append(True)
            tell(routes.noted())
        return found

    return run
