"""The engine in this process: how it fails, how it ends, and what it takes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from phloem import LLM, Engine
from phloem.core.errors import BadRequest, ConfigError, EngineDead, ModelLoadError
from phloem.core.messages import Abort, Control, ControlReply, Submit, Tokens, encode, pack_ids, refusal
from phloem.core.request import SamplingParams, recommended
from phloem.testing.checkpoints import tiny_checkpoint

SMALL: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048, "log_level": "warning"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine(model_path=str(path), **SMALL) as found:
        yield found


# How it fails


def test_a_checkpoint_that_lacks_tensors_is_a_model_load_error(path: Path, tmp_path: Path, capfd: Any) -> None:
    """Found in the engine's thread, and told by its class; no task is left behind."""
    from safetensors.torch import load_file, save_file

    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        Engine(model_path=str(tmp_path), **SMALL)
    with pytest.raises(ConfigError, match="attention backend flash"):
        Engine(model_path=str(path), **{**SMALL, "attention_backend": "flash"})
    assert "was destroyed" not in capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "phloem-door" and thread.is_alive()]


def test_after_shutdown_every_call_says_so(path: Path) -> None:
    engine = Engine(model_path=str(path), **SMALL)
    engine.shutdown()
    engine.shutdown()
    calls: list[Any] = [
        lambda: engine.generate("a"),
        lambda: engine.flush_cache(),
        lambda: engine.get_server_info(),
        lambda: engine.abort_request(abort_all=True),
        lambda: engine.pause_generation(),
        lambda: engine.continue_generation(),
        lambda: engine.open_session(),
        lambda: engine.close_session("x"),
        lambda: engine.score("a", "b", [1, 2]),
    ]
    for call in calls:
        with pytest.raises(EngineDead, match="shut down"):
            call()


def test_a_shutdown_under_load_is_no_error(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        engine = Engine(model_path=str(path), **SMALL)
        stream: Any = engine.generate("a", {"max_new_tokens": 400, "ignore_eos": True}, stream=True)
        next(stream)
        with caplog.at_level(logging.INFO):
            engine.shutdown()
        with pytest.raises(EngineDead):
            for _ in stream:
                pass
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_that_it_has_no_engine(engine: Engine) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            engine.generate("a", {"max_new_tokens": 1})
        except EngineDead as error:
            said = str(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        assert "forked child" in told.read()
    os.waitpid(child, 0)
    assert isinstance(engine.generate("a", {"max_new_tokens": 1}), dict)


# How a script ends

ENDINGS = {
    "a stream as the last line": "g = engine.generate('a', P, stream=True); next(g)",
    "an exception": "g = engine.generate('a', P, stream=True); next(g); raise SystemExit(3)",
    "a thread": """
        import threading
        def ask():
            try: engine.generate('a', P)
            except Exception as error: print(type(error).__name__)
        threading.Thread(target=ask, daemon=True).start()
        import time; time.sleep(0.2)
    """,
    "an event loop": """
        import asyncio
        async def main():
            g = await engine.async_generate('a', P, stream=True)
            await anext(aiter(g))
        asyncio.run(main())
    """,
    "an LLM": "from phloem import LLM; other = LLM(PATH, **S); g = other.engine.generate('a', P, stream=True); next(g)",
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_that_ends_while_a_step_runs_ends_cleanly(path: Path, ending: str) -> None:
    head = f"""
        from phloem import Engine
        P = {{"max_new_tokens": 450, "ignore_eos": True}}
        PATH, S = {str(path)!r}, {SMALL!r}
        engine = Engine(model_path=PATH, **S)
    """
    script = textwrap.dedent(head) + textwrap.dedent(ENDINGS[ending])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (3 if ending == "an exception" else 0), done.stderr[-2000:]
    for word in ("terminate called", "Traceback", "ERROR", "was destroyed"):
        assert word not in done.stderr, done.stderr[-2000:]


# What it takes


def test_arrays_and_tensors_of_token_ids(engine: Engine) -> None:
    wanted: Any = engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 4, "temperature": 0})
    forms: list[Any] = [np.array([5, 6, 7]), torch.tensor([5, 6, 7]), tuple([5, 6, 7]), [np.int64(5), np.int32(6), 7]]
    for ids in forms:
        found: Any = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 4, "temperature": 0})
        assert found["output_ids"] == wanted["output_ids"]
    several: list[Any] = [torch.tensor([[5, 6, 7]] * 2), [np.array([5, 6, 7])] * 2]
    for ids in several:
        both: Any = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 4, "temperature": 0})
        assert [one["output_ids"] for one in both] == [wanted["output_ids"]] * 2
    with pytest.raises(BadRequest, match="input_ids"):
        engine.generate(input_ids=np.array([0.5, 1.5]))


def test_several_texts_for_a_prompt_are_a_list_each(path: Path) -> None:
    with LLM(str(path), **SMALL) as model:
        assert all(isinstance(text, str) for text in model.generate(["a", "b"], {"max_new_tokens": 2}))
        found: Any = model.generate(["a", "b"], {"max_new_tokens": 2, "n": 3})
        assert [len(texts) for texts in found] == [3, 3]
        talk: Any = model.chat([{"role": "user", "content": "a"}], {"max_new_tokens": 2, "n": 2})
        assert [len(texts) for texts in talk] == [2]
        with pytest.raises(BadRequest, match="no messages"):
            model.chat([[]])
        assert model.chat([]) == []


# Nobody waits for ever


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"top_k": 20.5}, "top_k must be a whole number"),
        ({"top_k": "20"}, "top_k must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"repetition_penalty": -1}, "repetition_penalty must be in"),
    ],
)
def test_a_recommended_value_is_checked_like_a_clients(values: Any, said: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"generation_config.json: {said}"):
        recommended(values, 100)
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        Engine(model_path=str(tmp_path), **SMALL)


def test_whole_numbers_in_another_spelling_are_taken() -> None:
    assert recommended({"top_k": 20.0, "temperature": 1}, 100) == {"top_k": 20, "temperature": 1.0}
    assert recommended({"top_k": 0, "max_length": "x"}, 100) == {"top_k": -1}
    assert isinstance(recommended({"top_k": 20.0}, 100)["top_k"], int)


def test_a_message_that_is_not_understood_is_answered() -> None:
    submit = Submit(id="r1", input_ids=pack_ids([1]), sampling=SamplingParams())
    submit.sampling.top_k = 2.5  # type: ignore[assignment]
    answer = refusal(encode(submit), "Expected `int`, got `float`")
    assert isinstance(answer, Tokens)
    finish = answer.chunks[0].finish
    assert answer.chunks[0].id == "r1"
    assert finish is not None
    assert (finish.type, finish.status_code) == ("abort", 400)
    assert "Expected `int`" in (finish.message or "")
    reply = refusal(encode(Control(id="c1", name="state")), "why")
    assert isinstance(reply, ControlReply)
    assert (reply.id, reply.ok) == ("c1", False)
    assert refusal(encode(Abort(id="r1")), "why") is None
    assert refusal(msgspec.msgpack.encode([1, 2]), "why") is None
    assert refusal(b"\xc1", "why") is None
