"""`phloem bench programs`: the examples as programs, and the runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_door import http_door

from phloem import Engine
from phloem.bench import programs
from phloem.core.errors import BadRequest
from phloem.lang.backends.engine import EngineBackend
from phloem.lang.backends.openai import OpenAI
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # The tokenizer of a tiny model makes about one token of a character: prompts of examples are long for it.
    model = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=16384)
    with Engine(model_path=str(model), dtype="float32", max_total_tokens=65536) as found:
        yield found


@pytest.mark.slow
def test_every_example_is_a_program(engine: Engine) -> None:
    """What a model with random weights writes must break none of them."""
    backend = EngineBackend(engine)
    found = programs.load(programs.Options())
    assert len(found) == 9
    for name, module in found.items():
        assert module.__doc__ and len(module.cases(3, 1)) == 3 and module.cases(3, 1) == module.cases(3, 1)
        if name in ("summaries", "long_qa"):
            continue  # the longest prompts; they have nothing that could break
        states = module.program.run_batch(module.cases(1, 1), backend=backend, temperature=0, ignore_eos=False)
        assert [state.error() for state in states] == [None], name
        assert module.show(states[0])


@pytest.mark.slow
def test_runs_are_compared(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forked.py").write_text(
        "from phloem import lang\n"
        "@lang.function\n"
        "def program(s, number):\n"
        "    s += 'The quick brown fox jumps over the lazy dog. ' * 12 + str(number)\n"
        "    forks = s.fork(3)\n"
        "    forks += lambda i: f' {i}:' + lang.gen('x', max_tokens=4, ignore_eos=True)\n"
        "    forks.join()\n"
        "    s += lang.select('y', ['a', 'b'])\n"
        "def cases(count, seed):\n"
        "    return [{'number': i} for i in range(count)]\n"
    )
    options = programs.Options(folder=str(tmp_path), count=2)
    modules = programs.load(options)
    records = [
        programs.measure(
            "forked", modules["forked"], how, EngineBackend(engine, sharing=how == programs.SHARED), options
        )
        for how in (programs.SHARED, programs.PLAIN)
    ]
    with http_door(engine) as url:
        other = OpenAI("default", False, EngineBackend(engine).format, api_key="none", base_url=f"{url}/v1")
        records.append(programs.measure("forked", modules["forked"], programs.OTHER, other, options))
        other.shutdown()
    programs.compare(records)
    shared, plain, other_server = records
    assert other_server["failed"] == 0 and other_server["output_tokens"] >= 24 and other_server["same_texts"] == 2
    assert shared["failed"] == plain["failed"] == 0
    assert shared["output_tokens"] == plain["output_tokens"] == 24
    assert plain["cache_hit_rate"] == 0.0 and plain["computed_prompt_tokens"] == plain["prompt_tokens"]
    assert shared["cache_hit_rate"] > 0.7 and shared["computed_prompt_tokens"] < plain["computed_prompt_tokens"] / 3
    assert plain["speedup"] == 1.0 and shared["same_texts"] == 2
    programs.show(records, "tiny")
    shown = capsys.readouterr().out
    assert "shared, parallel" in shown and "uncached, sequential" in shown and "hit rate" in shown


def test_wrong_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="few_shot"):
        programs.load(programs.Options(programs="fewshot"))
    with pytest.raises(BadRequest, match="no programs"):
        programs.load(programs.Options(folder=str(tmp_path)))
