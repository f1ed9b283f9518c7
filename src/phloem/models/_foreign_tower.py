"""A tower whose code is transformers' own, before a language model of ours: for families that have no file here.

Of their class the language model is left out: it is built without layers. Pictures come as our processors make them
(`checkpoint.fallback.TOWERS`). Legend: M the model's hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.models._vision import VisionTower

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.checkpoint.fallback import Seen
    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack


class ForeignTower(VisionTower):
    """`theirs`: the body of their class, in evaluation."""

    def __init__(self, ctx: BuildContext, seen: Seen, theirs: Any, hidden_size: int) -> None:
        super().__init__(ctx, seen.token, hidden_size)
        self.name = seen.model_type
        self._theirs = theirs
        self._parts = {name for name, _ in theirs.named_children()}
        self.like = next(theirs.parameters()).dtype

    @torch.inference_mode()
    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        """[tokens, M] of each picture."""
        del pack  # their attention is their own
        return [self._one(item) for item in items]

    def _one(self, item: Media) -> Tensor:
        made = self._theirs.get_image_features(pixel_values=self.cast(self.pixels(item)), return_dict=True)
        found: Any = made.pooler_output
        rows = (found if isinstance(found, torch.Tensor) else torch.cat(list(found))).reshape(-1, self.hidden_size)
        wanted = sum(count for _, count in item.spans)
        if len(rows) != wanted:
            raise RuntimeError(f"{self.name}'s tower made {len(rows)} embeddings of a picture of {wanted} tokens")
        return rows

    def owns(self, name: str) -> bool:
        """Whether a checkpoint's tensor of this name is one of the tower's."""
        return not self._parts.isdisjoint(name.split("."))

    def take(self, other: ForeignTower) -> None:
        """The weights of another one, in place."""
        self._theirs.load_state_dict(other._theirs.state_dict())

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._theirs.parameters())


def load_tower(checkpoint: Checkpoint, seen: Seen, ctx: BuildContext, hidden_size: int) -> ForeignTower:
    """Build a checkpoint's tower and read its weights, as transformers does.

    Raises:
        ModelLoadError: transformers is not installed or has no such class, or tensors are missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelLoadError(f"{checkpoint.path}: the tower of {seen.model_type} needs transformers: {error}") from None
    where = f"{checkpoint.path}: the tower of {seen.model_type}"
    loud = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists the layers that are left out
    try:
        config: Any = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        config.text_config.num_hidden_layers = 0
        if isinstance(vars(config.text_config).get("layer_types"), list):
            config.text_config.layer_types = []
        whole, told = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint.path, config=config, dtype=ctx.dtype, use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever their code raises of a file that it does not like
        lines = str(error).strip().splitlines() or [""]
        raise ModelLoadError(f"{where}: transformers: {type(error).__name__}: {lines[0]:.300}") from error
    finally:
        transformers.logging.set_verbosity(loud)
    missing = sorted(name for name in map(str, told.get("missing_keys") or ()) if "lm_head" not in name)
    if missing:
        raise ModelLoadError(f"{where}: {len(missing)} tensors are missing, among them {missing[0]}")
    body = whole.model
    del body.language_model
    return ForeignTower(ctx, seen, body.to(ctx.device).eval().requires_grad_(False), hidden_size)
