"""Traces by `/start_profile` and `/stop_profile`: whose steps are in them, where they may be written."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from door import on_loop, open_door
from served import Server, eventually

from phloem.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_TORCH_PROFILER_DIR", str(root))
        found = Server(tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))).wait_ready()
    yield found
    found.close()


def ask(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=120)


def steps_of(path: Path) -> list[str]:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if re.match(r"(decode|step) \d+: ", event.get("name", ""))]


@pytest.mark.slow
def test_a_trace_has_the_steps_between_start_and_stop(server: Server, root: Path) -> None:
    server.generate("before it")
    started = ask(server, "/start_profile", output_dir="mine", profile_prefix="first", with_stack=False)
    assert started.status_code == 200, started.text
    path = Path(started.json()["path"])
    assert path.parent == root / "mine" and path.name.startswith("first-")
    twice = ask(server, "/start_profile")
    assert twice.status_code == 400 and "is being made already" in twice.json()["error"]["message"]
    assert server.generate("a prompt of some tokens", 6).status_code == 200
    assert not path.exists()
    stopped = httpx.get(server.url + "/stop_profile", timeout=120)
    assert stopped.status_code == 200 and stopped.json()["path"] == str(path)
    names = steps_of(path)
    decodes = [name for name in names if name.startswith("decode")]
    assert len(names) > len(decodes) >= 4 and all("1 rows" in name for name in names)
    again = ask(server, "/stop_profile")
    assert again.status_code == 400 and "no profile is being made" in again.json()["error"]["message"]


@pytest.mark.slow
def test_so_many_steps_from_one_on_end_by_themselves(server: Server, root: Path) -> None:
    begin = server.generate("x").json() and server.state()["steps"] + 2
    started = ask(server, "/start_profile", start_step=begin, num_steps=3, activities=["CPU", "MEM"])
    path = Path(started.json()["path"])
    assert path.parent == root
    assert server.generate("something else", 16).status_code == 200
    eventually(path.exists)
    assert 3 <= len(steps_of(path)) <= 5  # those in flight at either end may be in it
    assert ask(server, "/stop_profile").status_code == 400
    far = ask(server, "/start_profile", start_step=10**6)
    assert far.status_code == 200
    never = ask(server, "/stop_profile")
    assert never.status_code == 400 and "was to begin with step 1000000" in never.json()["error"]["message"]


@pytest.mark.slow
def test_traces_within_a_second_have_files_of_their_own(server: Server, root: Path) -> None:
    files: list[Path] = []
    for _ in range(3):
        assert ask(server, "/start_profile", output_dir="quick").status_code == 200
        files.append(Path(ask(server, "/stop_profile").json()["path"]))
    assert sorted(set(files)) == sorted((root / "quick").iterdir()) and len(set(files)) == 3
    huge = ask(server, "/start_profile", start_step=10**30)
    assert huge.status_code == 400 and huge.json()["error"]["param"] == "start_step"


@pytest.mark.slow
def test_a_folder_that_goes_fails_the_stop_and_nothing_else(server: Server, root: Path) -> None:
    assert ask(server, "/start_profile", output_dir="goes").status_code == 200
    (root / "goes").rmdir()
    (root / "goes").write_text("")
    stopped = ask(server, "/stop_profile")
    assert stopped.status_code == 400 and "was not written" in stopped.json()["error"]["message"]
    below = ask(server, "/start_profile", output_dir="goes/below")
    assert below.status_code == 400 and "cannot be made" in below.json()["error"]["message"]
    assert server.generate("still here").status_code == 200 and server.get("/health").status_code == 200


@pytest.mark.slow
def test_the_end_of_a_server_writes_what_was_traced(server: Server) -> None:
    path = Path(ask(server, "/start_profile").json()["path"])
    server.generate("a few tokens")
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert steps_of(path)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"output_dir": "/etc"}, "output_dir"),
        ({"output_dir": "../up"}, "output_dir"),
        ({"output_dir": "a\0b"}, "output_dir"),
        ({"output_dir": "a" * 5000}, "output_dir"),
        ({"profile_prefix": "../x"}, "profile_prefix"),
        ({"profile_prefix": ".hidden"}, "profile_prefix"),
        ({"activities": ["CUDA_PROFILER"]}, "activities"),
        ({"num_steps": 0}, "num_steps"),
        ({"start_step": -1}, "start_step"),
        ({"profile_by_stage": True}, "profile_by_stage"),
        ({"nom_steps": 1}, "nom_steps"),
    ],
)
@on_loop
async def test_what_cannot_be_is_refused_at_the_door(
    body: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    async with open_door() as door:
        answer = await door.post("/start_profile", body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        assert not door.engine.controls
        assert (await door.post("/start_profile", {"profile_by_stage": False, "profile_id": "1"})).status_code == 200
        (control,) = door.engine.controls
        assert control.name == "start_profile" and control.args["folder"] == str(tmp_path.resolve())
