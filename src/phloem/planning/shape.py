"""A model as a plan sees it: how many weights of which kind each layer has, and what it keeps and reads of a token.

Nothing is estimated: the family's own file builds the model without weights, on torch's `meta` device, and its slots
and its memory are counted. Whatever the engine serves by a file of its own can therefore be planned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from phloem.checkpoint.describe import Checkpoint, describe, read_safetensors_header
from phloem.checkpoint.quant_config import quantization_said, stored_format
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.core.memory import Cross, Latent, MemorySpec, Paged, State
from phloem.kernels.ops import Ops
from phloem.kvcache.layouts import layout_of
from phloem.layers.context import AttentionSpec, BuildContext
from phloem.layers.moe import SparseMLP
from phloem.layers.weight import Layer, Weight
from phloem.models import build_model
from phloem.models._common import Decoder
from phloem.planning.formats import FORMATS, Format, Formats, formats
from phloem.planning.machines import Kind

POSITIONS = 64  # tables of rotations are built for so many: their size is nobody's concern here
KV_TYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
# Classes of weights: `attention` and `dense` are cut over attention's ranks, `kv` as far as there are heads; `whole` is
# on every rank; `experts` lie over the experts' ranks; `vocab` is cut over attention's ranks.
CLASSES = ("attention", "kv", "dense", "whole", "experts", "vocab")


@dataclass
class Amount:
    """Weights of one class: how many, the bytes that they take, and as what they are multiplied."""

    count: float = 0.0
    bytes: float = 0.0
    kind: Kind = "bf16"

    def add(self, count: float, form: Format) -> None:
        if count > self.count:
            self.kind = form.kind  # of what most of them are
        self.count += count
        self.bytes += count * form.bits / 8


@dataclass(frozen=True)
class Reads:
    """What a layer's attention reads: `bytes` of each earlier token, of the last `window` (0: of all).

    `heads` KV heads share the bytes; 1 where every rank has all (latents). `decode` and `prefill`: FLOPs of one new
    token with one earlier token, over all heads, as each kind of step computes it.
    """

    bytes: float
    window: int
    heads: int
    decode: float
    prefill: float
    scan: float = 0.0  # bytes of every earlier token that are read to find out which are attended to

    def seen(self, context: float) -> float:
        return min(context, self.window) if self.window else context


@dataclass
class LayerShape:
    weights: dict[str, Amount] = field(default_factory=lambda: {name: Amount() for name in CLASSES})
    reads: list[Reads] = field(default_factory=list[Reads])
    kept: list[tuple[float, int, int]] = field(default_factory=list[tuple[float, int, int]])  # bytes, window, heads
    state: float = 0.0  # bytes of a request, however long
    sparse: bool = False


@dataclass(frozen=True)
class Shape:
    """`experts` 0: no layer is sparse. `spread`: most groups of experts that a token's choice may lie in; 0: any."""

    name: str
    family: str
    layers: tuple[LayerShape, ...]
    ends: tuple[dict[str, Amount], dict[str, Amount]]  # before the first layer, and behind the last
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    inner: int  # an expert's inner size
    spread: int
    context: int
    formats: Formats
    kv_type: str
    tied: bool = False  # the head is the embedding
    stored_bytes: int = 0  # of the weight files, where they are there

    @property
    def parameters(self) -> float:
        return sum(amount.count for amount in self._amounts())

    @property
    def weight_bytes(self) -> float:
        return sum(amount.bytes for amount in self._amounts())

    @property
    def active(self) -> float:
        """Parameters that a token is multiplied with: the embedding is a look-up."""
        share = self.top_k / self.experts if self.experts else 0.0
        layers = sum(a.count * (share if n == "experts" else 1) for at in self.layers for n, a in at.weights.items())
        return layers + sum(amount.count for amount in self.head.values())

    @property
    def head(self) -> dict[str, Amount]:
        """What stands behind the last layer, the embedding too where it is used there again."""
        return {**self.ends[1], "embedding": self.ends[0]["vocab"]} if self.tied else self.ends[1]

    def _amounts(self) -> Iterable[Amount]:
        for part in (*(layer.weights for layer in self.layers), *self.ends):
            yield from part.values()

    def kv_bytes(self, context: float = 1.0) -> float:
        """Bytes that a request of so many tokens keeps by page, uncut; of one token, where nothing else is said."""
        return sum(
            size * (min(context, window) if window else context) for at in self.layers for size, window, _ in at.kept
        )

    @property
    def state_bytes(self) -> float:
        return sum(layer.state for layer in self.layers)


# reading it


def read_shape(
    model: str, kv_type: str = "auto", quantization: str | None = None, expert_quantization: str | None = None
) -> Shape:
    """The shape of a config.json, a model's directory, a hub cache's directory, a GGUF file or a hub id.

    Raises:
        ConfigError: it cannot be planned for, or a name is not known.
        ModelLoadError: there is no such file, or its configuration lacks what is needed.
    """
    if kv_type not in KV_TYPES:
        raise ConfigError(
            f"kv_cache_dtype {kv_type!r:.40} is not known; known: {', '.join(KV_TYPES)}", param="kv_cache_dtype"
        )
    path = snapshot(Path(model).expanduser())
    checkpoint = describe(str(path) if path is not None else model, "dummy")
    where = Path(model) if path is None else path
    if checkpoint.pooling is not None or checkpoint.pictures is not None:
        raise ConfigError(
            f"{where}: plans are for models that generate text, not for {checkpoint.model_type}", param="model"
        )
    if checkpoint.chosen.impl != "phloem":
        raise ConfigError(
            f"{where}: {checkpoint.model_type} has no file of its own in models/: how its weights are shared out is "
            "known of families that have one",
            param="model",
        )
    return shape_of(checkpoint, kv_type, _formats(checkpoint, where, quantization, expert_quantization))


def snapshot(path: Path) -> Path | None:
    """The directory with the configuration below a hub cache's `models--...`; the path itself where it is no such.

    Raises ModelLoadError: the cache holds none.
    """
    if not path.exists():
        return None
    if not (path / "snapshots").is_dir():
        return path
    refs, found = path / "refs" / "main", sorted((path / "snapshots").iterdir())
    chosen = path / "snapshots" / refs.read_text().strip() if refs.is_file() else None
    for folder in ([chosen] if chosen is not None else []) + found:
        if (folder / "config.json").exists():
            return folder
    raise ModelLoadError(f"{path}: no snapshot here has a config.json", param="model_path")


def _formats(checkpoint: Checkpoint, where: Path, matrix: str | None, expert: str | None) -> Formats:
    if checkpoint.gguf is not None and matrix is None:
        tensors = checkpoint.gguf.tensors.values()
        count = sum(math.prod(info.shape) for info in tensors)
        form = Format("gguf", sum(info.nbytes for info in tensors) * 8 / max(count, 1), "bf16")
        return Formats(form, form if expert is None else formats({}, None, None, expert).expert, form)
    whole = checkpoint.config
    folder = where if where.is_dir() else where.parent
    stored = stored_format(quantization_said(whole, folder / "config.json")) if matrix is None else None
    return formats(whole, stored, matrix, expert)


def _stored_bytes(checkpoint: Checkpoint) -> int:
    if checkpoint.gguf is not None:
        return sum(info.nbytes for info in checkpoint.gguf.tensors.values())
    total = 0
    for file in sorted(checkpoint.path.glob("*.safetensors")) if checkpoint.path.is_dir() else ():
        ends = [entry["data_offsets"][1] for entry in read_safetensors_header(file).values()]
        total += max(ends, default=0)
    return total


def shape_of(checkpoint: Checkpoint, kv_type: str, forms: Formats) -> Shape:
    """Build the model without weights, and count. Raises ConfigError: it is put together in a way of its own."""
    ctx = BuildContext(Ops(), torch.bfloat16, torch.device("meta"))
    log = logging.getLogger("phloem.models")
    before = log.level
    log.setLevel(logging.ERROR)  # what it warns of is no matter of a plan
    try:
        built: Any = build_model(checkpoint.model_type, checkpoint.config, ctx, POSITIONS)
    finally:
        log.setLevel(before)
    if not isinstance(built, Decoder):
        raise ConfigError(f"{checkpoint.model_type}: plans are for decoders alone", param="model")
    config, counted = checkpoint.config, set[int]()
    sparse = next(iter(_blocks(built.layers)), None)
    count = 0 if sparse is None else sparse.config.count
    layers: list[LayerShape] = []
    for layer in built.layers:
        found = LayerShape(sparse=any(True for _ in _blocks([layer])))
        for weight in layer.weights():
            counted.add(id(weight))
            _count(found.weights, weight, forms, count)
        _memory(found, layer.memory, layer.attention, built.memory, config, KV_TYPES[kv_type])
        layers.append(found)
    ends: tuple[dict[str, Amount], dict[str, Amount]] = ({}, {})
    rest = [weight for weight in built.weights() if id(weight) not in counted]
    embedding = built.index.embedding
    for weight in rest:
        last = embedding not in weight.names and ("head" in weight.names[0] or "norm" in weight.names[0])
        _count(ends[last], weight, replace(forms, matrix=forms.other), count, vocab=True)
    specs = built.attention_specs
    latent = any(isinstance(spec, Latent) for spec in built.memory)
    return Shape(
        name=checkpoint.name,
        family=checkpoint.model_type,
        layers=tuple(layers),
        ends=ends,
        hidden=built.hidden_size,
        vocab=built.vocab_size,
        heads=max((spec.heads for spec in specs), default=int(config.get("num_attention_heads", 1))),
        kv_heads=1 if latent else max((spec.kv_heads for spec in specs), default=1),
        experts=count,
        top_k=0 if sparse is None else sparse.config.router.top_k,
        inner=0 if sparse is None else sparse.config.inner_size,
        spread=int(config.get("topk_group") or 0) if int(config.get("n_group") or 1) > 1 else 0,
        context=checkpoint.context_length,
        formats=forms,
        kv_type=kv_type,
        tied=built.config.tied,
        stored_bytes=_stored_bytes(checkpoint),
    )


def _blocks(values: Iterable[Any]) -> Iterable[SparseMLP]:
    """The sparse blocks below these layers."""
    for value in values:
        if isinstance(value, SparseMLP):
            yield value
        elif isinstance(value, Layer):
            yield from _blocks(vars(value).values())
        elif isinstance(value, list | tuple):
            yield from _blocks(value)


def _count(into: dict[str, Amount], weight: Weight, forms: Formats, experts: int, vocab: bool = False) -> None:
    for number, name in enumerate(weight.names):
        shape = weight.shapes[number]
        size, kind = math.prod(shape), _class(name, weight, shape, experts)
        kind = "vocab" if vocab and weight.role == "matrix" else kind
        form = forms.other
        if weight.role == "matrix" and kind != "vocab" and not _router(shape, experts):
            form = forms.of(name, expert=kind == "experts")
        if weight.role == "norm":
            form = FORMATS["fp32"]
        into.setdefault(kind, Amount()).add(size, form)


def _router(shape: tuple[int, ...], experts: int) -> bool:
    return experts > 0 and len(shape) == 2 and shape[0] == experts


def _class(name: str, weight: Weight, shape: tuple[int, ...], experts: int) -> str:
    stem = name.removesuffix(".weight").removesuffix(".bias")
    last = stem.rpartition(".")[2]
    if weight.experts or (".experts." in name and ".shared" not in name):
        return "experts"
    if len(shape) < 2 or weight.role == "norm" or _router(shape, experts) or "indexer" in name:
        return "whole"
    if last in ("q_a_proj", "kv_a_proj_with_mqa"):
        return "whole"
    if last in ("k_proj", "v_proj"):
        return "kv"
    return "dense" if any(part in name for part in (".mlp.", "feed_forward", "ffn", "moe.", "expert")) else "attention"


def _memory(
    found: LayerShape,
    own: Iterable[MemorySpec],
    spec: AttentionSpec | None,
    everything: list[MemorySpec],
    config: dict[str, Any],
    kv_type: torch.dtype,
) -> None:
    """What a layer keeps and reads. Latents are read by every head; as all heads share them, no rank has a part."""
    heads, scan = int(config.get("num_attention_heads") or 1), 0.0
    most = int(config.get("index_topk") or 0)
    latents: list[tuple[Latent, float]] = []
    for kept in own:
        narrow = torch.bfloat16 if isinstance(kept, Latent) and (not kept.rope or kv_type == torch.int8) else kv_type
        size = float(layout_of(kept, narrow).bytes)
        if isinstance(kept, State):
            found.state += size
        elif isinstance(kept, Cross):
            found.state += size * kept.tokens
        elif isinstance(kept, Latent):
            found.kept.append((size, kept.window, 1))
            latents.append((kept, size))
            scan += 0.0 if kept.rope else size
        elif isinstance(kept, Paged):
            found.kept.append((size, kept.window, kept.kv_heads))
    for kept, size in latents:
        if kept.rope or len(latents) == 1:
            nope, value = int(config.get("qk_nope_head_dim") or 0), int(config.get("v_head_dim") or 0)
            absorbed = 2.0 * heads * (2 * kept.rank + kept.rope)
            found.reads.append(
                Reads(size, most if scan else kept.window, 1, absorbed, 2.0 * heads * (nope + kept.rope + value), scan)
            )
    if spec is not None:
        pool = everything[spec.pool]
        assert isinstance(pool, Paged)
        flops = 2.0 * spec.heads * (spec.head_size + spec.values)
        size = float(layout_of(pool, kv_type).bytes)
        found.reads.append(Reads(size, spec.window or spec.chunk, spec.kv_heads, flops, flops))
