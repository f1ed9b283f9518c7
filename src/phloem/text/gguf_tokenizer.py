"""A `tokenizers` tokenizer rebuilt from the metadata of a GGUF file.

Five kinds of vocabulary occur (`tokenizer.ggml.model`): `gpt2`, a byte-level BPE whose way of cutting text into words
is named by `tokenizer.ggml.pre`; `llama`, a SentencePiece BPE with byte fallback whose merges follow from the
vocabulary; `bert`, WordPiece, whose words begin with U+2581 there and whose other pieces have lost their `##`;
`t5`, a SentencePiece unigram model, of encoders in many languages (XLM-R); and `gemma4` is `llama` with its merges
listed. Cuts are those of the original `tokenizer.json` files of the models concerned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from phloem.core.errors import ModelLoadError

# Values of tokenizer.ggml.token_type.
CONTROL, USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, word: str = r"\p{L}", after: str = r"[\r\n]*") -> str:
    """The family of GPT-4's cut: contractions, words with one leading sign, digits, punctuation, white space."""
    other = r"[^\s\p{L}\p{N}]" if word == r"\p{L}" else r"[^\s\p{L}\p{M}\p{N}]"
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{word}+|{digits}| ?{other}+{after}|{_SPACES}"


def _cased(tail: str, digits: str, after: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
    """The family of GPT-4o's cut: as above, and a capital begins a new word."""
    head = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{head}{upper}*{lower}+{tail}|{head}{upper}+{lower}*{tail}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{after}|{_SPACES}"


_NOT_HAN = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]")
_CONTRACTED = _CONTRACTIONS + "?"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True)
class _Cut:
    """How text is cut into words: patterns applied one after another, each match a piece of its own.

    `plain` ends with GPT-2's own cut; `digits` first sets every digit apart; `whole` takes a word that is in the
    vocabulary without merging it up; `bos` is whether a BOS is added when the file does not say.
    """

    patterns: tuple[str, ...] = ()
    plain: bool = False
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_GPT2 = _Cut(plain=True)
_DIGITS = _Cut(plain=True, digits=True)
_LLAMA3 = _Cut((_words(r"\p{N}{1,3}"),), whole=True, bos=True)
_QWEN2 = _Cut((_words(r"\p{N}"),), nfc=True)
_DEEPSEEK_V3 = _Cut(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|""" + _SPACES,
    )
)
_GPT4O = _Cut((_cased(_CONTRACTED, r"\p{N}{1,3}", r"[\r\n/]*"),))

_CUTS: dict[str, _Cut] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"), _GPT2),
    **dict.fromkeys(("roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _Cut(_LLAMA3.patterns)),
    **dict.fromkeys(("qwen2", "kormo", "megrez", "stablelm2"), _QWEN2),
    **dict.fromkeys(("deepseek-r1-qwen", "hunyuan", "grok-2", "solar-open"), _Cut(_QWEN2.patterns)),
    "qwen35": _Cut((_words(r"\p{N}", word=r"[\p{L}\p{M}]"),), nfc=True),
    "seed-coder": _Cut(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK_V3),
    "deepseek-coder": _Cut(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), digits=True),
    "deepseek-llm": _Cut(
        (
            "[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O),
    "tekken": _Cut((_cased("", r"\p{N}", r"[\r\n/]*"),), whole=True, bos=True),
    "kimi-k2": _Cut((r"\p{Han}+|" + _cased(_CONTRACTED, r"\p{N}{1,3}", r"[\r\n]*", *_NOT_HAN),)),
}

# Gemma's scores do not follow its merge order; the order of its tokens does.
_ORDERED_BY_POSITION = ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4")


def build_backend(metadata: dict[str, Any], name: str) -> Tokenizer:
    """The tokenizer that the metadata describes; `name` is the file's, for messages.

    Raises:
        ModelLoadError: if the vocabulary is missing, inconsistent, or of a kind that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    stored = metadata.get("tokenizer.ggml.tokens")
    tokens: list[str] = list(stored) if isinstance(stored, Sequence) and not isinstance(stored, str) else []
    if not tokens:
        raise ModelLoadError(f"{name}: it carries no tokenizer (tokenizer.ggml.tokens); name one with --tokenizer-path")
    build = _BUILDERS.get(str(kind))
    if build is None:
        known = ", ".join(sorted(_BUILDERS))
        raise ModelLoadError(
            f"{name}: tokenizer.ggml.model {kind!r} is not supported (supported: {known}); "
            "name a directory with a tokenizer.json as --tokenizer-path"
        )
    try:
        backend, bos = build(metadata, [_valid(token) for token in tokens], name)
        _mark_added(backend, metadata, tokens)
        if bos is not None:
            _add_ends(backend, metadata, bos)
    except ModelLoadError:
        raise
    except Exception as error:  # the library raises bare Exceptions for a vocabulary that contradicts itself
        raise ModelLoadError(f"{name}: its tokenizer cannot be built: {error}") from None
    return backend


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Ids by role, under the names that chat templates use: bos_token, eos_token, unk_token, pad_token."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    return {role: int(value) for role, value in found.items() if value is not None}


def _valid(token: str) -> str:
    """Bytes that were no UTF-8 come as lone surrogates, which the library refuses."""
    try:
        token.encode()
    except UnicodeEncodeError:
        return token.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return token


def _byte_level(metadata: dict[str, Any], tokens: list[str], name: str) -> tuple[Tokenizer, bool]:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in _CUTS:
        raise ModelLoadError(
            f"{name}: tokenizer.ggml.pre {pre!r} is not known (known: {', '.join(sorted(_CUTS))}); "
            "name a directory with a tokenizer.json as --tokenizer-path"
        )
    cut = _CUTS[pre]
    merges = [_pair(merge, name) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=cut.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.plain))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if cut.nfc:
        backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    return backend, cut.bos


def _pair(merge: str, name: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise ModelLoadError(f"{name}: tokenizer.ggml.merges holds {merge!r}, which is not a pair")
    return left, right


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], name: str) -> tuple[Tokenizer, bool]:
    by_position = metadata.get("general.architecture") in _ORDERED_BY_POSITION
    if by_position:
        # Runs of spaces are stored as spaces; the vocabulary knows them as U+2581.
        tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    scores = metadata.get("tokenizer.ggml.scores", ())
    if not by_position and len(scores) != len(tokens):
        raise ModelLoadError(f"{name}: tokenizer.ggml.scores does not match the {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    ranks = [-index for index in range(len(tokens))] if by_position else [float(score) for score in scores]
    given = metadata.get("tokenizer.ggml.merges")
    merges = [_pair(merge, name) for merge in given] if given else derive_merges(tokens, vocab, ranks)
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown))
    spaces = normalizers.Replace(" ", "▁")
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])  # pyright: ignore[reportAttributeAccessIssue]
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(decode)  # pyright: ignore[reportAttributeAccessIssue]
    return backend, True


def derive_merges(tokens: list[str], vocab: dict[str, int], ranks: list[Any]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union ranks highest: any split of a token into two tokens is a merge.

    Of the splits of equal rank the one with the longest left part comes first.
    """
    order = sorted(vocab.values(), key=ranks.__getitem__, reverse=True)
    merges: list[tuple[str, str]] = []
    for _, group in itertools.groupby(order, key=ranks.__getitem__):
        found: list[tuple[int, int, tuple[str, str]]] = []
        for index in group:
            token = tokens[index]
            size = len(token)
            for at in range(size - 1, 0, -1):
                left = token[:at]
                if left in vocab and (right := token[at:]) in vocab:
                    found.append((at, size - at, (left, right)))
        if len(found) > 1:
            found.sort(key=lambda item: item[:2], reverse=True)
        merges += [pair for _, _, pair in found]
    return merges


def _word_pieces(metadata: dict[str, Any], tokens: list[str], name: str) -> tuple[Tokenizer, None]:
    """What stands around a text is set here."""
    kinds = metadata.get("tokenizer.ggml.token_type")
    control = [token[:1] == "[" and token[-1:] == "]" for token in tokens]
    if kinds is not None:
        control = [int(kind) == CONTROL for kind in kinds]
    if len(control) != len(tokens):
        raise ModelLoadError(f"{name}: tokenizer.ggml.token_type does not match the {len(tokens)} tokens")
    pieces = [
        token if special else token[1:] if token[:1] == "▁" else f"##{token}"
        for token, special in zip(tokens, control, strict=True)
    ]
    ids = [
        (role, _id_of(metadata, keys, usual, tokens, name))
        for role, keys, usual in (
            ("cls", ("cls", "bos"), 101), ("sep", ("seperator", "separator", "eos"), 102), ("unk", ("unknown",), 100)
        )
    ]  # fmt: skip
    (_, cls), (_, sep), (_, unknown) = ids
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token=pieces[unknown], max_input_chars_per_word=100))
    # A vocabulary without capitals is one of a model that never saw any.
    lower = not any(piece != piece.lower() for piece, special in zip(pieces, control, strict=True) if not special)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="cls:0 $A:0 sep:0",
        pair="cls:0 $A:0 sep:0 $B:1 sep:1",
        special_tokens=[("cls", cls), ("sep", sep)],
    )
    return backend, None


def _unigram(metadata: dict[str, Any], tokens: list[str], name: str) -> tuple[Tokenizer, None]:
    """What stands around a text is set here, as XLM-R has it: both ends, and two ends between the texts of a pair."""
    scores = list(metadata.get("tokenizer.ggml.scores", ()))
    if len(scores) != len(tokens):
        raise ModelLoadError(f"{name}: tokenizer.ggml.scores does not match the {len(tokens)} tokens")
    unknown = _id_of(metadata, ("unknown",), 2, tokens, name)
    vocab = [(token, float(score)) for token, score in zip(tokens, scores, strict=True)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=False))
    charsmap = _charsmap(metadata, name)
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)  # pyright: ignore[reportAttributeAccessIssue]
    scheme = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    spaces = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", True):
        spaces = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    backend.pre_tokenizer = spaces  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)  # pyright: ignore[reportAttributeAccessIssue]
    ends = {
        role: _id_of(metadata, keys, usual, tokens, name)
        for role, keys, usual in (("bos", ("bos", "cls"), 0), ("eos", ("eos", "seperator", "separator"), 1))
        if metadata.get(
            f"tokenizer.ggml.add_{role}_token", role == "eos" or f"tokenizer.ggml.{role}_token_id" in metadata
        )
    }
    first, last = ("bos " if "bos" in ends else ""), (" eos" if "eos" in ends else "")
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{first}$A{last}", pair=f"{first}$A{last}{last} $B{last}", special_tokens=list(ends.items())
    )
    return backend, None


def _charsmap(metadata: dict[str, Any], name: str) -> bytes:
    """The table of what characters are normalised to; empty: none. Its first word is how long its trie is."""
    stored: Any = metadata.get("tokenizer.ggml.precompiled_charsmap")
    found = b"" if stored is None else bytes(int(item) & 255 for item in stored)
    if found and not 0 < int.from_bytes(found[:4], "little") <= len(found) - 4:
        raise ModelLoadError(f"{name}: tokenizer.ggml.precompiled_charsmap is cut off")
    return found


def _id_of(metadata: dict[str, Any], keys: tuple[str, ...], usual: int, tokens: list[str], name: str) -> int:
    """A token by the first key that the file has. Raises ModelLoadError for one that is none of the vocabulary."""
    found = next((v for key in keys if (v := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None), usual)
    if not isinstance(found, int) or not 0 <= found < len(tokens):
        raise ModelLoadError(f"{name}: tokenizer.ggml.{keys[0]}_token_id is {found!r}, of {len(tokens)} tokens")
    return found


_BUILDERS: dict[str, Callable[[dict[str, Any], list[str], str], tuple[Tokenizer, bool | None]]] = {
    "bert": _word_pieces,
    "gemma4": _sentencepiece,
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _unigram,
}


def _mark_added(backend: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Control tokens become special ones; user-defined tokens are found whole in the text but are not special."""
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return
    known = backend.model
    kinds = [int(kind) for kind in kinds]
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        texts = [token for token, its in zip(tokens, kinds, strict=False) if its == kind]
        present = [text for text in texts if text and text == _valid(text) and known.token_to_id(text) is not None]
        added = [AddedToken(text, normalized=False, special=special) for text in present]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _add_ends(backend: Tokenizer, metadata: dict[str, Any], bos_default: bool) -> None:
    ids = special_ids(metadata)
    bos = ids.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", bos_default) else None
    eos = ids.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    set_ends(backend, bos, eos)


def set_ends(backend: Tokenizer, bos: int | None, eos: int | None) -> None:
    """Let encoding put these ids before and after a text (None: nothing)."""
    names = {"bos": bos, "eos": eos}
    pieces = [f"{name}:0" if name != "text" else "$A:0" for name in ("bos", "text", "eos")]
    single = [piece for piece in pieces if piece == "$A:0" or names[piece[:3]] is not None]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=" ".join(single),
        pair="$A:0 $B:1",
        special_tokens=[(name, value) for name, value in names.items() if value is not None],
    )
