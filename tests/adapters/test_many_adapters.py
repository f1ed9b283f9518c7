"""Many adapters in one batch, beside rows without one: each row as if it were alone, recorded steps as eager ones."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_support import write_adapter
from native_support import built

from phloem import Engine
from phloem.core.errors import BadRequest, PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("peft", reason="PEFT writes the adapters")
pytestmark = pytest.mark.slow
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPTS = ["The quick brown fox", "A serving engine", "Sap moves", "What is the capital"]
NAMES = ["a", "b", "c", None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of several ranks and kinds."""
    kinds: dict[str, dict[str, Any]] = {"a": {}, "b": {"r": 8, "target_modules": ["q_proj", "down_proj"]}}
    kinds |= {"c": {"r": 3, "use_dora": True}, "d": {"r": 2}}
    return {
        name: write_adapter(model, tmp_path_factory.mktemp(name), seed, strong=2.0, **kind)
        for seed, (name, kind) in enumerate(kinds.items(), 11)
    }


def engine_of(model: Path, folders: dict[str, Path], names: str = "abc", **settings: Any) -> Engine:
    paths = [f"{name}={folders[name]}" for name in names]
    defaults: dict[str, Any] = {"max_total_tokens": 4096, "debug_invariants": True, "random_seed": 1}
    return Engine(model_path=str(model), lora_paths=paths, **{**defaults, **settings})


TABLES = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not built(), reason="the native library is not built")),
]
TABLES += [pytest.param("invariant", marks=pytest.mark.skipif(not built(), reason="the native library is not built"))]


@pytest.fixture(scope="module", params=TABLES)
def engine(request: pytest.FixtureRequest, model: Path, folders: dict[str, Path]) -> Iterator[Engine]:
    # With `check_step_graph` every recorded step is compared with an eager one, bit for bit.
    kept = {} if request.param == "reference" else {"kv_cache_dtype": "bfloat16"}  # of which steps are recorded
    with engine_of(model, folders, ops=request.param, check_step_graph=True, **kept) as found:
        yield found


def ids(answers: Any) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


@pytest.mark.slow
def test_a_batch_of_several_adapters_and_none_gives_what_each_gives_alone(engine: Engine) -> None:
    together = ids(engine.generate(PROMPTS, GREEDY, lora_path=NAMES))
    alone = [ids([engine.generate(p, GREEDY, lora_path=n)])[0] for p, n in zip(PROMPTS, NAMES, strict=True)]
    assert together == alone
    same = ids(engine.generate([PROMPTS[0]] * 4, GREEDY, lora_path=NAMES))
    assert len({tuple(tokens) for tokens in same}) == 4


@pytest.mark.slow
def test_logprobs_of_a_row_do_not_depend_on_the_adapters_beside_it(engine: Engine) -> None:
    def values(**fields: Any) -> list[list[float]]:
        found: Any = engine.generate(sampling_params=GREEDY, return_logprob=True, **fields)
        found = found if isinstance(found, list) else [found]
        return [[value for value, *_ in one["meta_info"]["output_token_logprobs"]] for one in found]

    engine.flush_cache()
    together = values(prompt=PROMPTS, lora_path=NAMES)
    for prompt, name, seen in zip(PROMPTS, NAMES, together, strict=True):
        engine.flush_cache()
        (alone,) = values(prompt=prompt, lora_path=name)
        exact = engine.config.runtime.ops == "invariant"
        assert seen == (alone if exact else pytest.approx(alone, abs=1e-4))


@pytest.mark.slow
def test_a_step_with_adapters_is_recorded_on_this_table(engine: Engine) -> None:
    engine.generate(PROMPTS, GREEDY, lora_path=NAMES)
    graphs = engine.get_server_info()["internal_states"][0]["prepared"]["graphs"]
    if engine.config.runtime.ops == "reference":
        assert "adapter_graph" not in graphs
    else:
        assert graphs["adapter_graph"]["recorded"] == 1 and not graphs["adapter_graph"]["given_up"]


@pytest.mark.slow
def test_prompt_logprobs_come_through_the_adapter(engine: Engine) -> None:
    """Wanted positions are then in another order than tokens."""
    fields: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0, "sampling_params": GREEDY}
    both: Any = engine.generate(PROMPTS[:2], lora_path=["a", None], **fields)
    for at, name in enumerate(["a", None]):
        one: Any = engine.generate(PROMPTS[at], lora_path=name, **fields)
        seen = [v for v, *_ in both[at]["meta_info"]["input_token_logprobs"][1:]]
        assert seen == pytest.approx([v for v, *_ in one["meta_info"]["input_token_logprobs"][1:]], abs=1e-4)


def test_prefixes_are_shared_inside_one_version_of_one_adapter_alone(model: Path, folders: dict[str, Path]) -> None:
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3

    with engine_of(model, folders, ops="reference") as engine:

        def cached(name: str | None, **fields: Any) -> int:
            answer: Any = engine.generate(text, {**GREEDY, "max_new_tokens": 1}, lora_path=name, **fields)
            return answer["meta_info"]["cached_tokens"]

        assert cached("a") == 0 and cached("b") == 0 and cached(None) == 0
        assert cached("a") > 0 and cached("b") > 0 and cached(None) > 0
        assert cached("a", cache_salt="x") == 0
        engine.load_lora_adapter("a", str(folders["a"]))
        assert cached("a") == 0  # the same folder, another load: what it holds may be another
        assert cached("b") > 0


def test_one_adapter_in_a_step_at_a_time_where_that_is_asked(model: Path, folders: dict[str, Path]) -> None:
    with engine_of(model, folders) as engine:
        want = ids(engine.generate(PROMPTS * 3, GREEDY, lora_path=NAMES * 3))
    with engine_of(model, folders, max_loras_per_batch=1) as engine:
        assert ids(engine.generate(PROMPTS * 3, GREEDY, lora_path=NAMES * 3)) == want


def test_adapters_beyond_the_places_take_turns(model: Path, folders: dict[str, Path]) -> None:
    with engine_of(model, folders, "abcd") as engine:
        want = ids(engine.generate(PROMPTS * 2, GREEDY, lora_path=["a", "b", "c", "d"] * 2))
    with engine_of(model, folders, "abcd", max_loaded_loras=2) as engine:
        assert ids(engine.generate(PROMPTS * 2, GREEDY, lora_path=["a", "b", "c", "d"] * 2)) == want
        state = engine.get_server_info()["internal_states"][0]
        assert state["lora_evictions"] >= 2 and state["loras_loaded"] == 2 and state["loras_registered"] == 4


def test_an_adapter_whose_folder_has_another_one_by_now_is_loaded_again_or_refused(
    model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """It gave way and must be read again: pages of its prompts are those of the one before."""
    mine = {**folders, "a": shutil.copytree(folders["a"], tmp_path / "a")}

    def of(engine: Engine, name: str) -> Any:
        return engine.generate(PROMPTS[0], GREEDY, lora_path=name)

    with engine_of(model, mine, "ab", max_loaded_loras=1) as engine:
        before = of(engine, "a")["output_ids"]
        of(engine, "b")  # takes its place
        shutil.copytree(folders["c"], tmp_path / "a", dirs_exist_ok=True)
        with pytest.raises(PhloemError, match="another one than was loaded: load it again"):
            of(engine, "a")
        engine.load_lora_adapter("a", str(mine["a"]))
        after = of(engine, "a")
        assert after["output_ids"] != before and after["meta_info"]["cached_tokens"] == 0
    with engine_of(model, folders, "c") as alone:
        assert of(alone, "c")["output_ids"] == after["output_ids"]


def test_the_memory_for_adapters_is_kept_to(model: Path, folders: dict[str, Path]) -> None:
    with engine_of(model, folders, "a", lora_memory="100KB") as engine:
        taken = engine.get_server_info()["internal_states"][0]["lora_bytes"]
        engine.load_lora_adapter("d", str(folders["d"]))
        state = engine.get_server_info()["internal_states"][0]
        assert taken > 0 and state["lora_bytes"] <= 100_000
    with engine_of(model, folders, "", enable_lora=True, lora_memory="1KB") as engine:
        with pytest.raises(PhloemError, match="lora_memory"):
            engine.load_lora_adapter("a", str(folders["a"]))
        assert engine.generate("x", GREEDY)


@pytest.mark.slow
def test_adapters_come_and_go_under_traffic(model: Path, folders: dict[str, Path]) -> None:
    """Requests that have begun with a version end with it, whatever its name means by then."""
    with engine_of(model, folders, max_loaded_loras=3) as engine:
        want: Any = engine.generate(PROMPTS[0], {**GREEDY, "max_new_tokens": 200}, lora_path="a")
        fails: list[BaseException] = []
        ended = threading.Event()

        def traffic(name: str | None) -> None:
            try:
                while not ended.is_set():
                    got: Any = engine.generate(PROMPTS[1], GREEDY, lora_path=name)
                    assert len(got["output_ids"]) == 12
            except BaseException as error:
                fails.append(error)

        threads = [threading.Thread(target=traffic, args=(name,)) for name in ("b", None)]
        for thread in threads:
            thread.start()
        stream: Any = engine.generate(PROMPTS[0], {**GREEDY, "max_new_tokens": 200}, lora_path="a", stream=True)
        next(stream)
        for turn in range(10):
            engine.load_lora_adapter("a", str(folders["d" if turn % 2 else "a"]))
            engine.unload_lora_adapter("c") if turn % 2 else engine.load_lora_adapter("c", str(folders["c"]))
        engine.unload_lora_adapter("a")
        last: Any = None
        for last in stream:  # noqa: B007 - the last one is wanted
            pass
        ended.set()
        for thread in threads:
            thread.join()
        assert not fails, fails
        assert last["output_ids"] == want["output_ids"]
        with pytest.raises(BadRequest, match="there is no adapter 'a'"):
            engine.generate("x", GREEDY, lora_path="a")
        engine.load_lora_adapter("a", str(folders["a"]))
        assert ids([engine.generate(PROMPTS[0], {**GREEDY, "max_new_tokens": 200}, lora_path="a")]) == [
            want["output_ids"]
        ]
