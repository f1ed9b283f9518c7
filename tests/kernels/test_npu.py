"""Ascend NPUs without one: who declines and why, the fused ops, and a server on a stand-in for torch_npu."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import npu_fused
import pytest
import torch
from served import Server
from vision_support import picture, png, seeing_checkpoint

from phloem import Engine
from phloem.kernels import npu
from phloem.kernels import reference as ref
from phloem.kernels.ops import Norm
from phloem.platforms import npu as platform
from phloem.testing.checkpoints import tiny_checkpoint

SUPPORT = Path(__file__).parents[1] / "support"
LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 2
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
DRAWN = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 10, "sampling_seed": 5, "ignore_eos": True}
DIGITS = {"temperature": 0, "max_new_tokens": 12, "regex": "[0-9]{3}-[0-9]{4}"}
SIZES: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 1024, "chunked_prefill_size": 32}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started find a torch_npu."""
    paths = [str(SUPPORT / "npu_stand_in"), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv(platform.DRIVER, "somewhere")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_its_library_or_its_driver_an_npu_declines_and_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.delenv(platform.DRIVER, raising=False)
    monkeypatch.setattr(platform.importlib, "import_module", never)
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: None)
    assert platform.is_available() == (False, "the library torch_npu is not installed")
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: object())
    available, reason = platform.is_available()
    assert not available and "set_env.sh sets ASCEND_HOME_PATH" in reason


def test_a_library_that_cannot_be_loaded_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libhccl.so: cannot open shared object file\nand more")

    monkeypatch.setenv(platform.DRIVER, "somewhere")
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(platform.importlib, "import_module", broken)
    assert platform.is_available() == (
        False,
        "torch_npu cannot be imported: libhccl.so: cannot open shared object file",
    )
    nothing = types.SimpleNamespace(npu=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(platform.importlib, "import_module", lambda name: nothing)
    assert platform.is_available()[1] == "no Ascend NPU with a working driver was found"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_fused_ops_give_what_the_reference_gives(kind: torch.dtype) -> None:
    torch.manual_seed(1)
    table = npu.table(npu_fused)
    near: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2} if kind != torch.float32 else {}
    npu_fused.CALLS.clear()
    x, y, weight = torch.randn(5, 64).to(kind), torch.randn(5, 64).to(kind), torch.rand(64).to(kind)
    torch.testing.assert_close(table.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5), **near)
    for got, want in zip(table.add_rms_norm(x, y, weight, 1e-5), ref.add_rms_norm(x, y, weight, 1e-5), strict=True):
        torch.testing.assert_close(got, want, **near)
    torch.testing.assert_close(table.silu_and_mul(x), ref.silu_and_mul(x), **near)
    matrix = torch.randn(12, 64).to(kind)
    options: dict[str, Any] = {"norm": Norm(weight, 1e-5), "residual": y, "gate": "silu"}
    fused, plain = table.linear(x, matrix, **options), npu.table(object()).linear(x, matrix, **options)
    for got, want in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, want, **near)
    assert npu_fused.CALLS == {"npu_rms_norm": 3, "npu_add_rms_norm": 2, "npu_swiglu": 2}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 8])
def test_the_fused_rotation_turns_strided_heads_in_place_as_the_reference_does(rotary: int, interleaved: bool) -> None:
    torch.manual_seed(2)
    positions, angles = torch.tensor([3, 0, 7, 8]), torch.rand(16, rotary // 2) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), 1)
    wanted = torch.randn(4, 3 * 16 + 16)
    got = wanted.clone()
    for table, both in ((npu.table(object()), wanted), (npu.table(npu_fused), got)):
        q, k = both[:, :48].unflatten(-1, (3, 16)), both[:, 48:].unflatten(-1, (1, 16))
        table.rope_(q, k, positions, cos_sin, interleaved)
    torch.testing.assert_close(got, wanted)


def test_what_a_fused_op_does_not_take_and_what_a_version_lacks_is_plain_torch() -> None:
    npu_fused.CALLS.clear()
    x, weight = torch.randn(2, 8).bfloat16(), torch.rand(8)
    table = npu.table(npu_fused)
    assert torch.equal(table.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5))
    assert torch.equal(table.add_rms_norm(x, x, weight, 1e-5)[0], ref.add_rms_norm(x, x, weight, 1e-5)[0])
    many = torch.randn(1, npu.MOST_HEADS, 4), torch.randn(1, 1, 4)
    table.rope_(*many, torch.zeros(1, dtype=torch.int64), torch.ones(1, 2, 2), False)
    older = types.SimpleNamespace(npu_rms_norm=npu_fused.npu_rms_norm)
    assert not npu_fused.CALLS and npu.found(older) == ["npu_rms_norm"]
    assert npu.table(older).silu_and_mul is ref.silu_and_mul and npu.table(older).rope_ is ref.rope_


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_the_stand_in_refuses_what_a_device_refuses_and_counts_its_memory() -> None:
    said = run(
        "from phloem import platforms; import torch\n"
        "from phloem.core.errors import ConfigError\n"
        "made, why = platforms.choose('auto', 1)\n"
        "print(made.name, made.device, '|', why.reason)\n"
        "def refused(call):\n"
        "    try: call()\n"
        "    except (RuntimeError, TypeError, ConfigError) as error: return str(error).splitlines()[0]\n"
        "x = torch.ones(3, 4, device=made.device)\n"
        "print(refused(lambda: x + torch.ones(4)), '|', refused(lambda: x.numpy()))\n"
        "v = x.t(); v[1:].mul_(2); print(v.stride(), x.tolist()[0])\n"
        "before = made.memory()[0]\n"
        "print(made.measure(lambda: torch.empty(1 << 20, device=made.device)), made.memory()[0] - before)\n"
        "big = torch.empty(1 << 20, dtype=torch.uint8, device=made.device); print(before - made.memory()[0])\n"
        "print(made.table(None)[0].name, made.table('reference')[0].name, refused(lambda: made.table('triton')))\n"
        "print(made.dtype(None)[0], made.dtype('float16')[0], made.reserve() >> 20)\n"
    ).splitlines()
    assert said[0].startswith("npu npu:0 | Ascend stand-in, 4 GiB, torch_npu 0.stand-in; not cuda: ")
    assert "at least two devices, npu:0 and cpu" in said[1] and "convert npu:0 device type tensor to numpy" in said[1]
    assert said[2] == "(1, 4) [1.0, 2.0, 2.0, 2.0]"
    assert said[3:5] == ["4194304 0", "1048576"]
    assert said[5] == "npu reference ops 'triton' is not one of npu, reference"
    assert said[6] == "torch.bfloat16 torch.float16 512"


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_served_on_the_stand_in_through_http_the_tokens_are_those_of_the_reference_table(tmp_path: Path) -> None:
    """A window and a full layer, prompts in chunks, several in flight, prefix hits, a grammar, draws, new weights."""
    path, other = tiny_checkpoint("gemma3_text", tmp_path / "a"), tiny_checkpoint("gemma3_text", tmp_path / "b", seed=3)
    asked: list[tuple[str, dict[str, Any]]] = [(LONG, GREEDY), (LONG + "What?", GREEDY), ("Tel. ", DIGITS)]
    asked.append(("The", DRAWN))
    wanted: list[list[Any]] = []
    for model in (path, other):
        with Engine(model_path=str(model), device="cpu", ops="reference", page_size=16, **SIZES) as engine:
            wanted.append([engine.generate(text, params, return_logprob=True) for text, params in asked])
    server = Server(path, "--device", "npu", *[f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()])
    try:
        server.wait_ready()

        def ask(text: str, params: dict[str, Any]) -> dict[str, Any]:
            body = {"text": text, "sampling_params": params, "return_logprob": True}
            return httpx.post(server.url + "/generate", json=body, timeout=120).json()

        for answers in wanted:
            with ThreadPoolExecutor(4) as clients:
                found = list(clients.map(ask, *zip(*asked, strict=True)))
            for got, want in zip(found, answers, strict=True):
                assert got["output_ids"] == want["output_ids"]
                ours, theirs = ([e[0] for e in one["meta_info"]["output_token_logprobs"]] for one in (got, want))
                assert ours == pytest.approx(theirs, abs=1e-4)
            assert ask(*asked[1])["meta_info"]["cached_tokens"] >= 32
            body = {"model_path": str(other)}
            assert httpx.post(server.url + "/update_weights_from_disk", json=body, timeout=60).status_code == 200
        log = "\n".join(server.lines)
    finally:
        server.close()
    assert "plain torch and the fused ops of torch_npu" in log, log


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_recurrent_layers_and_experts_run_on_the_stand_in_by_fused_ops(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_next", tmp_path)
    with Engine(model_path=str(path), device="cpu", ops="reference", **SIZES) as engine:
        wanted = engine.generate([LONG, "Sap"], GREEDY)
    said = run(
        "from phloem import Engine\n"
        f"with Engine(model_path={str(path)!r}, device='npu', **{SIZES!r}) as engine:\n"
        f"    print([one['output_ids'] for one in engine.generate([{LONG!r}, 'Sap'], {GREEDY!r})])\n"
        "import torch_npu; print(sorted(torch_npu.CALLS)); print(sorted(torch_npu.npu.USED))\n"
    ).splitlines()
    assert said[0] == str([one["output_ids"] for one in wanted])  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert said[1] == "['npu_add_rms_norm', 'npu_rms_norm', 'npu_rotary_mul', 'npu_swiglu']"
    assert {"pinned", "record", "record_stream", "set_device", "wait_stream"} <= set(eval(said[2]))


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_experts_on_the_host_beside_the_stand_in_cross_by_pinned_copies(tmp_path: Path) -> None:
    """Two devices of one process: copies of some experts on one, all of them on the other; deferred, and streamed."""
    path, settings = tiny_checkpoint("qwen3_moe", tmp_path), [{"kt_num_gpu_experts": 2}]
    settings.append({"kt_num_gpu_experts": 2, "kt_max_deferred_experts_per_token": 1})
    settings.append({"kt_num_gpu_experts": 1, "kt_gpu_prefill_token_threshold": 16})
    wanted: list[Any] = []
    for more in settings:
        with Engine(model_path=str(path), device="cpu", ops="reference", **SIZES, **more) as engine:
            answers: Any = engine.generate([LONG, "Sap"], GREEDY)
        wanted.append([one["output_ids"] for one in answers])
    said = run(
        "from phloem import Engine\n"
        "import torch_npu\n"
        f"for more in {settings!r}:\n"
        "    torch_npu.npu.USED.clear()\n"
        f"    with Engine(model_path={str(path)!r}, device='npu', **{SIZES!r}, **more) as engine:\n"
        f"        print([one['output_ids'] for one in engine.generate([{LONG!r}, 'Sap'], {GREEDY!r})])\n"
        "    print(torch_npu.npu.USED['record_stream'])\n"
    ).splitlines()
    assert said[::2] == [str(one) for one in wanted]
    # Three tensors of each of three layers in ten steps, beside what every step brings down.
    assert all(int(count) >= 90 for count in said[1::2])


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_what_is_seen_on_the_stand_in_is_what_the_reference_sees(tmp_path: Path) -> None:
    """A tower with windows: an order of the patches that the host makes."""
    path, seen = seeing_checkpoint("qwen2_5_vl", tmp_path / "sees"), tmp_path / "picture.png"
    seen.write_bytes(png(picture(1, 24, 16)))
    with Engine(model_path=str(path), device="cpu", ops="reference", **SIZES) as engine:
        wanted: Any = engine.generate("see <image> and", GREEDY, image_data=seen.read_bytes())
    said = run(
        "from pathlib import Path\nfrom phloem import Engine\n"
        f"with Engine(model_path={str(path)!r}, device='npu', **{SIZES!r}) as engine:\n"
        f"    seen = Path({str(seen)!r}).read_bytes()\n"
        f"    print(engine.generate('see <image> and', {GREEDY!r}, image_data=seen)['output_ids'])\n"
    )
    assert said.strip() == str(wanted["output_ids"])


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_the_doctor_names_the_npu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "phloem", "doctor", str(tiny_checkpoint("llama", tmp_path)), "--device", "npu"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch-npu" in done.stdout and "device             npu  (as asked)" in done.stdout
    assert "npu  (plain torch and the fused ops of torch_npu)" in done.stdout
