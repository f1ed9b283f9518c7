"""Drafters of blocks (DFlash): what they say is what plain torch says, answers are plain decoding's, and what does not
fit does not start."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash_support import MASK, block_states, dflash, dspark, speculator
from draft_spy import Said, spy_on
from draft_support import eagle, eagle3, said_by
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import phloem
from phloem.core.config import Config
from phloem.core.errors import ConfigError, PhloemError
from phloem.core.speculation import wanted
from phloem.engine.drafts.blocks import BlockWork
from phloem.speculation.controller import Chain, Controller
from phloem.speculation.drafters.dflash import Sight, read
from phloem.speculation.texts import Tally
from phloem.testing.checkpoints import tiny_checkpoint

LAYERS = 6
PLAIN: dict[str, Any] = {
    "ops": "reference",
    "dtype": "float32",
    "max_total_tokens": 400,
    "max_running_requests": 3,
    "random_seed": 5,
    "disable_speculative_adaptive": True,
    "debug_invariants": True,
}
PROMPTS = ["the dog a page table ", "Paris is sugar, and sugar is 1 2 3", "x"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    return spy_on(BlockWork, monkeypatch)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS)


class Reference:
    """What a drafter says behind a text, by transformers' model and `block_states`."""

    def __init__(self, target: Path, drafter: Path, inputs: Sequence[int], **options: Any) -> None:
        import transformers

        self.drafter, self.inputs, self.weights = drafter, inputs, load_file(drafter / "model.safetensors")
        self.skips, self.size = 1 - options.pop("anchor", False), options.pop("size", 8)
        self.scale = options.pop("scale", 1.0)
        self.options = options
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        self.embed = self.model.get_input_embeddings().weight.detach()
        self.say = said_by(drafter, self.model.get_output_embeddings().weight.detach())

    def drafts(self, tokens: list[int], room: int) -> list[int]:
        """As many as there is room for, a block at most."""
        with torch.no_grad():
            found = self.model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        features = torch.cat([found[number][0] for number in self.inputs], -1)
        size = min(self.size, room + self.skips)
        block = self.scale * self.embed[[tokens[-1], *[MASK] * (size - 1)]]
        states = block_states(self.drafter, features, block, **self.options)[self.skips :]
        if "markov_head.markov_w1.weight" not in self.weights:
            return [self.say(one) for one in states]
        # DSpark: each token changes the logits of the next.
        table, term = (self.weights[f"markov_head.markov_{name}.weight"] for name in ("w1", "w2"))
        own, found, plain = "d2t" in self.weights, [tokens[-1]], list[int]()
        head = self.weights["lm_head.weight"] if own else self.model.get_output_embeddings().weight.detach()
        for one in states:
            logits = one @ head.T
            bests = [int(some.argmax()) for some in (logits, logits + table[found[-1]] @ term.T)]
            alone, best = (one + (int(self.weights["d2t"][one]) if own else 0) for one in bests)
            found.append(best)
            plain.append(alone)
        assert found[1:] != plain
        return found[1:]


@pytest.fixture(scope="module")
def plainly(target: Path) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=str(target), speculative_algorithm="none", **PLAIN) as engine:
        yield engine


def check(target: Path, plainly: phloem.Engine | None, said: Said, reference: Reference, **values: Any) -> None:
    """The text is plain decoding's, and every draft is the reference's, near the text's end too."""
    head = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": str(reference.drafter)}
    with phloem.Engine(model_path=str(target), **{**PLAIN, **head, **values}) as engine:
        for prompt in PROMPTS:
            params = {"max_new_tokens": 23, "temperature": 0.0, "ignore_eos": True}
            said.found.clear()
            one: Any = engine.generate(prompt, params, return_logprob=True, logprob_start_len=0)
            tokens = [*(entry[1] for entry in one["meta_info"]["input_token_logprobs"]), *one["output_ids"]]
            for known, room, drafts in said.found:
                assert drafts == reference.drafts(tokens[:known], room)[: len(drafts)], known
                assert len(drafts) == min(room, reference.size - reference.skips)
            assert len({room for _, room, _ in said.found}) > 2
            if plainly is not None:
                expected: Any = plainly.generate(prompt, params)
                assert one["output_ids"] == expected["output_ids"]


@pytest.mark.slow
def test_a_drafter_says_what_plain_torch_says(target: Path, plainly: phloem.Engine, said: Said, tmp_path: Path) -> None:
    drafter = dflash(tmp_path)
    check(target, plainly, said, Reference(target, drafter, (1, 3, 5)))


def test_fewer_drafts_are_fewer_masks(target: Path, plainly: phloem.Engine, said: Said, tmp_path: Path) -> None:
    drafter = dflash(tmp_path, ids=(3, 0), layers=1, block=16)
    check(
        target, plainly, said, Reference(target, drafter, (4, 1), size=6, windows=((0, True),)), speculative_num_steps=5
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "scale"), [("qwen3", 1.0), ("qwen3_moe", 1.0), ("gemma3_text", 1.5)])
def test_other_models(family: str, scale: float, said: Said, tmp_path: Path) -> None:
    """Gemma multiplies its embeddings; a drafter's factor counts from the table itself."""
    target = tiny_checkpoint(family, tmp_path / "target", num_hidden_layers=LAYERS)
    config = json.loads((target / "config.json").read_text())
    assert config["hidden_size"] == 32 and config["vocab_size"] == 384
    drafter = dflash(tmp_path / "drafter", ids=(1, 2, 3, 4), block=5)
    told = json.loads((drafter / "config.json").read_text())
    told["dflash_config"]["input_embedding_scale"] = scale
    (drafter / "config.json").write_text(json.dumps(told))
    check(target, None, said, Reference(target, drafter, (2, 3, 4, 5), size=5, scale=scale))


SPECULATORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the model's head": ({}, {}),
    "a vocabulary of its own": ({"vocab": 96}, {}),
    "sampled from the anchor": ({"vocab": 96, "sample_from_anchor": True}, {"anchor": True}),
}


@pytest.mark.slow
@pytest.mark.some(1)
@pytest.mark.parametrize("kind", list(SPECULATORS))
def test_speculators_files(target: Path, plainly: phloem.Engine, said: Said, tmp_path: Path, kind: str) -> None:
    made, told = SPECULATORS[kind]
    drafter = speculator(tmp_path, **made)
    check(target, plainly, said, Reference(target, drafter, (1, 3, 5), **told))


@pytest.mark.slow
def test_dspark_tells_each_token_by_the_one_before(
    target: Path, plainly: phloem.Engine, said: Said, tmp_path: Path
) -> None:
    reference = Reference(target, dspark(tmp_path / "own"), (1, 3, 5), size=5, anchor=True)
    check(target, plainly, said, reference)
    drafter = speculator(
        tmp_path / "other", vocab=96, speculators_model_type="dspark", sample_from_anchor=False, markov_rank=16
    )
    check(target, plainly, said, Reference(target, drafter, (1, 3, 5)))


SLIDING = {"use_sliding_window": True, "sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWS: dict[str, tuple[dict[str, Any], tuple[tuple[int, bool], ...]]] = {
    "causal in a window": (SLIDING, ((11, False), (0, True))),
    "both ways in a window": ({**SLIDING, "is_causal": False}, ((11, True), (0, True))),
    "causal everywhere": ({"is_causal": True}, ((0, False), (0, False))),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(WINDOWS))
def test_windows(target: Path, plainly: phloem.Engine, said: Said, tmp_path: Path, kind: str) -> None:
    config, windows = WINDOWS[kind]
    check(target, plainly, said, Reference(target, dflash(tmp_path, **config), (1, 3, 5), windows=windows))


def repeating(path: Path, strength: float = 0.3) -> tuple[Path, Path]:
    """A model that mostly says its last token again, and a drafter that says what it sees most of."""
    target = tiny_checkpoint("llama", path / "model", num_hidden_layers=LAYERS)
    weights = load_file(target / "model.safetensors")
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.mul_(strength)
    table = torch.nn.functional.normalize(weights["model.embed_tokens.weight"], dim=-1)
    weights["model.embed_tokens.weight"], weights["lm_head.weight"] = table, 3.0 * table
    weights["model.norm.weight"] = torch.ones(32)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    drafter = dflash(path / "drafter", layers=1)
    made = load_file(drafter / "model.safetensors")
    at = "layers.0.self_attn"
    made["fc.weight"] = torch.cat([torch.eye(32), torch.zeros(32, 64)], 1)
    made[f"{at}.q_proj.weight"].zero_()  # so that all counts alike
    made[f"{at}.v_proj.weight"] = torch.eye(32)
    out = torch.zeros(32, 64)
    out[:16, :16] = out[16:, 32:48] = 8.0 * torch.eye(16)  # the first head of each pair
    made[f"{at}.o_proj.weight"] = out
    made["layers.0.mlp.down_proj.weight"].zero_()
    for name in ("hidden_norm", "norm", "layers.0.input_layernorm"):
        made[f"{name}.weight"] = torch.ones(32)
    save_file(made, drafter / "model.safetensors")
    return target, drafter


def test_drafts_that_are_right_are_accepted(tmp_path: Path) -> None:
    target, drafter = repeating(tmp_path, 0.0)
    head = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": str(drafter)}
    with phloem.Engine(model_path=str(target), **PLAIN, **head) as engine:
        params = {"max_new_tokens": 33, "temperature": 0.0, "ignore_eos": True}
        answer: Any = engine.generate(input_ids=[50] * 14, sampling_params=params)
    meta = answer["meta_info"]
    assert answer["output_ids"] == [50] * 33
    # The prompt's own step gives one token; four steps of eight tokens give the others.
    assert meta["spec_verify_ct"] == 5 and meta["spec_num_correct_drafts"] == meta["spec_num_proposed_drafts"] == 28


# Little memory and short steps: requests are preempted, prompts are cut, and drafts verified beside them.
TIGHT: dict[str, Any] = {
    "max_total_tokens": 320,
    "max_running_requests": 4,
    "chunked_prefill_size": 24,
    "random_seed": 5,
    "debug_invariants": True,
}
PARAMS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(4, 40),
        "temperature": st.sampled_from([0.0, 0.0, 0.4, 1.0]),
        "sampling_seed": st.integers(0, 3),
        "ignore_eos": st.booleans(),
    },
    optional={
        "top_p": st.sampled_from([0.5, 0.9]),
        "frequency_penalty": st.sampled_from([0.1, 1.5]),
        "min_new_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(st.integers(4, 300), max_size=10),
    },
)
IDS = st.lists(st.sampled_from([50, 50, 50, 9, 120, 77]), min_size=1, max_size=70)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return repeating(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def engines(pair: tuple[Path, Path]) -> Iterator[list[phloem.Engine]]:
    """Plain; drafting always; drafting by measured times."""
    head = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": str(pair[1])}
    always = {**head, "disable_speculative_adaptive": True}
    made = [
        phloem.Engine(model_path=str(pair[0]), **TIGHT, **values)
        for values in ({"speculative_algorithm": "none"}, always, head)
    ]
    yield made
    for engine in made:
        engine.shutdown()


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(st.tuples(IDS, PARAMS), min_size=1, max_size=7))
def test_answers_are_those_of_plain_decoding(
    engines: list[phloem.Engine], asked: list[tuple[list[int], dict[str, Any]]]
) -> None:
    ids = [one for one, _ in asked]
    answers: list[Any] = [
        engine.generate(input_ids=ids, sampling_params=[dict(params) for _, params in asked]) for engine in engines
    ]
    for got in answers[1:]:
        assert [one["output_ids"] for one in got] == [one["output_ids"] for one in answers[0]]


def each_answer(engine: phloem.Engine, ids: list[list[int]], params: Any) -> list[Any]:
    found: Any = engine.generate(input_ids=ids, sampling_params=params)
    return found


@pytest.mark.slow
def test_some_of_those_drafts_count_and_some_do_not(engines: list[phloem.Engine]) -> None:
    """Also behind prompts that are there already, and a prompt of one token."""
    for heat in (0.0, 1.0):
        params = {"max_new_tokens": 40, "temperature": heat, "ignore_eos": True, "sampling_seed": 1}
        ids = [[50] * 40, [50] * 40 + [9], [50] * 40 + [77, 77], [50]]
        want, got = (each_answer(engine, ids, params) for engine in engines[:2])
        assert [one["output_ids"] for one in got] == [one["output_ids"] for one in want]
        metas = [one["meta_info"] for one in got]
        right = sum(meta["spec_num_correct_drafts"] for meta in metas)
        assert 0 < right < sum(meta["spec_num_proposed_drafts"] for meta in metas)


@pytest.mark.slow
def test_dspark_draws_by_the_requests_own_settings(engines: list[phloem.Engine], pair: tuple[Path, Path]) -> None:
    """Requests that draw and that do not, of one step, with a term that favours what was said last."""
    drafter, made = dspark(pair[0].parent / "dspark", layers=1), load_file(pair[1] / "model.safetensors")
    made |= {f"markov_head.markov_{name}.weight": torch.zeros(384, 32) for name in ("w1", "w2")}
    table = load_file(pair[0] / "model.safetensors")["model.embed_tokens.weight"]
    made["markov_head.markov_w1.weight"], made["markov_head.markov_w2.weight"] = table, table.clone()
    path = changed(drafter.parent / "followed", drafter, {}, markov_rank=32)
    save_file(made, Path(path) / "model.safetensors")
    head = {"speculative_algorithm": "DSPARK", "speculative_draft_model_path": path}
    params = [{"max_new_tokens": 40, "temperature": heat, "sampling_seed": 1} for heat in (0.0, 1.0, 0.5)]
    ids = [[50] * 20, [50] * 20, [9, 50] * 9]
    with phloem.Engine(model_path=str(pair[0]), disable_speculative_adaptive=True, **TIGHT, **head) as engine:
        want, got = (each_answer(one, ids, params) for one in (engines[0], engine))
    assert [one["output_ids"] for one in got] == [one["output_ids"] for one in want]
    metas = [one["meta_info"] for one in got]
    right = sum(meta["spec_num_correct_drafts"] for meta in metas)
    assert 0 < right < sum(meta["spec_num_proposed_drafts"] for meta in metas)


def changed(path: Path, drafter: Path, tensors: dict[str, Tensor | None], **config: Any) -> str:
    """A copy with some tensors and settings put in, or left out (None)."""
    path.mkdir()
    found: dict[str, Any] = {**load_file(drafter / "model.safetensors"), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**json.loads((drafter / "config.json").read_text()), **config}))
    return str(path)


def reads(*ids: int, **more: Any) -> dict[str, Any]:
    return {"dflash_config": {"mask_token_id": MASK, "target_layer_ids": list(ids), **more}}


SPARK = {"speculators_model_type": "dspark", "aux_hidden_state_layer_ids": [1]}
BAD: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], str]] = {
    "another hidden size": ({"fc.weight": torch.zeros(48, 144)}, {}, "hidden size is 32"),
    "another number of states": ({}, reads(0, 2), "2 states of it take 32 x 64"),
    "another vocabulary": ({}, {"vocab_size": 500}, "a vocabulary of 500, not of 384"),
    "a layer that is not there": ({}, reads(0, 2, 9), "these layers are not there"),
    "the last layer": ({}, reads(0, 2, 5), "the last layer's output is not kept"),
    "a deeper model": ({}, {"num_target_layers": 28}, "a model of 28 layers, not of 6"),
    "no layers named": ({}, {"dflash_config": {"mask_token_id": MASK}}, "no target_layer_ids"),
    "no mask": ({}, {"dflash_config": {"target_layer_ids": [0, 2, 4]}}, "mask_token_id is None"),
    "a mask beyond the vocabulary": ({}, reads(0, 2, 4, mask_token_id=384), "none of the model's 384"),
    "a block of one": ({}, {"block_size": 1}, "block_size is 1, expected 2 to 32"),
    "a block too long": ({}, {"block_size": 64}, "block_size is 64, expected 2 to 32"),
    "another number of layers": ({}, {"num_hidden_layers": 3}, "num_hidden_layers is 3, and it has 2"),
    "a tensor too few": ({"norm.weight": None}, {}, "no tensor norm.weight"),
    "a weight too few": ({"layers.1.mlp.up_proj.weight": None}, {}, "layers.1.mlp.up_proj.weight"),
    "a tensor too many": ({"extra.weight": torch.zeros(3)}, {}, "tensors that no such head has"),
    "DFlash 2": ({"candidate_selector.hidden_projection.weight": torch.zeros(4, 32)}, {}, "a drafter of DFlash 2"),
    "Domino": ({"correction_head.weight": torch.zeros(4, 32)}, {}, "a drafter of Domino"),
    "half a term": ({"markov_head.markov_w1.weight": torch.zeros(384, 4)}, {"markov_rank": 4}, "no tensor markov_head"),
    "a rank without a term": ({}, {"markov_rank": 4}, "markov_rank 4, and tensors of 0"),
    "another term": ({}, {"markov_rank": 4, "markov_head_type": "gated"}, "markov_head_type 'gated'"),
    "a speculator that does not say": ({}, SPARK, "it does not say sample_from_anchor"),
    "something new": ({}, reads(0, 2, 4, fc_layernorm=True), "fc_layernorm, which is not known"),
    "another speculator": ({}, {"speculators_model_type": "peagle"}, "of kind peagle, not dflash or dspark"),
    "a list of settings": ({}, {"dflash_config": [1]}, "dflash_config is [1], expected an object"),
    "a scale of nothing": ({}, reads(0, 2, 4, input_embedding_scale=0), "input_embedding_scale is 0, expected"),
    "a map of another length": ({"lm_head.weight": torch.zeros(96, 32)}, {}, "no d2t of that length"),
    "a row for a matrix": ({"fc.weight": torch.zeros(32)}, {}, "fc.weight is [32], expected 2 dimensions"),
    "a number for a row": ({"hidden_norm.weight": torch.tensor(1.0)}, {}, "hidden_norm.weight is [], expected 1 dim"),
    "a norm too few": ({"hidden_norm.weight": None}, {}, "no tensor hidden_norm.weight, which every DFlash"),
    "a layer without a number": ({"layers.x.norm.weight": torch.zeros(3)}, {}, "and it has 3 layers"),
    "a word for a window": ({}, {"use_sliding_window": True, "sliding_window": "x"}, "sliding_window is 'x', expected"),
    "a window below 0": ({}, {"use_sliding_window": True, "sliding_window": -5}, "sliding_window is -5, expected"),
    "a word for the first window": ({}, {"max_window_layers": "x"}, "max_window_layers is 'x', expected"),
    "a word for its tokens": ({}, {"draft_vocab_size": "x"}, "draft_vocab_size is 'x', expected"),
    "a list for the model's layers": ({}, {"num_target_layers": [6]}, "num_target_layers is [6], expected"),
    "a word for a rank": ({}, {"markov_rank": "x"}, "markov_rank is 'x', expected"),
    "a number for kinds of layers": ({}, {"layer_types": 5}, "layer_types is 5, expected a list of names"),
    "kinds of layers in lists": ({}, {"layer_types": [["full_attention"]] * 2}, "expected a list of names"),
    "a number for a class": ({}, {"architectures": [5]}, "architectures is [5], expected a list of names"),
    "rotation of pictures": ({}, {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "by height"),
}  # fmt: skip


def refused(target: Path, algorithm: str, drafter: str, **values: Any) -> str:
    head = {"speculative_algorithm": algorithm, "speculative_draft_model_path": drafter}
    with pytest.raises(PhloemError) as caught:
        phloem.Engine(model_path=str(target), **PLAIN, **head, **values)
    return str(caught.value)


@pytest.mark.parametrize("name", list(BAD))
def test_what_does_not_fit_is_refused_before_ready(target: Path, tmp_path: Path, name: str) -> None:
    tensors, config, reason = BAD[name]
    drafter = changed(tmp_path / "bad", dflash(tmp_path / "drafter"), tensors, **config)
    assert reason in refused(target, "DFLASH", drafter)


def test_heads_and_drafters_are_told_apart(target: Path, tmp_path: Path) -> None:
    drafter, one, three = dflash(tmp_path / "d"), eagle(tmp_path / "one"), eagle3(tmp_path / "three")
    assert "this is an EAGLE head: speculative_algorithm EAGLE runs it" in refused(target, "DFLASH", str(one))
    assert "this is an EAGLE-3 head: EAGLE3 runs it" in refused(target, "DFLASH", str(three))
    for algorithm in ("EAGLE", "EAGLE3"):
        assert "this is a DFlash drafter, no EAGLE head" in refused(target, algorithm, str(drafter))
    assert "DFlashDraftModel is a head, not a model" in refused(target, "STANDALONE", str(drafter))
    assert "a block of 8 places gives 7 drafts; 8 were asked for" in refused(
        target, "DFLASH", str(drafter), speculative_num_steps=8
    )


def test_settings() -> None:
    """SGLang's flags count the token before the drafts, vLLM's JSON does not; nobody has to say a number."""
    path = {"speculative_draft_model_path": "d"}
    sglang = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": 16, **path}
    vllm = {"speculative_config": '{"method": "dflash", "model": "d", "num_speculative_tokens": 15}'}
    dspark = {"speculative_algorithm": "DSPARK", **path}
    assert wanted(Config.from_flat({"model_path": "m", **dspark})).algorithm == "dflash"
    for said, counted in ((sglang, True), (vllm, True), ({"speculative_algorithm": "dflash", **path}, False)):
        found = wanted(Config.from_flat({"model_path": "m", **said}))
        assert (found.algorithm, found.drafts, found.draft_model, found.counted) == ("dflash", 15, "d", counted)
    with pytest.raises(ConfigError, match="one token for each place of a block"):
        wanted(Config.from_flat({"model_path": "m", **sglang, "speculative_eagle_topk": 4}))


def test_files_say_what_a_layer_sees() -> None:
    def seen(**config: Any) -> tuple[Sight, ...]:
        base = {"num_hidden_layers": 2, "block_size": 8, "mask_token_id": 1, "target_layer_ids": [0]}
        return read({**base, **config}, "d").sights

    assert seen() == (Sight(0, True),) * 2
    assert seen(sliding_window=9) == (Sight(0, True),) * 2  # not used
    late = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    assert seen(**late) == (Sight(0, True), Sight(9, False))
    assert seen(**late, is_causal=False) == (Sight(0, True), Sight(9, True))
    speculators = {"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": [1], **late}
    assert seen(**speculators) == (Sight(0, True), Sight(9, False))
    assert seen(**speculators, sliding_window_non_causal=True) == (Sight(0, True), Sight(9, True))


def test_a_pass_has_one_price_however_long_the_drafts() -> None:
    """Where rows are cheap beside a pass, drafts that come together pay where the same ones do not pay one by one."""

    def lengths(once: bool) -> int:
        controller = Controller(15, 24, share=1.5)
        for _ in range(6):
            controller.plain(1, True, 1.0)
        chain = Chain(15, "dflash", 0, True, Tally(), modelled=True, once=once)
        for _ in range(40):
            controller.judged(chain, 15, 15)
        return controller.lengths([chain], True)[0]

    assert lengths(True) >= 7 and lengths(False) == 0
