"""A prompt in tokens, as the servers of a model make it: for cache events, which speak of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.errors import PhloemError
from phloem.protocol.body import Parser
from phloem.server.chat.body import ChatBody
from phloem.server.chat.convert import to_request
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.client.client import EngineClient
    from phloem.client.info import ModelInfo

_log = log.get("router")


class _Text(msgspec.Struct):
    prompt: object = None
    text: object = None


_chat = Parser(ChatBody)
_text = msgspec.json.Decoder(_Text).decode


class Tokens:
    """Of one model. Raises PhloemError where it cannot be read."""

    def __init__(self, model_path: str) -> None:
        self._client: EngineClient
        self._info: ModelInfo
        self._client, self._info, _ = make_client(Config.from_flat({"model_path": model_path}))

    async def ids(self, path: str, body: bytes | bytearray) -> list[int] | None:
        """None where they cannot be told; the server will say why."""
        try:
            if path == "/v1/chat/completions":
                parsed = _chat.parse(bytes(body), self._info.features)
                found = await to_request(parsed, self._client, self._info)
                item = found.request.items[0]
                return item.ids if item.ids is not None else self._encode(item.text)
            if path in ("/v1/completions", "/generate"):
                told = _text(body)
                return self._encode(told.text if told.prompt is None else told.prompt)
        except (PhloemError, msgspec.DecodeError, ValueError) as error:
            _log.debug("a prompt could not be tokenised: %s", error)
        return None

    def _encode(self, text: object) -> list[int] | None:
        tokenizer = self._client.tokenizer
        return tokenizer.encode(text) if isinstance(text, str) and tokenizer is not None else None
