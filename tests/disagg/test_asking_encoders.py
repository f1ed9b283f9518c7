"""Who is asked for embeddings, what is taken of the answer, and what a request gets where none comes."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import numpy as np
import pytest
from encoder_support import FACTS, WIDTH, item_of, made_of, submit_of, values_of

from phloem.core.errors import BadRequest, ConfigError, EngineDead
from phloem.core.media import Media
from phloem.core.messages import Submit
from phloem.disagg.embeddings import Look, Misfit, encode, read_look
from phloem.disagg.encoders import Awaited, Caller, Encoders, Lost, Wanted, addresses
from phloem.testing.driver import ManualClock

ONE, TWO, THREE = "http://one:1", "http://two:2", "http://three:3"


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        time.sleep(0.001)
        assert time.monotonic() < end, "it never came to hold"


class Fakes:
    """Encoders that answer at once, or when they are let go."""

    def __init__(self, held: bool = False) -> None:
        self.go = threading.Event()
        if not held:
            self.go.set()
        self.asked: list[tuple[str, Media]] = []
        self.answers: dict[str, Callable[[Media], bytes]] = {}  # by URL; others answer well

    def __call__(self, url: str, body: bytes, most: int) -> bytes:
        item = read_look(body, FACTS)
        self.asked.append((url, item))
        assert self.go.wait(20)
        data = self.answers.get(url, made_of)(item)
        assert len(data) <= most
        return data

    def urls(self) -> list[str]:
        return [url for url, _ in self.asked]


def encoders_of(
    fakes: Fakes, *urls: str, budget: int = 1 << 20, clock: Callable[[], float] = time.monotonic
) -> Encoders:
    return Encoders(urls or (ONE, TWO), Wanted(FACTS, WIDTH), budget, None, fakes, clock)


def awaited(encoders: Encoders, submit: Submit) -> Awaited:
    found = encoders.expect(submit)
    assert found is not None
    until(found.ready)
    return found


def lose(_: Media) -> bytes:
    raise Lost("gone")


def test_embeddings_stand_in_the_place_of_pixels_and_are_kept_by_content() -> None:
    fakes = Fakes()
    encoders = encoders_of(fakes)
    first, second = item_of(1), item_of(2, start=6)
    submit, before = submit_of(first, second, item_of(1, start=10)), [first, second]
    assert awaited(encoders, submit).error is None
    for item, seed, start in zip(submit.media, (1, 2, 1), (1, 6, 10), strict=True):
        found = np.frombuffer(item.features, dtype="<f4").reshape(item.count, WIDTH)
        assert (found == values_of(item_of(seed))).all()
        assert item.pixels == b"" and item.kind == "float32" and item.spans == [(start, 2)]
    assert before[0].pixels and not before[0].features  # whoever else has them has them as they were
    assert len(fakes.asked) == 2
    again = submit_of(item_of(2))
    assert encoders.expect(again) is None and again.media[0].features == submit.media[1].features
    assert len(fakes.asked) == 2
    state = encoders.state()
    assert (state["media_fetched"], state["media_found"], state["media_coming"]) == (2, 1, 0)
    assert state["embedding_bytes_kept"] == state["embedding_bytes"] == 2 * 2 * WIDTH * 4
    encoders.close()


def test_no_more_bytes_are_kept_than_allowed() -> None:
    fakes, each = Fakes(), 2 * WIDTH * 4
    encoders = encoders_of(fakes, budget=2 * each)
    for seed in (1, 2, 3):
        awaited(encoders, submit_of(item_of(seed)))
        assert encoders.state()["embedding_bytes_kept"] <= 2 * each
    assert encoders.expect(submit_of(item_of(3))) is None
    assert awaited(encoders, submit_of(item_of(1))).error is None
    assert len(fakes.asked) == 4
    encoders.close()


def test_one_item_that_many_want_is_asked_for_once() -> None:
    fakes = Fakes(held=True)
    encoders = encoders_of(fakes)
    submits = [submit_of(item_of(1), name=str(number)) for number in range(5)]
    waits = [encoders.expect(submit) for submit in submits]
    until(lambda: len(fakes.asked) == 1)
    assert not any(late is None or late.ready() for late in waits)
    fakes.go.set()
    for late, submit in zip(waits, submits, strict=True):
        assert late is not None
        until(late.ready)
        assert submit.media[0].features
    assert len(fakes.asked) == 1 and encoders.state()["media_coming"] == 0
    encoders.close()


def test_items_are_spread_by_the_tokens_that_each_encoder_makes() -> None:
    fakes = Fakes(held=True)
    encoders = encoders_of(fakes, ONE, TWO)
    late = encoders.expect(submit_of(item_of(1, count=9)))
    until(lambda: len(fakes.asked) == 1)
    more = encoders.expect(submit_of(*(item_of(seed, start=2 * seed) for seed in (2, 3, 4))))
    until(lambda: len(fakes.asked) == 4)
    busy = fakes.asked[0][0]
    assert busy not in fakes.urls()[1:]  # three of two tokens are fewer than nine
    loads = {one["url"]: one["tokens"] for one in encoders.state()["encoders"]}
    assert sorted(loads.values()) == [6, 9] and loads[busy] == 9
    fakes.go.set()
    for one in (late, more):
        assert one is not None
        until(one.ready)
    assert [one["tokens"] for one in encoders.state()["encoders"]] == [0, 0]
    encoders.close()


def test_idle_encoders_are_asked_by_content() -> None:
    """The same picture goes where it is known; different ones go to all."""
    fakes = Fakes()
    encoders = encoders_of(fakes, ONE, TWO, THREE, budget=0)
    for _ in range(2):
        for seed in range(24):
            awaited(encoders, submit_of(item_of(seed)))
    urls = fakes.urls()
    assert urls[:24] == urls[24:] and set(urls) == {ONE, TWO, THREE}
    encoders.close()


def test_a_lost_encoder_is_asked_last_for_a_while_and_another_one_answers() -> None:
    fakes, clock = Fakes(), ManualClock()
    encoders = encoders_of(fakes, ONE, TWO, budget=0, clock=clock)
    for seed in range(8):  # the content decides: both are first for some
        awaited(encoders, submit_of(item_of(seed)))
    seed = fakes.urls().index(ONE)
    fakes.answers[ONE] = lose
    fakes.asked.clear()
    submit = submit_of(item_of(seed))
    assert awaited(encoders, submit).error is None and submit.media[0].features
    assert fakes.urls() == [ONE, TWO]
    awaited(encoders, submit_of(item_of(seed)))
    assert fakes.urls() == [ONE, TWO, TWO]
    clock.now += 1.5
    awaited(encoders, submit_of(item_of(seed)))
    assert fakes.urls()[3:] == [ONE, TWO]
    clock.now += 1.5  # the pause has doubled
    awaited(encoders, submit_of(item_of(seed)))
    assert fakes.urls()[5:] == [TWO]
    clock.now += 1.0
    del fakes.answers[ONE]
    awaited(encoders, submit_of(item_of(seed)))
    assert fakes.urls()[6:] == [ONE]
    told = {one["url"]: one for one in encoders.state()["encoders"]}
    assert told[ONE]["failed"] == 2 and told[ONE]["why"] == "" and told[TWO]["failed"] == 0
    encoders.close()


def test_with_no_encoder_left_the_request_ends_and_may_be_sent_again() -> None:
    fakes = Fakes()
    fakes.answers = {ONE: lose, TWO: lose}
    encoders = encoders_of(fakes)
    submit = submit_of(item_of(1))
    error = awaited(encoders, submit).error
    assert isinstance(error, EngineDead) and error.status == 503 and error.retryable
    assert ONE in error.message and TWO in error.message and "gone" in error.message
    assert sorted(fakes.urls()) == [ONE, TWO] and not submit.media[0].features
    fakes.answers.clear()
    assert awaited(encoders, submit_of(item_of(1))).error is None  # all are asked again, though each has a pause
    encoders.close()


def test_an_item_that_cannot_be_encoded_is_not_tried_elsewhere() -> None:
    def refuse(_: Media) -> bytes:
        raise BadRequest("no such thing", param="image_data")

    fakes = Fakes()
    fakes.answers = {ONE: refuse, TWO: refuse}
    encoders = encoders_of(fakes)
    error = awaited(encoders, submit_of(item_of(1))).error
    assert isinstance(error, BadRequest) and error.param == "image_data" and len(fakes.asked) == 1
    encoders.close()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda item: made_of(item, digest=bytes(32)),
        lambda item: made_of(item, shape=(item.count, WIDTH + 1)),
        lambda item: made_of(item, shape=(item.count + 1, WIDTH)),
        lambda item: made_of(item, kind="bfloat16"),
        lambda item: made_of(item, data=b"1234"),
        lambda item: made_of(item)[:-1],
        lambda item: b"",
        lambda item: msgspec.msgpack.encode([1, 2]),
    ],
)
def test_an_answer_that_does_not_fit_is_not_taken(wrong: Callable[[Media], bytes]) -> None:
    fakes = Fakes()
    fakes.answers = {ONE: wrong}
    encoders = encoders_of(fakes, ONE)
    submit = submit_of(item_of(1))
    assert isinstance(awaited(encoders, submit).error, EngineDead) and not submit.media[0].features
    encoders.close()


def test_what_no_request_waits_for_any_more_is_not_asked_for() -> None:
    fakes = Fakes(held=True)
    encoders = encoders_of(fakes, ONE)
    running = [encoders.expect(submit_of(item_of(seed))) for seed in range(4)]
    until(lambda: len(fakes.asked) == 4)  # as many as are asked for at a time
    waiting = encoders.expect(submit_of(item_of(9), name="gone"))
    assert waiting is not None
    job = weakref.ref(next(iter(waiting.jobs.values())))
    del waiting
    gc.collect()
    fakes.go.set()
    for late in running:
        assert late is not None
        until(late.ready)
    until(lambda: encoders.state()["media_coming"] == 0)
    assert len(fakes.asked) == 4
    until(lambda: gc.collect() >= 0 and job() is None)  # its pixels with it
    encoders.close()


def test_at_the_end_whoever_waits_is_told() -> None:
    fakes = Fakes(held=True)
    encoders = encoders_of(fakes, ONE)
    waits = [encoders.expect(submit_of(item_of(seed))) for seed in range(6)]
    until(lambda: len(fakes.asked) == 4)
    encoders.close()
    fakes.go.set()
    for late in waits:
        assert late is not None
        until(late.ready)
    assert all(isinstance(late.error, EngineDead) for late in waits[4:] if late is not None)
    late = encoders.expect(submit_of(item_of(77)))
    assert late is not None
    until(late.ready)
    assert isinstance(late.error, EngineDead)


@pytest.mark.parametrize(
    "given",
    ["ftp://host:1", "host:30000", "http://", "http://host:1/path", "http://u:p@host:1", "http://h:99999", " , "],
)
def test_addresses_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="encoder_urls"):
        addresses([given])


def test_addresses_may_stand_in_one_text_and_once_counts() -> None:
    given = ["http://a:1, https://b", "http://a:1/"]
    assert addresses(given) == ["http://a:1", "https://b"]


def changed(**values: Any) -> bytes:
    return encode(Look(msgspec.structs.replace(item_of(1), **values), FACTS))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\x00", b"\xc1" * 64, msgspec.msgpack.encode({"item": 1}),
        changed(shape=(1, 4, 4, 4)), changed(shape=(1, -4, -4, 3)), changed(shape=(0, 4, 4, 3)), changed(pixels=b""),
        changed(spans=[]), changed(spans=[(0, 0)]), changed(spans=[(-1, 2)]), changed(digest=b"short"),
        changed(scale=[1.0]), changed(features=b"1234", kind="float32"),
    ],
)  # fmt: skip
def test_a_question_that_contradicts_itself_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read_look(body, FACTS)


def test_servers_of_other_models_are_told_what_differs() -> None:
    look = Look(item_of(1), {**FACTS, "dtype": "bfloat16"})
    with pytest.raises(Misfit, match=r"dtype is 'bfloat16' there and 'float32' here"):
        read_look(encode(look), FACTS)
    with pytest.raises(Misfit, match="version 7"):
        read_look(encode(Look(item_of(1), FACTS, version=7)), FACTS)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[dict[str, str]]]]:
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_over_http_the_key_goes_along() -> None:
    with answering(200, b"made") as (url, seen):
        assert Caller("secret")(url, b"body", 4) == b"made"
        assert seen[0]["path"] == "/encode_media" and seen[0]["authorization"] == "Bearer secret"
        with pytest.raises(Lost, match="longer than it can be"):
            Caller(None)(url, b"body", 3)
        assert "authorization" not in seen[1]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, BadRequest, "it is broken"),
        (413, BadRequest, "as large"),
        (401, Lost, "api_key"),
        (403, Lost, "api_key"),
        (404, Lost, "HTTP 404"),
        (409, Lost, "not the one for this model: HTTP 409: it is broken"),
        (500, Lost, "it is broken"),
        (503, Lost, "it is broken"),
        (507, Lost, "it is broken"),
    ],
)
def test_refusals_over_http_say_why(status: int, kind: type[Exception], words: str) -> None:
    body = json.dumps({"error": {"message": "it is broken"}}).encode()
    with answering(status, body) as (url, _), pytest.raises(kind, match=words):
        Caller(None)(url, b"body", 1000)


def test_nobody_at_the_address_is_a_lost_encoder() -> None:
    with answering(200, b"") as (url, _):
        pass
    with pytest.raises(Lost, match="ConnectionRefused"):
        Caller(None)(url, b"body", 10)
