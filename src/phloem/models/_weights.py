"""Weights by name: pulled from safetensors, GGUF or thin air, pushed by live updates, over one index.

A `WeightSource` (kernels/ops.py) is one tensor not read yet; `ops.prepare_linear` decides how its bytes are kept.
"""

from __future__ import annotations

import os
import re
import zlib
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.errors import ModelLoadError
from phloem.models._scales import scale_of
from phloem.quant import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.checkpoint.gguf_reader import GGUFTensor
    from phloem.layers.context import BuildContext
    from phloem.layers.weight import Weight

    Progress = Callable[[str, float], None]

_DENSE_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_ELEMENTS_AT_ONCE = 1 << 18  # dequantised at a time by one worker: the intermediates stay in its cache
DUMMY_STD = 0.02


@dataclass
class Source:
    """One tensor that has not been read. `shifted`: the layer's shift (`Weight.shift`) is in the values already."""

    name: str
    shape: tuple[int, ...]
    kind: str = "dense"
    shifted: bool = False
    workers: Executor | None = None  # to dequantise with

    def dense(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        raise TypeError(f"{self.name} is dense: it has no quantised bytes")


@dataclass
class SafetensorsSource(Source):
    """A tensor of an open safetensors file, memory-mapped."""

    file: Any = None  # of safetensors.safe_open
    key: str = ""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.file.get_tensor(self.key).to(dtype).contiguous()


@dataclass
class TensorSource(Source):
    """A tensor that somebody handed over."""

    tensor: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        assert self.tensor is not None
        return self.tensor.detach().to("cpu", dtype).contiguous()


@dataclass
class DummySource(Source):
    """Random values that depend on the name alone, so that they are the same on every machine and in any order."""

    role: str = "matrix"

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self.role != "matrix":
            return torch.full(self.shape, 1.0 if self.role == "norm" else 0.0, dtype=dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return torch.empty(self.shape, dtype=torch.float32).normal_(0.0, DUMMY_STD, generator=generator).to(dtype)


@dataclass
class GGUFSource(Source):
    """A tensor of a GGUF file. `heads` > 0: its rows are stored for a rotation of neighbours; they are put back."""

    tensor: GGUFTensor | None = None
    heads: int = 0

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        assert self.tensor is not None
        rows = self.tensor.raw()
        return rows[halves_from_neighbours(self.shape[0], self.heads)] if self.heads else rows

    def dense(self, dtype: torch.dtype) -> Tensor:
        assert self.tensor is not None
        if self.tensor.kind not in _DENSE_KINDS:
            return self._dequantise(self.raw(), dtype)
        # A copy, because torch wants memory that may be written.
        stored = torch.from_numpy(self.tensor.raw().copy()).view(_DENSE_KINDS[self.tensor.kind])
        stored = stored.reshape(self.shape).to(dtype)
        return stored[torch.from_numpy(halves_from_neighbours(self.shape[0], self.heads))] if self.heads else stored

    def _dequantise(self, rows: np.ndarray[Any, np.dtype[np.uint8]], dtype: torch.dtype) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        width = self.shape[-1]
        out = torch.empty((prod(self.shape) // width, width), dtype=dtype)
        step = max(1, _ELEMENTS_AT_ONCE // width)

        def fill(start: int) -> None:
            values = dequantize(rows[start : start + step], GGMLQuantizationType[self.kind])
            out[start : start + step] = torch.from_numpy(np.ascontiguousarray(values))

        try:
            list((self.workers.map if self.workers else map)(fill, range(0, len(out), step)))
        except (KeyError, NotImplementedError):
            raise ModelLoadError(f"{self.name}: no way to dequantise GGUF type {self.kind}") from None
        return out.view(self.shape)


def halves_from_neighbours(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each row of a q or k projection lies in a GGUF file of architecture llama.

    The file pairs neighbours (row 2j with 2j + 1 of a head) where the checkpoint pairs halves (j with j + size / 2).
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_SANDWICH_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GGUF_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")


def gguf_name(name: str, architecture: str) -> tuple[str, int | None]:
    """A checkpoint tensor's name in a GGUF file, and which expert it is of the stacked tensor of that name."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _GGUF_OUTER_NAMES.get(name, name), None
    expert = _EXPERT.fullmatch(match[2])
    if expert is not None:
        return f"blk.{match[1]}.ffn_{expert[2]}_exps.{match[3]}", int(expert[1])
    names = {**_GGUF_NAMES, **_GGUF_SANDWICH_NAMES} if architecture.startswith("gemma") else _GGUF_NAMES
    return f"blk.{match[1]}.{names.get(match[2], match[2])}.{match[3]}", None


def open_sources(
    checkpoint: Checkpoint, index: WeightIndex, rename: Callable[[str], str | None]
) -> tuple[dict[str, Source], list[str]]:
    """Every tensor of a checkpoint by our name, and the names in it that the model does not use."""
    if checkpoint.format == "dummy":
        return {
            name: DummySource(name, weight.shapes[part], shifted=True, role=weight.role)
            for name, (weight, part) in index.slots.items()
        }, []
    if checkpoint.gguf is not None:
        return _gguf_sources(checkpoint, index)
    return _safetensors_sources(checkpoint, index, rename)


def _gguf_sources(checkpoint: Checkpoint, index: WeightIndex) -> tuple[dict[str, Source], list[str]]:
    assert checkpoint.gguf is not None
    tensors = checkpoint.gguf.tensors
    architecture = checkpoint.gguf.metadata["general.architecture"]
    heads = checkpoint.config["num_attention_heads"]
    swapped = {"q_proj": heads, "k_proj": checkpoint.config.get("num_key_value_heads") or heads}
    found: dict[str, Source] = {}
    used = {"rope_freqs.weight"}
    for name, (weight, _) in index.slots.items():
        stored, expert = gguf_name(name, architecture)
        used.add(stored)
        if stored in tensors:
            turned = swapped.get(name.split(".")[-2], 0) if architecture == "llama" else 0
            # The converter has already added the shift to the norms that have one.
            tensor = tensors[stored] if expert is None else _expert_of(tensors[stored], expert, weight, checkpoint)
            kind = "dense" if tensor.kind in ("F32", "F64") else tensor.kind
            shifted = weight.role == "norm"
            found[name] = GGUFSource(name, tensor.shape, kind, shifted, tensor=tensor, heads=turned)
    return found, sorted(set(tensors) - used)


def _expert_of(stacked: GGUFTensor, expert: int, weight: Weight, checkpoint: Checkpoint) -> GGUFTensor:
    if len(stacked.shape) != 3 or stacked.shape[0] != weight.experts:
        raise ModelLoadError(
            f"{checkpoint.path}: {stacked.name} is {list(stacked.shape)}, expected {weight.experts} stacked matrices"
        )
    return stacked.part(expert)


def _safetensors_sources(
    checkpoint: Checkpoint, index: WeightIndex, rename: Callable[[str], str | None]
) -> tuple[dict[str, Source], list[str]]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, Source] = {}
    unused: list[str] = []
    for path in checkpoint.files:
        try:
            file = safe_open(str(path), framework="pt", device="cpu")
            for key in file.keys():  # noqa: SIM118 - not a dict
                name = rename(key)
                if name is not None and name in index.slots:
                    shape = tuple(file.get_slice(key).get_shape())
                    found[name] = SafetensorsSource(name, shape, file=file, key=key)
                elif name is not None and not index.ignores(name):
                    unused.append(key)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path}: {error}") from None
    return found, sorted(unused)


class WeightIndex:
    """Every weight slot of a model by the names of its checkpoint tensors."""

    def __init__(self, weights: Iterable[Weight], ctx: BuildContext, embedding: str) -> None:
        self.ctx = ctx
        self.weights = list(weights)
        self.slots: dict[str, tuple[Weight, int]] = {
            name: (weight, part) for weight in self.weights for part, name in enumerate(weight.names)
        }
        self.embedding = embedding

    def names(self) -> list[str]:
        return list(self.slots)

    def ignores(self, name: str) -> bool:
        """Tensors that checkpoints carry and no layer needs: rotation tables, a second copy of a tied embedding, and
        scales of the KV cache, which are read where the cache is made.
        """
        known = name.endswith(("rotary_emb.inv_freq", "attn.masked_bias")) or name == "lm_head.weight"
        return known or scale_of(name) is not None

    @property
    def nbytes(self) -> int:
        return sum(int(getattr(weight.value, "nbytes", 0)) for weight in self.weights)

    def pull(self, sources: dict[str, Source], where: str, progress: Progress | None) -> None:
        """Fill every slot, one after another: tables need not prepare several weights at a time.

        Raises:
            ModelLoadError: naming the tensors that are missing or have another shape, before any is read.
        """
        self._check(sources, where)
        total = sum(prod(shape) for weight in self.weights for shape in weight.shapes)
        done = 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "phloem-load") as workers:
            for weight in self.weights:
                for name in weight.names:
                    sources[name].workers = workers
                self._fill(weight, sources)
                done += sum(prod(shape) for shape in weight.shapes)
                if progress is not None:
                    progress("weights", done / total)
        self._settle_biases()

    def _check(self, sources: dict[str, Source], where: str) -> None:
        missing = [name for name in self.slots if name not in sources]
        if missing:
            raise ModelLoadError(f"{where}: {len(missing)} tensors are missing: {some(missing)}")
        wrong: list[str] = []
        for name, (weight, part) in self.slots.items():
            seen, expected = sources[name].shape, weight.shapes[part]
            if seen != expected:
                wrong.append(f"{name} is {list(seen)}, expected {list(expected)}")
        if wrong:
            raise ModelLoadError(f"{where}: {len(wrong)} tensors have another shape: {some(wrong)}")

    def _fill(self, weight: Weight, sources: dict[str, Source]) -> None:
        parts: list[Any] = [sources[name] for name in weight.names]
        if weight.role == "matrix":
            if self.ctx.quant is not None:
                parts = [METHODS.get(self.ctx.quant)(part) for part in parts]
            ops = self.ctx.ops
            dtype, device = self.ctx.dtype, self.ctx.device
            if weight.experts:
                weight.value = ops.prepare_experts(parts, dtype, device, weight.experts)
            else:
                weight.value = ops.prepare_linear(parts, dtype, device)
            return
        weight.value = torch.cat([self._vector(weight, part) for part in parts]).to(self.ctx.device)

    def _vector(self, weight: Weight, source: Source) -> Tensor:
        values = source.dense(torch.float32)
        return values if source.shifted or not weight.shift else values + weight.shift

    def _settle_biases(self) -> None:
        """Biases take the type of the activations, which the table's `embedding` decides."""
        biases = [weight for weight in self.weights if weight.role == "bias"]
        if biases:
            ids = torch.zeros(1, dtype=torch.int64, device=self.ctx.device)
            dtype = self.ctx.ops.embedding(ids, self.slots[self.embedding][0].value, 1.0).dtype
            for weight in biases:
                weight.value = weight.value.to(dtype)

    def _slot(self, name: str) -> tuple[Weight, int]:
        if name not in self.slots:
            raise ModelLoadError(f"no weight is called {name!r}; see weight_names()")
        return self.slots[name]

    def _rows(self, weight: Weight, part: int) -> slice:
        start = sum(shape[0] for shape in weight.shapes[:part])
        return slice(start, start + weight.shapes[part][0])

    def get(self, name: str) -> Tensor:
        """One tensor as a checkpoint would hold it (a copy)."""
        weight, part = self._slot(name)
        rows = self._rows(weight, part)
        if isinstance(weight.value, torch.Tensor):
            values = weight.value[rows]
            return (values - weight.shift if weight.shift else values).clone()
        # Whatever a packed weight is, the table's `embedding` reads its rows.
        ids = torch.arange(rows.start, rows.stop, device=self.ctx.device)
        return self.ctx.ops.embedding(ids, weight.value, 1.0).to(self.ctx.dtype).clone()

    def push(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Take new values. Dense weights are overwritten in place; packed ones are packed anew, once per call."""
        packed: dict[int, tuple[Weight, dict[str, Source]]] = {}
        for name, tensor in tensors:
            if name not in self.slots and self.ignores(name):
                continue
            weight, part = self._slot(name)
            source = TensorSource(name, tuple(tensor.shape), tensor=tensor)
            if source.shape != weight.shapes[part]:
                raise ModelLoadError(f"{name} is {list(source.shape)}, expected {list(weight.shapes[part])}")
            if not isinstance(weight.value, torch.Tensor):
                packed.setdefault(id(weight), (weight, {}))[1][name] = source
                continue
            rows = weight.value[self._rows(weight, part)]
            rows.copy_(tensor.detach() if weight.role == "matrix" else self._vector(weight, source))
        for weight, sources in packed.values():
            for name in weight.names:
                if name not in sources:
                    kept = self.get(name)
                    sources[name] = TensorSource(name, tuple(kept.shape), tensor=kept)
            self._fill(weight, sources)
        return bool(packed)


def some(items: list[str], limit: int = 8) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
