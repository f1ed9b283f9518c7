"""Weights for the tests of packed linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from phloem.kernels import native

GGUF_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
# Block bytes, weights, and the offsets of the float16 factors in a block.
FIELDS = {
    "Q4_0": (18, 32, [0]), "Q4_1": (20, 32, [0, 2]), "Q5_0": (22, 32, [0]), "Q5_1": (24, 32, [0, 2]),
    "Q8_0": (34, 32, [0]), "Q2_K": (84, 256, [80, 82]), "Q3_K": (110, 256, [108]), "Q4_K": (144, 256, [0, 2]),
    "Q5_K": (176, 256, [0, 2]), "Q6_K": (210, 256, [208]), "IQ4_NL": (18, 32, [0]),
}  # fmt: skip


def levels() -> list[str]:
    try:
        return list(native.runtime().library.levels())
    except native.Unavailable:
        return []


def cases(*threads: int) -> list[Any]:
    """(level, threads) to test kernels at. The fast tier has the machine's own level, and AVX2 with several threads."""
    own = native.runtime().library.level() if levels() else ""
    return [
        pytest.param(
            (level, count),
            id=f"{level}-{count}",
            marks=() if level == own or (level == "avx2" and count == threads[-1]) else pytest.mark.slow,
        )
        for level in levels()
        for count in threads
    ]


needs_native = pytest.mark.skipif(not levels(), reason="the native library is not built (no C++ compiler?)")


@dataclass
class Source:
    """A `WeightSource` of test data."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray
    values: torch.Tensor | None = None

    @classmethod
    def dense_of(cls, tensor: torch.Tensor) -> Source:
        return cls("w", tuple(tensor.shape), "dense", np.empty(0, np.uint8), tensor)

    def raw(self) -> np.ndarray:
        return self.data

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        if self.values is None:
            kind = gguf.GGMLQuantizationType[self.kind]
            self.values = torch.from_numpy(gguf.quants.dequantize(self.data, kind))
        return self.values.to(dtype)


def make_source(kind: str, rows: int, blocks: int, seed: int) -> Source:
    """Random blocks of a GGUF type: every bit pattern, scales of sensible size and either sign."""
    if kind == "dense":
        return Source.dense_of(torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)).bfloat16())
    size, weights, factors = FIELDS[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for offset in factors:
        values = (rng.standard_normal((rows, blocks, 1)) * 0.01).astype(np.float16)
        data[:, :, offset : offset + 2] = values.view(np.uint8)
    return Source("w", (rows, blocks * weights), kind, data.reshape(rows, -1))


def as_int8(x: torch.Tensor, shared: int = 32) -> torch.Tensor:
    """What the kernels make of activations: 127 steps to the largest of each `shared` inputs."""
    n = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -n % shared)).unflatten(-1, (-1, shared))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    rounded = (groups * inverse).round()
    return (rounded.double() * (largest / 127.0)).flatten(-2)[..., :n]


def shared_inputs(kind: str, rows: int, exact: bool) -> int:
    """How many inputs of a row have one scale."""
    return 64 if meets_bytes(rows, exact) and kind not in ("Q2_K", "Q3_K", "Q8_0") else 32


def meets_bytes(rows: int, exact: bool) -> bool:
    """Whether so many rows meet integer weights as bytes."""
    return native.runtime().library.level() == "avx512" and rows > 24 and not exact
