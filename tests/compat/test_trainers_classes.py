"""The client classes of verl and AReaL, as their wheels have them, against a server.

Their wheels alone are read, not installed: what the classes import of the rest needs Ray and GPUs.

    pip download --no-deps verl==0.9.1 areal==1.0.4 -d build/trainers
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import sys
import types
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from engine_door import http_door
from safetensors.torch import load_file

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build" / "trainers"
HOME = ROOT / "compat" / "phloem-sglang" / "src"
PARAMS: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
pytestmark = pytest.mark.slow


def source(package: str, path: str) -> str:
    """A file of a wheel."""
    found = sorted(WHEELS.glob(f"{package}-*.whl"))
    if not found:
        pytest.skip(f"no wheel of {package}: pip download --no-deps {package} -d {WHEELS}")
    with zipfile.ZipFile(found[-1]) as wheel:
        return wheel.read(path).decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    path = tiny_checkpoint("olmoe", tmp_path_factory.mktemp("model"))
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 2048, "enable_return_routed_experts": True}
    with Engine(model_path=str(path), **settings) as engine, http_door(engine) as url:
        yield url, path


@pytest.fixture
def names() -> Iterator[None]:
    """`import sglang` finds the names of compat/phloem-sglang."""
    sys.path.insert(0, str(HOME))
    yield
    sys.path.remove(str(HOME))
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        del sys.modules[name]
    sys.meta_path[:] = [one for one in sys.meta_path if type(one).__name__ != "_Refusing"]


@pytest.mark.usefixtures("names")
def test_verl_s_adapter_generates_updates_and_gives_memory_back(served: tuple[str, Path], tmp_path: Path) -> None:
    for needed in ("aiohttp", "requests"):
        pytest.importorskip(needed, reason=f"verl's adapter imports {needed}")
    code = tmp_path / "http_server_engine.py"
    code.write_text(source("verl", "verl/workers/rollout/sglang_rollout/http_server_engine.py"))
    spec = importlib.util.spec_from_file_location("verl_http_server_engine", code)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput  # pyright: ignore
    from sglang.srt.utils import MultiprocessingSerializer  # pyright: ignore

    url, path = served
    host, port = url.removeprefix("http://").split(":")
    adapter = module.HttpServerAdapter(launch_server=False, model_path=str(path), host=host, port=int(port))
    answer = adapter.generate(input_ids=[5, 6, 7], sampling_params=PARAMS, return_logprob=True)
    assert len(answer["output_ids"]) == len(answer["meta_info"]["output_token_logprobs"]) == 6
    other = tiny_checkpoint("olmoe", tmp_path / "other", seed=9)
    tensors = list(load_file(other / "model.safetensors").items())
    request = UpdateWeightsFromTensorReqInput([MultiprocessingSerializer.serialize(tensors)], flush_cache=True)
    assert adapter.update_weights_from_tensor(request)["success"]
    assert adapter.generate(input_ids=[5, 6, 7], sampling_params=PARAMS)["output_ids"] != answer["output_ids"]
    httpx.post(f"{url}/update_weights_from_disk", json={"model_path": str(path)}).raise_for_status()
    adapter.flush_cache()
    assert adapter.release_memory_occupation(["kv_cache", "weights"])["success"]
    assert adapter.resume_memory_occupation(["weights", "kv_cache"])["success"]
    assert adapter.abort_request(abort_all=True)["success"]
    assert adapter.generate(input_ids=[5, 6, 7], sampling_params=PARAMS)["output_ids"] == answer["output_ids"]


@dataclass
class Holder:
    """Stands in for AReaL's dataclasses: holds what it is given."""

    endpoint: str = ""
    payload: dict[str, Any] = field(default_factory=dict)
    method: str = "POST"
    requests: list[Any] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    stop_reason: str = ""
    routed_experts: Any = None
    best_effort: bool = False


def areal_backend() -> Any:
    """AReaL's `SGLangBackend`: the class's own code, without the module around it."""
    tree = ast.parse(source("areal", "areal/engine/sglang_remote.py"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SGLangBackend")
    flags = ast.parse("from __future__ import annotations").body
    names: dict[str, Any] = {
        "np": np, "pybase64": base64, "HttpRequest": Holder, "HttpGenerationResult": Holder,
        "WeightUpdateRequests": Holder, "format_host_for_url": str,
        "current_platform": types.SimpleNamespace(communication_backend="gloo"),
        "get_versioned_lora_name": lambda name, version: f"{name}-v{version}",
    }  # fmt: skip
    exec(compile(ast.Module([*flags, found], []), "sglang_remote.py", "exec"), names)
    return names["SGLangBackend"]()


def test_areal_s_requests_are_answered_as_it_reads_them(served: tuple[str, Path]) -> None:
    backend, (url, path) = areal_backend(), served
    config = types.SimpleNamespace(
        stop_token_ids=[], stop=None, use_beam_search=False, top_p=1.0, top_k=-1, max_new_tokens=6, greedy=False,
        temperature=1.0, ignore_eos=True, skip_special_tokens=True, frequency_penalty=0.0, lora_name="",
    )  # fmt: skip
    asked = types.SimpleNamespace(
        gconfig=config, input_ids=[5, 6, 7, 8], image_data=[], metadata={"return_routed_experts": True}
    )
    with httpx.Client(base_url=url, timeout=60) as http:

        def send(request: Any) -> Any:
            answer = http.request(request.method, request.endpoint, json=request.payload or {})
            assert answer.status_code == 200, answer.text
            return answer.json() if answer.content else None

        found = backend.parse_generation_response(send(backend.build_generation_request(asked, False, 0)))
        assert len(found.output_tokens) == len(found.output_logprobs) == 6 and found.stop_reason == "length"
        assert found.routed_experts.shape[0] == 4 + 6 - 1
        text = [5, 6, 7, 8, *found.output_tokens]
        scored = backend.parse_score_response(send(backend.build_score_request(text, 6, False, 0)), 6)
        assert max(abs(a - b) for a, b in zip(scored, found.output_logprobs, strict=True)) < 1e-4
        send(backend.get_pause_request())
        meta = types.SimpleNamespace(use_lora=False, path=path)
        for request in backend.build_disk_weight_update_requests(meta).requests:
            assert send(request)["success"]
        send(backend.get_resume_request())
        health = backend.get_health_check_request()
        assert http.request(health.method, health.endpoint).status_code == 200
