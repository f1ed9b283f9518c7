"""The arg-max of a large head for a few rows: most of it is read in four bits (csrc/cpu/linear/screen.h).

A head of 8 bits and more a weight is what one stream waits for: for every token all of it comes from memory. A copy in
4.5 bits a weight rules out all but a few blocks of the vocabulary, which are then read whole; the token is the one that
the head itself gives. The copy is made when it is first of use and costs that memory beside the head. A Q8_0 head needs
none: the upper halves of its bytes lie together (`PackedLinear.split`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.native_linear import PackedLinear, Sizes

FEATURES = 4096  # fewer do not pay for two more barriers
GAIN = 1.4  # the least that reading the screen saves


class Screens:
    """Makes the screens of one runtime."""

    def __init__(self, rt: Runtime, sizes: Sizes) -> None:
        self.rt = rt
        self.rows = sizes.screen_rows  # at most; what screen.h takes at once
        self.block = sizes.block
        # A screen is laid out as weights of four bits: inputs and bytes of a unit of 16 features.
        self.unit = sizes.geometry[sizes.numbers["kQ4S"]][:2]
        self.MAKE = rt.op("linear_screen")

    def of(self, weight: PackedLinear, rows: int) -> torch.Tensor | None:
        """The screen of a weight where it serves `rows` rows, made on first use; None where the weight is read whole.

        Not while a step is recorded, unless it is there already.
        """
        if rows > self.rows:
            return None
        if weight.split:
            return weight.memory[0]
        if weight.screen is None and not weight.screenless and not self.rt.recording:
            weight.screen = self._make(weight) if self._pays(weight) else None
            weight.screenless = weight.screen is None
        return weight.screen

    def bytes_read(self, weight: PackedLinear) -> int:
        """About what the arg-max of a few rows reads of a weight."""
        if not weight.native.screened or not (weight.split or self._pays(weight)):
            return weight.nbytes
        return self._bytes(weight)

    def _pays(self, weight: PackedLinear) -> bool:
        return (
            weight.segments.shape[0] == 1
            and not weight.paired
            and weight.out_features >= FEATURES
            and weight.nbytes >= GAIN * self._bytes(weight)
        )

    def _bytes(self, weight: PackedLinear) -> int:
        inputs, size = self.unit
        return -(-weight.out_features // self.block) * weight.padded_inputs // inputs * size

    def _make(self, weight: PackedLinear) -> torch.Tensor | None:
        screen, unfit = weight.native.store.take(self._bytes(weight)), torch.zeros(1, dtype=torch.int64)
        self.rt.call(
            self.MAKE, weight.nbytes, parts=weight.segments.data_ptr(), target=screen.data_ptr(),
            unfit=unfit.data_ptr(), inputs=weight.padded_inputs,
        )  # fmt: skip
        return None if unfit.item() else screen
