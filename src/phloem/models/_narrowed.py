"""A quantised checkpoint's model without data, in the forms that its files will be given by an op table.

Of the files the headers are read, and the small tensors (scales, zero points) by which a format chooses its form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from phloem.models._index import open_sources
from phloem.models._sources import DummySource, GGUFSource
from phloem.quant._grid import Grid

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.models._common import Decoder
    from phloem.quant._source import Source


def _is_narrow(source: Source | None) -> TypeGuard[Source]:
    blocks = isinstance(source, GGUFSource) and source.kind not in ("dense", "F16", "BF16")
    return blocks or isinstance(source, Grid)


def load_forms(model: Decoder, checkpoint: Checkpoint) -> None:
    """Fill a model whose device is `meta`; it may have fewer layers than the checkpoint.

    Raises:
        ModelLoadError: as loading does.
    """
    index = model.index
    stored, _ = open_sources(checkpoint, index, model.checkpoint_name, whole=False)
    index.join(stored)
    sources: dict[str, Source] = {
        name: source
        if places[0][0].role == "matrix" and _is_narrow(source := stored.get(name))
        else DummySource(name, index.stored_shape(name), shifted=True, role=places[0][0].role, device=index.ctx.device)
        for name, places in index.slots.items()
    }
    index.pull(sources, str(checkpoint.path), None)
