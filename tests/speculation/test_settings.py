"""What is asked of speculation, in SGLang's flags and vLLM's JSON, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

import pytest

from phloem.core.config import Config, SpeculativeConfig
from phloem.core.errors import ConfigError
from phloem.core.speculation import Wanted, wanted
from phloem.speculation import assemble
from phloem.speculation.drafters import DRAFTERS


def read(**values: Any) -> Wanted:
    found = wanted(Config.from_flat(values))
    assemble.check(found)
    return found


def test_nothing_said_is_auto() -> None:
    assert read() == Wanted(drafts=23) and read().algorithm == "auto" and read().rows == 24
    assert read(speculative_algorithm="none").rows == 1


@pytest.mark.parametrize(
    ("said", "name"), [("NGRAM", "ngram"), ("suffix", "suffix"), ("SUFFIX", "suffix"), ("Auto", "auto")]
)
def test_names_are_read_as_others_write_them(said: str, name: str) -> None:
    assert read(speculative_algorithm=said).algorithm == name


def test_the_help_lists_our_names_and_says_which_are_other_engines() -> None:
    """Every drafter there is, and what other names stand for."""
    said = next(one for one in fields(SpeculativeConfig) if one.name == "speculative_algorithm").metadata["help"]
    own, aliases = said.split("Other engines' names", 1)
    assert set(DRAFTERS.names()) | {"auto", "none"} <= set(re.findall(r"\w+", own))
    named = re.findall(r"((?:\w+ and )?\w+) \((\w+)\)", aliases)
    pairs = {(alias, ours) for found, ours in named for alias in found.split(" and ")}
    assert {"standalone", "prompt_lookup", "nextn"} <= {alias for alias, _ in pairs}
    for alias, ours in pairs:
        assert read(speculative_algorithm=alias, speculative_draft_model_path=MODEL[ours]).algorithm == ours


MODEL: dict[str, str | None] = {"draft_model": "somewhere", "ngram": None, "mtp": None}


def test_draft_tokens_count_the_token_before_them() -> None:
    assert read(speculative_num_draft_tokens=12).drafts == 11 and read(speculative_num_steps=5).drafts == 5
    assert read(speculative_num_steps=5, speculative_num_draft_tokens=6).drafts == 5


def test_drafts_of_texts_are_long_where_measured_times_cut_them() -> None:
    assert read(speculative_algorithm="suffix").drafts == read(speculative_config={"method": "ngram"}).drafts == 23
    assert read(speculative_algorithm="suffix", disable_speculative_adaptive=True).drafts == 7
    assert 1 + read(speculative_algorithm="suffix").drafts == assemble.MOST_ROWS


def test_the_other_engines_json_is_read() -> None:
    values = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 3, "prompt_lookup_max": 4}
    found = read(speculative_config=json.dumps(values))
    assert (found.algorithm, found.drafts, found.min_match, found.max_match) == ("ngram", 5, 3, 4)
    assert read(speculative_config={"method": "suffix"}).algorithm == "suffix"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("STANDALONE", "draft_model"),
        ("EAGLE", "eagle"),
        ("EAGLE3", "eagle3"),
        ("NEXTN", "mtp"),
        ("mtp", "mtp"),
    ],
)
def test_models_draft_shorter_chains(said: str, name: str) -> None:
    found = read(speculative_algorithm=said, speculative_draft_model_path="x")
    assert (found.algorithm, found.drafts, found.draft_model) == (name, 5, "x")
    assert read(speculative_config=json.dumps({"method": said, "model": "x", "num_speculative_tokens": 3})).drafts == 3
    assert read(speculative_algorithm="nextn").draft_model is None  # the model's own checkpoint has the layer


HEAD = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": "x"}


def test_a_tree_is_as_deep_as_its_steps_and_as_large_as_its_tokens() -> None:
    found = read(**HEAD, speculative_eagle_topk=4)
    assert (found.topk, found.steps, found.drafts, found.rows) == (4, 5, 7, 8)
    found = read(**HEAD, speculative_eagle_topk=4, speculative_num_steps=3, speculative_num_draft_tokens=16)
    assert (found.topk, found.steps, found.drafts) == (4, 3, 15)
    found = read(**HEAD, speculative_eagle_topk=3, speculative_num_steps=1)
    assert (found.steps, found.drafts) == (1, 3)  # what one step finds
    found = read(**HEAD, speculative_eagle_topk=2, speculative_num_steps=9, speculative_num_draft_tokens=5)
    assert (found.steps, found.drafts) == (4, 4)  # no deeper than it is large
    assert read(**HEAD, speculative_eagle_topk=1, speculative_num_steps=3) == read(**HEAD, speculative_num_steps=3)
    said = json.dumps({"method": "eagle", "model": "x", "num_speculative_tokens": 3})
    found = read(speculative_config=said, speculative_eagle_topk=2)
    assert (found.topk, found.steps, found.drafts) == (2, 3, 7)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"speculative_algorithm": "MEDUSA"},
            "unknown speculative algorithm 'medusa'; known: auto, none, dflash, draft_model, eagle, eagle3, mtp, "
            "ngram, suffix",
        ),
        ({"speculative_algorithm": "EAGLE3"}, "EAGLE3 needs speculative_draft_model_path"),
        ({"speculative_config": '{"method": "eagle"}'}, "eagle needs speculative_draft_model_path"),
        ({"speculative_algorithm": "sufix"}, "did you mean 'suffix'"),
        ({"speculative_num_steps": 5, "speculative_num_draft_tokens": 5}, "verified as 6 tokens"),
        ({"speculative_num_steps": 0}, "0 is not in 1 to 31"),
        ({"speculative_num_draft_tokens": 1}, "0 is not in 1 to 31"),
        ({"speculative_eagle_topk": 4}, "a tree of drafts comes from a model"),
        ({"speculative_eagle_topk": 4, "speculative_algorithm": "suffix"}, "not from suffix"),
        ({**HEAD, "speculative_eagle_topk": 17}, "17 is not in 1 to 16"),
        ({**HEAD, "speculative_eagle_topk": 0}, "0 is not in 1 to 16"),
        ({**HEAD, "speculative_eagle_topk": 2, "speculative_num_steps": 0}, "0 is not in 1 to 31"),
        (
            {**HEAD, "speculative_eagle_topk": 2, "speculative_num_steps": 2, "speculative_num_draft_tokens": 8},
            "find 6 drafts, with the token before them 7",
        ),
        ({"speculative_accept_threshold_single": 0.9}, "only 1.0 is exact"),
        ({"speculative_accept_threshold_acc": 0.5}, "only 1.0 is exact"),
        ({"speculative_algorithm": "suffix", "speculative_draft_model_path": "x"}, "drafts without a model"),
        ({"speculative_algorithm": "STANDALONE"}, "needs speculative_draft_model_path"),
        ({"speculative_config": "{"}, "not JSON"),
        ({"speculative_config": "[1]"}, "must be an object"),
        ({"speculative_config": '{"num_speculative_tokens": 3}'}, "'method' is missing"),
        ({"speculative_config": '{"method": "ngram", "tree": 1}'}, "tree not known here"),
        ({"speculative_config": '{"method": "ngram", "num_speculative_tokens": "3"}'}, "is no int"),
        ({"speculative_config": '{"method": "ngram"}', "speculative_algorithm": "suffix"}, "both say algorithm"),
        ({"speculative_ngram_capacity": -1}, "is not in 0"),
        ({"speculative_algorthm": "suffix"}, "did you mean 'speculative_algorithm'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**values)
    assert reason in caught.value.message
