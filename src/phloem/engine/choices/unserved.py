"""What does not go together, as far as settings and a checkpoint's configuration tell: refused before any rank is
started and any weight read. Without torch: a node that executes alone can say so too.

What several ranks do not serve is in `unshared`; what only a model's layers tell, in `on_paper`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.speculation import AUTO, MODELS, NONE, cannot, check_capture, wanted
from phloem.engine.ranks.unshared import option_of

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config


def refuse_unserved(config: Config, checkpoint: Checkpoint, *, several: bool) -> None:
    """`several`: the model is shared out among ranks. Raises ConfigError."""
    drafts = wanted(config)
    asked = drafts.algorithm not in (AUTO, NONE)
    if asked and (why := undrafted(config, checkpoint, several=several)):
        raise cannot(drafts, why)
    check_capture(config.speculative, uncaptured(config, checkpoint, several=several))


def undrafted(
    config: Config, checkpoint: Checkpoint, *, several: bool, recurrent: bool = False, fills: bool = False
) -> str:
    """Why drafts are not verified; "": they are.

    Args:
        several: the model is shared out among ranks.
        recurrent: the model has states, which have taken drafts in before these are refused.
        fills: it writes by diffusion.
    """
    name, size = option_of(config)
    if checkpoint.pooling is not None:
        return "the model does not generate"
    if config.lora.enable_lora or config.lora.lora_paths:
        return "beside adapters, drafts have not been shown to change no bit"
    if fills:
        return "a model of diffusion gives several tokens a pass by itself"
    if several and wanted(config).algorithm in MODELS:
        return f"a model that drafts runs on one rank, and {name} is {size}"
    if several and recurrent:
        return f"states without refused drafts are made anew on one rank, and {name} is {size}"
    return ""


def uncaptured(config: Config, checkpoint: Checkpoint, *, several: bool) -> str:
    """Why hidden states are not captured; "": they may be."""
    if checkpoint.pooling is not None:
        return "the model does not generate"
    if several or config.runtime.dp_size > 1:
        return "states are captured by one engine on one rank"
    return ""
