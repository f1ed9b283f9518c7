"""Hidden states for trainers of heads, by an engine that serves: between two of its steps, into files of a folder.

A capture reads its texts from their first token on, whatever the cache holds, and leaves the cache as it is. Its file
is DIR/store_id/sample_id.safetensors, with the tensors [1, S, N or A] under the names that were asked for, and what the
client sends along (`passthrough`) as it is.

Legend: S tokens of a text, N hidden size, A the widths of all auxiliary states together.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from phloem.core.errors import BadRequest, ConfigError
from phloem.core.speculation import check_capture
from phloem.speculation.capture import aux_layers, capture
from phloem.speculation.drafters._files import decoder_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.config import SpeculativeConfig
    from phloem.models import Model

# Of a folder or a file, without a way out; and of a tensor. safetensors keeps what begins with two underscores.
NAME = re.compile(r"(?!__)[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
SAMPLE = re.compile(r"(?!__)[A-Za-z0-9_-][A-Za-z0-9._:-]{0,159}")  # SpecForge's are run:task
TOKENS = 8192  # of one call: the engine serves nobody meanwhile
FEATURES = {"aux": "aux_TA", "last_hidden": "last_TN"}


class Capturer:
    """Of an engine that was started with --enable-spec-capture."""

    def __init__(self, model: Model, vocab_size: int, context: int, folder: Path) -> None:
        """Raises ConfigError for a model that gives no states, or a folder that cannot be made."""
        self._model, self._vocab_size, self._context, self._folder = decoder_of(model), vocab_size, context, folder
        try:
            self.layers = aux_layers(len(self._model.layers))
            folder.mkdir(parents=True, exist_ok=True)
        except ValueError as error:
            raise ConfigError(f"enable_spec_capture: {error}", param="enable_spec_capture") from None
        except OSError as error:
            raise ConfigError(f"spec_capture_dir: {folder}: {error.strerror}", param="spec_capture_dir") from None

    def capture(self, texts: list[list[int]], asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write the states of each text; gives what each file has. For `Runner.between`.

        Raises:
            BadRequest: what is asked for does not fit; nothing is written then.
        """
        places = [self._place(one) for one in asked]
        if len(set(places)) < len(places):
            raise BadRequest("two samples have one sample_id", param="spec_capture.sample_id")
        lengths = [len(text) for text in texts]
        if not lengths or min(lengths) < 1 or sum(lengths) > TOKENS or max(lengths) > self._context:
            raise BadRequest(f"texts of 1 to {min(TOKENS, self._context)} tokens, {TOKENS} in all", param="input_ids")
        if any(not 0 <= token < self._vocab_size for text in texts for token in text):
            raise BadRequest(f"a token id is not in [0, {self._vocab_size})", param="input_ids")
        try:
            got = capture(self._model, texts, self.layers)
        except ConfigError as error:
            raise BadRequest(error.message, code="not_supported") from None
        found: list[dict[str, Any]] = []
        for one, place, states in zip(asked, places, got, strict=True):
            names = one.get("features") or {name: name for name in FEATURES}
            tensors = {names[name]: vars(states)[FEATURES[name]].cpu()[None].contiguous() for name in names}
            tensors |= {item["name"]: _passed(item) for item in one.get("passthrough") or ()}
            self._write(place, tensors, one)
            told = {
                key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
                for key, value in tensors.items()
            }
            keys = {key: one.get(key) for key in ("sample_id", "store_id", "gen")}
            # As trainers count layers: by their outputs.
            outputs = [layer - 1 for layer in self.layers]
            layers = {"layers": list(self.layers), "aux_layer_ids": outputs}
            found.append({**keys, "features": told, "path": str(place), **layers})
        return found

    def _place(self, asked: dict[str, Any]) -> Path:
        for key, pattern in (("store_id", NAME), ("sample_id", SAMPLE)):
            if not pattern.fullmatch(str(asked.get(key) or "")):
                raise BadRequest(f"{key}: expected letters, digits, '-', '_' and '.'", param=f"spec_capture.{key}")
        names = asked.get("features") or {}
        if set(names) - set(FEATURES) or len(set(names.values())) < len(names):
            known = ", ".join(FEATURES)
            raise BadRequest(f"features: known: {known}, each with a name of its own", param="spec_capture.features")
        if not all(NAME.fullmatch(str(name)) for name in names.values()):
            raise BadRequest("features: a name has letters, digits, '-', '_' and '.'", param="spec_capture.features")
        passed = [str(item["name"]) for item in asked.get("passthrough") or ()]
        own = [*names.values()] if names else [*FEATURES]
        if len({*passed, *own}) < len(passed) + len(own):
            raise BadRequest("passthrough: each tensor needs a name of its own", param="spec_capture.passthrough")
        if not all(NAME.fullmatch(name) for name in passed):
            raise BadRequest("passthrough: a name has letters, digits, '-', '_', '.'", param="spec_capture.passthrough")
        place = self._folder / str(asked["store_id"]) / f"{asked['sample_id']}.safetensors"
        if place.exists() and not asked.get("replace"):
            raise BadRequest("this sample is there already, and replace is false", param="spec_capture.replace")
        return place

    def _write(self, place: Path, tensors: dict[str, Any], asked: dict[str, Any]) -> None:
        part = place.with_name(f".{place.name}.part")
        try:
            place.parent.mkdir(exist_ok=True)
            save_file(tensors, part, metadata={"gen": str(asked.get("gen") or 0), "layers": str(list(self.layers))})
            part.replace(place)
        except Exception as error:  # safetensors has an error of its own for a full disk
            with suppress(OSError):  # a file lies where the store's folder should, say
                part.unlink(missing_ok=True)
            raise BadRequest(f"the states cannot be written: {error}", code="not_stored") from None


def _passed(item: dict[str, Any]) -> Tensor:
    """A tensor that a client sends along. Raises BadRequest for numbers that its type does not hold."""
    kind: torch.dtype = getattr(torch, item["dtype"])
    try:
        return torch.tensor(item["data"], dtype=kind).view(item["shape"])
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise BadRequest(f"passthrough: {item['name']}: {error}", param="spec_capture.passthrough") from None


def capturer(
    config: SpeculativeConfig, model: Model | None, vocab_size: int, context: int, why: str
) -> Capturer | None:
    """None: it was not asked for. `why`: what makes it impossible here.

    Raises:
        ConfigError: flags that do not go together, or a model that gives no states.
    """
    if not check_capture(config, why):
        return None
    assert model is not None and config.spec_capture_dir is not None, "why says so, and so does the check"
    return Capturer(model, vocab_size, context, Path(config.spec_capture_dir).expanduser())
