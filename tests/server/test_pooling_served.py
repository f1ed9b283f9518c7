"""Models that do not generate, from the engine's door and over HTTP, with the clients that people have."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from engine_door import http_door

import phloem
from phloem.core.errors import BadRequest, ConfigError
from phloem.testing.checkpoints import tiny_checkpoint

TEXTS = ["The quick brown fox", "jumps", "", "over the lazy dog, and the dog does not mind. " * 3]


def add_files(path: Path) -> Path:
    """As sentence-transformers would leave it: a tokenizer that ends texts, mean pooling, prompts, shorter vectors."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    prompts = {"prompts": {"query": "find: "}, "matryoshka_dimensions": [8, 16]}
    (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    return pair_tokenizer(path)


def pair_tokenizer(path: Path) -> Path:
    """The tokenizer puts what BERT's does around texts and pairs of them."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|im_end|>",
        pair="<|bos|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|bos|>", 1), ("<|im_end|>", 3)],
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phloem.Engine]:
    path = add_files(tiny_checkpoint("bert", tmp_path_factory.mktemp("embedder")))
    with phloem.Engine(model_path=str(path), served_model_name="tiny", debug_invariants=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(embedder: phloem.Engine) -> Iterator[str]:
    with http_door(embedder) as found:
        yield found


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[phloem.Engine, str]]:
    path = tmp_path_factory.mktemp("ranker")
    pair_tokenizer(tiny_checkpoint("bert", path, head="ForSequenceClassification", num_labels=1))
    with phloem.Engine(model_path=str(path), served_model_name="tiny") as engine, http_door(engine) as found:
        yield engine, found


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[phloem.Engine, str]]:
    path = tmp_path_factory.mktemp("classifier")
    named = {"id2label": {0: "bad", 1: "good", 2: "odd"}, "label2id": {"bad": 0, "good": 1, "odd": 2}}
    ids = {"pad_token_id": 0, "bos_token_id": 1}  # as the tokenizer has them
    pair_tokenizer(tiny_checkpoint("roberta", path, head="ForSequenceClassification", **named, **ids))
    with phloem.Engine(model_path=str(path)) as engine, http_door(engine) as found:
        yield engine, found


@torch.inference_mode()
def theirs(path: str, ids: list[int], **more: Any) -> Any:
    import transformers

    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return model(torch.tensor([ids]), **more)[0][0]


@torch.inference_mode()
def logits(path: str, ids: list[int], **more: Any) -> np.ndarray[Any, Any]:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **more).logits[0].numpy()


def expected(engine: phloem.Engine, text: str) -> np.ndarray[Any, Any]:
    vector = theirs(engine.config.model.model_path, engine.tokenizer.encode(text)).mean(0).numpy()
    return vector / np.linalg.norm(vector)


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60)


def refusal(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = post(url, path, body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_vectors_by_the_openai_client_in_both_encodings(embedder: phloem.Engine, url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    wanted = np.stack([expected(embedder, text) for text in TEXTS])
    for options in ({}, {"encoding_format": "float"}):  # the client asks for base64 unless told otherwise
        answer = client.embeddings.create(model="tiny", input=TEXTS, **options)
        found = np.array([item.embedding for item in answer.data])
        assert np.abs(found - wanted).max() < 1e-5 and [item.index for item in answer.data] == [0, 1, 2, 3]
        count = sum(len(embedder.tokenizer.encode(text)) for text in TEXTS)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == count
    packed = post(url, "/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"}).json()["data"][0][
        "embedding"
    ]
    assert np.abs(np.frombuffer(base64.b64decode(packed), "<f4") - wanted[0]).max() < 1e-5


def test_token_ids_and_lists_of_them(embedder: phloem.Engine, url: str) -> None:
    ids = [embedder.tokenizer.encode(text) for text in TEXTS]
    several = [item["embedding"] for item in post(url, "/v1/embeddings", {"input": ids}).json()["data"]]
    one = post(url, "/v1/embeddings", {"input": ids[0]}).json()["data"]
    assert len(one) == 1 and np.allclose(one[0]["embedding"], several[0], atol=1e-6)
    assert np.allclose(several, [expected(embedder, text) for text in TEXTS], atol=1e-5)


def test_an_empty_text_has_a_vector_and_an_empty_list_none(embedder: phloem.Engine, url: str) -> None:
    found = post(url, "/v1/embeddings", {"input": ["", "fox"]}).json()["data"]
    assert np.allclose(found[0]["embedding"], expected(embedder, ""), atol=1e-5)
    assert np.allclose(found[1]["embedding"], expected(embedder, "fox"), atol=1e-5)
    assert "at least one text" in refusal(url, "/v1/embeddings", {"input": []})["message"]


def test_shorter_vectors_have_length_one(embedder: phloem.Engine, url: str) -> None:
    whole = post(url, "/v1/embeddings", {"input": "a b c"}).json()["data"][0]["embedding"]
    short = post(url, "/v1/embeddings", {"input": "a b c", "dimensions": 8}).json()["data"][0]["embedding"]
    cut = np.array(whole[:8]) / np.linalg.norm(whole[:8])
    assert np.allclose(short, cut, atol=1e-6)
    assert "8, 16" in refusal(url, "/v1/embeddings", {"input": "a", "dimensions": 9})["message"]
    raw = post(url, "/v1/embeddings", {"input": "a b c", "normalize": False}).json()["data"][0]["embedding"]
    assert abs(np.linalg.norm(raw) - 1) > 1e-3 and np.allclose(np.array(raw) / np.linalg.norm(raw), whole, atol=1e-5)


@pytest.mark.slow
def test_too_long_a_text_is_refused_or_cut_before_its_last_token(embedder: phloem.Engine, url: str) -> None:
    text = "over the lazy dog " * 40
    error = refusal(url, "/v1/embeddings", {"input": ["a", text]})
    assert error["code"] == "context_length_exceeded" and "64" in error["message"] and "input[1]" in error["message"]
    ids = embedder.tokenizer.encode(text)
    for asked, most in ((-1, 64), (10, 10), (1000, 64)):
        found = post(url, "/v1/embeddings", {"input": text, "truncate_prompt_tokens": asked}).json()
        assert found["usage"]["prompt_tokens"] == most
        vector = theirs(embedder.config.model.model_path, [*ids[: most - 1], 3]).mean(0).numpy()
        assert np.allclose(found["data"][0]["embedding"], vector / np.linalg.norm(vector), atol=1e-5)
    assert "at least 1" in refusal(url, "/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0})["message"]
    assert "no room" in refusal(url, "/v1/embeddings", {"input": text, "truncate_prompt_tokens": 2})["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "at least one text"),
        ({"input": [[]]}, "no token ids"),
        ({"input": ["a", 3]}, "side by side"),
        ({"input": [[5, 100_000]]}, "100000 is not in"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "prompt_name": "no"}, "the model has query"),
        ({"input": "a", "input_type": "no"}, "input_type"),
        ({}, "input"),
    ],
)
def test_bad_input_is_named(url: str, body: dict[str, Any], message: str) -> None:
    assert message in refusal(url, "/v1/embeddings", body)["message"]


def test_prompts_stand_before_texts(embedder: phloem.Engine, url: str) -> None:
    wanted = expected(embedder, "find: fox")
    for more in ({"prompt_name": "query"}, {"input_type": "query"}, {"prompt": "find: "}):
        found = post(url, "/v1/embeddings", {"input": "fox", **more}).json()["data"][0]["embedding"]
        assert np.allclose(found, wanted, atol=1e-5)


def test_what_generates_is_refused_with_the_right_route(embedder: phloem.Engine, url: str) -> None:
    message = {"role": "user", "content": "Hello"}
    for path, body in (
        ("/v1/chat/completions", {"messages": [message], "model": "tiny"}),
        ("/v1/completions", {"prompt": "a", "model": "tiny"}),
        ("/v1/responses", {"input": "a", "model": "tiny"}),
        ("/generate", {"text": "a"}),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1]}),
    ):
        error = refusal(url, path, body)
        assert error["code"] == "wrong_task" and ("/v1/embeddings" in error["message"] or "text_1" in error["message"])
    with pytest.raises(BadRequest, match="/v1/embeddings"):
        embedder.generate("a")
    assert refusal(url, "/classify", {"input": "a"})["code"] == "wrong_task"


@pytest.mark.slow
def test_what_embeds_is_refused_by_a_model_that_generates(tmp_path: Path) -> None:
    with phloem.Engine(model_path=str(tiny_checkpoint("llama", tmp_path))) as engine, http_door(engine) as url:
        for path, body in (
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("/classify", {"input": "a"}),
            ("/encode", {"text": "a"}),
            ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ):
            error = refusal(url, path, body)
            assert error["code"] == "wrong_task" and "/v1/chat/completions" in error["message"]
        with pytest.raises(BadRequest, match="generates text"):
            engine.encode("a")
        assert engine.generate("a", {"max_new_tokens": 2, "ignore_eos": True})["meta_info"]["completion_tokens"] == 2
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["task"] == "generate"


def test_the_model_says_what_it_is_for(embedder: phloem.Engine, url: str) -> None:
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["task"] == "embed"
    about = httpx.get(f"{url}/model_info").json()
    assert about["is_generation"] is False and about["context_length"] == 64
    assert httpx.get(f"{url}/health_generate", timeout=60).status_code == 200
    decisions = {name: (value, why) for name, value, why in embedder.ready["decisions"]}
    assert decisions["task"][0] == "embed" and "mean pooling, normalised, 32 numbers" in decisions["task"][1]
    assert decisions["kv_cache"][0] == "none"


def test_encode_by_its_native_names(embedder: phloem.Engine, url: str) -> None:
    wanted = expected(embedder, "fox")
    one = post(url, "/encode", {"text": "fox"}).json()
    assert np.allclose(one["embedding"], wanted, atol=1e-5)
    assert one["meta_info"]["prompt_tokens"] == len(embedder.tokenizer.encode("fox"))
    several = post(url, "/encode", {"text": ["fox", "dog"]}).json()
    assert len(several) == 2 and np.allclose(several[0]["embedding"], wanted, atol=1e-5)
    ids = embedder.tokenizer.encode("fox")
    assert np.allclose(post(url, "/encode", {"input_ids": ids}).json()["embedding"], wanted, atol=1e-5)
    assert isinstance(post(url, "/encode", {"input_ids": [ids]}).json(), list)
    assert "either" in refusal(url, "/encode", {})["message"]
    assert np.allclose(embedder.encode("fox")["embedding"], wanted, atol=1e-5)
    assert np.allclose(embedder.encode(input_ids=torch.tensor([ids]))[0]["embedding"], wanted, atol=1e-5)


@pytest.mark.slow
def test_a_cross_encoder_ranks_pairs_with_their_segments(ranker: tuple[phloem.Engine, str]) -> None:
    engine, url = ranker
    documents = ["over the lazy dog", "jumps", "Sap moves through the phloem of a tree"]
    (a, _), *_ = engine.tokenizer.encode_pairs(["The fox"])
    raw: list[float] = []
    for document in documents:
        ((ids, second),) = engine.tokenizer.encode_pairs([("The fox", document)])
        assert second == len(a)
        types = torch.tensor([[0] * second + [1] * (len(ids) - second)])
        raw.append(float(logits(engine.config.model.model_path, ids, token_type_ids=types)[0]))
    scores = 1 / (1 + np.exp(-np.array(raw)))
    order = sorted(range(3), key=lambda at: -scores[at])
    answer = post(url, "/v1/rerank", {"model": "tiny", "query": "The fox", "documents": documents}).json()
    assert [item["index"] for item in answer["results"]] == order
    assert np.allclose([item["relevance_score"] for item in answer["results"]], scores[order], atol=1e-5)
    assert [item["document"]["text"] for item in answer["results"]] == [documents[at] for at in order]
    shaped: list[Any] = [{"text": documents[0]}, documents[1], {"content": [{"type": "text", "text": documents[2]}]}]
    body = {"query": "The fox", "documents": shaped, "top_n": 2, "return_documents": False}
    few = post(url, "/rerank", body).json()["results"]
    assert [item["index"] for item in few] == order[:2] and "document" not in few[0]
    assert "document" not in post(url, "/v2/rerank", {"query": "a", "documents": ["b"]}).json()["results"][0]
    plain = post(url, "/v1/rerank", {"query": "The fox", "documents": documents, "use_activation": False}).json()
    assert np.allclose([item["relevance_score"] for item in plain["results"]], np.array(raw)[order], atol=1e-5)
    for body in ({"text_1": "The fox", "text_2": documents}, {"text_1": ["The fox"] * 3, "text_2": documents}):
        found = post(url, "/v1/score", body).json()
        assert np.allclose([item["score"] for item in found["data"]], scores, atol=1e-5)
    assert "2 texts on one side" in refusal(url, "/score", {"text_1": ["a", "b"], "text_2": documents})["message"]
    assert "documents[0]" in refusal(url, "/rerank", {"query": "a", "documents": [{"title": "b"}]})["message"]
    assert "at least one" in refusal(url, "/rerank", {"query": "a", "documents": []})["message"]
    encoded = post(url, "/encode", {"text": "fox"}).json()["embedding"]
    assert np.allclose(encoded, logits(engine.config.model.model_path, engine.tokenizer.encode("fox")), atol=1e-5)


def test_a_long_document_is_cut_and_the_query_is_not(ranker: tuple[phloem.Engine, str]) -> None:
    engine, url = ranker
    long = "over the lazy dog " * 200
    error = refusal(url, "/rerank", {"query": "The fox", "documents": ["jumps", long]})
    assert error["code"] == "context_length_exceeded" and "documents[1]" in error["message"]
    body = {"query": "The fox", "documents": [long], "truncate_prompt_tokens": 20}
    found = post(url, "/rerank", body).json()
    assert found["usage"]["prompt_tokens"] == 20
    ids, second = engine.tokenizer.encode_cut(("The fox", long), 20)
    assert ids[:second] == engine.tokenizer.encode("The fox") and ids[-1] == 3
    short = post(url, "/rerank", {"query": "The fox", "documents": [long], "max_tokens_per_doc": 7}).json()
    assert short["usage"]["prompt_tokens"] == second + 7 + 1


@torch.inference_mode()
def test_a_cross_encoder_whose_attention_weighs_distances(tmp_path: Path) -> None:
    """DeBERTa's rerankers have no segments."""
    import transformers

    path = tiny_checkpoint("deberta_v2", tmp_path, head="ForSequenceClassification", num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    documents = ["jumps", "over the lazy dog", "a page table", "what is the capital"]
    with phloem.LLM(str(path)) as llm:
        found = {item["index"]: item["relevance_score"] for item in llm.rerank("fox", documents)}
        for at, document in enumerate(documents):
            ids, _ = llm.engine.tokenizer.encode_cut(("fox", document), 64)
            assert abs(found[at] - float(model(torch.tensor([ids])).logits[0, 0].sigmoid())) < 1e-5
    assert len(set(found.values())) == 4


def test_labels_over_http_and_in_the_engine(classifier: tuple[phloem.Engine, str]) -> None:
    engine, url = classifier
    answer = post(url, "/classify", {"input": TEXTS[:2]}).json()["data"]
    for item, text in zip(answer, TEXTS, strict=False):
        raw = logits(engine.config.model.model_path, engine.tokenizer.encode(text)).astype(np.float64)
        probs = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
        assert np.allclose(item["probs"], probs, atol=1e-5) and item["num_classes"] == 3
        assert item["label"] == ("bad", "good", "odd")[int(raw.argmax())]
    assert engine.classify(TEXTS[:2])[1]["label"] == answer[1]["label"]
    assert "3 labels" in refusal(url, "/rerank", {"query": "a", "documents": ["b"]})["message"]
    assert "/classify" in refusal(url, "/v1/embeddings", {"input": "a"})["message"]


def test_labels_of_tokens(tmp_path: Path) -> None:
    path = tiny_checkpoint("bert", tmp_path, head="ForTokenClassification", num_labels=4)
    with phloem.Engine(model_path=str(path)) as engine, http_door(engine) as url:
        (item,) = post(url, "/classify", {"input": "The quick brown fox"}).json()["data"]
        count = len(engine.tokenizer.encode("The quick brown fox"))
        assert len(item["label"]) == len(item["probs"]) == count and len(item["probs"][0]) == 4
        assert np.allclose(np.sum(item["probs"], -1), 1, atol=1e-5)


def test_vectors_rank_by_their_cosine_with_the_prompt_for_queries(embedder: phloem.Engine, url: str) -> None:
    query = expected(embedder, "find: fox")
    wanted = [float(query @ expected(embedder, text)) for text in TEXTS[:2]]
    found = post(url, "/v1/score", {"text_1": "fox", "text_2": TEXTS[:2]}).json()["data"]
    assert np.allclose([item["score"] for item in found], wanted, atol=1e-5)


def test_many_texts_at_once_are_what_each_is_alone(embedder: phloem.Engine) -> None:
    texts = [" ".join(["dog", "fox", "tree", "page"][at % 4] for _ in range(at % 13 + 1)) for at in range(300)]
    together = np.array(embedder.embed(texts))
    alone = np.array([embedder.embed(text)[0] for text in texts[:20]])
    assert np.abs(together[:20] - alone).max() < 1e-5
    assert len(together) == 300 and np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_llm_embeds_scores_and_reranks(tmp_path: Path) -> None:
    path = add_files(tiny_checkpoint("modernbert", tmp_path))
    with phloem.LLM(str(path)) as llm:
        vectors = np.array(llm.embed(TEXTS[:2], normalize=True))
        assert vectors.shape == (2, 32)
        scores = llm.score("fox", TEXTS[:2])
        ranked = llm.rerank("fox", TEXTS[:2], top_n=1)
        assert len(ranked) == 1 and ranked[0]["relevance_score"] == max(scores)
        with pytest.raises(BadRequest, match="task is embed"):
            llm.generate("a")


def test_a_reward_is_a_number_without_bounds(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3", tmp_path, head="ForSequenceClassification", num_labels=1)
    with phloem.LLM(str(path)) as llm:
        ids = llm.engine.tokenizer.encode("The fox")
        assert np.allclose(llm.classify("The fox")[0]["probs"], logits(str(path), ids), atol=1e-5)


def test_a_task_that_the_model_cannot_serve_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is an encoder"):
        phloem.Engine(model_path=str(tiny_checkpoint("bert", tmp_path)), task="generate")


def test_requests_from_many_clients_share_steps(embedder: phloem.Engine, url: str) -> None:
    async def run() -> list[Any]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [{"input": [f"fox {at}", "dog"]} for at in range(24)]
            answers = await asyncio.gather(*(client.post(f"{url}/v1/embeddings", json=body) for body in bodies))
            return [answer.json()["data"][1]["embedding"] for answer in answers]

    wanted = expected(embedder, "dog")
    assert all(np.allclose(found, wanted, atol=1e-5) for found in asyncio.run(run()))


@torch.inference_mode()
def test_a_decoder_is_asked_for_yes_or_no(tmp_path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer

    path = tiny_checkpoint("qwen3", tmp_path, tie_word_embeddings=False, vocab_size=400, max_position_embeddings=600)
    tokenizer: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save(str(path / "tokenizer.json"))
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with phloem.LLM(str(path), task="score") as llm:
        judge = llm.engine.info.pooling.judge
        assert judge is not None and (judge.yes, judge.no) == (yes, no)
        found = {item["index"]: item["relevance_score"] for item in llm.rerank("fox", ["jumps", "over the lazy dog"])}
        for at, document in enumerate(["jumps", "over the lazy dog"]):
            parts = (judge.question("fox", None), document, judge.after)
            ids = [token for part in parts for token in tokenizer.encode(part).ids]
            last = model(torch.tensor([ids])).logits[0, -1]
            assert abs(found[at] - float(last[[no, yes]].softmax(-1)[1])) < 1e-4
        with pytest.raises(BadRequest, match="600"):
            llm.rerank("fox", ["over the lazy dog " * 200])
        with pytest.raises(BadRequest, match="pairs of texts"):
            llm.engine.encode("fox")
        # Of the document alone the end is cut: the instruction, the query and what asks for the answer stay.
        long = "over the lazy dog " * 200
        ask, text, after = (tokenizer.encode(part).ids for part in (judge.question("fox", None), long, judge.after))
        ids = [*ask, *text[: 600 - len(ask) - len(after)], *after]
        last = model(torch.tensor([ids])).logits[0, -1]
        cut = llm.engine.score_pairs("fox", long, truncate_prompt_tokens=-1)
        assert abs(cut[0] - float(last[[no, yes]].softmax(-1)[1])) < 1e-4
