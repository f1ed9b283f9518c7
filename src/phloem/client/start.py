"""The door's own half of the start, beside the engine's: what is known of the model, its tokenizer, its template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phloem.checkpoint.describe import describe
from phloem.client.client import EngineClient
from phloem.client.info import ModelInfo, with_formats
from phloem.text.template import load_template
from phloem.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config


def make_client(config: Config) -> tuple[EngineClient, ModelInfo, Checkpoint]:
    """A client that waits for its engine (`attach`). Neither torch nor weights are touched.

    Raises:
        PhloemError: the configuration or the checkpoint is wrong.
    """
    model = config.model
    checkpoint = describe(
        model.model_path, model.load_format, model.revision, model.tokenizer_path, model.task, draws=True
    )
    # Without a tokenizer nothing can follow a text.
    features = frozenset[str]() if model.skip_tokenizer_init else frozenset({"grammar"})
    if config.server.enable_return_hidden_states:
        features |= {"hidden_states"}
    if config.lora.enable_lora or config.lora.lora_paths:
        features |= {"lora"}
    info = ModelInfo.of(checkpoint, config, features)
    if model.skip_tokenizer_init or info.draws:
        return EngineClient(None, None, info), info, checkpoint
    tokenizer = load_tokenizer(checkpoint)
    if info.pooling is not None:
        return EngineClient(tokenizer, None, info), info, checkpoint
    override = Path(model.chat_template) if model.chat_template else None
    template = load_template(checkpoint, override, tokenizer)
    if checkpoint.gguf is not None:
        checkpoint.gguf.release()
    info = with_formats(info, template.source, model.tool_call_parser, model.reasoning_parser)
    return EngineClient(tokenizer, template, info), info, checkpoint
