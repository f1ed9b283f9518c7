"""Configuration: errors that name the field, the value and the nearest spelling."""

import pytest

from phloem.cli._options import parse
from phloem.core.config import Config, flat_fields
from phloem.core.errors import ConfigError
from phloem.core.ranges import parse_bytes


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prot": 1}, ["'prot'", "'port'"]),
        ({"port": 70000}, ["port", "70000"]),
        ({"dtype": "bfloat17"}, ["dtype", "bfloat17", "float32", "did you mean 'bfloat16'"]),
        ({"page_size": 0}, ["page_size", "0"]),
        ({"watchdog_timeout": 1e13}, ["watchdog_timeout", "10000000 seconds"]),
        ({"mem_fraction_static": 1.5}, ["mem_fraction_static"]),
        ({"kv_memory": "much"}, ["kv_memory", "much", "512MiB"]),
        ({"port": "many"}, ["port", "many"]),
    ],
)
def test_error_explains(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(values)
    for word in words:
        assert word in caught.value.message


def test_flat_round_trip_and_spellings() -> None:
    config = Config.from_flat({"page-size": "32", "schedule_policy": "lpm"})
    assert config.cache.page_size == 32
    assert Config.from_flat(config.flat()) == config
    assert len(flat_fields()) <= 161


def test_bytes() -> None:
    assert parse_bytes("1.5GiB") == 1610612736
    assert parse_bytes("100 MB") == 100_000_000


def test_code_of_a_checkpoint_is_run_only_where_somebody_says_so() -> None:
    assert Config.from_flat({}).model.trust_remote_code is False
    assert Config.from_flat({"trust_remote_code": True}).model.trust_remote_code is True


def test_settings_answer_to_the_names_of_other_engines() -> None:
    config = Config.from_flat({"disable-piecewise-cuda-graph": True, "piecewise_cuda_graph_max_tokens": 64})
    assert config.runtime.disable_piecewise_graph and config.runtime.piecewise_graph_max_tokens == 64
    assert "piecewise_cuda_graph_max_tokens" not in config.flat()
    parsed, _ = parse("serve", ["m", "--disable-piecewise-cuda-graph", "--piecewise-cuda-graph-max-tokens", "7"])
    assert parsed.runtime.disable_piecewise_graph and parsed.runtime.piecewise_graph_max_tokens == 7
