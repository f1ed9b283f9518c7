"""Facts of families, read from their files' text."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phloem.checkpoint.families import FACTS, FAMILIES, facts_of, family, gguf_families
from phloem.core.errors import ConfigError


@pytest.mark.parametrize("name", FAMILIES.names())
def test_facts_that_are_read_are_those_that_run(name: str) -> None:
    module, found = FAMILIES.module(name), facts_of(name)
    assert found == {fact: getattr(module, fact) for fact in FACTS if hasattr(module, fact)}
    assert family(name).name == name  # and its GGUF facts have no key too many


def test_facts_may_come_from_another_familys_file() -> None:
    assert family("gemma3").defaults == family("gemma3_text").defaults != {}


def test_architectures_have_one_family_each() -> None:
    known = [facts for name in FAMILIES.names() if (facts := family(name).gguf) is not None]
    assert len(gguf_families()) == sum(1 + len(facts.also) for facts in known)
    assert gguf_families()["qwen3moe"].name == "qwen3_moe"


def test_families_of_one_architecture_are_found_without_reading_the_others() -> None:
    every = gguf_families()
    names = {item.name: {item.gguf.architecture, *item.gguf.also} for item in every.values() if item.gguf is not None}
    for arch in {arch for several in names.values() for arch in several}:
        wanted, found = {key for key, item in every.items() if arch in names[item.name]}, gguf_families(arch)
        assert wanted and {key: every[key] for key in wanted} == {key: found[key] for key in wanted}
    assert len(gguf_families("qwen3moe")) < 10 and gguf_families("no such one") == {}


def test_an_unknown_family_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model type 'lama' \(did you mean 'llama'\?\); known: .*qwen3"):
        family("lama")


def test_facts_cost_no_torch_and_no_layer() -> None:
    code = (
        "import sys; from phloem.checkpoint.families import FAMILIES, family\n"
        "[family(name) for name in FAMILIES.names()]\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers') or 'phloem.layers' in m]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
