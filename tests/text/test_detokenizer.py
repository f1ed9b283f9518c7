"""Streams: any split of the ids gives the same text, the same stop, and the same number of ids."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.text.detokenizer import StreamDecoder, _StopStrings
from phloem.text.tokenizer import Tokenizer, byte_alphabet


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens, some words, and a special token: ids 0..255 are the bytes."""
    spelled = {value: char for char, value in byte_alphabet().items()}
    words = ["ab", "abc", "Ġthe", "stop", "</s", "ðŁĻ"]
    vocab = {spelled[value]: value for value in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


def piece_tokenizer() -> Tokenizer:
    """SentencePiece: 256 byte tokens, then pieces; one leading space is stripped."""
    pieces = ["<unk>", "</s>", "▁", "▁the", "a", "b", "世", "▁stop", "s", "🙂"]
    vocab = {f"<0x{value:02X}>": value for value in range(256)} | {piece: 256 + i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def word_tokenizer() -> Tokenizer:
    """A decoder of neither kind: words joined by the WordPiece rules."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "hello", "world", "##s", "un", "##do", ",", "."])}
    backend = Backend(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend, {})


TOKENIZERS = {"bytes": byte_tokenizer(), "pieces": piece_tokenizer(), "words": word_tokenizer()}
UTF8 = st.text(alphabet="ab世🙂 é\ns", max_size=30).map(lambda text: list(text.encode()))
IDS = {
    "bytes": st.lists(st.integers(0, 262), max_size=40) | UTF8,
    "pieces": st.lists(st.integers(0, 265) | st.integers(256, 265), max_size=40) | UTF8,
    "words": st.lists(st.integers(0, 7), max_size=30),
}
STOPS = st.lists(st.text(alphabet="abcst </\ufffd世", min_size=1, max_size=5), max_size=4)


def run(tokenizer: Tokenizer, ids: list[int], cuts: list[int], **params: object) -> tuple[str, str | None, int]:
    """Push `ids` cut at these places; text, stop and ids that count."""
    decoder = StreamDecoder(tokenizer, SamplingParams(**params))  # type: ignore[arg-type]
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    text, kept, stop = "", 0, None
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        piece = decoder.push(ids[begin:end], last=number == len(edges) - 2)
        assert piece.keep <= end - begin
        if stop is not None:
            assert piece.text == "" and piece.keep == 0
        text, kept, stop = text + piece.text, kept + piece.keep, piece.stop
    return text, stop, kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TOKENIZERS))
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(IDS[kind])
    skip = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=10))
    text, stop, kept = run(tokenizer, ids, cuts, skip_special_tokens=skip)
    assert stop is None and kept == len(ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def first_stop(text_after: list[str], stops: list[str]) -> tuple[int, int, str] | None:
    """The rule, written plainly: the first prefix of the text that ends in a stop; of several the longest."""
    whole = text_after[-1] if text_after else ""
    for end in range(1, len(whole) + 1):
        ending = [stop for stop in stops if whole[:end].endswith(stop)]
        if ending:
            best = max(ending, key=len)
            return end - len(best), end, best
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_stop_strings_whatever_the_chunks(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids, stops = data.draw(IDS[kind]), data.draw(STOPS)
    trim = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=10))
    params = {"stop": stops, "no_stop_trim": not trim}
    text, stop, kept = run(tokenizer, ids, cuts, **params)
    assert (text, stop, kept) == run(tokenizer, ids, list(range(len(ids))), **params)
    decoder = tokenizer.stream(True)
    grown = [""]
    for token in ids:
        grown.append(grown[-1] + decoder.push(token))
    grown.append(grown[-1] + decoder.finish())
    found = first_stop(grown, stops)
    if found is None:
        assert (text, stop, kept) == (grown[-1], None, len(ids))
    else:
        start, end, which = found
        assert stop == which and text == grown[-1][: start if trim else end]
        assert kept == min(len(ids), next(i for i, so_far in enumerate(grown) if len(so_far) >= end))


def test_nothing_that_may_be_a_stop_is_sent_early() -> None:
    decoder = StreamDecoder(TOKENIZERS["bytes"], SamplingParams(stop=["stop"]))
    sent = [decoder.push([byte]).text for byte in b"a sto sts"]
    assert sent == ["a", " ", "", "", "", "sto ", "", "", "st"]
    assert decoder.push(list(b"top!")).stop == "stop"


def test_what_is_held_comes_at_the_end() -> None:
    decoder = StreamDecoder(TOKENIZERS["bytes"], SamplingParams(stop=["stop"]))
    assert decoder.push(list("x🙂".encode()) + list(b"sto")).text == "x🙂"
    assert decoder.push([], last=True).text == "sto"
    decoder = StreamDecoder(TOKENIZERS["bytes"], SamplingParams())
    assert decoder.push(list("🙂".encode()[:3])).text == ""
    assert decoder.push([], last=True).text == "\ufffd"


def test_earliest_stop_wins_and_the_rest_does_not_count() -> None:
    piece = StreamDecoder(TOKENIZERS["bytes"], SamplingParams(stop=["the", "abc"])).push([120, 257, 258, 97])
    assert (piece.text, piece.stop, piece.keep) == ("x", "abc", 2)


def test_special_tokens_are_shown_on_request() -> None:
    assert run(TOKENIZERS["bytes"], [97, 262], [], skip_special_tokens=False)[0] == "a<|end|>"
    assert run(TOKENIZERS["bytes"], [97, 262], [])[0] == "a"


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    ids=UTF8,
    cuts=st.lists(st.integers(0, 40), max_size=8),
    pattern=st.sampled_from(["a+b", "s.*?b", "[0-9]{2,}|世", "(?i)S\\s", "b$", "^a", "🙂"]),
    trim=st.booleans(),
)
def test_stop_regex_whatever_the_chunks(ids: list[int], cuts: list[int], pattern: str, trim: bool) -> None:
    params = {"stop_regex": [pattern], "no_stop_trim": not trim}
    assert run(TOKENIZERS["bytes"], ids, cuts, **params) == run(TOKENIZERS["bytes"], ids, [], **params)


def test_stop_regex_spanning_tokens() -> None:
    ids = list(b"price 12 USD, then")
    assert run(TOKENIZERS["bytes"], ids, [4, 8], stop_regex=[r"\d+ [A-Z]{3}"])[:2] == ("price ", r"\d+ [A-Z]{3}")
    text, _, kept = run(TOKENIZERS["bytes"], ids, [], stop_regex=[r"\d+ [A-Z]{3}"], no_stop_trim=True)
    assert text == "price 12 USD" and kept == len("price 12 USD")
    assert run(TOKENIZERS["bytes"], ids, [], stop_regex=["^rice"])[1] is None


@pytest.mark.parametrize("pattern", ["(", "[a", "", "x" * 2000, "a*", "(?P<a", "\\"])
def test_bad_stop_regex_is_refused(pattern: str) -> None:
    with pytest.raises(BadRequest, match="stop_regex"):
        StreamDecoder(TOKENIZERS["bytes"], SamplingParams(stop_regex=[pattern]))


@pytest.mark.slow
def test_catastrophic_stop_regex_fails_its_request_in_time() -> None:
    decoder = StreamDecoder(TOKENIZERS["bytes"], SamplingParams(stop_regex=["(x+x+)+y"]))
    started = time.monotonic()
    with pytest.raises(BadRequest, match="too long"):
        for _ in range(400):
            decoder.push([120])
    assert time.monotonic() - started < 10


def test_stop_strings_of_any_length_cost_little_per_character() -> None:
    stops = _StopStrings(["a" * 200_000, "a" * 100_000 + "b", "ab" * 1000])
    started = time.process_time()
    for _ in range(50):
        assert stops.feed("a" * 200) is None
    assert time.process_time() - started < 2
    assert stops.pending == 10_000


def test_long_answers_stay_linear() -> None:
    decoder = StreamDecoder(TOKENIZERS["bytes"], SamplingParams(stop=["zzz", "stop"]))
    started = time.process_time()
    for _ in range(20_000):
        decoder.push([97])
    assert time.process_time() - started < 3
