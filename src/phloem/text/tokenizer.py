"""Text to token ids and back, on the `tokenizers` library alone.

Sources are `tokenizer.json`, the metadata of a GGUF file, a SentencePiece model, or `tekken.json`.

Decoding works on bytes: every token has fixed bytes (`token_bytes`), and the text is their UTF-8 reading, in which
bytes that are no UTF-8 become U+FFFD. So a stream gives what a whole decode gives, whatever the chunks. This agrees
with the library's own decoders except where a SentencePiece byte run is not valid UTF-8 (there the library replaces
the whole run, also its valid characters). Vocabularies with other decoders are read through the library, in windows.
"""

from __future__ import annotations

import codecs
import json
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.core.errors import BadRequest, ModelLoadError
from phloem.text import sentencepiece_tokenizer, tekken_tokenizer
from phloem.text.gguf_tokenizer import build_backend, set_ends, special_ids
from phloem.text.template_sources import TEKKEN, read_json

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from tokenizers import Encoding

    from phloem.checkpoint.describe import Checkpoint

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@lru_cache(1)
def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


class IncrementalDecoder(Protocol):
    """Turns ids into text one at a time; what it returns never has to be taken back."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@contextmanager
def _tokens_of_text() -> Generator[None]:
    """Raises BadRequest where the library makes no tokens of a text."""
    try:
        yield
    except (UnicodeEncodeError, TypeError):
        raise BadRequest("the text is not valid Unicode: it has lone surrogates") from None
    except BaseException as error:
        # The library's panics are no Exceptions, and would pass all that answers for errors.
        if type(error).__name__ != "PanicException":
            raise
        raise BadRequest("the tokenizer's pattern gives up on the text, as on millions of spaces") from None


class Tokenizer:
    """A tokenizer; `special` maps roles (`bos_token`, `eos_token`, ...) to token texts, as chat templates want them."""

    def __init__(self, backend: Backend, special: dict[str, str], eos_ids: Sequence[int] = ()) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = special
        self.bos_id = self._id_of("bos_token")
        own_eos = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, *([] if own_eos is None else [own_eos])]))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, added in self._added.items() if added.special)
        self._style = _Style.of(backend)
        self._bytes: dict[int, bytes] = {}
        # Of tokens whose bytes are whole characters, met so far: with special ones as nothing, and by their name.
        self.whole: tuple[dict[int, str], dict[int, str]] = ({}, {})

    def _id_of(self, role: str) -> int | None:
        text = self.special.get(role)
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written in the text are taken as such."""
        return self._encoded([text], add_special_tokens)[0].ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts; releases the interpreter lock and uses several cores."""
        return [item.ids for item in self._encoded(texts, add_special_tokens)]

    def encode_pairs(self, texts: Sequence[str | tuple[str, str]], special: bool = True) -> list[tuple[list[int], int]]:
        """Token ids of texts and of pairs of texts, each with the token at which a pair's second begins, as the model
        tells the two apart; 0 where it does not, or there is one text."""
        return [(item.ids, _second(item.type_ids)) for item in self._encoded(texts, special)]

    def _encoded(self, texts: Sequence[str | tuple[str, str]], special: bool) -> list[Encoding]:
        """Raises BadRequest for a text of which no tokens can be made."""
        with _tokens_of_text():
            # The fast one leaves out where in the text each token stands.
            return self.backend.encode_batch_fast(list(texts), add_special_tokens=special)

    def encode_cut(self, text: str | tuple[str, str], most: int, special: bool = True) -> tuple[list[int], int]:
        """As `encode_pairs`, of at most so many tokens: the end of the text, or of a pair's second, is left out, and
        what the model needs around them stays. Raises BadRequest where not even that fits."""
        first, second = text if isinstance(text, tuple) else (text, None)
        backend = self.backend
        with _tokens_of_text():
            one = backend.encode(first, add_special_tokens=False)
            two = None if second is None else backend.encode(second, add_special_tokens=False)
        room = most - (backend.num_special_tokens_to_add(two is not None) if special else 0)
        if two is not None and room > len(one):
            two.truncate(room - len(one))
        elif room > 0 and two is None:
            one.truncate(room)
        else:
            raise BadRequest(f"{most} tokens have no room for {'both texts' if two is not None else 'a text'}")
        whole = backend.post_process(one, two, special)
        return whole.ids, _second(whole.type_ids)

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of token ids; ids that the vocabulary does not have count as empty.

        `spaces_between_special_tokens` is taken for compatibility: as in every tokenizer of this library, no spaces are
        put between tokens in either case.
        """
        del spaces_between_special_tokens
        if self._style is None:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        decoder = self.stream(skip_special_tokens)
        return "".join([decoder.push(token) for token in ids]) + decoder.finish()

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one growing answer."""
        if self._style is None:
            return _Windows(self.backend, skip_special_tokens)
        return _Utf8(self, skip_special_tokens, self._style.strip)

    def token_text(self, token: int) -> str:
        """One token as text (special ones by their name); bytes that are part of a character become U+FFFD."""
        if self._style is None or token in self._added:
            return self.backend.id_to_token(token) or ""
        return self.raw_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; none for special ones and for ids that the vocabulary lacks."""
        return b"" if token in self._special_ids else self.raw_bytes(token)

    def raw_bytes(self, token: int) -> bytes:
        """As `token_bytes`, and for special tokens the bytes of their name."""
        found = self._bytes.get(token)
        if found is None:
            text = self.backend.id_to_token(token) if token >= 0 else None
            if text is None:
                found = b""
            elif self._style is None:
                found = self.backend.decode([token], skip_special_tokens=False).encode()
            else:
                found = self._style.to_bytes(text)
            self._bytes[token] = found
        return found

    def is_special(self, token: int) -> bool:
        return token in self._special_ids


def _second(types: list[int]) -> int:
    return types.index(1) if 1 in types else 0


class _Style:
    """How the vocabulary spells bytes: in the byte alphabet, or as text with byte tokens `<0x0A>`."""

    def __init__(self, byte_level: bool, space: str | None = None, strip: int = 0) -> None:
        self.byte_level = byte_level
        self.space = space
        self.strip = strip

    @staticmethod
    def of(backend: Backend) -> _Style | None:
        """None where the decoder is neither of the two kinds."""
        decoder: Any = backend.decoder
        if decoder is None:
            return None
        state = json.loads(decoder.__getstate__())
        steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return _Style(True)
        if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
            return None
        replace = steps[0]
        if replace["content"] != " " or "String" not in replace["pattern"]:
            return None
        strip: dict[str, Any] = steps[3] if len(steps) > 3 else {"content": " ", "start": 0, "stop": 0}
        if strip["content"] != " " or strip["stop"]:
            return None
        return _Style(False, replace["pattern"]["String"], int(strip["start"]))

    def to_bytes(self, text: str) -> bytes:
        if self.byte_level:
            alphabet = byte_alphabet()
            try:
                return bytes([alphabet[char] for char in text])
            except KeyError:
                return text.encode()  # an added token, spelled as it is
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                pass
        return (text.replace(self.space, " ") if self.space else text).encode()


class _Utf8:
    def __init__(self, tokenizer: Tokenizer, skip_special: bool, strip: int) -> None:
        self._read = tokenizer.token_bytes if skip_special else tokenizer.raw_bytes
        self._whole = tokenizer.whole[0 if skip_special else 1]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._settled = True  # no character has begun that is not complete
        self._strip = strip  # leading spaces still to be dropped

    def push(self, token: int) -> str:
        text = self._whole.get(token) if self._settled else None
        if text is None:
            text = self._decode(token)
        return self._stripped(text) if self._strip and text else text

    def _decode(self, token: int) -> str:
        began, data = self._settled, self._read(token)
        text = self._decoder.decode(data)
        self._settled = not self._decoder.getstate()[0]
        # What encodes back to the same bytes had nothing replaced in it; kept, it is the same between any other tokens.
        if began and self._settled and text.encode() == data:
            self._whole[token] = text
        return text

    def finish(self) -> str:
        text = self._decoder.decode(b"", True)
        return self._stripped(text) if self._strip and text else text

    def _stripped(self, text: str) -> str:
        while self._strip and text.startswith(" "):
            text = text[1:]
            self._strip -= 1
        if text:
            self._strip = 0
        return text


class _Windows:
    """Decoding through the library: a few ids of context before the new ones decide how those are joined."""

    CONTEXT = 6

    def __init__(self, backend: Backend, skip_special: bool) -> None:
        self._backend = backend
        self._skip = skip_special
        self._ids: list[int] = []
        self._done = 0  # ids whose text has been given out

    def push(self, token: int) -> str:
        self._ids.append(token)
        before, now = self._texts()
        # An unfinished character ends in U+FFFD; give it a few tokens to complete.
        if now.endswith("\ufffd") and len(self._ids) - self._done < 8:
            return ""
        return self._give(before, now)

    def finish(self) -> str:
        return self._give(*self._texts()) if self._done < len(self._ids) else ""

    def _texts(self) -> tuple[str, str]:
        decode = self._backend.decode
        before = decode(self._ids[: self._done], skip_special_tokens=self._skip)
        return before, decode(self._ids, skip_special_tokens=self._skip)

    def _give(self, before: str, now: str) -> str:
        self._ids = self._ids[-self.CONTEXT :]
        self._done = len(self._ids)
        return now[len(before) :]


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint: from `tokenizer.json`, or rebuilt from another file (`tekken.json`, ...).

    Raises:
        ModelLoadError: naming the file that is missing or wrong.
    """
    path = checkpoint.tokenizer_path
    if path.suffix == ".gguf":
        same = checkpoint.gguf is not None and checkpoint.gguf.path == path
        file = checkpoint.gguf if same and checkpoint.gguf is not None else GGUFFile.open(path)
        backend = build_backend(file.metadata, str(path))
        texts = {role: backend.id_to_token(token) for role, token in special_ids(file.metadata).items()}
        special = {role: text for role, text in texts.items() if text is not None}
    else:
        backend, special = _from_directory(path)
    return Tokenizer(backend, special, checkpoint.eos_ids)


def _from_directory(path: Path) -> tuple[Backend, dict[str, str]]:
    directory, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    if not file.is_file():
        found = [directory / name for name in sentencepiece_tokenizer.FILES if (directory / name).is_file()]
        file = next(iter(found), directory / TEKKEN if (directory / TEKKEN).is_file() else file)
    config = read_json(directory / "tokenizer_config.json")
    roles = read_json(directory / "special_tokens_map.json")
    special = _roles(roles) | _roles(config)
    if file.suffix == ".model":
        added = {text: at for text, at in read_json(directory / "added_tokens.json").items() if isinstance(at, int)}
        return sentencepiece_tokenizer.build_backend(file, {**roles, **config}, special, added)
    if file.name == TEKKEN:
        return tekken_tokenizer.build_backend(file, byte_alphabet())
    if not file.is_file():
        others = [name for name in ("vocab.json",) if (directory / name).is_file()]
        hint = f" (found {', '.join(others)}: convert it with `transformers`, whose save_pretrained writes one)"
        raise ModelLoadError(f"{directory} has no tokenizer.json{hint if others else ''}")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ModelLoadError(f"{file}: not a tokenizer: {error}") from None
    _add_missing(backend, config, special)
    _add_ends(backend, config, special)
    return backend, special


def _add_ends(backend: Backend, config: dict[str, Any], special: dict[str, str]) -> None:
    """Heed `add_bos_token` and `add_eos_token` where the tokenizer class does and the file says nothing itself.

    DeepSeek's files name a Llama class, whose constructor added the BOS that their tokenizer.json leaves out.
    """
    post: Any = backend.post_processor
    if post is not None and "SpecialToken" in post.__getstate__().decode("utf-8", "replace"):
        return
    if not str(config.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama", "Gemma", "Cohere")):
        return
    flags = {"bos_token": config.get("add_bos_token"), "eos_token": config.get("add_eos_token")}
    ids = {role: backend.token_to_id(special[role]) for role, flag in flags.items() if flag is True and role in special}
    if ids:
        set_ends(backend, ids.get("bos_token"), ids.get("eos_token"))


def _roles(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for role in ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[role] = text
    return found


def _add_missing(backend: Backend, config: dict[str, Any], special: dict[str, str]) -> None:
    """Tokens that only the configuration knows, in the order of their ids; then those that only a role names."""
    known = {added.content for added in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder")
    entries = sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else []
    for _, entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and entry["content"] not in known:
            flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
            backend.add_tokens([AddedToken(entry["content"], special=bool(entry.get("special")), **flags)])
            known.add(entry["content"])
    missing = [text for text in special.values() if text not in known]
    backend.add_special_tokens(list(dict.fromkeys(missing)))
