"""The `sglang` names of compat/phloem-sglang: all that callers import, over engines and servers that run."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import logging
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from phloem import Engine as PhloemEngine
from phloem.core.config import Config
from phloem.core.errors import ConfigError, PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

HOME = Path(__file__).parents[2] / "compat" / "phloem-sglang" / "src"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
SIZES: dict[str, Any] = {"max_total_tokens": 2048, "context_length": 256, "dtype": "float32", "log_level": "error"}
# Module -> the names that verl, slime, Miles and AReaL import of it.
NAMES = {
    "sglang": "__version__ Engine ServerArgs",
    "sglang.srt.server_args": "ServerArgs PortArgs prepare_server_args",
    "sglang.srt.entrypoints.engine": "Engine _set_envs_and_config init_tokenizer_manager run_scheduler_process "
    "run_detokenizer_process",
    "sglang.srt.entrypoints.http_server": "launch_server app Engine _launch_subprocesses _GlobalState set_global_state "
    "_setup_and_run_http_server _execute_server_warmup ServerArgs",
    "sglang.srt.entrypoints.EngineBase": "EngineBase",
    "sglang.srt.managers.io_struct": "GenerateReqInput UpdateWeightsFromTensorReqInput "
    "LoadLoRAAdapterFromTensorsReqInput PauseGenerationReqInput ContinueGenerationReqInput "
    "ReleaseMemoryOccupationReqInput ResumeMemoryOccupationReqInput Function Tool RpcReqInput RpcReqOutput "
    "UpdateWeightsFromIPCReqInput LoadLoRAAdapterFromDistributedReqInput",
    "sglang.srt.managers.tokenizer_manager": "ServerStatus TokenizerManager",
    "sglang.srt.utils": "MultiprocessingSerializer kill_process_tree assert_pkg_version is_cuda is_hip "
    "set_prometheus_multiproc_dir set_ulimit get_bool_env_var add_prometheus_middleware",
    "sglang.srt.utils.common": "kill_process_tree assert_pkg_version add_prometheus_middleware",
    "sglang.srt.utils.patch_torch": "monkey_patch_torch_reductions",
    "sglang.srt.patch_torch": "monkey_patch_torch_reductions",
    "sglang.srt.weight_sync.utils": "update_weights _preprocess_tensor_for_update_weights",
    "sglang.srt.weight_sync.tensor_bucket": "FlattenedTensorBucket FlattenedTensorMetadata",
    "sglang.srt.model_executor.model_runner": "LocalSerializedTensor FlattenedTensorBucket",
    "sglang.srt.model_executor.model_runner_components.weight_updater": "LocalSerializedTensor FlattenedTensorBucket",
    "sglang.srt.constants": "GPU_MEMORY_TYPE_WEIGHTS GPU_MEMORY_TYPE_KV_CACHE GPU_MEMORY_TYPE_CUDA_GRAPH",
    "sglang.srt.function_call.function_call_parser": "FunctionCallParser",
    "sglang.srt.function_call.core_types": "ToolCallItem",
    "sglang.srt.parser.reasoning_parser": "ReasoningParser",
    "sglang.srt.entrypoints.openai.protocol": "Tool Function ChatCompletionRequest",
    "sglang.srt.layers.moe.routed_experts_capturer": "extract_routed_experts_from_meta_info",
    "sglang.srt.state_capturer.routed_experts": "extract_routed_experts_from_meta_info",
    "sglang.srt.batch_invariant_ops": "enable_batch_invariant_mode is_batch_invariant_mode_enabled",
}


@pytest.fixture(scope="module", autouse=True)
def names() -> Iterator[None]:
    """The distribution on the path, as an installation would have it."""
    sys.path.insert(0, str(HOME))
    yield
    sys.path.remove(str(HOME))
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        del sys.modules[name]
    sys.meta_path[:] = [one for one in sys.meta_path if type(one).__name__ != "_Refusing"]


def of(module: str) -> Any:
    return importlib.import_module(f"sglang.srt.{module}")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, torch.Tensor]]:
    return list(
        load_file(tiny_checkpoint("llama", tmp_path_factory.mktemp("new"), seed=9) / "model.safetensors").items()
    )


@pytest.fixture(scope="module")
def engine(old: Path) -> Iterator[Any]:
    with importlib.import_module("sglang").Engine(model_path=str(old), **SIZES) as found:
        yield found


@pytest.mark.slow
def test_every_name_that_callers_import_is_there() -> None:
    for module, names in NAMES.items():
        found = importlib.import_module(module)
        assert [name for name in names.split() if not hasattr(found, name)] == [], module


def test_what_is_not_there_is_refused_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"phloem-sglang has no module sglang\.srt\.models"):
        importlib.import_module("sglang.srt.models.llama")
    with caplog.at_level(logging.WARNING, "sglang"), pytest.raises(ImportError):
        exec("from sglang.srt.utils import broadcast_pyobj")
    assert "phloem-sglang has no sglang.srt.utils.broadcast_pyobj" in caplog.text
    with pytest.raises(NotImplementedError, match="operators of the caller's own torch"):
        of("batch_invariant_ops").enable_batch_invariant_mode()


def test_another_sglang_beside_it_is_refused(tmp_path: Path) -> None:
    installed = tmp_path / "installed" / "sglang-0.5.23.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Name: sglang\nVersion: 0.5.23\n")
    lying = tmp_path / "lying" / "sglang"
    lying.mkdir(parents=True)
    (lying / "__init__.py").write_text("")
    for place in (installed.parent, lying.parent):
        env = {**os.environ, "PYTHONPATH": f"{HOME}{os.pathsep}{place}"}
        done = subprocess.run([sys.executable, "-c", "import sglang"], env=env, capture_output=True, text=True)
        assert done.returncode and "another sglang" in done.stderr and "pip uninstall" in done.stderr, done.stderr


def test_settings_are_honoured_left_out_with_a_line_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    args_of = of("server_args").ServerArgs
    args = args_of(model_path="m", dtype="half", log_level="WARN", attention_backend="fa3", enable_memory_saver=True)
    with caplog.at_level(logging.INFO, "sglang"):
        found = args.settings()
    assert found == {"logprobs_mode": "temperature", "model_path": "m", "dtype": "float16", "log_level": "warning"}
    assert "attention_backend='fa3' is left out" in caplog.text and "enable_memory_saver" in caplog.text
    for name, value in (
        ("custom_weight_loader", ["a.b"]),
        ("encoder_only", True),
    ):
        with pytest.raises(ConfigError, match=name):
            args_of("m", **{name: value}).settings()
    with pytest.raises(ConfigError, match="tp_sise"):
        importlib.import_module("sglang").Engine(model_path="m", tp_sise=2)


def test_server_args_come_from_a_command_line_and_are_a_dataclass() -> None:
    module = of("server_args")
    parser = argparse.ArgumentParser()
    module.ServerArgs.add_cli_args(parser)
    given = ["--model-path", "m", "--tp", "2", "--skip-tokenizer-init", "--mem-fraction-static", "0.5", "--host", "::"]
    args = module.ServerArgs.from_cli_args(parser.parse_args(given))
    assert (args.tp_size, args.skip_tokenizer_init, args.mem_fraction_static) == (2, True, 0.5)
    assert args.url() == "http://[::1]:30000" and args.settings()["tp_size"] == 2
    more = ["--dp", "2", "--disaggregation-mode", "decode", "--kt-num-gpu-experts", "4", "--kt-threadpool-count", "1"]
    more += ["--tp", "2", "--ep-size", "2", "--enable-eplb", "--disaggregation-transfer-backend", "nixl"]
    found = module.prepare_server_args(["--model-path", "m", *more]).settings()
    assert (found["dp_size"], found["disaggregation_mode"], found["kt_num_gpu_experts"]) == (2, "decode", 4)
    assert found["enable_eplb"] is True and found["disaggregation_transfer_backend"] == "nixl"
    Config.from_flat(found)
    # As AReaL writes the command: every setting of its own that is not None or False.
    areal = "--chunked-prefill-size -1 --torch-compile-max-bs 32 --triton-attention-num-kv-splits 8 --enable-metrics "
    areal += "--num-continuous-decode-steps 1 --attention-backend fa3 --schedule-policy lpm --log-requests-level 0 "
    areal += "--max-prefill-tokens 32768 --cpu-offload-gb 0 --decode-log-interval 1 --dist-init-addr localhost:1"
    Config.from_flat(module.prepare_server_args(["--model-path", "m", *areal.split()]).settings())
    with pytest.raises(TypeError, match="phloem-sglang has no setting enable_warp, speed"):
        module.ServerArgs(model_path="m", speed=1, enable_warp=True)
    assert pickle.loads(pickle.dumps(args)) == args
    names = {spec.name for spec in dataclasses.fields(args)}
    asked = "base_gpu_id json_model_override_args enable_return_routed_experts disaggregation_mode load_balance_method"
    assert set(asked.split()) <= names


def test_every_setting_that_is_honoured_is_one_of_ours_and_the_page_has_the_table() -> None:
    from phloem.core.config import flat_fields

    settings = of("_settings")
    assert [one for one in settings.SETTINGS if one.fate == "=" and one.text not in flat_fields()] == []
    page = HOME.parents[2] / "docs" / "phloem-sglang.md"
    assert settings.table() in page.read_text(), "python scripts/sglang_settings.py writes it"


@pytest.mark.slow
def test_an_engine_answers_as_sglang_s_and_updates_from_what_senders_make(engine: Any, new: Any) -> None:
    before = engine.generate("hello", GREEDY, return_logprob=True)
    assert len(before["meta_info"]["output_token_logprobs"]) == len(before["output_ids"]) == 8
    serialise, bucket_of = of("utils").MultiprocessingSerializer, of("weight_sync.tensor_bucket").FlattenedTensorBucket
    bucket = bucket_of(named_tensors=new)
    body = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    request_of = of("managers.io_struct").UpdateWeightsFromTensorReqInput
    texts = [serialise.serialize(body, output_str=True)]
    asked = request_of(serialized_named_tensors=texts, load_format="flattened_bucket", weight_version="7")
    assert asyncio.run(engine.tokenizer_manager.update_weights_from_tensor(asked))[0]
    after = engine.generate("hello", GREEDY)
    assert after["output_ids"] != before["output_ids"] and after["meta_info"]["weight_version"] == "7"
    ok, why = asyncio.run(engine.tokenizer_manager.update_weights_from_tensor(request_of([b"x"])))
    assert not ok and "no pickle" in why
    with pytest.raises(PhloemError, match="enable-lora"):
        engine.load_lora_adapter_from_tensors("a", {}, {"peft_type": "LORA", "r": 1})


@pytest.mark.slow
def test_an_adapter_goes_to_an_engine_as_verl_sends_it(old: Path) -> None:
    sglang, ask = importlib.import_module("sglang"), of("managers.io_struct")
    serialise = of("utils").MultiprocessingSerializer
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    held = {f"{name}_A.weight": torch.ones(2, 32), f"{name}_B.weight": torch.ones(64, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "target_modules": ["q_proj"]}
    args = {**SIZES, "enable_lora": True, "max_lora_rank": 4, "lora_target_modules": ["q_proj"]}
    with sglang.Engine(model_path=str(old), **args) as engine:
        manager = engine.tokenizer_manager
        request_of = ask.LoadLoRAAdapterFromTensorsReqInput
        texts = [serialise.serialize(held)]
        asked = request_of(lora_name="policy", config_dict=config, serialized_named_tensors=texts)
        done = asyncio.run(manager.load_lora_adapter_from_tensors(asked))
        assert done.success and done.loaded_adapters == {"policy": "__tensor__/policy"}
        text = serialise.serialize(held, output_str=True)
        asked = request_of(lora_name="older", config_dict=config, serialized_tensors=text)
        assert asyncio.run(manager.load_lora_adapter_from_tensors(asked)).success
        answers = [engine.generate("hello", GREEDY, lora_path=one)["output_ids"] for one in ("policy", "older", None)]
        assert answers[0] == answers[1] != answers[2]
        for wrong in ({"added_tokens_config": {"a": 5}}, {"serialized_named_tensors": [b"x"]}, {"config_dict": {}}):
            fields = {"lora_name": "wrong", "config_dict": config, "serialized_named_tensors": texts, **wrong}
            done = asyncio.run(manager.load_lora_adapter_from_tensors(request_of(**fields)))
            assert not done.success and done.error_message


def test_what_was_serialised_comes_back_and_a_hostile_payload_does_not() -> None:
    serialise, bucket_of = of("utils").MultiprocessingSerializer, of("weight_sync.tensor_bucket").FlattenedTensorBucket
    sent = [("a", torch.arange(5)[1:].to(torch.bfloat16)), ("b", torch.ones(2, 3)), ("c", torch.zeros(0, 4))]
    back = serialise.deserialize(serialise.serialize(sent, output_str=True))
    assert [name for name, _ in back] == ["a", "b", "c"]
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(sent, back, strict=True))
    assert all(
        torch.equal(one, other) and one.dtype == other.dtype
        for (_, one), (_, other) in zip(sent, bucket_of(named_tensors=sent).reconstruct_tensors(), strict=True)
    )
    with pytest.raises(PhloemError, match="posix"):
        serialise.deserialize(
            b"cposix\nsystem\n(S'true'\ntR.".replace(b"cposix\nsystem\n", b"\x8c\x05posix\x8c\x06system\x93")
        )
    with pytest.raises(ValueError, match="named_tensors"):
        bucket_of()


@pytest.mark.slow
def test_a_tokenizer_manager_generates_pauses_and_gives_memory_back(engine: Any) -> None:
    manager, io = engine.tokenizer_manager, of("managers.io_struct")
    manager.server_status = of("managers.tokenizer_manager").ServerStatus.Up
    tags = [of("constants").GPU_MEMORY_TYPE_WEIGHTS, of("constants").GPU_MEMORY_TYPE_KV_CACHE]

    async def drive() -> None:
        one = io.GenerateReqInput(input_ids=[5, 6, 7], sampling_params=GREEDY, rid="r", return_logprob=True)
        (answer,) = [answer async for answer in manager.generate_request(one, None)]
        assert answer["meta_info"]["id"] == "r" and len(answer["output_ids"]) == 8
        grown = [
            a async for a in manager.generate_request(io.GenerateReqInput("hi", sampling_params=GREEDY, stream=True))
        ]
        assert len(grown) > 1 and len(grown[-1]["output_ids"]) == 8
        await manager.pause_generation(io.PauseGenerationReqInput(mode="retract"))
        waiting = asyncio.ensure_future(anext(manager.generate_request(one, None)))
        await manager.release_memory_occupation(io.ReleaseMemoryOccupationReqInput(tags=tags), None)
        await manager.resume_memory_occupation(io.ResumeMemoryOccupationReqInput(tags=tags), None)
        assert (await manager.flush_cache()).success and not waiting.done()
        await manager.continue_generation(io.ContinueGenerationReqInput())
        assert len((await waiting)["output_ids"]) == 8

    # What an update brought is lost with the weights' memory: those of the checkpoint are what can come back.
    engine.update_weights_from_disk(engine.server_args.model_path)
    asyncio.run(drive())


@pytest.mark.slow
def test_weights_of_each_rank_go_to_an_engine_as_verl_sends_them(engine: Any, new: Any, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    class Adapter:
        async def update_weights_from_tensor(self, asked: Any) -> Any:
            return await engine.tokenizer_manager.update_weights_from_tensor(asked)

    engine.update_weights_from_disk(engine.server_args.model_path)
    before = engine.generate("hello", GREEDY)["output_ids"]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        work = of("weight_sync.utils").update_weights(Adapter(), new, "tp", mesh, flush_cache=False)
        assert asyncio.run(work)[0]
    finally:
        dist.destroy_process_group()
    assert engine.generate("hello", GREEDY)["output_ids"] != before


@pytest.mark.slow
def test_experts_are_a_tensor_where_the_caller_tokenises(tmp_path: Path) -> None:
    """verl reads a tensor [tokens, layers, top_k] in `meta_info` with `skip_tokenizer_init`, else it decodes text."""
    path = tiny_checkpoint("olmoe", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    shape = (3 + 8 - 1, config["num_hidden_layers"], config["num_experts_per_tok"])
    found: list[torch.Tensor] = []
    for skip in (True, False):
        args = {**SIZES, "skip_tokenizer_init": skip, "enable_return_routed_experts": True}
        with importlib.import_module("sglang").Engine(model_path=str(path), **args) as engine:

            async def ask(manager: Any = engine.tokenizer_manager) -> Any:
                fields = {"input_ids": [5, 6, 7], "sampling_params": GREEDY, "return_routed_experts": True}
                return await anext(manager.generate_request(of("managers.io_struct").GenerateReqInput(**fields), None))

            answer = asyncio.run(ask())
            experts = answer["meta_info"]["routed_experts"]
            if not skip:
                flat = of("state_capturer.routed_experts").extract_routed_experts_from_meta_info(answer)
                experts = torch.from_numpy(flat.reshape(shape).copy())
            found.append(experts)
    assert found[0].dtype == torch.int32 and tuple(found[0].shape) == shape
    assert torch.equal(found[0], found[1]) and int(found[0].max()) < config["num_experts"]


@pytest.mark.slow
def test_the_app_serves_an_engine_of_this_process(engine: Any) -> None:
    server, transport = of("entrypoints.http_server"), None
    state = server._GlobalState(engine.tokenizer_manager, engine.chat_template, engine.scheduler_info)
    server.set_global_state(state)
    assert server._execute_server_warmup(engine.server_args)
    transport = httpx.ASGITransport(app=server.app)

    async def drive() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            body = {"input_ids": [5, 6, 7], "sampling_params": GREEDY}
            answer = await http.post("/generate", json=body)
            assert answer.status_code == 200 and len(answer.json()["output_ids"]) == 8
            assert (await http.post("/generate", json={})).status_code == 400
            assert (await http.get("/get_weight_version")).status_code == 200

    asyncio.run(drive())


def test_calls_and_reasoning_are_taken_out_of_texts() -> None:
    protocol = of("entrypoints.openai.protocol")
    tool = protocol.Tool(function=protocol.Function(name="add", parameters={"type": "object"}))
    parser_of = of("function_call.function_call_parser").FunctionCallParser
    text = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    parser = parser_of([tool], "qwen25")
    assert parser.has_tool_call(text) and not parser.has_tool_call("I add.")
    said, (call,) = parser.parse_non_stream(text)
    assert (said, call.name, call.tool_index) == ("I add.", "add", 0) and call.parameters == '{"a": 1}'
    pieces = [parser.parse_stream_chunk(text[at : at + 5]) for at in range(0, len(text), 5)]
    assert "".join(c.parameters for _, calls in pieces for c in calls) == '{"a": 1}'
    with pytest.raises(ConfigError, match="known"):
        parser_of([tool], "nothing_like_it")
    reasoning = of("parser.reasoning_parser").ReasoningParser(model_type="qwen3")
    assert reasoning.parse_non_stream("<think>so</think>yes") == ("so", "yes")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.slow
def test_a_server_is_launched_updated_over_http_and_ended(old: Path, new: Any) -> None:
    args = of("server_args").ServerArgs(model_path=str(old), port=free_port(), skip_server_warmup=True, **SIZES)
    launch = of("entrypoints.http_server").launch_server
    process = multiprocessing.get_context("spawn").Process(target=launch, args=(args,))
    process.start()
    try:
        with httpx.Client(base_url=args.url(), timeout=60) as http:
            end = time.monotonic() + 90
            while True:
                assert process.is_alive() and time.monotonic() < end
                try:
                    if http.get("/health_generate").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            body = {"input_ids": [5, 6, 7], "sampling_params": GREEDY}
            before = http.post("/generate", json=body).json()["output_ids"]
            serialise = of("utils").MultiprocessingSerializer
            update = {"serialized_named_tensors": [serialise.serialize(new, output_str=True)], "flush_cache": False}
            answer = http.post("/update_weights_from_tensor", json=update)
            assert answer.status_code == 200 and answer.json()["success"], answer.text
            assert http.post("/generate", json=body).json()["output_ids"] != before
    finally:
        of("utils").kill_process_tree(process.pid)
        process.join(20)
    assert not process.is_alive()


@pytest.mark.slow
def test_answers_are_those_of_phloem_itself(engine: Any, old: Path) -> None:
    engine.update_weights_from_disk(str(old))
    with PhloemEngine(model_path=str(old), **SIZES) as plain:
        assert plain.generate("hello", GREEDY)["output_ids"] == engine.generate("hello", GREEDY)["output_ids"]
