"""How often experts are chosen: files of it (`--init-expert-location`), and whether experts lie over ranks by it.

Names of options are SGLang's."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ConfigError
from phloem.distributed.experts import KEYS, counts_of
from phloem.engine.memory import first_line
from phloem.layers.spread import Spread
from phloem.models._common import Decoder

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config, ExpertsConfig
    from phloem.distributed.experts import Counts

MOST = 1 << 28  # numbers in a table: SGLang's have a row for each layer and each of up to thousands of passes


def read_counts(path: str) -> Counts:
    """JSON, or `.pt` as SGLang writes it. Raises ConfigError where it cannot be read, or holds none."""
    where = f"init_expert_location: {path}"
    try:
        return counts_of(_stored(path) if path.endswith(".pt") else json.loads(Path(path).read_text("utf-8")), where)
    except ConfigError:
        raise
    except pickle.UnpicklingError:
        why = "it holds other things than tensors and numbers, which are not built"
    except Exception as error:  # a file of somebody else's may fail in any way
        why = f"{first_line(error):.200}"
    raise ConfigError(f"{where}: {why}", param="init_expert_location")


def _stored(path: str) -> dict[str, object]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise TypeError(f"a mapping is expected, and this is a {type(found).__name__}")
    data: dict[str, object] = {}
    for key in KEYS:
        value = found.get(key)
        if isinstance(value, torch.Tensor):
            if value.numel() > MOST:  # a view may be far larger than its file
                raise ValueError(f"{key} of shape {list(value.shape)}")
            value = value.detach().to(torch.float64).numpy()
        if value is not None:
            data[key] = value
    return data


def check_counted(own: ExpertsConfig, spread: Spread, model: Any, model_type: str) -> None:
    """Of a model that was built with this. Raises ConfigError where it has no experts to count."""
    if not spread.layers or not isinstance(model, Decoder):
        name = "enable_eplb" if own.enable_eplb else "expert_distribution_recorder_mode"
        raise ConfigError(f"{name}: {model_type} has no routed experts of ours", param=name)


def spread_of(config: Config, checkpoint: Checkpoint) -> Spread | None:
    """For the model's sparse layers; None: experts lie in their order, and nobody counts.
    Raises:
        ConfigError: options that do not go together, or a file without counts.
    """
    own, runtime = config.experts, config.runtime
    kept = own.kt_num_gpu_experts is not None or own.kt_weight_path is not None
    given = None if kept or own.init_expert_location in (None, "trivial") else str(own.init_expert_location)
    asked = {
        "enable_eplb": own.enable_eplb,
        "ep_num_redundant_experts": own.ep_num_redundant_experts > 0,
        "init_expert_location": given is not None,
    }
    name = next((name for name, found in asked.items() if found), "")
    mode = own.expert_distribution_recorder_mode
    name = name or ("expert_distribution_recorder_mode" if mode is not None else "")
    if not name:
        return None
    if runtime.pp_size > 1:
        raise ConfigError(f"{name}: not with pp_size above 1, whose stages each have other layers", param=name)
    if kept:
        raise ConfigError(f"{name}: kt_num_gpu_experts counts by itself, see /server_info", param=name)
    first = None if given is None else read_counts(given)
    layers = int(checkpoint.config.get("num_hidden_layers") or 0)
    return Spread(own.ep_num_redundant_experts, first, layers, counting=own.enable_eplb)
