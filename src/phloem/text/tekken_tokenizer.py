"""A `tokenizers` tokenizer from Mistral's `tekken.json`, for folders that have no `tokenizer.json`.

The file lists byte strings in the order in which they are joined, and a pattern that cuts a text into words; ids begin
behind the control tokens. Control tokens written in a prompt are read as such, as by every Hugging Face tokenizer;
those that a chat message spells stay text, as in Mistral's own library (`template_sources.SPELLED`).
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from phloem.core.errors import ModelLoadError
from phloem.text.gguf_tokenizer import derive_merges, set_ends
from phloem.text.template_sources import SPELLED, read_json, tekken_version

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_MOST = {"default_vocab_size": 1 << 24, "default_num_special_tokens": 1 << 16}
_LONGEST = 1024  # bytes of a token: the ways to join one grow with their square
# Of the versions up to 7, whose files do not list them.
_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_LISTED = 7  # versions above it list their control tokens


def build_backend(file: Path, alphabet: Mapping[str, int]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by role.

    Args:
        file: a `tekken.json`.
        alphabet: character -> byte of byte-level BPE.

    Raises:
        ModelLoadError: naming what is absent, or no part of such a file.
    """
    found = read_json(file)
    config, listed = found.get("config"), found.get("vocab")
    if not isinstance(config, dict) or not isinstance(listed, list):
        raise ModelLoadError(f"{file}: expected an object config and a list vocab")
    size, first = (_count(config, key, file) for key in _MOST)
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise ModelLoadError(f"{file}: config.pattern is {pattern!r:.60}, expected a regular expression")
    if not 256 <= size - first <= len(listed):
        raise ModelLoadError(
            f"{file}: config.default_vocab_size {size} less default_num_special_tokens {first} leaves {size - first} "
            f"tokens, expected 256 to the {len(listed)} of vocab"
        )
    control = _control(found, config, first, file)
    spelling = {value: character for character, value in alphabet.items()}
    tokens = [_spelled(entry, rank, spelling, file) for rank, entry in enumerate(listed[: size - first])]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) < len(tokens):
        raise ModelLoadError(f"{file}: vocab has {len(tokens) - len(ranks)} tokens twice")
    merges = derive_merges(tokens, ranks, [-rank for rank in range(len(tokens))])
    # A text that spells a control token is read as that.
    merges = [pair for pair in merges if pair[0] + pair[1] not in control and not {*pair} & control.keys()]
    vocab = {token: first + rank for token, rank in ranks.items()} | control
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=True))
    try:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # the library raises bare Exceptions
        raise ModelLoadError(f"{file}: config.pattern is no regular expression: {error}") from None
    # Control tokens are found before it, words behind it.
    backend.normalizer = normalizers.Replace(SPELLED, "")  # pyright: ignore[reportAttributeAccessIssue]
    steps: list[Any] = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    set_ends(backend, control.get(_ROLES["bos_token"]), None)
    return backend, {role: text for role, text in _ROLES.items() if text in control}


def _count(config: dict[str, Any], key: str, file: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST[key]:
        raise ModelLoadError(f"{file}: config.{key} is {value!r:.60}, expected a whole number from 1 to {_MOST[key]}")
    return value


def _control(found: dict[str, Any], config: dict[str, Any], count: int, file: Path) -> dict[str, int]:
    """Control tokens and their ids, filled up to `count`."""
    listed = found.get("special_tokens")
    if listed is None:
        if tekken_version(config) > _LISTED:
            raise ModelLoadError(f"{file}: has no special_tokens, which version {config.get('version')!r} needs")
        listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(_CONTROL)]
    texts: dict[int, str] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        rank, text = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if not isinstance(rank, int) or not isinstance(text, str) or not text or not 0 <= rank < count:
            raise ModelLoadError(
                f"{file}: special_tokens holds {entry!r:.80}: expected a rank below {count} and a text"
            )
        if rank in texts or text in texts.values():
            raise ModelLoadError(f"{file}: special_tokens has {text!r}, or rank {rank}, twice")
        texts[rank] = text
    return {texts.get(rank, f"<SPECIAL_{rank}>"): rank for rank in range(count)}


def _spelled(entry: Any, rank: int, spelling: Mapping[int, str], file: Path) -> str:
    """A token's bytes, a character each."""
    stored = entry.get("token_bytes") if isinstance(entry, dict) else None
    if not isinstance(stored, str) or entry.get("rank") != rank:
        raise ModelLoadError(f"{file}: vocab[{rank}] is {entry!r:.80}: expected rank {rank} and token_bytes")
    try:
        raw = base64.b64decode(stored, validate=True)
    except (binascii.Error, ValueError):
        raise ModelLoadError(f"{file}: token_bytes of vocab[{rank}] is {stored!r:.40}, expected base64") from None
    if len(raw) > _LONGEST:
        raise ModelLoadError(f"{file}: vocab[{rank}] has {len(raw)} bytes, expected at most {_LONGEST}")
    if not raw or (rank < 256 and raw != bytes([rank])):
        raise ModelLoadError(f"{file}: vocab[{rank}] is {raw!r:.40}, expected {'some bytes' if rank > 255 else 'byte'}")
    return "".join(spelling[value] for value in raw)
