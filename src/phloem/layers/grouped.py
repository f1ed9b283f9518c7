"""What stands around a layer's two blocks where groups of ranks attend to rows of their own (`rows.py`).

Legend: T tokens of this rank's group, A tokens of all groups, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.layers.context import ForwardBatch
    from phloem.layers.norm import AnyNorm
    from phloem.layers.rows import Rows


class Feed(Protocol):
    """As `models._layer.Feed`."""

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, /, *, add: bool
    ) -> tuple[Tensor, Tensor | None]: ...


class Gathered(Layer):
    """A feed-forward block of all ranks behind attention of each group."""

    def __init__(self, rows: Rows, block: Feed) -> None:
        self.rows, self.block = rows, block

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As the block itself, and never summed."""
        del add
        x_TN, total_TN = (x_TN, x_TN) if norm is None else norm.add(x_TN, residual_TN)
        out_AN, _ = self.block(None, self.rows.gather(x_TN), None, add=False)
        return self.rows.own(out_AN), total_TN


class Output(Protocol):
    """As `models._layer.Output`."""

    def __call__(self, x_TN: Tensor, /, *, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...


class Mixer(Protocol):
    """As `models._layer.Mixer`."""

    @property
    def out(self) -> Output: ...

    @property
    def memory(self) -> MemorySpec | tuple[MemorySpec, ...] | None: ...

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch, /
    ) -> tuple[Tensor, Tensor]: ...


class Resting(Layer):
    """A mixer of one group, which rests in steps that have no row for it: kernels and backends see rows alone."""

    def __init__(self, mixer: Mixer, hidden_size: int) -> None:
        self.mixer, self._hidden_size = mixer, hidden_size

    @property
    def memory(self) -> MemorySpec | tuple[MemorySpec, ...] | None:
        return self.mixer.memory

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch, /
    ) -> tuple[Tensor, Tensor]:
        return self.mixer.attend(norm, x_TN, residual_TN, step) if len(x_TN) else (x_TN, x_TN)

    def out(self, x_TN: Tensor, /, *, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.mixer.out(x_TN, add=add) if len(x_TN) else (x_TN.new_empty((0, self._hidden_size)), add)
