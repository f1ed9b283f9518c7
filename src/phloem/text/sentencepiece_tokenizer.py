"""A `tokenizers` tokenizer from a SentencePiece model file, for checkpoints that have no `tokenizer.json`.

The file is a protocol buffer (`sentencepiece_model.proto` of the SentencePiece project); the fields that matter are
read here. Unigram and BPE models give the ids that the library itself gives, but for three corners: a text that is
nothing but one user-defined symbol has no dummy prefix; the character map is applied to whole graphemes; and where a
unigram model finds several ways to cut a text equally likely (long runs of one character), another may be taken.
Control and unknown pieces written in a text are read as such, as by every Hugging Face tokenizer; SentencePiece spells
them out.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from phloem.core.errors import ModelLoadError
from phloem.text.gguf_tokenizer import derive_merges, set_ends

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # TrainerSpec.ModelType

# Classes whose ids are not those of the file: they shift them, or put tokens before them.
_SHIFTED = (
    "XLMRoberta",
    "XGLM",
    "MBart",
    "Camembert",
    "Barthez",
    "Nllb",
    "M2M100",
    "Pegasus",
    "BigBirdPegasus",
    "Plbart",
)
_NEVER = -1e6  # log-probability of byte pieces as text: only the fallback may take them


@dataclass
class _Model:
    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, type
    kind: int = UNIGRAM
    byte_fallback: bool = False
    suffix: bool = False  # white space ends a word instead of beginning it
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra: bool = True
    escape: bool = True


def build_backend(
    path: Path, config: dict[str, Any], roles: dict[str, str], added: dict[str, int]
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by role (`bos_token`, ...).

    `config`: tokenizer_config.json; `roles`: the special tokens that it names; `added`: added_tokens.json, text -> id.

    Raises:
        ModelLoadError: naming the file: it is no SentencePiece model, or of a kind that cannot be converted exactly.
    """
    name = str(config.get("tokenizer_class") or "")
    if name.startswith(_SHIFTED):
        raise ModelLoadError(f"{path}: ids of a {name} are not those of the file; convert it with `transformers`")
    try:
        model = read(path.read_bytes())
    except (OSError, ValueError, struct.error) as error:
        raise ModelLoadError(f"{path}: not a SentencePiece model: {error}") from None
    reason = _declined(model)
    if reason is not None:
        raise ModelLoadError(f"{path}: {reason}; convert it with `transformers`, whose save_pretrained writes one")
    if isinstance(config.get("add_prefix_space"), bool):
        model.dummy_prefix = config["add_prefix_space"]
    roles = {**_own_roles(model), **roles}
    try:
        backend = _build(model)
        _add_tokens(backend, model, config, roles, added, path)
    except ModelLoadError:
        raise
    except Exception as error:  # the library raises bare Exceptions for a vocabulary that contradicts itself
        raise ModelLoadError(f"{path}: its tokenizer cannot be built: {error}") from None
    _add_ends(backend, model, config, roles, name)
    return backend, roles


# --- the file


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protocol buffer message; values are whole numbers or bytes.

    Raises:
        ValueError: the bytes are no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("it ends in the middle")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if at >= len(data):
            raise ValueError("it ends in the middle")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number has too many bytes")


def _int32(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a number was expected")
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("bytes were expected")
    return value


def read(data: bytes) -> _Model:
    """What a model file says. Raises ValueError for one that holds no pieces."""
    model = _Model()
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_piece(_bytes(value)))
        elif number == 2:
            _read_trainer(model, _bytes(value))
        elif number == 3:
            _read_normalizer(model, _bytes(value))
    if not model.pieces:
        raise ValueError("it has no pieces")
    return model


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode("utf-8")
        elif number == 2:
            score = float(struct.unpack("<f", _bytes(value))[0])
        elif number == 3:
            kind = _int32(value)
    return text, score, kind


def _read_trainer(model: _Model, data: bytes) -> None:
    roles = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    for number, value in _fields(data):
        if number == 3:
            model.kind = _int32(value)
        elif number == 24:
            model.suffix = bool(value)
        elif number == 35:
            model.byte_fallback = bool(value)
        elif number in roles:
            model.ids[roles[number]] = _int32(value)


def _read_normalizer(model: _Model, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _bytes(value)
        elif number == 3:
            model.dummy_prefix = bool(value)
        elif number == 4:
            model.remove_extra = bool(value)
        elif number == 5:
            model.escape = bool(value)


def _declined(model: _Model) -> str | None:
    """Why a model cannot be converted exactly."""
    if model.kind not in (UNIGRAM, BPE):
        kind = {WORD: "word", CHAR: "char"}.get(model.kind, str(model.kind))
        return f"models of kind {kind} are not supported (unigram and bpe are)"
    if model.suffix:
        return "white space as a suffix (treat_whitespace_as_suffix) is not supported"
    if not model.escape:
        return "white space that is not escaped (escape_whitespaces false) is not supported"
    if any(kind == UNUSED for _, _, kind in model.pieces):
        return "a vocabulary with unused pieces is not supported"
    if not 0 <= model.ids["unk"] < len(model.pieces):
        return "it has no unknown piece"
    return None


# --- the tokenizer


def _build(model: _Model) -> Tokenizer:
    texts = [text for text, _, _ in model.pieces]
    unknown = model.ids["unk"]
    if model.kind == UNIGRAM:
        scores = [_NEVER if kind == BYTE else score for _, score, kind in model.pieces]
        vocab = list(zip(texts, scores, strict=True))
        backend = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=model.byte_fallback))
    else:
        normal = {text: at for at, (text, _, kind) in enumerate(model.pieces) if kind == NORMAL}
        merges = derive_merges(texts, normal, [score for _, score, _ in model.pieces])
        whole = {text: at for at, text in enumerate(texts)}
        backend = Tokenizer(
            models.BPE(
                vocab=whole,
                merges=merges,
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
                unk_token=texts[unknown],
            )
        )
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra:
        # The library looks for white space at the end when it is escaped already: a U+2581 of the text goes too.
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        # A pattern instead of Prepend: the texts of added tokens are normalised too, and must get no prefix.
        alone = [re.escape(text) for text, _, kind in model.pieces if kind == USER_DEFINED]
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{'|'.join(alone)})?\z)"), "▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(decode)  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _own_roles(model: _Model) -> dict[str, str]:
    return {f"{role}_token": model.pieces[at][0] for role, at in model.ids.items() if 0 <= at < len(model.pieces)}


def _add_tokens(
    backend: Tokenizer,
    model: _Model,
    config: dict[str, Any],
    roles: dict[str, str],
    added: dict[str, int],
    path: Path,
) -> None:
    """Control pieces, the unknown piece and user-defined ones; then what the configuration adds, in order of ids."""
    control = [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN) and text]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    # One with a space is never found: the text has no spaces any more when symbols are looked for.
    own = [text for text, _, kind in model.pieces if kind == USER_DEFINED and text and " " not in text]
    backend.add_tokens([AddedToken(text, normalized=True, special=False) for text in own])
    wanted: dict[int, AddedToken] = {at: AddedToken(text, normalized=False) for text, at in added.items()}
    listed = config.get("added_tokens_decoder")
    for at, entry in (listed if isinstance(listed, dict) else {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(at).isdigit():
            flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word") if key in entry}
            special = bool(entry.get("special"))
            wanted[int(at)] = AddedToken(entry["content"], normalized=False, special=special, **flags)
    known = {*control, *own}
    for at, token in sorted(wanted.items(), key=lambda item: item[0]):
        text = str(token.content)
        if text in known and not token.special:
            continue
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(text) != at:
            raise ModelLoadError(f"{path}: the added token {text!r} has id {backend.token_to_id(text)}, not {at}")
    extra = config.get("additional_special_tokens")
    named = [*roles.values(), *(_text(item) for item in (extra if isinstance(extra, list) else []))]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in named if text])


def _text(value: Any) -> str:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _add_ends(backend: Tokenizer, model: _Model, config: dict[str, Any], roles: dict[str, str], name: str) -> None:
    """BOS where the model has one, no EOS, unless the configuration or the tokenizer's class says otherwise."""
    defaults = {"bos": model.ids["bos"] >= 0 and not name.startswith("T5"), "eos": name.startswith("T5")}
    ends: dict[str, int | None] = {}
    for role, default in defaults.items():
        flag, text = config.get(f"add_{role}_token"), roles.get(f"{role}_token")
        asked = flag if isinstance(flag, bool) else default
        ends[role] = backend.token_to_id(text) if asked and text else None
    if any(value is not None for value in ends.values()):
        set_ends(backend, ends["bos"], ends["eos"])
