"""SentencePiece models without a tokenizer.json: against the library's own ids, and what a configuration adds."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import CORPUS, load, noise

from phloem.core.errors import ModelLoadError
from phloem.text import gguf_tokenizer, sentencepiece_tokenizer
from phloem.text.tokenizer import Tokenizer

TEXT = [
    *CORPUS,
    "The quick brown fox jumps over the lazy dog, and the other foxes sleep in their den until morning comes.",
    "A tokenizer cuts a text into pieces; the pieces are those that the model was trained with, 1, 2, 3 and so on.",
    "Der schnelle braune Fuchs springt über den faulen Hund, während die anderen schlafen.",
    "return the value of the counter when it is above zero and the list is not empty",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start_of_turn>", "▁▁", "▁▁▁", "▁▁▁▁", "\n\n"],
    },
    "bpe": {"model_type": "bpe"},
    "bpe symbols": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "<|im_start|>", "lazy dog"]},
    "unigram": {"model_type": "unigram"},
    "unigram bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
    "unigram folded": {"model_type": "unigram", "normalization_rule_name": "nfkc_cf"},
    "unigram symbols": {
        "model_type": "unigram",
        "byte_fallback": True,
        "user_defined_symbols": ["<sep>", "<|im_start|>"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
}


@functools.cache
def trained(name: str) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    into = io.BytesIO()
    options = {"vocab_size": 620, "hard_vocab_limit": False, "character_coverage": 0.98, "minloglevel": 5}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXT for line in text.split("\n")] * 3),
        model_writer=into,
        num_threads=1,
        **{**options, **VARIANTS[name]},
    )
    return into.getvalue()


def texts() -> list[str]:
    rand = random.Random(5)
    words = " ".join(TEXT).split(" ")
    mixed = [" ".join(rand.choice(words) for _ in range(rand.randint(1, 12))) for _ in range(150)]
    spaced = [
        "".join(rand.choice([" ", "  ", "a", "the", "\n", "\t", "dog", "▁", "."]) for _ in range(12)) for _ in range(60)
    ]
    marked = ["x<sep>y", "<sep>a b", "a <sep> <sep>b", "the lazy dog  sleeps", "<|im_start|>user\n", "<0x41> <0x0A>"]
    found = [*TEXT, *mixed, *spaced, *marked, *noise(3, 150)]
    # A run of one character has cuts of equal likelihood.
    return [text for text in found if "aaaaaaaa" not in text]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_ids_and_texts_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    data = trained(name)
    import sentencepiece

    theirs: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
    (tmp_path / "tokenizer.model").write_bytes(data)
    ours = load(tmp_path)
    assert ours.vocab_size == theirs.vocab_size()
    assert [ours.bos_id, *ours.eos_ids] == [theirs.bos_id(), theirs.eos_id()]
    for text in texts():
        if name == "unigram folded" and "\u0301" in text:
            continue  # the map is applied to whole graphemes: a mark on a letter that it changes gets lost
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        known = [token for token in ids if token != theirs.unk_id()]
        assert ours.decode(known).lstrip(" ") == theirs.decode(known).replace(" \u2047 ", "").lstrip(" "), text


def checkpoint(folder: Path, name: str = "llama", file: str = "tokenizer.model", **files: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / file).write_bytes(trained(name))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return load(folder)


def test_ends_are_those_of_the_configuration(tmp_path: Path) -> None:
    ids = checkpoint(tmp_path).encode("The fox", add_special_tokens=False)
    assert load(tmp_path).encode("The fox") == [1, *ids]
    for at, (config, wanted) in enumerate(
        (
            ({"add_bos_token": False}, ids),
            ({"add_bos_token": False, "add_eos_token": True}, [*ids, 2]),
            ({"add_eos_token": True, "bos_token": "</s>"}, [2, *ids, 2]),
            ({"tokenizer_class": "T5Tokenizer"}, [*ids, 2]),
        )
    ):
        tokenizer = checkpoint(tmp_path / str(at), tokenizer_config=config)
        assert tokenizer.encode("The fox") == wanted
    assert load(tmp_path / "tokenizer.model").encode("The fox") == [1, *ids]


def test_added_tokens_get_their_ids(tmp_path: Path) -> None:
    size = checkpoint(tmp_path).vocab_size
    tokenizer = checkpoint(
        tmp_path,
        file="spiece.model",
        added_tokens={"<tool>": size, "<s>": 1},
        special_tokens_map={"pad_token": "<pad>", "additional_special_tokens": ["<more>", {"content": "<last>"}]},
        tokenizer_config={
            "added_tokens_decoder": {
                "2": {"content": "</s>", "special": True, "normalized": True},
                str(size + 1): {"content": "<|im_start|>", "special": True},
            }
        },
    )
    ids = tokenizer.encode("a<tool>b<|im_start|>user</s>", add_special_tokens=False)
    assert [token for token in ids if token >= size] == [size, size + 1] and ids[-1] == 2
    assert not tokenizer.is_special(size) and tokenizer.is_special(size + 1)
    assert tokenizer.special["pad_token"] == "<pad>" and tokenizer.vocab_size == size + 5
    assert tokenizer.decode(ids) == "a<tool> b user"


def test_no_dummy_prefix_where_the_configuration_says_so(tmp_path: Path) -> None:
    with_prefix = checkpoint(tmp_path / "a").encode("fox", add_special_tokens=False)
    without = checkpoint(tmp_path / "b", tokenizer_config={"add_prefix_space": False})
    assert without.encode(" fox", add_special_tokens=False) == with_prefix
    assert without.decode(without.encode("fox and", add_special_tokens=False)) == "fox and"


def test_ids_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"'<tool>' has id \d+, not 5000"):
        checkpoint(tmp_path, added_tokens={"<tool>": 5000})
    with pytest.raises(ModelLoadError, match="ids of a XGLMTokenizer"):
        checkpoint(tmp_path, tokenizer_config={"tokenizer_class": "XGLMTokenizer"})


# --- without the library


def number(field: int, value: int) -> bytes:
    """A field of a message; values above 127 take several bytes."""
    out = bytearray()
    for item in (field << 3, value & 0xFFFFFFFFFFFFFFFF):
        while item > 127:
            out.append(item & 127 | 128)
            item >>= 7
        out.append(item)
    return bytes(out)


def block(field: int, data: bytes) -> bytes:
    return number(field, len(data)).replace(bytes([field << 3]), bytes([field << 3 | 2]), 1) + data


def piece(text: str, score: float, kind: int = 1) -> bytes:
    return block(1, block(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + number(3, kind))


def model(kind: int = 2, trainer: bytes = b"", normalizer: bytes = b"", extra: bytes = b"") -> bytes:
    pieces = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3)
    words = [*"▁abc", "ab", "▁ab", "bc"]
    pieces += b"".join(piece(word, -float(at)) for at, word in enumerate(words[::-1]))
    return pieces + extra + block(2, number(3, kind) + trainer) + block(3, number(4, 0) + normalizer)


def test_a_model_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model())
    tokenizer = load(tmp_path)
    spelled = [tokenizer.backend.id_to_token(token) for token in tokenizer.encode("abc x", add_special_tokens=False)]
    assert spelled == ["▁", "a", "bc", "▁", "<unk>"]
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]
    assert tokenizer.special == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has no pieces"),
        (b"x", "ends in the middle"),
        (b"\x0a\xff\x01", "ends in the middle"),
        (b"\xff" * 12, "too many bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x00\x00", "field number 0"),
        (b"\x08\x01", "bytes were expected"),
        (b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
        (model(kind=4), "kind char"),
        (model(trainer=number(24, 1)), "treat_whitespace_as_suffix"),
        (model(normalizer=number(5, 0)), "escape_whitespaces"),
        (model(extra=piece("gone", 0, 5)), "unused pieces"),
        (model(trainer=number(40, -1)), "no unknown piece"),
        (model(extra=piece("ab", 0)) + block(3, block(2, b"abc")), "cannot be built"),
    ],
)
def test_what_cannot_be_read_names_the_file(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelLoadError, match=rf"tokenizer\.model: .*{reason}"):
        load(tmp_path)


def as_xlm_r(model: Any) -> dict[str, Any]:
    """The vocabulary of a unigram model as llama.cpp's converter writes that of an encoder in many languages."""
    pieces = [model.IdToPiece(number) for number in range(3, model.GetPieceSize())]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *pieces]
    scores = [0.0] * 4 + [model.GetScore(number) for number in range(3, model.GetPieceSize())]
    roles = {"bos": 0, "eos": 2, "unknown": 3, "seperator": 2, "padding": 1, "cls": 0}
    charsmap = sentencepiece_tokenizer.read(model.serialized_model_proto()).charsmap
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[1] * len(pieces)],
        "tokenizer.ggml.precompiled_charsmap": list(charsmap),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        **{f"tokenizer.ggml.{role}_token_id": number for role, number in roles.items()},
    }


def test_the_unigram_vocabulary_of_a_gguf_file_gives_the_ids_of_the_library() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_proto=trained("unigram"))
    ours = gguf_tokenizer.build_backend(as_xlm_r(model), "x.gguf")
    for text in [*TEXT, "", "  two  spaces ", "\uff21\u2460 na\u00efve", "\u65e5\u672c", "a\tb\nc", *noise(7, 30)]:
        if any(mark in text for mark in ("<", "\u2581", "aaaa")):  # special tokens, and pieces that score alike
            continue
        wanted = [3 if one == model.unk_id() else one + 1 for one in model.encode(text)]
        assert ours.encode(text).ids == [0, *wanted, 2], text
    pair = ours.encode("the fox", "sleeps")
    assert pair.ids == [*ours.encode("the fox").ids, 2, *ours.encode("sleeps").ids[1:]]
    assert ours.decode(ours.encode("the quick brown fox").ids) == "the quick brown fox"


def test_a_unigram_vocabulary_that_contradicts_itself_is_named() -> None:
    metadata = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["<s>", "</s>", "<unk>"]}
    with pytest.raises(ModelLoadError, match=r"scores does not match the 3 tokens"):
        gguf_tokenizer.build_backend(metadata, "x.gguf")
    metadata |= {"tokenizer.ggml.scores": [0.0] * 3, "tokenizer.ggml.precompiled_charsmap": [9, 0, 0, 0, 1]}
    with pytest.raises(ModelLoadError, match="precompiled_charsmap is cut off"):
        gguf_tokenizer.build_backend(metadata, "x.gguf")
