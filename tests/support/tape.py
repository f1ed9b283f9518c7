"""A recorder for tests: a step, or pieces of it, as lists of torch calls over tensors that stay, as a graph is.

Nothing that a recording computed is left in its buffers (they are filled with NaN), so that a replay that did not
compute a value again would show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phloem.kernels.graph import Pieces, RecordError

WAITING = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::nonzero_numpy", "aten::is_nonzero")


class Tape(TorchDispatchMode):
    """Notes every torch call; refuses those that would wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITING:
            raise RecordError(f"{name} is not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        # Not `is_view`: torch calls `to` a view even where it converts.
        if func._schema.is_mutable or not {_home(x) for x in _tensors(out)} <= {_home(x) for x in _tensors(args)}:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable and not func._schema.name.startswith("aten::empty"):
                for target, value in zip(_tensors(out), _tensors(again), strict=True):
                    target.copy_(value)

    def forget_values(self) -> None:
        for func, _, _, out in self.calls:
            if not func._schema.is_mutable:
                for tensor in _tensors(out):
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(x, torch.Tensor)]


def _home(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class TapeRecorder:
    """`GraphRecorder` over tapes that can cut. `fail`: raised at the n-th piece, as a device without memory would."""

    cuts, resizes = True, False

    def __init__(self, fail: Exception | None = None, fail_at: int = 0) -> None:
        self.recorded = 0
        self.replays = 0
        self.fail, self.fail_at = fail, fail_at

    def record(self, fn: Callable[[], Any]) -> Any:
        fn()
        if self.fail is not None:
            raise self.fail
        with Tape() as tape:
            result = fn()
        tape.forget_values()
        self.recorded += 1
        return Counted(self, [tape.replay], 1), result

    def record_sizes(self, fn: Callable[[tuple[int, ...]], Any], sizes: tuple[int, ...]) -> Any:
        raise AssertionError("only pieces are asked for")

    def record_pieces(self, fn: Callable[[Any], Any]) -> tuple[Pieces, Any]:
        recorder = self
        fn(_NoCalls())

        class Cutting:
            def __init__(self) -> None:
                self.parts: list[Any] = []
                self.tapes: list[Tape] = []
                self.tape: Tape | None = None

            def begin(self) -> None:
                if recorder.fail is not None and len(self.tapes) == recorder.fail_at:
                    raise recorder.fail
                self.tape = Tape()
                self.tape.__enter__()

            def end(self) -> None:
                if self.tape is not None:
                    self.tape.__exit__(None, None, None)
                    self.tapes.append(self.tape)
                    self.parts.append(self.tape.replay)
                    self.tape = None

            def __call__(self, call: Any, more: bool = True) -> None:
                self.end()
                self.parts.append(call)
                if more:
                    self.begin()

            def hold(self, x: torch.Tensor) -> torch.Tensor:
                return x

        cut = Cutting()
        cut.begin()
        try:
            result = fn(cut)
        finally:
            cut.end()
        for tape in cut.tapes:
            tape.forget_values()
        self.recorded += 1
        return Counted(self, cut.parts, len(cut.tapes)), result


class Counted(Pieces):
    def __init__(self, recorder: TapeRecorder, parts: list[Any], graphs: int) -> None:
        super().__init__(parts, graphs, 1000)
        self._recorder = recorder

    def replay(self, *sizes: int) -> None:
        self._recorder.replays += 1
        super().replay()


class _NoCalls:
    def __call__(self, call: Any, more: bool = True) -> None: ...

    def hold(self, x: torch.Tensor) -> torch.Tensor:
        return x
