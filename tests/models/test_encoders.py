"""Models that do not generate, against transformers, and a batch of mixed lengths against one text at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from phloem.attention import _packed
from phloem.attention._packed import PackedMemory
from phloem.checkpoint.describe import describe
from phloem.checkpoint.families import family
from phloem.checkpoint.pooling import Pooling
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.models._pooled import load_pooled
from phloem.models.deberta_v2 import build as build_body
from phloem.models.deberta_v2 import distance_rows
from phloem.testing.checkpoints import encoders, tiny_checkpoint

CASES = [*encoders(), *(f"{name}-{variant}" for name in encoders() for variant in family(name).variants)]
TEXTS = [
    [5, 9, 200, 31, 7],
    [11],
    [4, 8, 15, 16, 23, 42, 99, 100, 101, 102, 103, 5, 6, 7, 8, 9, 10],
    [60, 61, 62, 63, 64],
]


def load(path: Path, task: str = "auto", **pooling: Any) -> Any:
    """A model and its checkpoint; `pooling`: what is to be otherwise."""
    from dataclasses import replace

    checkpoint = describe(str(path), task=task)
    assert checkpoint.pooling is not None
    checkpoint = replace(checkpoint, pooling=replace(checkpoint.pooling, **pooling))
    return load_pooled(checkpoint, BuildContext(Ops(), torch.float32, torch.device("cpu")))


@torch.inference_mode()
def run(model: Any, texts: Sequence[Sequence[int]], types: Sequence[int] | None = None) -> torch.Tensor:
    lengths = [len(text) for text in texts]
    ids = torch.tensor([token for text in texts for token in text])
    positions = torch.cat([torch.arange(length) for length in lengths])
    segments = None if types is None else torch.tensor(types)
    return model.forward(ForwardBatch(ids, positions, PackedMemory(Ops(), lengths), None, types=segments), lengths)


@torch.inference_mode()
def states(path: Path, text: Sequence[int], **more: Any) -> torch.Tensor:
    import transformers

    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return model(torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long), **more)[0][0]


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance


@pytest.mark.some(6)
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_transformers_for_texts_of_mixed_lengths(name: str, tmp_path: Path) -> None:
    kind, _, variant = name.partition("-")
    path = tiny_checkpoint(kind, tmp_path, **(family(kind).variants[variant] if variant else {}))
    ours = run(load(path, kinds=("mean",)), TEXTS)
    near(ours, torch.stack([states(path, text).mean(0) for text in TEXTS]))
    near(run(load(path), TEXTS), torch.stack([states(path, text)[0] for text in TEXTS]))  # the first token's


@pytest.mark.slow
@pytest.mark.parametrize("name", [*encoders(), "qwen3"])
def test_a_batch_is_one_text_after_the_other(name: str, tmp_path: Path) -> None:
    model = load(tiny_checkpoint(name, tmp_path), task="embed", kinds=("cls", "max", "mean", "last"))
    alone = torch.cat([run(model, [text]) for text in TEXTS])
    near(run(model, TEXTS), alone, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cls", lambda x: x[0]),
        ("last", lambda x: x[-1]),
        ("max", lambda x: x.max(0).values),
        ("mean_sqrt_len", lambda x: x.sum(0) / len(x) ** 0.5),
        ("weightedmean", lambda x: (x * torch.arange(1.0, len(x) + 1)[:, None]).sum(0) / (len(x) * (len(x) + 1) / 2)),
    ],
)
def test_kinds_of_pooling(kind: str, expected: Any, tmp_path: Path) -> None:
    path = tiny_checkpoint("bert", tmp_path)
    near(run(load(path, kinds=(kind,)), TEXTS), torch.stack([expected(states(path, text)) for text in TEXTS]))


@pytest.mark.slow
@pytest.mark.parametrize("family_name", ["qwen3", "llama", "gemma2", "gpt_oss", "mistral", "gpt2"])
def test_decoders_are_pooled_by_their_last_token(family_name: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family_name, tmp_path)
    near(run(load(path, task="embed"), TEXTS), torch.stack([states(path, text)[-1] for text in TEXTS]))


def test_a_decoder_without_a_head_is_for_embeddings(tmp_path: Path) -> None:
    """Names without `model.`, and no head in the files, though it is not tied."""
    path = tiny_checkpoint("qwen3", tmp_path, head="Model", tie_word_embeddings=False)
    checkpoint = describe(str(path))
    assert checkpoint.pooling is not None and checkpoint.pooling.kinds == ("last",) and checkpoint.pooling.normalize
    near(run(load(path), TEXTS), torch.stack([states(path, text)[-1] for text in TEXTS]))


@pytest.mark.slow
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", [*encoders(), "qwen3", "llama"])
@torch.inference_mode()
def test_labels_of_texts(name: str, labels: int, tmp_path: Path) -> None:
    import transformers

    path = tiny_checkpoint(name, tmp_path, head="ForSequenceClassification", num_labels=labels)
    model = load(path)
    assert model.pooling.task == ("score" if labels == 1 else "classify") and len(model.pooling.labels) == labels
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    expected = [theirs(torch.tensor([text]), attention_mask=torch.ones(1, len(text))).logits[0] for text in TEXTS]
    near(run(model, TEXTS), torch.stack(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "deberta_v2", "qwen3"])
@torch.inference_mode()
def test_labels_of_tokens(name: str, tmp_path: Path) -> None:
    import transformers

    path = tiny_checkpoint(name, tmp_path, head="ForTokenClassification", num_labels=5)
    model = load(path)
    assert model.pooling.task == "tokens"
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(path, dtype=torch.float32).eval()
    expected = [theirs(torch.tensor([text]), attention_mask=torch.ones(1, len(text))).logits[0] for text in TEXTS]
    near(run(model, TEXTS), torch.cat(expected))


def test_the_second_segment_of_a_pair_has_its_own_embedding(tmp_path: Path) -> None:
    path = tiny_checkpoint("bert", tmp_path)
    types = [0, 0, 0, 1, 1]
    theirs = states(path, TEXTS[0], token_type_ids=torch.tensor([types])).mean(0)
    model = load(path, kinds=("mean",))
    near(run(model, TEXTS[:1], types)[0], theirs)
    assert float((run(model, TEXTS[:1])[0] - theirs).abs().max()) > 0.01


def test_positions_of_roberta_begin_behind_the_padding(tmp_path: Path) -> None:
    path = tiny_checkpoint("xlm_roberta", tmp_path, max_position_embeddings=20)
    assert describe(str(path)).context_length == 18
    text = list(range(5, 23))
    near(run(load(path, kinds=("mean",)), [text])[0], states(path, text).mean(0))


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (8, 64), (32, 40)])
def test_distances_of_deberta_share_rows_as_transformers_has_them(buckets: int, farthest: int) -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    theirs = make_log_bucket_position(torch.arange(-(farthest - 1), farthest), buckets, farthest).long()
    assert torch.equal(distance_rows(farthest, buckets, farthest), (theirs + buckets).clamp(0, 2 * buckets - 1))
    plain = distance_rows(20, -1, 8)
    assert plain.tolist() == [0] * 11 + list(range(16)) + [15] * 12 and len(plain) == 39


@pytest.mark.slow
@torch.inference_mode()
def test_long_texts_of_deberta_and_labels_with_its_convolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts as long as the model takes, attended to one after the other where the logits of all are too many."""
    import transformers

    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(4, 380, (length,), generator=generator).tolist() for length in (64, 64, 40, 64, 1)]
    path = tiny_checkpoint("deberta_v2", tmp_path, head="ForSequenceClassification", num_labels=3, conv_kernel_size=3)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    expected = torch.stack([theirs(torch.tensor([text])).logits[0] for text in texts])
    near(run(load(path), texts), expected)
    monkeypatch.setattr(_packed, "_MOST_LOGITS", 5000)
    near(run(load(path), texts), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type: p2p is not served; known: c2p, p2c"),
        ({"embedding_size": 16}, "embedding_size: 16 is not served"),
        ({"conv_kernel_size": 4}, "conv_kernel_size 4, conv_groups 1, conv_act 'tanh' are not served"),
        ({"conv_kernel_size": 3, "conv_act": "selu"}, "conv_act 'selu'"),
        ({"conv_kernel_size": 3, "num_hidden_layers": 1}, "behind the only layer"),
    ],
)
def test_what_no_published_deberta_asks_for_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    facts = family("deberta_v2")
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = {**facts.defaults, **(facts.tiny or {}), **sizes, "num_attention_heads": 4, **change}
    with pytest.raises(ModelLoadError, match=said):
        build_body(config, BuildContext(Ops(), torch.float32, torch.device("meta")), 64)


def write_modules(path: Path, *more: tuple[str, str], mode: str = "pooling_mode_mean_tokens") -> None:
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *more]
    modules = [
        {"idx": at, "name": str(at), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, place) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, mode: True}))


def pooling_at(path: Path, **options: Any) -> Pooling:
    found = describe(str(path), **options).pooling
    assert found is not None
    return found


def test_what_sentence_transformers_writes_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tiny_checkpoint("bert", tmp_path)
    write_modules(path, ("Dense", "2_Dense"), ("Normalize", "3_Normalize"))
    (path / "2_Dense").mkdir()
    settings = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (path / "2_Dense" / "config.json").write_text(json.dumps(settings))
    weight, bias = torch.randn(8, 32), torch.randn(8)
    save_file({"linear.weight": weight, "linear.bias": bias}, str(path / "2_Dense" / "model.safetensors"))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    prompts = {"prompts": {"query": "search: "}, "default_prompt_name": None}
    (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = pooling_at(path)
    assert (found.kinds, found.normalize, found.size, found.lower) == (("mean",), True, 8, True)
    assert found.prompts == {"query": "search: "} and found.dimensions is None
    assert describe(str(path)).context_length == 20
    expected = [torch.tanh(weight @ states(path, text).mean(0) + bias) for text in TEXTS]
    near(run(load(path), TEXTS), torch.stack(expected))
    save_file({"linear.weight": weight}, str(path / "2_Dense" / "model.safetensors"))
    with pytest.raises(ModelLoadError, match="bias True"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("WordWeights", "2_WordWeights"), "'WordWeights' is not served"),
        (("Dense", "nowhere"), "no in_features"),
    ],
)
def test_a_module_that_is_not_known_is_refused(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("bert", tmp_path)
    write_modules(path, change)
    with pytest.raises(ModelLoadError, match=message):
        describe(str(path))


def test_what_the_model_is_for_is_read_and_can_be_said(tmp_path: Path) -> None:
    decoder = tiny_checkpoint("llama", tmp_path / "a")
    assert describe(str(decoder)).pooling is None
    assert pooling_at(decoder, task="embed").kinds == ("last",)
    write_modules(decoder, mode="pooling_mode_lasttoken")
    assert pooling_at(decoder).task == "embed" and describe(str(decoder), task="generate").pooling is None
    encoder = tiny_checkpoint("bert", tmp_path / "b")
    for task in ("generate", "classify", "score"):
        with pytest.raises(ConfigError, match=task):
            describe(str(encoder), task=task)


@pytest.mark.parametrize(
    ("said", "labels", "expected"),
    [
        ({}, 1, "sigmoid"),
        ({}, 3, "softmax"),
        ({"problem_type": "multi_label_classification"}, 3, "sigmoid"),
        ({"problem_type": "regression"}, 1, "none"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 1, "none"),
    ],
)
def test_activation(said: dict[str, Any], labels: int, expected: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("bert", tmp_path, head="ForSequenceClassification", num_labels=labels)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **said}))
    assert pooling_at(path).activation == expected


def test_a_single_number_of_a_decoder_is_a_reward(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3", tmp_path, head="ForSequenceClassification", num_labels=1)
    assert pooling_at(path).activation == "none"


@pytest.mark.parametrize("name", ["gpt_neox", "deepseek_v3"])
def test_decoders_that_keep_other_things_are_refused_or_served(name: str, tmp_path: Path) -> None:
    from phloem.attention._packed import refusal

    body = load(tiny_checkpoint(name, tmp_path), task="embed").body
    assert (refusal(body.memory, body.attention_specs) is None) == (name == "gpt_neox")
