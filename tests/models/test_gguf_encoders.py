"""Encoders out of GGUF files: states, pooling, and the vocabulary of word pieces; MiniLM as a package carries it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_encoders import TEXTS, load, near, run, states
from test_real_embeddings import TEXTS as SENTENCES
from test_real_embeddings import folder

import phloem
from phloem.checkpoint.describe import describe
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.testing import checkpoints
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf
from phloem.text.gguf_tokenizer import build_backend


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "modernbert", "nomic_bert", "distilbert", "roberta", "xlm_roberta"])
def test_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(name, tmp_path / "hf")
    arch = {"modernbert": "modern-bert", "nomic_bert": "nomic-bert"}.get(name, "bert")
    file = tiny_gguf(path, tmp_path / "tiny.gguf", **{f"{arch}__pooling_type": 1})
    checkpoint = describe(str(file))
    assert checkpoint.pooling is not None
    assert (checkpoint.pooling.kinds, checkpoint.pooling.normalize) == (("mean",), True)
    near(run(load(file, normalize=False), TEXTS), torch.stack([states(path, text).mean(0) for text in TEXTS]))


@pytest.mark.slow
def test_embeddinggemma_sees_both_ways_and_does_not_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts longer than its windows, out of a folder and out of a file."""
    both = {"use_bidirectional_attention": True, "sliding_window": 8, "query_pre_attn_scalar": 16}
    path = tiny_checkpoint("gemma3_text", tmp_path / "hf", **both)
    wanted = torch.stack([states(path, text).mean(0) for text in TEXTS])
    near(run(load(path, kinds=("mean",)), TEXTS), wanted)
    monkeypatch.setattr(checkpoints, "architecture", lambda config, usual: "gemma-embedding")
    file = tiny_gguf(path, tmp_path / "tiny.gguf", **{"gemma-embedding__pooling_type": 1})
    near(run(load(file, normalize=False), TEXTS), wanted)
    for one in (path, file):
        with pytest.raises(ConfigError, match="task generate: gemma3_text is an encoder"):
            describe(str(one), task="generate")
    wide, back = torch.randn(48, 32), torch.randn(32, 48)
    write = gguf.GGUFWriter.write_header_to_file

    def with_dense(writer: Any) -> None:
        writer.add_tensor("dense_2.weight", wide.numpy())
        writer.add_tensor("dense_3.weight", back.numpy())
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_dense)
    more = {"gemma-embedding__pooling_type": 1, "gemma-embedding__dense_2_feat_out": 48}
    deep = load(tiny_gguf(path, tmp_path / "deep.gguf", **more), normalize=False)
    assert deep.pooling.size == 32 and [layer.outputs for layer in deep.pooling.dense] == [48, 32]
    near(run(deep, TEXTS), wanted @ wide.T @ back.T, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [1, 3])
@torch.inference_mode()
def test_rerankers_give_the_labels_of_their_folder(labels: int, tmp_path: Path) -> None:
    """As converted files of bge-reranker-v2-m3 do."""
    import transformers

    path = tiny_checkpoint("xlm_roberta", tmp_path / "hf", head="ForSequenceClassification", num_labels=labels)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    wanted = [theirs(torch.tensor([text]), attention_mask=torch.ones(1, len(text))).logits[0] for text in TEXTS]
    model = load(tiny_gguf(path, tmp_path / "tiny.gguf", bert__pooling_type=4))
    assert (model.pooling.task, len(model.pooling.labels)) == ("score" if labels == 1 else "classify", labels)
    near(run(model, TEXTS), torch.stack(wanted))


def test_heads_beside_the_dense_one_are_named(tmp_path: Path) -> None:
    """BGE-M3's sparse and many vectors."""
    path = tiny_checkpoint("xlm_roberta", tmp_path)
    (path / "sparse_linear.pt").touch()
    pooling = describe(str(path)).pooling
    assert pooling is not None and "dense vectors alone: sparse_linear.pt not served" in pooling.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"prenorm": True}, "prenorm: True is not served"),
        ({"moe_every_n_layers": 2}, "moe_every_n_layers: 2 is not served"),
        ({"activation_function": "gelu"}, "hidden_act"),
    ],
)
def test_published_settings_of_nomic_bert(other: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Names of GPT-2's age; what only the code behind them can do is refused."""
    path = tiny_checkpoint("nomic_bert", tmp_path)
    wanted, config = states(path, TEXTS[2])[0], json.loads((path / "config.json").read_text())
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names |= {"intermediate_size": "n_inner", "layer_norm_eps": "layer_norm_epsilon"}
    old: dict[str, Any] = {theirs: config[ours] for ours, theirs in names.items()}
    old |= {key: config[key] for key in ("model_type", "architectures", "vocab_size", "type_vocab_size")}
    old |= {"activation_function": "swiglu", "rotary_emb_base": 1000, "n_positions": 8192, "max_trained_positions": 64}
    old |= {"prenorm": False, "rotary_emb_fraction": 1.0, "qkv_proj_bias": False}
    (path / "config.json").write_text(json.dumps(old))
    assert describe(str(path)).context_length == 64
    near(run(load(path), TEXTS[2:3])[0], wanted)
    (path / "config.json").write_text(json.dumps(old | other))
    with pytest.raises(ModelLoadError, match=said):
        load(path)


def test_a_decoder_whose_file_says_how_its_states_are_pooled_embeds(tmp_path: Path) -> None:
    """As published files of Qwen3-Embedding do; asked to, it generates."""
    file = tiny_gguf(tiny_checkpoint("qwen3", tmp_path / "hf"), tmp_path / "tiny.gguf", qwen3__pooling_type=3)
    pooling = describe(str(file)).pooling
    assert pooling is not None
    assert (pooling.task, pooling.kinds, pooling.normalize) == ("embed", ("last",), True)
    assert "pooling_type 3" in pooling.reason
    assert describe(str(file), task="generate").pooling is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bert__attention__causal", True, "attention.causal is not false"),
        ("bert__attention__layer_norm_epsilon", "tiny", "layer_norm_epsilon is 'tiny', expected a number"),
        ("bert__embedding_length", 3, "hidden_size 3 is not a multiple of num_attention_heads 4"),
        ("bert__pooling_type", 4, "pooling_type 4: of rerankers in GGUF files RoBERTa's and XLM-R's"),
        ("bert__context_length", 513, "position"),
        ("bert__attention__head_count", 5, "head_count|num_attention_heads 5|hidden_size 32"),
    ],
)
def test_what_is_no_encoder_is_refused_by_name(key: str, value: Any, said: str, tmp_path: Path) -> None:
    file = tiny_gguf(tiny_checkpoint("bert", tmp_path / "hf"), tmp_path / "tiny.gguf", **{key: value})
    with pytest.raises((ModelLoadError, ConfigError), match=said):
        load(file)


def vocabulary(source: Path) -> tuple[list[str], list[int]]:
    """Word pieces as the converter spells them, and their types."""
    state = json.loads((source / "tokenizer.json").read_text())
    special = {token["content"] for token in state["added_tokens"]}
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    spelled = [one if one in special else one[2:] if one.startswith("##") else f"\u2581{one}" for one in pieces]
    return spelled, [3 if one in special else 1 for one in pieces]


def as_gguf(source: Path, target: Path) -> Path:
    """MiniLM as llama.cpp's converter writes it."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), "bert")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(config["type_vocab_size"])
    tokens, types = vocabulary(source)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for role, token in (("unknown", 100), ("seperator", 102), ("padding", 0), ("cls", 101), ("mask", 103)):
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, values in load_file(source / "model.safetensors").items():
        stored = names.get_name(name.removeprefix("bert."), try_suffixes=(".weight", ".bias"))
        if stored is not None and "pooler" not in name and values.dtype.kind == "f":
            writer.add_tensor(stored, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.slow
def test_minilm_gives_the_vectors_of_its_folder(tmp_path: Path) -> None:
    file = as_gguf(folder(), tmp_path / "minilm.gguf")
    texts = SENTENCES[:5]
    with phloem.LLM(str(file), dtype="float32") as llm:
        ours = np.array(llm.embed(texts))
    with phloem.LLM(str(folder()), dtype="float32") as llm:
        theirs = np.array(llm.embed(texts))
    assert (ours * theirs).sum(1).min() > 1 - 1e-6


@pytest.mark.slow
def test_word_pieces_are_those_of_the_models_own_tokenizer() -> None:
    from tokenizers import Tokenizer

    tokens, types = vocabulary(folder())
    metadata = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ours, theirs = build_backend(metadata, "x.gguf"), Tokenizer.from_file(str(folder() / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    odd = [
        "",
        "naïve ÉTÉ",
        "[MASK] in [brackets]",
        "日本語 text",
        "a\u0000b\tc",
        "x" * 120,
        "don't: it's 3.14!",
        "ᾳ ß Ⅷ",
    ]
    for text in [*SENTENCES, *odd]:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        assert ours.encode(text, "and a second").type_ids == theirs.encode(text, "and a second").type_ids, text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tokenizer.ggml.cls_token_id": 9}, r"cls_token_id is 9, of 3 tokens"),
        ({"tokenizer.ggml.unknown_token_id": "a"}, "unknown_token_id is 'a', of 3 tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type does not match the 3 tokens"),
    ],
)
def test_vocabularies_that_contradict_themselves_are_named(more: dict[str, Any], said: str) -> None:
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": ["[UNK]", "[CLS]", "[SEP]"],
        **dict.fromkeys(("tokenizer.ggml.cls_token_id", "tokenizer.ggml.seperator_token_id"), 1),
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }
    with pytest.raises(ModelLoadError, match=said):
        build_backend(metadata, "x.gguf")
