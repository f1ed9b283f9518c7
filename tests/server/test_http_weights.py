"""A weight is read over HTTP and by `Engine` with steps in flight: as the checkpoint has it, and nobody notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from engine_door import http_door
from safetensors.numpy import load_file

from phloem import Engine
from phloem.core.errors import PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

LONG: dict[str, Any] = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """In bfloat16 native tables replay recorded steps, in float32 steps run eagerly."""
    with Engine(
        model_path=str(model), dtype=request.param, kv_cache_dtype=request.param, max_total_tokens=4096
    ) as found:
        yield found


def close(found: Any, want: np.ndarray[Any, Any]) -> bool:
    return np.shape(found) == want.shape and np.allclose(found, want, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_weights_are_those_of_the_checkpoint_while_steps_run(engine: Engine, model: Path) -> None:
    stored = load_file(model / "model.safetensors")
    alone: Any = engine.generate("hello there", LONG)
    stream: Any = engine.generate("hello there", LONG, stream=True)
    first = last = next(stream)
    for name in stored:  # an event may bring several tokens: perhaps there are fewer than weights
        last = next(stream, last)
        assert close(engine.get_weights_by_name(name), stored[name][:100]), name
        assert close(engine.get_weights_by_name(name, 3), stored[name][:3]), name
    for event in stream:
        last = event
    assert last["output_ids"] == alone["output_ids"]
    assert len(first["output_ids"]) < len(alone["output_ids"]), "the first were read while it ran"
    with pytest.raises(PhloemError, match="no weight is called 'model'"):
        engine.get_weights_by_name("model")


@pytest.mark.slow
def test_over_http_the_answer_is_the_list_itself(engine: Engine, model: Path) -> None:
    stored, name = load_file(model / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    with http_door(engine) as url, httpx.Client(base_url=url, timeout=60) as http:
        alone = http.post("/generate", json={"text": "hello", "sampling_params": LONG}).json()
        body = {"text": "hello", "sampling_params": LONG, "stream": True}
        with http.stream("POST", "/generate", json=body) as running, httpx.Client(base_url=url, timeout=60) as other:
            lines = (line for line in running.iter_lines() if line.startswith("data: {"))
            next(lines)
            found = other.request("GET", "/get_weights_by_name", json={"name": name, "truncate_size": 5})
            assert close(found.json(), stored[name][:5])
            found = other.post("/get_weights_by_name", json={"name": "model.norm.weight"})
            assert close(found.json(), stored["model.norm.weight"])
            *_, last = lines
        assert httpx.Response(200, content=last.removeprefix("data: ")).json()["output_ids"] == alone["output_ids"]
        refused = http.get("/get_weights_by_name", params={"name": "x"})
        assert refused.status_code == 400 and "no weight is called 'x'" in refused.text
