"""What files of heads that draft say of themselves, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from phloem.checkpoint.describe import describe
from phloem.core.errors import ConfigError
from phloem.models._common import Decoder
from phloem.models._sources import shapes_in
from phloem.platforms._facts import in_host_memory
from phloem.quant import method_for
from phloem.speculation.capture import untapped

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.layers.context import BuildContext
    from phloem.models import Model

PARAM = "speculative_draft_model_path"
Shapes = dict[str, tuple[int, ...]]
_MATRICES = ("fc.weight", "lm_head.weight", "markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
_ROWS = ("d2t", "t2d", "hidden_norm.weight", "norm.weight")


def draft_of(wanted: Wanted) -> Checkpoint:
    """The checkpoint that drafts. Raises ModelLoadError, or ConfigError for one that does not generate."""
    assert wanted.draft_model is not None
    found = describe(wanted.draft_model)
    if any("DFlash" in name or "DSpark" in name for name in found.architectures):
        found = describe(wanted.draft_model, task="generate")  # else `...Model` says that it gives vectors
    if found.pooling is not None or found.pictures is not None:
        raise ConfigError(f"{found.path}: it does not generate, so it drafts nothing", param=PARAM)
    return found


def shapes_of(checkpoint: Checkpoint) -> Shapes:
    """Every tensor of a checkpoint without the `model.` that some writers put before the names. Raises ConfigError for
    tensors of heads that have not as many dimensions as they have everywhere."""
    if checkpoint.format != "safetensors":
        raise ConfigError(f"{checkpoint.path}: heads that draft are read from safetensors", param=PARAM)
    found = {name.removeprefix("model."): shape for path in checkpoint.files for name, shape in shapes_in(path).items()}
    for names, count in ((_MATRICES, 2), (_ROWS, 1)):
        for name in names:
            if len(found.get(name, (0,) * count)) != count:
                raise ConfigError(
                    f"{checkpoint.path}: {name} is {list(found[name])}, expected {count} dimensions", param=PARAM
                )
    return found


def whole(config: dict[str, Any], name: str, where: str) -> int:
    """What a configuration says under `name`, 0 where it says nothing. Raises ConfigError for what is no whole number
    from 0."""
    value = config.get(name)
    if value is None or value is False:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{where}: {name} is {value!r:.60}, expected a whole number from 0", param=PARAM)
    return value


def check_no_block(shapes: Shapes, draft: Checkpoint) -> None:
    """That it is not a drafter of blocks. Raises ConfigError."""
    if "hidden_norm.weight" in shapes and "fc.weight" in shapes:
        raise ConfigError(
            f"{draft.path}: this is a DFlash drafter, no EAGLE head: speculative_algorithm DFLASH runs it",
            param="speculative_algorithm",
        )


def check_head(shapes: Shapes, draft: Checkpoint, target: Checkpoint, wide: int, kind: str) -> None:
    """That `fc` takes `wide` states of the target's size and gives one. Raises ConfigError."""
    size = int(target.config["hidden_size"])
    if "fc.weight" not in shapes:
        raise ConfigError(f"{draft.path}: no tensor fc.weight, which every {kind} head has", param=PARAM)
    rows, width = shapes["fc.weight"]
    if (rows, width) == (size, wide * size):
        return
    if width != wide * rows and width in (2 * rows, 3 * rows):
        is_kind, asked = ("EAGLE3", "EAGLE") if width == 3 * rows else ("EAGLE", "EAGLE3")
        raise ConfigError(
            f"{draft.path}: fc.weight is {rows} x {width}: this is an {is_kind} head, and run as {asked} none of its "
            f"drafts would be right; speculative_algorithm {is_kind} runs it",
            param="speculative_algorithm",
        )
    raise ConfigError(
        f"{draft.path}: fc.weight is {rows} x {width}, but the model's hidden size is {size}, which takes {size} x "
        f"{wide * size}: the head was made for another model",
        param=PARAM,
    )


def check_layers(shapes: Shapes, draft: Checkpoint) -> None:
    """That there is one layer. Raises ConfigError."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    if len(layers) > 1 or whole(draft.config, "num_hidden_layers", str(draft.path)) > 1:
        raise ConfigError(f"{draft.path}: heads of more than one layer are not run", param=PARAM)


def ids_of(draft: Checkpoint, own: int, vocab: int) -> Tensor:
    """The token of each of a head's `own` ids, int64, by its d2t. Raises ConfigError for one that is none."""
    for path in draft.files:
        with safe_open(str(path), framework="pt") as file:
            name = next((key for key in file.keys() if key.removeprefix("model.") == "d2t"), None)  # noqa: SIM118
            if name is None:
                continue
            ids_D = torch.arange(own) + file.get_tensor(name).long()
            if int(ids_D.min()) < 0 or int(ids_D.max()) >= vocab or len(ids_D.unique()) < len(ids_D):
                raise ConfigError(f"{path}: d2t leads to tokens that are not there, or to one twice", param=PARAM)
            return ids_D
    raise AssertionError("the header named it")


def head_context(ctx: BuildContext, target: Checkpoint) -> BuildContext:
    """How a head is built: beside weights of few bits on the host in 8 bits, as reading it is what a pass waits for."""
    few = target.quantised and in_host_memory(ctx.device)
    return replace(ctx, quant=method_for("int8", None)) if few else ctx


def decoder_of(model: Model) -> Decoder:
    """The model, as one whose states may be read. Raises ConfigError."""
    if not isinstance(model, Decoder):
        raise ConfigError("a head drafts for models whose code is ours", param="speculative_algorithm")
    if (why := untapped(model)) is not None:
        raise ConfigError(f"a head cannot draft for this model: {why}", param="speculative_algorithm")
    return model
