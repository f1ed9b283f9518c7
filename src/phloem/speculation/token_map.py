"""A file that names the tokens that a head says: a list of ids, or what a head has (`d2t`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def read_token_map(path: Path, vocab_size: int, param: str) -> Tensor:
    """Ids int64 [D], rising, from a .pt, .json or .safetensors file. `param`: the setting that names it.

    Raises:
        ConfigError: it cannot be read, or has ids that are not there, or one twice.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                given: Any = {"d2t": file.get_tensor("d2t")}
        elif path.suffix == ".json":
            given = json.loads(path.read_text())
        else:
            given = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(given, dict):
            d2t_D = _whole(cast("dict[str, Any]", given)["d2t"])
            ids_D = d2t_D + torch.arange(len(d2t_D))
        else:
            ids_D = _whole(given).sort().values
    except Exception as error:
        raise ConfigError(f"{param}: {path} cannot be read: {error!r}", param=param) from None
    if not len(ids_D) or int(ids_D.min()) < 0 or int(ids_D.max()) >= vocab_size or len(ids_D.unique()) < len(ids_D):
        raise ConfigError(f"{param}: {path} has tokens that the model has not, or one twice", param=param)
    return ids_D


def _whole(given: Any) -> Tensor:
    """A list of whole numbers, int64 [D]: no mask of tokens (`t2d`), which would be read as the ids 0 and 1."""
    values = torch.as_tensor(given)
    if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"a list of whole numbers is expected, not {values.dtype} {list(values.shape)}")
    return values.long().cpu()
