"""Ranks that have different experts, or different layers, compute what one rank computes: by threads of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import LIMIT, PAGE, PROMPT, Engine
from share_support import checkpoint, engine_in, engine_of, staged, together

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.distributed.mesh import Mesh
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import FAMILIES, build_model
from phloem.models._stage import spans
from phloem.testing.checkpoints import families, tiny_checkpoint

OUTPUTS = 6
SPARSE = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "granitemoehybrid", "gpt_oss",
    "minimax_m2", "llama4_text", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "lfm2_moe", "jamba", "nemotron_h",
    "qwen3_next", "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa",
    "gemma4_text", "qwen3_vl_moe", "phimoe", "glm4_moe_lite", "exaone_moe", "glm4v_moe",
    "kimi_linear", "qwen3_omni_moe_thinker",
)  # fmt: skip
FEW = ("llama", "qwen3_moe")
TOWERS = (
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "gemma3",
    "qwen2_audio",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "glm4v",
    "glm4v_moe",
)
# Layers read what the first stage would make, or what the layer before them sets aside.
NO_STAGES = ("gemma3n_text", "gemma4_text", "longcat_flash")


@pytest.fixture(autouse=True)
def one_thread_a_rank() -> Iterator[None]:
    """Ranks in threads wait for each other: with more compute threads than cores, those spin meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work(engine: Engine, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """A whole prompt, the same in chunks, a mixed step with a prefix hit, and greedy tokens."""
    logits = engine.whole(PROMPT)
    pages = engine.pages(len(PROMPT))
    spans = ((0, 3), (3, 8), (8, len(PROMPT)))
    chunks = [engine.step([(PROMPT[a:b], pages, a)], every=True) for a, b in spans]
    shared = pages[:2] + engine.pages(len(PROMPT) - 2 * PAGE)
    mixed = engine.step([(PROMPT[2 * PAGE :], shared, 2 * PAGE), (PROMPT[:11], engine.pages(11), 0)])
    own, found = engine.pages(len(PROMPT) + OUTPUTS), list[int]()
    for at in range(OUTPUTS):
        row = (PROMPT, own, 0) if at == 0 else (tokens[at - 1 : at], own, len(PROMPT) + at - 1)
        found.append(int(engine.step([row]).argmax()))
    return logits, torch.cat(chunks), mixed, found


def compare(found: Any, whole: torch.Tensor, tokens: list[int]) -> None:
    logits, chunks, mixed, chosen = found
    assert (logits - whole).abs().max() <= LIMIT
    assert (chunks - whole).abs().max() <= LIMIT
    assert (mixed - whole[[len(PROMPT) - 1, 10]]).abs().max() <= LIMIT
    assert chosen == tokens


def some(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in names]


def test_every_family_with_experts_is_named_here(tmp_path: Path) -> None:
    named = {name for name in families() if "moe" in name or name.startswith(("deepseek", "glm_moe", "mixtral"))}
    assert named <= set(SPARSE) and set(SPARSE) <= set(families())


@pytest.mark.some(10)
@pytest.mark.parametrize("name", some(SPARSE))
def test_experts_over_ranks_give_the_logits_and_tokens_of_one(name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    one = Engine(path)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)
    for tp, ep in ((2, 2), (4, 2)) if name in FEW else ((4, 2),):
        compare(together(tp, lambda comm, ep=ep: work(engine_of(path, comm, ep), tokens))[0], whole, tokens)


@pytest.mark.some(18)
@pytest.mark.parametrize("name", some([name for name in families() if name not in (*NO_STAGES, *TOWERS)]))
def test_stages_of_layers_give_the_logits_and_tokens_of_one(name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    one = Engine(path)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)
    for pp, tp in ((2, 1), (3, 1), (2, 2)) if name in FEW else ((2, 2),):
        run = lambda groups, pp=pp, tp=tp: work(engine_in(path, groups, pp, tp), tokens)  # noqa: E731
        compare(staged(pp, tp, run)[0], whole, tokens)


def test_stages_of_ranks_with_different_experts(tmp_path: Path) -> None:
    path = checkpoint("qwen3_moe", tmp_path)
    one = Engine(path)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)
    compare(staged(2, 2, lambda groups: work(engine_in(path, groups, 2, 2, 2), tokens))[0], whole, tokens)


@pytest.mark.parametrize("name", NO_STAGES)
def test_models_whose_layers_all_read_the_embedding_have_no_stages(name: str, tmp_path: Path) -> None:
    found = describe(str(checkpoint(name, tmp_path)))
    ctx = BuildContext(Ops(), torch.float32, torch.device("meta"), mesh=Mesh.of(0, pp=2))
    with pytest.raises(ModelLoadError, match=r"pp_size 2: .*(first stage|share|sets aside)"):
        build_model(found.model_type, found.config, ctx, 64)


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_reads_its_layers_and_no_more(tied: bool, tmp_path: Path) -> None:
    from phloem.models._index import open_sources

    path = tiny_checkpoint("llama", tmp_path, num_hidden_layers=4, tie_word_embeddings=tied)
    found = describe(str(path))

    def load(mesh: Mesh) -> Any:
        model: Any = FAMILIES.module(found.model_type).build(
            found.config, BuildContext(Ops(), torch.float32, torch.device("cpu"), mesh=mesh), 64
        )
        sources, unused = open_sources(found, model.index, model.checkpoint_name)
        assert not unused
        model.index.pull(sources, "here", None)
        assert sum(source.bytes_read for source in sources.values()) == model.weight_bytes
        return model

    whole, parts = load(Mesh()), [load(Mesh.of(rank, pp=2)) for rank in range(2)]
    names = [set(part.weight_names()) for part in parts]
    assert names[0] | names[1] == set(whole.weight_names())
    shared = {"model.embed_tokens.weight"} if tied else set[str]()
    assert names[0] & names[1] == shared
    assert "model.embed_tokens.weight" in names[0] and "model.norm.weight" in names[1]
    assert ("lm_head.weight" in names[1]) != tied
    assert parts[0].stage.pools == parts[1].stage.pools and parts[0].stage.own | parts[1].stage.own == {0, 1, 2, 3}


def test_layers_are_shared_out_by_what_they_weigh() -> None:
    assert spans([1] * 8, 0, 2) == [(0, 4), (4, 8)]
    assert spans([1] * 8, 0, 3) in ([(0, 3), (3, 6), (6, 8)], [(0, 2), (2, 5), (5, 8)], [(0, 3), (3, 5), (5, 8)])
    assert spans([1] * 8, 4, 2) == [(0, 6), (6, 8)], "the head weighs as much as four of them"
    assert spans([5, 1, 1, 1, 1, 1], 0, 2) == [(0, 1), (1, 6)]
    assert spans([1, 1], 100, 2) == [(0, 1), (1, 2)]
    with pytest.raises(ModelLoadError, match=r"pp_size 3: 2 layers cannot be shared out; valid: 1, 2"):
        spans([1, 1], 0, 3)
