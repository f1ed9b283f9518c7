"""Which family draws for a folder: one file for each, by the class that `model_index.json` names.

`FluxPipeline` is drawn by `flux.py`. A class without a file, or with a schedule that the file does not know, is run
whole by its own pipeline (`_whole.py`), one picture at a time.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError, ModelLoadError
from phloem.core.resolve import Decision
from phloem.diffusion.family import Family
from phloem.diffusion.models._whole import Whole
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    import torch

    from phloem.checkpoint.pictures import Pictures

FAMILIES: Registry[type[Family]] = Registry("phloem.diffusion.models", "family of pictures", "PAINTER")
Painter = Family | Whole


def key_of(class_name: str) -> str:
    """`StableDiffusion3Pipeline` -> `stable_diffusion_3`."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*|\d+", class_name.removesuffix("Pipeline"))
    return "_".join(words).lower()


ENCODERS = ("text_encoder", "image_encoder")  # begin the names of parts that read prompts and pictures


def load(pictures: Pictures, device: torch.device, dtype: torch.dtype, tiling: bool, *, encoders: bool = True) -> Any:
    """The folder's pipeline, in the host's memory; `choose` brings it to the device. Not `encoders`: it will only
    compute steps, of what others have read.

    Raises:
        ConfigError: diffusers is not installed.
        ModelLoadError: what diffusers says of the folder.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError("pictures need diffusers: pip install 'phloem[diffusion]'", param="model_path")
    import diffusers
    import diffusers.utils

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    library: Any = diffusers
    kind: Any = getattr(library, pictures.class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, library.DiffusionPipeline)):
        raise ModelLoadError(
            f"{pictures.path}: {pictures.class_name} is no pipeline of diffusers {diffusers.__version__}",
            param="model_path",
        )
    names = [] if encoders else list(inspect.signature(kind.__init__).parameters)
    without = {name: None for name in names if name.startswith(ENCODERS)}
    try:
        pipe = kind.from_pretrained(str(pictures.path), torch_dtype=dtype, local_files_only=True, **without)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(f"{pictures.path}: {reason}", param="model_path") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if callable(getattr(part, "requires_grad_", None)):
            part.eval().requires_grad_(False)
    if tiling:
        if not callable(getattr(getattr(pipe, "vae", None), "enable_tiling", None)):
            raise ConfigError(f"vae_tiling: the VAE of {pictures.class_name} has no tiles", param="vae_tiling")
        pipe.vae.enable_tiling()
    return pipe


def choose(
    pipe: Any, device: torch.device, dtype: torch.dtype, defaults: dict[str, Any], offload: bool = False
) -> tuple[Painter, Decision]:
    """Who draws, and why; the pipeline is brought to the device, or its parts when they are used (`offload`).

    Raises:
        ConfigError: a pipeline that runs whole cannot be offloaded here.
    """
    if not offload:
        pipe.to(device)
    name, key = type(pipe).__name__, key_of(type(pipe).__name__)
    if key not in FAMILIES.names():
        why = f"no family of ours draws {name}: its pipeline runs whole, one picture at a time"
    else:
        why = _declined(pipe, FAMILIES.get(key))
        if why is None:
            painter = FAMILIES.get(key)(pipe, device, dtype, defaults, offload)
            return painter, Decision("painter", key, f"draws {name} in steps that pictures share")
    if offload:
        _offload(pipe, device)
    return Whole(pipe, defaults), Decision("painter", "whole pipeline", why)


def _offload(pipe: Any, device: torch.device) -> None:
    """By diffusers' own hooks. Raises ConfigError."""
    try:
        pipe.enable_model_cpu_offload(device=device)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"offload: {type(pipe).__name__} runs whole, and diffusers says: {reason}", param="offload"
        ) from None


def _declined(pipe: Any, family: type[Family]) -> str | None:
    scheduler = pipe.scheduler
    if pipe.transformer is None:
        return "it has no first transformer"
    if type(scheduler).__name__ not in family.schedulers:
        return f"the schedule is {type(scheduler).__name__}, not flow matching by {' or '.join(family.schedulers)}"
    if type(scheduler).__name__.startswith("UniPC") and scheduler.config.get("prediction_type") != "flow_prediction":
        return "the schedule is not of flow matching"
    if scheduler.config.get("stochastic_sampling") or scheduler.config.get("invert_sigmas"):
        return "the schedule draws noise between steps, or runs upwards"
    return None
