"""The engine in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import phloem
from phloem.core.errors import PhloemError
from phloem.lang.backends._native import NativeBackend
from phloem.lang.chat import FORMATS, ChatFormat, derive

if TYPE_CHECKING:
    from phloem.llm import Engine


class EngineBackend(NativeBackend):
    """Programs on `phloem.Engine`. `owned`: the engine ends with `shutdown`."""

    def __init__(self, engine: Engine, owned: bool = False, sharing: bool = True) -> None:
        super().__init__(sharing)
        if engine.tokenizer is None:
            raise PhloemError("programs are text: they need an engine with a tokenizer")
        self.engine = engine
        self._owned = owned

    def post(self, body: dict[str, Any]) -> Any:
        return self.engine.generate(body.pop("text", None), **body)

    def post_stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        answers: Any = self.engine.generate(body.pop("text", None), stream=True, **body)
        yield from answers

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.engine.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def make_format(self) -> ChatFormat:
        template, tokenizer = self.engine.chat_template, self.engine.tokenizer
        if template is None or template.source is None:
            return FORMATS["default"]
        bos = tokenizer.decode(tokenizer.encode(""), skip_special_tokens=False)

        def render(messages: list[dict[str, Any]], generate: bool) -> str:
            return template.render(messages, add_generation_prompt=generate)

        return derive(render, bos) or FORMATS["default"]

    def flush_cache(self) -> bool:
        return self.engine.flush_cache(timeout=10.0)

    def get_server_info(self) -> dict[str, Any]:
        return self.engine.get_server_info()

    def get_model_name(self) -> str:
        return self.engine.info.served_model_name

    def shutdown(self) -> None:
        if self._owned:
            self.engine.shutdown()


def make(model_path: str = "demo", **settings: Any) -> EngineBackend:
    """Start an engine for programs; keywords are the settings of `phloem serve`. End it with `shutdown()`."""
    return EngineBackend(phloem.Engine(model_path=model_path, **settings), owned=True)


BACKEND = EngineBackend
