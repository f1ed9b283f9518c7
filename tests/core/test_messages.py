"""What travels to an engine, and what cannot."""

from __future__ import annotations

import pytest

from phloem.core.errors import BadRequest
from phloem.core.messages import Control, decode_to_engine, encode
from phloem.grammar.schema.numbers import Rounded


def test_numbers_that_know_how_they_were_written_travel_as_floats() -> None:
    sent = Control(id="a", name="load", args={"config": {"alpha": Rounded(1e308, "1e308")}})
    assert decode_to_engine(encode(sent)) == Control(id="a", name="load", args={"config": {"alpha": 1e308}})


def test_integers_of_more_than_64_bits_are_refused_and_not_a_failure() -> None:
    with pytest.raises(BadRequest, match="more than 64 bits"):
        encode(Control(id="a", name="load", args={"config": {"alpha": 10**30}}))
