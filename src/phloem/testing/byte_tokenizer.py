"""A tokenizer without a vocabulary file, for tests: token i below 256 is the byte i; a few special tokens follow."""

from __future__ import annotations

import codecs
from typing import Any

SPECIALS = ("<bos>", "<eos>", "<pad>", "<user>", "<assistant>", "<system>", "<end>")
BOS, EOS, PAD, USER, ASSISTANT, SYSTEM, END = range(256, 256 + len(SPECIALS))


class ByteTokenizer:
    """The face of `server.tokenizer.Tokenizer` over bytes; special tokens are read from and written as their names."""

    vocab_size = 256 + len(SPECIALS)
    bos_id: int | None = BOS
    eos_ids: tuple[int, ...] = (EOS, END)
    backend: Any = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        rest = text
        while rest:
            found = [(rest.find(name), token) for token, name in enumerate(SPECIALS, 256) if name in rest]
            at, token = min(found, default=(len(rest), -1))
            ids += rest[:at].encode()
            if token >= 0:
                ids.append(token)
                at += len(SPECIALS[token - 256])
            rest = rest[at:]
        return ids

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(
        self, ids: list[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        kept = [token for token in ids if token < 256 or not skip_special_tokens]
        parts = [self.token_bytes(token) or self.token_text(token).encode() for token in kept]
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        return SPECIALS[token - 256] if token >= 256 else bytes([token]).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return b"" if token >= 256 else bytes([token])

    def stream(self, skip_special_tokens: bool = True) -> _ByteStream:
        return _ByteStream(self, skip_special_tokens)

    def is_special(self, token: int) -> bool:
        return token >= 256


class _ByteStream:
    """Incomplete UTF-8 is held back until it is complete or the end has come."""

    def __init__(self, tokenizer: ByteTokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token >= 256:
            return self._decoder.decode(b"") + ("" if self._skip else self._tokenizer.token_text(token))
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class ByteTemplate:
    """The face of `server.template.ChatTemplate` with one fixed format."""

    source: str | None = "{% byte template %}"

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        parts = [f"<{message['role']}>{message.get('content') or ''}<end>" for message in messages]
        text = "<bos>" + "".join(parts)
        if continue_final_message:
            return text.removesuffix("<end>")
        return text + "<assistant>" if add_generation_prompt else text
