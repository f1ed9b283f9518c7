"""Sampling parameters: what is refused, and that the refusal names the field."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams

VOCAB = 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("top_k", -2),
        ("min_p", -1.0),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.5),
        ("max_new_tokens", -1),
        ("n", 0),
        ("stop", [""]),
        ("stop_token_ids", [VOCAB]),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"100": 1.0}),
    ],
)
def test_refusal_names_the_field(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**{field: value}).validate(VOCAB)
    assert caught.value.param == field
    assert field in caught.value.message


def test_two_constraints_are_refused() -> None:
    with pytest.raises(BadRequest, match="regex and ebnf"):
        SamplingParams(regex="a", ebnf="root ::= a").validate(VOCAB)


def test_defaults_are_valid_and_travel() -> None:
    params = SamplingParams()
    params.validate(VOCAB)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@given(st.floats(), st.floats(), st.integers())
def test_validate_raises_nothing_else(temperature: float, top_p: float, top_k: int) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    try:
        params.validate(VOCAB)
    except BadRequest:
        return
    assert temperature >= 0 and 0 < top_p <= 1 and (top_k == -1 or top_k >= 1)
