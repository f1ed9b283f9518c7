"""Experts in more slots than there are, placed by counts and moved while serving: the answers of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loads import answers, load
from model_support import LIMIT, PROMPT, Engine
from native_support import built
from share_support import ThreadRanks, checkpoint, together

import phloem
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError, ModelLoadError, PhloemError
from phloem.distributed.mesh import Mesh
from phloem.engine.ranks.balancing import Shifter
from phloem.engine.ranks.parallel import Moved, refuse
from phloem.kernels import native
from phloem.launch.core import EngineCore
from phloem.layers.spread import Spread
from phloem.testing.checkpoints import families, tiny_checkpoint, tiny_gguf

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "nemotron_h", "granitemoe", "longcat_flash")
FEW = ("qwen3_moe",)
OUTPUTS = 6


def some() -> list[Any]:
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in FAMILIES]


def path_of(name: str, folder: Path) -> Path:
    if name == "gemma4_text":
        sparse = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
        return tiny_checkpoint(name, folder, **sparse)
    return checkpoint(name, folder)


def work(engine: Engine, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Logits of a whole prompt, and greedy tokens behind it; what a rank is fed is what one alone has chosen."""
    pages, found = engine.pages(len(PROMPT) + OUTPUTS), list[int]()
    whole = engine.whole(PROMPT)
    for at in range(OUTPUTS):
        row = (PROMPT, pages, 0) if at == 0 else (tokens[at - 1 : at], pages, len(PROMPT) + at - 1)
        found.append(int(engine.step([row]).argmax()))
    return whole, found


@pytest.mark.some(3)
@pytest.mark.parametrize("name", some())
def test_copies_and_moves_change_no_token(name: str, tmp_path: Path) -> None:
    path = path_of(name, tmp_path)
    one = Engine(path)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)

    def run(comm: Any) -> Any:
        spread = Spread(2, counting=True)
        engine = Engine(path, mesh=Mesh.of(comm.rank, tp=2, ep=2), comm=comm, spread=spread)
        found = [work(engine, tokens)]
        counts = spread.counts()
        experts, shifter = counts.shape[1], Shifter(engine.model, engine.checkpoint, comm)
        # Each has the other's; those that both have change their slots.
        half = experts // 2 + 1
        ranks = [[*range(experts - 1, experts - half - 1, -1)], [*range(half)]]
        for layer in spread.layers:
            assert shifter.shift(Moved(layer.number, ranks))
        found.append(work(engine, tokens))
        assert [layer.ranks for layer in spread.layers] == [ranks] * len(spread.layers)
        return found, counts

    (found, counts), (_, theirs) = together(2, run)
    for logits, chosen in found:
        assert (logits - whole).abs().max() <= LIMIT
        assert chosen == tokens
    k = counts[0].sum() / (len(PROMPT) + len(PROMPT) + OUTPUTS - 1)
    assert np.array_equal(counts, theirs) and (name == "longcat_flash" or k == int(k) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "plain"])
def test_experts_of_packed_weights_move_too(kind: str, tmp_path: Path) -> None:
    """What a table has packed is packed anew."""
    path = checkpoint("qwen3_moe", tmp_path / "model")
    path = tiny_gguf(path, tmp_path / "model.gguf", kind) if kind == "Q8_0" else path
    options: dict[str, Any] = {"ops": native.table(1, float32=True)} if built() else {}
    one = Engine(path, **options)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)

    def run(comm: Any) -> Any:
        spread, mesh = Spread(2), Mesh.of(comm.rank, tp=2, ep=2)
        engine = Engine(path, **options, mesh=mesh, comm=comm, spread=spread)
        shifter, found = Shifter(engine.model, engine.checkpoint, comm), [work(engine, tokens)]
        for layer in spread.layers:
            assert shifter.shift(Moved(layer.number, [[7, 0, 5, 2, 1], [6, 1, 4, 3, 2]]))
        return [*found, work(engine, tokens)]

    for logits, chosen in together(2, run)[0]:
        assert (logits - whole).abs().max() <= 5e-4
        assert chosen == tokens


@pytest.mark.slow
@pytest.mark.parametrize(("comm", "kind"), [("shm", None), ("gloo", "int8")])
def test_experts_move_among_processes(comm: str, kind: str | None, tmp_path: Path) -> None:
    path = str(checkpoint("qwen3_moe", tmp_path))
    options: dict[str, Any] = {"ops": "reference", "max_total_tokens": 512, "log_level": "warning", "dtype": "float32"}
    options["quantization"] = kind
    asks = [[5, 6, 7, 8], [9, 8, 7], [1] * 20]
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    with phloem.Engine(model_path=path, **options) as engine:
        expected = [engine.generate(input_ids=ask, sampling_params=sampling)["output_ids"] for ask in asks]
    sizes = {"tp_size": 2, "ep_size": 2, "ep_num_redundant_experts": 2, "enable_eplb": True, "tp_comm": comm}
    with phloem.Engine(model_path=path, **sizes, eplb_rebalance_num_iterations=4, **options) as engine:
        found = [engine.generate(input_ids=ask, sampling_params=sampling)["output_ids"] for ask in asks]
        facts = engine.get_server_info()["internal_states"][0]["prepared"]["experts"]
    assert found == expected
    assert facts["moved_layers"] > 1 and facts["failed_moves"] == 0


def test_a_rank_that_cannot_read_leaves_all_as_they_are(tmp_path: Path) -> None:
    path = checkpoint("qwen3_moe", tmp_path)
    whole = Engine(path).whole(PROMPT)

    def run(comm: Any) -> Any:
        spread = Spread(2)
        engine = Engine(path, mesh=Mesh.of(comm.rank, tp=2, ep=2), comm=comm, spread=spread)
        shifter = Shifter(engine.model, engine.checkpoint, comm)
        before, names = spread.layers[0].ranks, engine.model.weight_names()
        if comm.rank == 1:

            def broken(*args: Any) -> Any:
                raise ModelLoadError("the file has gone")

            shifter._moves.read = broken  # type: ignore[method-assign]
        assert not shifter.shift(Moved(0, [before[1], before[0]]))
        assert spread.layers[0].ranks == before and engine.model.weight_names() == names
        return engine.whole(PROMPT)

    assert (together(2, run)[0] - whole).abs().max() <= LIMIT


def test_names_follow_the_experts(tmp_path: Path) -> None:
    path = checkpoint("qwen3_moe", tmp_path)
    one = Engine(path).model

    def run(comm: Any) -> Any:
        spread = Spread()
        engine = Engine(path, mesh=Mesh.of(comm.rank, tp=2, ep=2), comm=comm, spread=spread)
        Shifter(engine.model, engine.checkpoint, comm).shift(Moved(0, [[0, 7, 2, 5], [4, 1, 6, 3]]))
        model = engine.model
        names = [name for name in model.weight_names() if ".0.mlp.experts." in name]
        return {name: model.get_weight(name) for name in names}

    mine, other = together(2, run)
    assert {int(name.split("experts.")[1].split(".")[0]) for name in mine} == {0, 2, 5, 7}
    for name, value in {**mine, **other}.items():
        assert torch.equal(value, one.get_weight(name)), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp"), [("qwen3_moe", 2), ("deepseek_v3", 4)])
def test_experts_move_while_requests_go_on(name: str, tp: int, tmp_path: Path) -> None:
    """With prefix hits, chunks, preemption, grammars, penalties and log probabilities."""
    path = str(checkpoint(name, tmp_path))
    options: dict[str, Any] = {
        "model_path": path, "dtype": "float32", "ops": "reference", "max_total_tokens": 160, "page_size": 8,
        "context_length": 128, "chunked_prefill_size": 16, "max_running_requests": 4, "debug_invariants": True,
        "random_seed": 1, "threads": 1,
    }  # fmt: skip
    one = EngineCore(Config.from_flat(options), describe(path), lambda message: None)
    try:
        expected = answers(one, load())
    finally:
        one.close()
    sizes = {"tp_size": tp, "ep_size": 2, "ep_num_redundant_experts": 2, "enable_eplb": True}
    config = Config.from_flat({**options, **sizes, "eplb_rebalance_num_iterations": 5})
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        found = answers(core, load())
        facts = core.runner.prepared["experts"]
    finally:
        core.close()
    for key, (tokens, values, _) in expected.items():
        assert found[key][0] == tokens and len(tokens) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
    moved = [told for told in ranks.told if isinstance(told, Moved)]
    assert facts["moved_layers"] >= len(moved) - 1 > 1 and facts["failed_moves"] == 0
    assert facts["redundant_experts"] == 2 and 0.5 < facts["balancedness"] <= 1
    # A file of these counts places experts at the start.
    file = tmp_path / "counts.json"
    file.write_text(json.dumps(facts))
    spread = {"init_expert_location": str(file), "ep_num_redundant_experts": 2}
    config = Config.from_flat({**options, "tp_size": tp, "ep_size": 2, **spread})
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        placed = answers(core, load())
        facts = core.runner.prepared["experts"]
    finally:
        core.close()
    assert all(placed[key][0] == tokens for key, (tokens, _, _) in expected.items())
    assert not any(isinstance(told, Moved) for told in ranks.told)
    assert facts["ranks"][0] != [[*range(5)], [5, 6, 7, 0, 1]]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"ep_num_redundant_experts": 1}, "ep_size 2: experts and redundant ones 9 cannot be shared out"),
        ({"ep_num_redundant_experts": 10}, "ep_num_redundant_experts: 10 beyond 8 experts"),
        ({"ep_num_redundant_experts": 2, "ep_size": 1}, "ep_num_redundant_experts: .*ep_size above 1"),
        ({"enable_eplb": True, "ep_size": 1}, "enable_eplb: .*ep_size above 1"),
        ({"enable_eplb": True, "pp_size": 2}, "enable_eplb: not with pp_size above 1"),
        ({"init_expert_location": "/nowhere.json"}, "init_expert_location: /nowhere.json"),
        ({"init_expert_location": "wrong"}, r"init_expert_location: counts of \[1, 3\]"),
        ({"eplb_rebalance_num_iterations": 5}, "eplb_rebalance_num_iterations: .* enable_eplb must be given"),
        ({"eplb_rebalance_num_iterations": 0}, "eplb_rebalance_num_iterations: 0 must be above 0"),
        ({"ep_num_redundant_experts": -1}, "ep_num_redundant_experts: -1 is below 0"),
        ({"expert_distribution_recorder_mode": "per_token"}, "expert_distribution_recorder_mode"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = checkpoint("qwen3_moe", tmp_path)
    if values.get("init_expert_location") == "wrong":
        (tmp_path / "few.json").write_text("[[1, 2, 3]]")
        values = {"init_expert_location": str(tmp_path / "few.json")}
    with pytest.raises((ConfigError, ModelLoadError), match=why):
        refuse(Config.from_flat({"model_path": str(path), "tp_size": 2, "ep_size": 2, **values}), describe(str(path)))


def test_families_that_are_tested_exist() -> None:
    assert set(FAMILIES) <= set(families())


@pytest.mark.slow
def test_the_recorder_counts_what_is_chosen_between_start_and_stop(tmp_path: Path) -> None:
    path = checkpoint("deepseek_v3", tmp_path)
    options: dict[str, Any] = {"ops": "reference", "max_total_tokens": 512, "log_level": "warning", "dtype": "float32"}
    sampling = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    with phloem.Engine(model_path=str(path), expert_distribution_recorder_mode="stat", **options) as engine:
        with pytest.raises(PhloemError, match="comes first"):
            engine.dump_expert_distribution_record()
        engine.generate(input_ids=[5, 6, 7], sampling_params=sampling)
        engine.start_expert_distribution_record()
        engine.generate(input_ids=[1, 2, 3, 4, 5, 6], sampling_params=sampling)
        engine.stop_expert_distribution_record()
        engine.generate(input_ids=[9, 8, 7], sampling_params=sampling)
        counts = np.array(engine.dump_expert_distribution_record())
    config = json.loads((path / "config.json").read_text())
    sparse = config["num_hidden_layers"] - config["first_k_dense_replace"]
    assert counts.shape == (sparse, config["n_routed_experts"])
    # The last layer computes the rows alone whose next token is wanted.
    seen = set((counts.sum(1) / config["num_experts_per_tok"]).tolist())
    assert seen <= {9.0, 4.0} and seen
    with phloem.Engine(model_path=str(path), **options) as engine:  # noqa: SIM117
        with pytest.raises(PhloemError, match="experts are not counted"):
            engine.start_expert_distribution_record()
