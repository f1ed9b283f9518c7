"""Encoder servers and servers without towers: the answers are those of one server with both."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import torch
from encoder_support import SETTINGS, EncoderServer, item_of
from served import Server, eventually
from speech_support import sound, wav
from test_doors import door, image, user
from test_foreign_towers import written
from vision_support import clip, picture, png, seeing_checkpoint

from phloem.attention._packed import PackedMemory
from phloem.checkpoint.describe import described
from phloem.client.request import Item
from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.errors import BadRequest, ConfigError, ModelLoadError, OutOfMemory, PhloemError
from phloem.core.request import SamplingParams
from phloem.disagg.embeddings import Look, encode
from phloem.engine.towers.encoding import Embedding, Encoder, content_of, facts_of
from phloem.engine.towers.media import Desk
from phloem.engine.transfer import plain_up
from phloem.kernels.ops import Ops
from phloem.launch.encoders import check
from phloem.layers.context import BuildContext
from phloem.llm import Engine
from phloem.models import load_model
from phloem.models._apart import load_tower_alone, without_tower
from phloem.models._vision import SeeingDecoder
from phloem.multimodal._reader import Source
from phloem.testing.checkpoints import tiny_checkpoint

PICTURES = [png(picture(1, 24, 16)), png(picture(2, 17, 40)), png(picture(3, 32, 32))]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
LENGTH = {"max_total_tokens": 4096, "max_running_requests": 8}
P, AUDIO = -1, 8
TEXTS: list[tuple[list[int], list[int]]] = [
    ([5, 17, 200, 301, 44, 9], []),
    ([5, 17, 200, P, 301, 44, 9, 12], [0]),
    ([P, 301, 44, 9, 12], [1]),
    ([5, P, 3, P, 200, 70, P, 99], [2, 0, 2]),
    ([5, 17, 200, P, 301, 44, 9, 12], [0]),
]


class FakeTower:
    """Its embeddings are the item's first pixel; it cannot take those that begin with 13, nor 14 with another."""

    like = torch.float32

    def __init__(self) -> None:
        self.passes: list[int] = []

    def encode(self, items: Any, pack: Any) -> list[torch.Tensor]:
        first = [item.pixels[0] for item in items]
        self.passes.append(len(first))
        if 13 in first:
            raise ValueError("thirteen")
        if 14 in first and len(first) > 1:
            raise torch.OutOfMemoryError("no room")
        if 15 in first:
            raise MemoryError
        return [torch.full((item.count + (item.pixels[0] == 16), 3), float(item.pixels[0])) for item in items]


def fake_encoder(budget: int = 1 << 20) -> tuple[Encoder, FakeTower]:
    tower: Any = FakeTower()
    platform: Any = SimpleNamespace(empty_cache=lambda: None, begin_steps=lambda: None)
    return Encoder(tower, platform, lambda lengths: lengths, budget), tower


def test_one_pass_makes_what_is_not_known_and_each_content_once() -> None:
    encoder, tower = fake_encoder()
    made = encoder.encode([item_of(1), item_of(2, start=4), item_of(1, start=9)])
    assert all(isinstance(one, Embedding) for one in made) and made[0] == made[2] != made[1]
    assert tower.passes == [2] and (encoder.encoded, encoder.found) == (2, 1)
    one = made[1]
    assert isinstance(one, Embedding) and one.shape == (2, 3) and one.kind == "float32"
    assert torch.frombuffer(bytearray(one.data), dtype=torch.float32).tolist() == [2.0] * 6
    encoder.encode([item_of(2), item_of(3)])
    assert tower.passes == [2, 1] and (encoder.encoded, encoder.found) == (3, 2)


def test_an_item_that_cannot_be_encoded_harms_no_other() -> None:
    encoder, tower = fake_encoder()
    made = encoder.encode([item_of(seed) for seed in (1, 13, 14, 15, 16)])
    kinds = [type(one) for one in made]
    assert kinds == [Embedding, BadRequest, Embedding, OutOfMemory, BadRequest]
    assert isinstance(made[1], PhloemError) and "thirteen" in made[1].message
    assert tower.passes == [5, 1, 1, 1, 1, 1] and encoder.encoded == 2


def test_content_is_what_the_tower_sees_and_not_what_the_sender_says() -> None:
    one, other = item_of(1), item_of(2)
    assert content_of(one) == content_of(item_of(1, start=7))
    other.digest = one.digest
    assert content_of(one) != content_of(other)
    assert content_of(item_of(1, count=2)) != content_of(item_of(1, count=3))


def test_a_tower_alone_makes_what_it_makes_beside_its_model(tmp_path: Path) -> None:
    """Of the weights each of the two has its own, and what the one makes the other takes as its own."""
    config = Config.from_flat({**SETTINGS, "model_path": str(seeing_checkpoint("qwen3_vl", tmp_path))})
    client, _, checkpoint = make_client(config)
    reader = client.pictures
    assert reader is not None
    mark, source = reader.tokens["image"], Source("", "image_data", data=PICTURES[1])
    prompt = asyncio.run(client.admission.grown(Item(SamplingParams(), ids=[5, mark, 9], pictures=[source])))
    asyncio.run(client.close())
    (item,) = prompt.media
    ctx = BuildContext(Ops(), torch.float32, torch.device("cpu"))
    whole, cut = load_model(checkpoint, ctx), load_model(checkpoint, ctx, cut=without_tower)
    tower, nbytes = load_tower_alone(checkpoint, ctx)
    assert isinstance(whole, SeeingDecoder) and isinstance(cut, SeeingDecoder)
    assert cut.weight_bytes + nbytes == whole.weight_bytes and 0 < nbytes < whole.weight_bytes
    platform: Any = SimpleNamespace(empty_cache=lambda: None)
    (made,) = Encoder(tower, platform, partial(PackedMemory, ctx.ops), 1 << 20).encode([item])
    assert isinstance(made, Embedding) and made.shape == (item.count, cut.seeing.hidden_size * cut.seeing.parts)
    given = msgspec.structs.replace(item, features=made.data, kind=made.kind, pixels=b"")
    found = [
        Desk(model.seeing, ctx.ops, 2, 1 << 20, plain_up(torch.device("cpu")))._features({item.digest: one})[
            item.digest
        ]
        for model, one in ((whole, item), (cut, given))
    ]
    assert torch.equal(*found) and facts_of(checkpoint, tower) == facts_of(checkpoint, cut.seeing)
    with pytest.raises(RuntimeError, match="language_only"):
        cut.seeing.encode([item], partial(PackedMemory, ctx.ops))


def ask(engine: Engine, ids: list[int], field: str, which: list[Any], **params: Any) -> Any:
    media: dict[str, Any] = {field: which} if which else {}
    return engine.generate(
        input_ids=ids, sampling_params={**GREEDY, **params}, return_logprob=True, return_prompt_token_ids=True, **media
    )


def mark_of(engine: Engine, kind: str = "image") -> int:
    pictures: Any = engine._client.pictures
    return engine.tokenizer.encode(pictures.processors[kind].mark, add_special_tokens=False)[0]


def answers(engine: Engine, texts: list[tuple[list[int], list[int]]], media: list[bytes], field: str) -> list[Any]:
    """Output tokens, their log probabilities, and how much of each prompt was found."""
    mark = AUDIO if field == "audio_data" else mark_of(engine)
    found: list[Any] = []
    for ids, which in texts:
        told = ask(engine, [mark if token == P else token for token in ids], field, [media[at] for at in which])
        meta = told["meta_info"]
        chosen = [entry[0] for entry in meta["output_token_logprobs"]]
        found.append((told["output_ids"], chosen, meta["prompt_token_ids"], meta["cached_tokens"]))
    return found


def same(path: Path, media: list[bytes], field: str, distinct: int, **settings: Any) -> None:
    """Compared with one server with both, in this order: alone and in chunks of three."""
    usual = {**SETTINGS, **LENGTH, "model_path": str(path), "page_size": 1, "debug_invariants": True, **settings}
    with EncoderServer(path) as encoder:
        for more in ({}, {"chunked_prefill_size": 3, "max_running_requests": 2}):
            with Engine(**usual | more) as whole:
                expected, weights = answers(whole, TEXTS, media, field), whole.ready["weight_bytes"]
            with Engine(**usual | more, language_only=True, encoder_urls=[encoder.url]) as engine:
                assert answers(engine, TEXTS, media, field) == expected
                state = engine.get_server_info()["internal_states"][0]
                assert (
                    state["encoders"]["media_fetched"] == distinct and state["encoders"]["encoders"][0]["failed"] == 0
                )
                alone = encoder.client.connection.ready
                assert alone is not None
                assert engine.ready["weight_bytes"] + alone["weight_bytes"] == weights
        eventually(lambda: encoder.counts == (distinct, distinct))


@pytest.mark.some(3)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next", "mistral3"])
def test_pictures_as_one_server(family: str, tmp_path: Path) -> None:
    same(seeing_checkpoint(family, tmp_path), PICTURES, "image_data", 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_sounds_as_one_server(family: str, tmp_path: Path) -> None:
    longer = 5.0 if family.startswith("qwen3") else 1.0  # of less than a second no token is made there
    sounds = [wav(sound(longer * seconds, pitch=pitch)) for seconds, pitch in ((0.5, 440), (0.337, 880), (0.9, 300))]
    same(tiny_checkpoint(family, tmp_path), sounds, "audio_data", 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_usual_kernels_of_this_machine(dtype: str, tmp_path: Path) -> None:
    """Whatever type activations have: embeddings have the same."""
    path = seeing_checkpoint("qwen2_vl", tmp_path)
    kernels: dict[str, Any] = {"ops": None, "dtype": dtype}
    usual = {**SETTINGS, **LENGTH, "model_path": str(path), "page_size": 16, **kernels}
    with Engine(**usual) as whole:
        expected = answers(whole, TEXTS, PICTURES, "image_data")
    with (
        EncoderServer(path, **kernels) as encoder,
        Engine(**usual, language_only=True, encoder_urls=[encoder.url]) as engine,
    ):
        assert answers(engine, TEXTS, PICTURES, "image_data") == expected


@pytest.mark.slow
def test_towers_of_transformers_can_be_elsewhere(tmp_path: Path) -> None:
    """VipLLaVA: its language model has a file, its tower has none."""
    path = written("vipllava", tmp_path)
    usual = {**SETTINGS, **LENGTH, "model_path": str(path)}
    with Engine(**usual) as whole:
        expected = answers(whole, TEXTS, PICTURES, "image_data")
    with EncoderServer(path) as encoder, Engine(**usual, language_only=True, encoder_urls=[encoder.url]) as engine:
        assert answers(engine, TEXTS, PICTURES, "image_data") == expected


@pytest.mark.slow
def test_videos_and_continuations_and_many_at_once(tmp_path: Path) -> None:
    path = seeing_checkpoint("qwen2_vl", tmp_path)
    usual = {**SETTINGS, "model_path": str(path), "page_size": 4, "max_total_tokens": 400, "max_running_requests": 8}
    shown = clip([picture(seed, 32, 32) for seed in range(4)])

    def run(engine: Engine) -> list[Any]:
        film, mark = mark_of(engine, "video"), mark_of(engine)
        first = ask(engine, [5, film, 9, 12], "video_data", [shown])["output_ids"]
        ids = [[mark if token == P else token for token in text] for text, _ in TEXTS]
        many: Any = engine.generate(
            input_ids=ids * 2,
            image_data=[[PICTURES[at] for at in which] for _, which in TEXTS] * 2,
            sampling_params={**GREEDY, "n": 2, "max_new_tokens": 30},
        )
        return [first, [one["output_ids"] for one in many]]

    with Engine(**usual) as whole:
        expected = run(whole)
    with EncoderServer(path) as one, EncoderServer(path) as two:
        urls = [one.url, two.url]
        with Engine(**usual, debug_invariants=True, language_only=True, encoder_urls=urls) as engine:
            assert run(engine) == expected
        eventually(lambda: one.counts[0] + two.counts[0] == 4)


@pytest.fixture(scope="module")
def sees(tmp_path_factory: Any) -> Path:
    return seeing_checkpoint("llava", tmp_path_factory.mktemp("sees"))


@pytest.fixture(scope="module")
def encoder(sees: Path) -> Iterator[EncoderServer]:
    with EncoderServer(sees, api_key="secret") as found:
        yield found


@pytest.mark.slow
def test_what_an_encoder_server_answers(encoder: EncoderServer) -> None:
    with httpx.Client(base_url=encoder.url, headers={"authorization": "Bearer secret"}, timeout=60) as http:
        assert httpx.get(f"{encoder.url}/health").status_code == 200
        assert httpx.post(f"{encoder.url}/encode_media", content=b"").status_code == 401
        assert http.get("/health_generate").status_code == 200
        about = http.get("/model_info").json()
        assert about["task"] == "encode_media" and about["is_generation"] is False
        told = http.get("/server_info").json()
        assert told["encoder_only"] is True and told["internal_states"][0]["waiting"] == 0
        for route, body in (("/generate", {"text": "a"}), ("/v1/chat/completions", {"messages": user("a")})):
            answer = http.post(route, json=body)
            assert answer.status_code == 400 and "encoder_only" in answer.json()["error"]["message"]
        for body, status in ((b"", 400), (b"\x81\xa4item\x01", 400), (encode(Look(item_of(1), {})), 409)):
            answer = http.post("/encode_media", content=body)
            assert answer.status_code == status and answer.json()["error"]["message"]
        facts = (encoder.client.connection.ready or {})["encoder"]
        broken = http.post("/encode_media", content=encode(Look(item_of(1, count=999), facts)))
        assert broken.status_code == 400 and broken.json()["error"]["message"]
        assert http.get("/health").status_code == 200
        assert http.post("/flush_cache").status_code == 200


@pytest.mark.slow
def test_without_an_encoder_requests_with_pictures_end_and_others_do_not(sees: Path, encoder: EncoderServer) -> None:
    async def run() -> None:
        wrong = {"language_only": True, "encoder_urls": ["http://127.0.0.1:9", encoder.url]}
        asked = {"messages": user("What is ", image(PICTURES[0]), "?"), "max_tokens": 4, "temperature": 0}
        async with door(sees, **wrong) as http:  # it has no key
            answer = await http.post("/v1/chat/completions", json=asked)
            error = answer.json()["error"]
            assert answer.status_code == 503 and error["retryable"] is True
            assert "api_key" in error["message"] and "127.0.0.1:9" in error["message"]
            plain = {**asked, "messages": user("What is it?")}
            assert (await http.post("/v1/chat/completions", json=plain)).status_code == 200
            state = (await http.get("/server_info")).json()["internal_states"][0]
            assert state["running"] == state["waiting"] == 0 and state["encoders"]["media_coming"] == 0
        async with door(sees, **wrong, api_key="secret") as http:
            keyed = {"authorization": "Bearer secret"}
            answer = await http.post("/v1/chat/completions", json=asked, headers=keyed)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4

    asyncio.run(run())


@pytest.mark.slow
def test_an_encoder_of_other_weights_is_not_taken(sees: Path, tmp_path: Path) -> None:
    other = seeing_checkpoint("llava", tmp_path, rms_norm_eps=3e-5)
    with (
        EncoderServer(other) as encoder,
        Engine(**SETTINGS, model_path=str(sees), language_only=True, encoder_urls=[encoder.url]) as engine,
        pytest.raises(PhloemError, match=r"it is not the one for this model: HTTP 409: .*model is"),
    ):
        ask(engine, [5, mark_of(engine)], "image_data", [PICTURES[0]])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"language_only": True}, "encoder_urls"),
        ({"encoder_urls": ["http://127.0.0.1:9"]}, "language_only"),
        ({"language_only": True, "encoder_urls": ["127.0.0.1:9"]}, "no address"),
        ({"language_only": True, "encoder_urls": ["http://127.0.0.1:9"], "enable_spec_capture": True}, "captured"),
    ],
)
def test_settings_that_contradict_each_other(sees: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine(**SETTINGS, model_path=str(sees), **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"language_only": True}, "towers alone, or none"),
        ({"tp_size": 2}, "one rank"),
        ({"dp_size": 2}, "one rank"),
        ({"disaggregation_mode": "prefill"}, "prefill"),
        ({"enable_lora": True}, "adapters"),
    ],
)
def test_what_no_encoder_server_is(sees: Path, settings: dict[str, Any], words: str) -> None:
    config = Config.from_flat({"model_path": str(sees), "encoder_only": True, **settings})
    with pytest.raises(ConfigError, match=words):
        check(config, described(config.model))


def test_a_model_of_texts_has_no_tower_that_could_be_elsewhere(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    with pytest.raises(ModelLoadError, match="no tower"):
        Engine(**SETTINGS, model_path=str(path), language_only=True, encoder_urls=["http://127.0.0.1:9"])
    with pytest.raises(AssertionError, match="no tower"):
        EncoderServer(path)


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.slow
def test_beside_a_split_of_prompts_and_answers(sees: Path) -> None:
    """Three kinds of servers: one has the tower, one computes prompts, one writes answers."""

    async def run(url: str) -> None:
        split = {"language_only": True, "encoder_urls": [url], "disaggregation_bootstrap_port": 0}
        shown = [data_uri(picture) for picture in PICTURES]
        texts = [("Say something", []), ("See <image> here", [0]), ("<image> and <image> again", [2, 1])]
        bodies = [
            {"text": text, "image_data": [shown[at] for at in which] or None, "sampling_params": GREEDY}
            for text, which in texts
        ]
        async with door(sees) as whole:
            expected = [(await whole.post("/generate", json=body)).json()["output_ids"] for body in bodies]
        async with (
            door(sees, **split, disaggregation_mode="prefill") as prefill,
            door(sees, **split, disaggregation_mode="decode") as decode,
        ):
            told = (await prefill.get("/server_info")).json()
            port = told["disaggregation"]["bootstrap_port"]
            for room, (body, wanted) in enumerate(zip(bodies, expected, strict=True)):
                asked = {**body, "bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
                both = await asyncio.gather(*(one.post("/generate", json=asked) for one in (prefill, decode)))
                assert [one.status_code for one in both] == [200, 200], [one.text for one in both]
                assert both[1].json()["output_ids"] == wanted
            state = (await decode.get("/server_info")).json()["internal_states"][0]["disaggregation"]
            assert state["rooms_fetched"] == 3 and state["rooms_failed"] == 0

    with EncoderServer(sees) as encoder:
        asyncio.run(run(encoder.url))
        eventually(lambda: encoder.counts == (3, 3))  # both ask, and of those that meet in a pass one is encoded


@pytest.mark.slow
def test_two_servers_over_http_and_one_is_killed(sees: Path) -> None:
    """The answers of one server; killed in the middle, its requests end with 503; back again, all goes on."""
    common = ("--ops", "reference", "--dtype", "float32", "--threads", "1", "--max-total-tokens", "4096")
    body = {"image_data": data_uri(PICTURES[0]), "sampling_params": GREEDY, "text": "See <image> here"}
    with httpx.Client(timeout=120) as http:
        whole = Server(sees, *common).wait_ready(300)
        expected = http.post(f"{whole.url}/generate", json=body).json()
        whole.close()
        encoder = Server(sees, *common, "--encoder-only").wait_ready(300)
        language = Server(sees, *common, "--language-only", "--encoder-urls", encoder.url).wait_ready(300)
        try:
            found = http.post(f"{language.url}/generate", json=body).json()
            assert found["output_ids"] == expected["output_ids"] and found["text"] == expected["text"]
            port = encoder.port
            encoder.close()
            other = {**body, "image_data": data_uri(PICTURES[1])}
            lost = http.post(f"{language.url}/generate", json=other)
            assert lost.status_code == 503 and lost.json()["error"]["retryable"] is True
            assert http.post(f"{language.url}/generate", json=body).json()["output_ids"] == expected["output_ids"]
            encoder = Server(sees, *common, "--encoder-only", "--port", str(port)).wait_ready(300)
            assert http.post(f"{language.url}/generate", json=other).status_code == 200
            state = language.state()
            assert state["running"] == state["waiting"] == 0 and state["encoders"]["media_coming"] == 0
        finally:
            encoder.close()
            language.close()
