"""Tensors of the host as handles to memory that processes share: what `/update_weights_from_tensor` reads."""

from __future__ import annotations

import io
import time
from base64 import b64decode, b64encode
from collections import deque
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.reductions import reduce_storage

from phloem.rl.payload import rebuilt
from sglang._missing import refuse

KEPT_SECONDS = 60.0  # for which a tensor that nobody else holds can still be read
_kept: deque[tuple[float, Any]] = deque()


class _Pickler(ForkingPickler):
    """Shared memory by name, whatever the process's strategy. Torch would count the receiver as a holder for ever: the
    engine copies and counts nothing, so the memory is held here for a while instead."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.dispatch_table = {**self.dispatch_table, torch.UntypedStorage: _reduced}


def _reduced(storage: torch.UntypedStorage) -> Any:
    if storage.device.type != "cpu":
        refuse("handle to GPU memory", "engines on the host read the host's memory: serialize tensor.cpu()")
    found = reduce_storage(storage)
    if storage.nbytes():
        storage._shared_decref()
        _kept.append((time.monotonic(), storage))
    return found


class MultiprocessingSerializer:
    """As SGLang's: `serialize` gives bytes, or base64 text with `output_str`. A tensor must live until it has been
    read; one that nobody holds any more can be read for a minute."""

    @staticmethod
    def serialize(obj: Any, output_str: bool = False) -> bytes | str:
        """Lists, tuples, dicts, numbers and texts of tensors.

        Raises:
            NotThere: a tensor is not on the host.
        """
        while _kept and _kept[0][0] < time.monotonic() - KEPT_SECONDS:
            _kept.popleft()
        before = multiprocessing.get_sharing_strategy()
        multiprocessing.set_sharing_strategy("file_system")
        try:
            buffer = io.BytesIO()
            _Pickler(buffer).dump(obj)
        finally:
            multiprocessing.set_sharing_strategy(before)
        data = buffer.getvalue()
        return b64encode(data).decode() if output_str else data

    @staticmethod
    def deserialize(data: bytes | str) -> Any:
        """Copies of the tensors, in the lists, tuples and dicts that they were in.

        Raises:
            phloem.core.errors.BadRequest: there is something else in it; nothing is ever executed.
        """
        return rebuilt(b64decode(data) if isinstance(data, str) else bytes(data))
