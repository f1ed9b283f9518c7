"""What only a model's layers tell of what it cannot be served with: asked of a model without weights, before any is
read. One rank asks the model that it is about to read; several, a share of it that is made for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.adapters._sites import check_adaptable
from phloem.core.errors import ConfigError
from phloem.core.memory import groups_of
from phloem.core.speculation import AUTO, NONE, cannot, wanted
from phloem.engine.choices.routes import check_told
from phloem.engine.choices.unserved import undrafted
from phloem.engine.ranks.counts import check_counted
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models._common import Decoder

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.layers.context import Chosen
    from phloem.layers.spread import Spread

POSITIONS = 64  # tables of rotations are built for so many: nobody looks into them


def context(spread: Spread | None = None) -> BuildContext:
    """What a model without weights is built of."""
    return BuildContext(Ops(), torch.bfloat16, torch.device("meta"), spread=spread)


def has_experts(model: Any) -> bool:
    """Whether there are experts among a model's weights."""
    return not isinstance(model, Decoder) or any(weight.experts for weight in model.weights())


def check(config: Config, checkpoint: Checkpoint, model: Any, spread: Spread | None, chosen: Chosen | None) -> None:
    """Of a model without weights, or of one rank's share. Raises ConfigError for what it cannot be served with."""
    if spread is not None:
        check_counted(config.experts, spread, model, checkpoint.model_type)
    if config.lora.enable_lora or config.lora.lora_paths:
        check_adaptable(model)
    if chosen is not None:
        check_told(chosen, groups_of(model.memory), checkpoint.model_type)


def check_drafts(config: Config, checkpoint: Checkpoint, model: Any) -> None:
    """Of a rank's share. Raises ConfigError for drafts that several ranks do not verify."""
    drafts = wanted(config)
    recurrent = any(group.kind == "state" for group in groups_of(model.memory))
    why = undrafted(config, checkpoint, several=True, recurrent=recurrent)
    if why and drafts.algorithm not in (AUTO, NONE):
        raise cannot(drafts, why)


def check_alone(
    config: Config, checkpoint: Checkpoint, model: Any, spread: Spread | None, chosen: Chosen | None
) -> None:
    """As `check`, of the model of one rank before its weights are read."""
    check(config, checkpoint, model, spread, chosen)
    own = config.experts
    if own.kt_num_gpu_experts is None and own.kt_weight_path is None:
        return
    if not (isinstance(model, Decoder) and has_experts(model)):
        name = "kt_weight_path" if own.kt_num_gpu_experts is None else "kt_num_gpu_experts"
        raise ConfigError(f"{name}: this model has no routed experts", param=name)
