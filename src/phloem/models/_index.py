"""Weights by name: pulled from a checkpoint or thin air, pushed by live updates, over one index.

One stored tensor may hold several matrices (a fused qkv, stacked experts), one matrix may lie in several tensors (its
quantisation's companions), and a rank keeps a share of each. Names are always those of the checkpoint.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from phloem.checkpoint.mistral_format import hugging_name
from phloem.core.errors import ModelLoadError
from phloem.layers.aside import HOST
from phloem.models._gguf import gguf_sources
from phloem.models._scales import scale_of
from phloem.models._sources import DummySource, Read, SafetensorsSource, Stored, TensorSource, stored_in
from phloem.models._stored import WHOLE, as_base, may_stand_for, some, unused_parts, unused_scales
from phloem.quant._grid import Grid
from phloem.quant._report import Report
from phloem.quant._source import View

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.kernels.ops import Ops
    from phloem.layers.context import BuildContext
    from phloem.layers.weight import Weight
    from phloem.quant._source import Index, Source

    Progress = Callable[[str, float], None]

FEW_ELEMENTS = 8 << 20  # a matrix of more is cut into pieces that are read side by side

Place = tuple["Weight", int]  # a slot, and which of its parts


def open_sources(
    checkpoint: Checkpoint, index: WeightIndex, rename: Callable[[str], str | None], *, whole: bool = True
) -> tuple[dict[str, Source], list[str]]:
    """Every tensor of a checkpoint by our name, and the names in it that the model does not use. Not `whole`: the index
    has a few of the model's weights, and what else there is was looked at before."""
    if checkpoint.format == "dummy":
        device = index.ctx.device
        return {
            name: DummySource(name, index.stored_shape(name), shifted=True, role=places[0][0].role, device=device)
            for name, places in index.slots.items()
        }, []
    if checkpoint.gguf is not None:
        index.report = index.report or Report("GGUF")
        found, unused = gguf_sources(checkpoint, index.slots, index.report)
        unused = unused if whole and index.ctx.mesh.pp.size == 1 else []  # other stages have the rest
        _refuse(unused_parts(unused), "would change the answers, and no layer uses them", str(checkpoint.path))
        return found, unused
    found, unused = _safetensors_sources(checkpoint, index, rename)
    for name in (name for weight in index.weights for name in weight.zeros if name not in found):
        shape = index.stored_shape(name)
        found[name] = TensorSource(name, shape, tensor=torch.zeros(shape))
    _refuse(
        unused_scales(unused) if whole else [],
        "belong to weights in a format that is not supported",
        str(checkpoint.path),
    )
    return found, unused


def _refuse(names: list[str], why: str, where: str) -> None:
    if names:
        raise ModelLoadError(f"{where}: {len(names)} tensors {why}: {some(names)}")


def _safetensors_sources(
    checkpoint: Checkpoint, index: WeightIndex, rename: Callable[[str], str | None]
) -> tuple[dict[str, Source], list[str]]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, Source] = {}
    unused: list[str] = []
    companions = index.companion_names()
    path = checkpoint.path
    try:
        keys: list[tuple[Any, str]] = []
        places: dict[str, Stored] = {}
        for path in checkpoint.files:
            file = safe_open(str(path), framework="pt", device="cpu")
            keys += [(file, key) for key in file.keys()]  # noqa: SIM118 - not a dict
            places |= stored_in(path) if index.ctx.stager is not None else {}
        if checkpoint.consolidated:
            rename = _from_hugging(rename)
        rename = as_base(rename, [key for _, key in keys], index.embedding)
        for file, key in keys:
            name = rename(key)
            if name is not None and (name in index.slots or name in companions):
                stored = file.get_slice(key)
                shape, kind = tuple(stored.get_shape()), str(stored.get_dtype())
                found[name] = SafetensorsSource(name, shape, file=file, key=key, stored=kind, place=places.get(key))
            elif name is not None and not index.ignores(name) and not _no_bias(name, key, file, index):
                unused.append(key)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: {error}") from None
    return found, sorted(unused)


def _from_hugging(rename: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """`rename` for files in Mistral's own format."""

    def found(name: str) -> str | None:
        usual = hugging_name(name)
        return None if usual is None else rename(usual)

    return found


def _no_bias(name: str, key: str, file: Any, index: WeightIndex) -> bool:
    """Whether a tensor is a bias of zeros beside a matrix that has none here, as quantisers write them.

    Raises:
        ModelLoadError: if it is not of zeros: it would be left out, and would change the answers.
    """
    matrix = name.removesuffix(".bias") + ".weight"
    if not name.endswith(".bias") or matrix not in index.slots:
        return False
    if bool(file.get_tensor(key).any()):
        raise ModelLoadError(
            f"{key}: this family has no bias there, and it is not of zeros: leaving it out would change the answers "
            "(config.json may lack attention_bias or mlp_bias)"
        )
    return True


class WeightIndex:
    """Every weight slot of a model by the names of its checkpoint tensors."""

    def __init__(
        self, weights: Iterable[Weight], ctx: BuildContext, embedding: str, elsewhere: Iterable[str] = ()
    ) -> None:
        """`elsewhere`: tensors that other ranks have."""
        self.ctx = ctx
        self.weights = list(weights)
        self.slots: dict[str, list[Place]] = {}
        for weight in self.weights:
            for part, name in enumerate(weight.names):
                self.slots.setdefault(name, []).append((weight, part))
        self.embedding = embedding
        self.report = None if ctx.quant is None else ctx.quant.report
        self.lost: set[str] = set()  # tensors whose memory was given back, until they are there again
        self._elsewhere = {*elsewhere, *(name for weight in self.weights for name in weight.elsewhere)}
        self._companions = self._name_companions()
        self._stored_parts: dict[str, list[Source]] = {}  # what joined matrices are made of
        if ctx.quant is not None:
            self._elsewhere |= {other for name in self._elsewhere for other in ctx.quant.companions(name).values()}

    def _name_companions(self) -> dict[str, dict[str, str]]:
        method = self.ctx.quant
        if method is None or method.join is None:
            return {}
        # By shape: latent attention keeps one of its matrices as a plain tensor.
        matrices = [name for name, places in self.slots.items() if len(places[0][0].shapes[places[0][1]]) == 2]
        return {name: found for name in matrices if (found := method.companions(name))}

    def names(self) -> list[str]:
        """Of those that checkpoints have."""
        return [name for name, places in self.slots.items() if name not in places[0][0].zeros]

    def companion_names(self) -> set[str]:
        """Tensors that may hold a matrix instead of the one that is named after it."""
        return {name for found in self._companions.values() for name in found.values()}

    def ignores(self, name: str) -> bool:
        """Tensors that checkpoints carry and no layer here needs: rotation tables, a second copy of a tied embedding,
        other ranks' experts, and scales of the KV cache, which are read where the cache is made.
        """
        known = name.endswith(("rotary_emb.inv_freq", "attn.masked_bias")) or name == "lm_head.weight"
        return known or name in self._elsewhere or scale_of(name) is not None

    @property
    def nbytes(self) -> int:
        return sum(int(getattr(weight.value, "nbytes", 0)) for weight in self.weights)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """What a checkpoint's tensor of that name must look like, from all the parts that lie in it."""
        rows, transposed, experts, cols = 0, False, 0, ()
        for weight, number in self.slots[name]:
            shape, part = weight.shapes[number], weight.part(number)
            if part is None:
                return shape
            rows = max(rows, part.total, part.start + part.step * (shape[0] - 1) + 1)
            transposed, experts, cols = part.transposed, part.experts, shape[1:]
        inner = (*cols, rows) if transposed and cols else (rows, *cols)
        return (experts, *inner) if experts else inner

    def pull(self, sources: dict[str, Source], where: str, progress: Progress | None) -> None:
        """Fill every slot, one after another: tables need not prepare several weights at a time.

        Raises:
            ModelLoadError: naming the tensors that are missing or have another shape, before any is read.
        """
        self._turn(sources)
        self.join(sources)
        self.check(sources, where)
        self._stage(sources)
        total = sum(prod(weight.local(part)) for weight in self.weights for part in range(len(weight.names)))
        done = 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "phloem-load") as workers:
            for weight in self.weights:
                for name in weight.names:
                    sources[name].workers = workers
                self._fill(weight, sources)
                done += sum(prod(weight.local(part)) for part in range(len(weight.names)))
                if progress is not None:
                    progress("weights", done / total)
        self._settle_biases()

    def _turn(self, sources: dict[str, Source]) -> None:
        """Stacked experts that lie the other way round than their family usually stores them are read so."""
        stacked = [
            name
            for name, places in self.slots.items()
            if (part := places[0][0].part(places[0][1])) is not None and part.experts and part.transposed
        ]
        shapes = [(tuple(sources[name].shape), self.stored_shape(name)) for name in stacked if name in sources]
        odd = [(found, usual) for found, usual in shapes if len(usual) == 3 and usual[1] != usual[2]]
        if not odd or any(found != (usual[0], usual[2], usual[1]) for found, usual in odd):
            return
        for weight in {id(weight): weight for name in stacked for weight, _ in self.slots[name]}.values():
            weight.parts = tuple(None if part is None else replace(part, transposed=False) for part in weight.parts)

    def join(self, sources: dict[str, Source]) -> None:
        """Matrices that lie in several tensors become one source each; plain ones stay: what the file holds decides."""
        method = self.ctx.quant
        if method is None or method.join is None:
            return
        for name, companions in self._companions.items():
            found = {what: sources[other] for what, other in companions.items() if other in sources}
            if not found or set(found) == {"weight"}:
                continue
            places = [weight.part(number) for weight, number in self.slots[name]]
            if any(part is not None and part.transposed and not part.experts for part in places):
                raise ModelLoadError(f"{name}: quantised matrices of layers that are stored transposed are not read")
            sources[name] = method.join(name, found, self.stored_shape(name))
            self._stored_parts[name] = list(found.values())

    def _stage(self, sources: dict[str, Source]) -> None:
        """Tensors go from the file to the device, where quantised ones are unpacked and those rounded that have the
        same bits wherever that is done; other methods make theirs on the host."""
        quant = self.ctx.quant
        if quant is not None and quant.wrap is not None and not quant.exact:
            return
        aside = {name for weight in self.weights if weight.aside for name in weight.names}
        for weight in self.weights:
            found = [] if weight.aside else [sources[name] for name in weight.names]
            read = [source for source in found if isinstance(source, SafetensorsSource | Grid)]
            for source in read if len(read) == len(found) else ():
                if isinstance(source, SafetensorsSource):
                    source.stager = self.ctx.stager
                    continue
                for part in self._stored_parts.get(source.name, []) if source.name not in aside else ():
                    if isinstance(part, SafetensorsSource):
                        part.stager = self.ctx.stager

    def check(self, sources: dict[str, Source], where: str) -> None:
        missing = [name for name in self.slots if name not in sources]
        if missing:
            base = missing == ["lm_head.weight"]
            hint = " (a base model has no output head: this one needs tie_word_embeddings)" if base else ""
            raise ModelLoadError(f"{where}: {len(missing)} tensors are missing: {some(missing)}{hint}")
        wrong: list[str] = []
        few: list[str] = []
        for name in self.slots:
            low = _stored_low(sources[name])
            if low:
                few.append(f"{name} is {low}")
            self._lift(name, sources)
            seen, expected = sources[name].shape, self.stored_shape(name)
            if seen != expected:
                wrong.append(f"{name} is {list(seen)}, expected {list(expected)}")
        if few:
            raise ModelLoadError(
                f"{where}: {len(few)} tensors are in a type that stands for no weights by itself, and nothing in the "
                f"checkpoint's configuration says how to read them: {some(few)}"
            )
        if wrong:
            raise ModelLoadError(f"{where}: {len(wrong)} tensors have another shape: {some(wrong)}")

    def _lift(self, name: str, sources: dict[str, Source]) -> None:
        """Read one that is stored in another shape, whole: only a kernel or a small tensor may be."""
        seen, expected = sources[name].shape, self.stored_shape(name)
        if seen != expected and may_stand_for(seen, expected):
            whole = sources[name].take(None, torch.float32).reshape(expected)
            sources[name] = TensorSource(name, expected, shifted=sources[name].shifted, tensor=whole)

    def view(self, weight: Weight, number: int, source: Source) -> View:
        """What one part of a slot takes of its stored tensor."""
        part, spans, shape = weight.part(number), weight.spans(number), weight.local(number)
        name = weight.names[number]
        if part is None:
            share = None if shape == source.shape else tuple(slice(first, last, 1) for first, last in spans)
            return View(name, shape, source, share)
        first, last = spans[0]
        stop = part.start + part.step * (last - 1) + 1
        rows = slice(part.start + part.step * first, stop, part.step)
        cols = [slice(first, last, 1) for first, last in spans[1:]]
        index: Index = (*cols, rows) if part.transposed else (rows, *cols)
        index = index if part.expert is None else (part.expert, *index)
        return View(name, shape, source, index, part.transposed and bool(cols))

    def _fill(self, weight: Weight, sources: dict[str, Source]) -> None:
        weight.value = self.made(weight, sources)
        for name in weight.names:
            sources[name].done()

    def rewriting(self, weight: Weight, sources: dict[str, Source]) -> Callable[[], None] | None:
        """What puts new values of a packed weight where the old ones lie (`Ops.rewriting`); None: make it anew."""
        ops = self.table(weight)
        if ops.rewriting is None or weight.role != "matrix" or weight.experts:
            return None
        views = [self.view(weight, number, sources[name]) for number, name in enumerate(weight.names)]
        return ops.rewriting(weight.value, self._wrapped(weight, views), self.ctx.dtype)

    def _wrapped(self, weight: Weight, views: Sequence[View]) -> Sequence[Any]:
        """The views as the quantisation that the weight is stored in shows them."""
        method = self.ctx.quant
        if weight.experts and self.ctx.expert_quant is not None:
            method = self.ctx.expert_quant
        wrap = None if method is None or weight.plain else method.wrap
        return views if wrap is None else [wrap(view) for view in views]

    def made(self, weight: Weight, sources: dict[str, Source]) -> Any:
        views = [self.view(weight, number, sources[name]) for number, name in enumerate(weight.names)]
        ops, dtype, device = self.table(weight), self.ctx.dtype, self.device(weight)
        if weight.role == "matrix":
            # What is rounded anew is read in a wider type than the model's.
            parts = self._wrapped(weight, views)
            parts = self._ahead(views, sources) if parts is views else parts
            if not weight.experts:
                return ops.prepare_linear(parts, dtype, device)
            prepare = ops.prepare_experts if weight.fused else ops.stack_experts
            return prepare(parts, dtype, device, weight.experts)
        values = torch.cat([self.vector(weight, view) for view in views])
        return values.to(device, self.ctx.dtype if weight.in_own_type else None)

    def stand_in(self, weight: Weight, tensors: Mapping[str, Tensor]) -> Any:
        """A value that can take a slot's place for a while, dense whatever the slot's own is: of its stored tensors by
        their names, whole."""
        sources = {name: TensorSource(name, tuple(one.shape), tensor=one) for name, one in tensors.items()}
        views = [self.view(weight, number, sources[name]) for number, name in enumerate(weight.names)]
        if weight.role == "matrix":
            return self.table(weight).prepare_linear(views, self.ctx.dtype, self.device(weight))
        values = torch.cat([self.vector(weight, view) for view in views])
        like = weight.value
        return values.to(like.device, like.dtype) if isinstance(like, torch.Tensor) else values.to(self.device(weight))

    def prepared(self, name: str, matrix: Tensor) -> Any:
        """A matrix of any size as a linear layer's, dense."""
        view = View(name, tuple(matrix.shape), TensorSource(name, tuple(matrix.shape), tensor=matrix))
        return self.ctx.ops.prepare_linear([view], self.ctx.dtype, self.ctx.device)

    def _ahead(self, views: Sequence[View], sources: dict[str, Source]) -> Sequence[Any]:
        """Of many small matrices (experts) several are read at a time, where they go to the device unchanged."""
        staged = all(isinstance(source := sources[view.name], SafetensorsSource) and source.stager for view in views)
        workers = views[0].workers
        if not staged or workers is None or len(views) == 1 or prod(views[0].shape) > FEW_ELEMENTS:
            return views
        values = list(workers.map(lambda view: view.dense(self.ctx.dtype), views))
        return [Read(view.name, view.shape, tensor) for view, tensor in zip(views, values, strict=True)]

    def table(self, weight: Weight) -> Ops:
        """The op table that reads a weight."""
        aside = self.ctx.aside
        return aside.ops if weight.aside and aside is not None else self.ctx.ops

    def device(self, weight: Weight) -> torch.device:
        return HOST if weight.aside else self.ctx.device

    def vector(self, weight: Weight, view: View) -> Tensor:
        values = view.dense(torch.float32)
        return values if view.shifted or not weight.shift else values + weight.shift

    def _settle_biases(self) -> None:
        """Biases take the type of the activations, which the table's `embedding` decides."""
        biases = [weight for weight in self.weights if weight.role == "bias"]
        if biases:
            dtype = self.activations()
            for weight in biases:
                if weight.in_own_type:
                    continue
                weight.value = weight.value.to(dtype)

    def activations(self) -> torch.dtype:
        """The type in which layers compute, once weights are there: the table's `embedding` decides it."""
        ids = torch.zeros(1, dtype=torch.int64, device=self.ctx.device)
        known = self.slots.get(self.embedding)
        # A later stage has no embedding, nor has a tower: any matrix is read in the same type.
        table = known[0][0] if known else next(w for w in self.weights if w.role == "matrix" and not w.experts)
        return self.ctx.ops.embedding(ids, table.value, 1.0).dtype

    def rename(self, weight: Weight, like: Weight) -> None:
        """This slot is of other tensors from now on, those of `like`. What it holds is the caller's matter."""
        for name in weight.names:
            left = [place for place in self.slots.get(name, []) if place[0] is not weight]
            if left:
                self.slots[name] = left
            else:
                self.slots.pop(name, None)
        weight.names, weight.parts, weight.elsewhere = like.names, like.parts, like.elsewhere
        for part, name in enumerate(weight.names):
            self.slots.setdefault(name, []).append((weight, part))
        self._elsewhere |= set(like.elsewhere)
        self._companions = self._name_companions()

    def places(self, name: str) -> list[Place]:
        if name not in self.slots:
            raise ModelLoadError(f"no weight is called {name!r}; see weight_names()")
        return self.slots[name]

    def get(self, name: str, rows: int | None = None, *, lost: bool = False) -> Tensor:
        """One tensor as a checkpoint would hold it (a copy); on a rank of several, of the rows and columns it keeps.

        `rows`: the first so many rows alone. `lost`: also where there are no values, but memory.

        Raises:
            ModelLoadError: there is no such tensor, or its memory has been given back.
        """
        places = self.places(name)
        if name in self.lost and not lost:
            raise ModelLoadError(f"the memory of {name} has been given back, and its values are not there")
        parts = [(weight, number, weight.part(number)) for weight, number in places]
        if parts[0][2] is None:
            return self._stored(*places[0], rows)
        # The parts of this rank, in the order and the stride in which the file has all of them.
        parts.sort(key=lambda item: (item[2].expert or 0, item[2].start) if item[2] is not None else (0, 0))
        experts: dict[int | None, list[Tensor]] = {}
        strided = transposed = False
        for weight, number, part in parts:
            assert part is not None
            experts.setdefault(part.expert, []).append(self._stored(weight, number))
            strided, transposed = part.step > 1, part.transposed
        found = [torch.stack(pieces, 1).flatten(0, 1) if strided else torch.cat(pieces) for pieces in experts.values()]
        found = [values.T if transposed and values.ndim > 1 else values for values in found]
        whole = found[0] if parts[0][2].expert is None else torch.stack(found)
        return (whole if rows is None else whole[:rows]).contiguous()

    def _stored(self, weight: Weight, number: int, most: int | None = None) -> Tensor:
        rows = weight.rows(number)
        if most is not None:
            rows = slice(rows.start, min(rows.stop, rows.start + most))
        if isinstance(weight.value, torch.Tensor):
            values = weight.value[rows]
            return (values - weight.shift if weight.shift else values).clone()
        # Whatever a packed weight is, the table's `embedding` reads its rows.
        ids = torch.arange(rows.start, rows.stop, device=self.device(weight))
        return self.table(weight).embedding(ids, weight.value, 1.0).to(self.ctx.dtype).clone()


def _stored_low(source: Source) -> str:
    """The stored type of a tensor whose values are not the weights; a format's `join` has made another source."""
    return source.stored if isinstance(source, SafetensorsSource) and source.stored not in WHOLE else ""
