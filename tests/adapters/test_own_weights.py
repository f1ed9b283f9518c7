"""Adapters with weights of their own: heads, embeddings, norms, whole modules, trained and added tokens, as PEFT has
them, beside rows of others in one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapter_support import logprobs, ours, write_adapter
from engine_door import http_door
from native_support import built
from safetensors.torch import load_file, save_file

from phloem import Engine
from phloem.cli import main
from phloem.core.errors import BadRequest, PhloemError
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

pytest.importorskip("peft", reason="PEFT says what is right")
pytestmark = pytest.mark.slow
TOKENS = [7, 99, 31, 250, 12, 12, 301, 44, 5, 180]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
PROMPTS = [[7, 99, 31, 250], [12, 301, 44], [5, 180, 7, 7, 99], [44, 44, 31], [250, 301]]
KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head alone": {"target_modules": ["lm_head"], "r": 7},
    "dora head": {"target_modules": ["down_proj", "lm_head"], "use_dora": True},
    "head with bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True},
    "head and embedding": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"target_modules": ["up_proj"], "modules_to_save": ["input_layernorm", "norm"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "down_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 301, 44]},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [99, 12], "lm_head": [3, 250, 12]},
    },
}
TIED = ["head", "embedding", "saved head", "saved embedding", "tokens"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp
    found = {name: tiny_checkpoint(name, made(name)) for name in ("llama", "qwen2")}
    return {**found, "tied": tiny_checkpoint("llama", made("tied"), tie_word_embeddings=True)}


def engine_of(path: Path, **settings: Any) -> Engine:
    usual: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 4096, "max_lora_rank": 16}
    return Engine(model_path=str(path), **{**usual, "enable_lora": True, "debug_invariants": True, **settings})


@pytest.fixture(scope="module")
def engines(bases: dict[str, Path]) -> Iterator[dict[str, Engine]]:
    made = {name: engine_of(path) for name, path in bases.items()}
    yield made
    for engine in made.values():
        engine.shutdown()


CASES = [("llama", kind) for kind in KINDS] + [("tied", kind) for kind in TIED]
CASES += [("qwen2", "whole modules"), ("qwen2", "head")]


@pytest.mark.some(7)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_are_those_of_peft(
    family: str, kind: str, bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path
) -> None:
    adapter, engine = write_adapter(bases[family], tmp_path / "adapter", **KINDS[kind]), engines[family]
    engine.load_lora_adapter("one", str(adapter))
    want, base = logprobs(bases[family], adapter, TOKENS)[:-1], logprobs(bases[family], None, TOKENS)[:-1]
    torch.testing.assert_close(ours(engine, TOKENS, VOCAB, lora_path="one"), want, rtol=1e-4, atol=1e-4)
    assert (want - base).abs().max() > 0.05  # an adapter that does nothing would prove nothing
    torch.testing.assert_close(ours(engine, TOKENS, VOCAB), base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_trained_tokens_are_merged(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter, out = write_adapter(bases[family], tmp_path / "adapter", **KINDS["tokens"]), tmp_path / "merged"
    assert main(["merge", str(bases[family]), str(adapter), str(out)]) == 0
    want = logprobs(bases[family], adapter, TOKENS)
    torch.testing.assert_close(logprobs(out, None, TOKENS), want, rtol=1e-4, atol=1e-4)
    wrong = _with(adapter, tmp_path / "wrong", {}, trainable_token_indices=[5])
    assert main(["merge", str(bases[family]), wrong, str(tmp_path / "none")]) == 1


@pytest.mark.parametrize("target", [["embed_tokens"], ["q_proj"]])
def test_tied_matrices_stay_tied_where_the_adapter_says_so(
    target: list[str], bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path
) -> None:
    saved = {} if target == ["embed_tokens"] else {"modules_to_save": ["embed_tokens"]}
    tied = {"target_modules": target, "ensure_weight_tying": True, **saved}
    adapter = write_adapter(bases["tied"], tmp_path / "adapter", **tied)
    engines["tied"].load_lora_adapter("tied", str(adapter))
    want = logprobs(bases["tied"], adapter, TOKENS)[:-1]
    torch.testing.assert_close(ours(engines["tied"], TOKENS, VOCAB, lora_path="tied"), want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folders(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("adapters")
    kinds = {"h": "head and embedding", "s": "saved both", "n": "norms"}
    found = {
        name: write_adapter(bases["llama"], made / name, seed, strong=2.0, **KINDS[kind])
        for seed, (name, kind) in enumerate(kinds.items(), 3)
    }
    return {**found, "p": write_adapter(bases["llama"], made / "p", 9, strong=2.0)}


def ids(answers: Any) -> list[list[int]]:
    return [one["output_ids"] for one in answers]


TABLES = [
    pytest.param({}, id="reference"),
    pytest.param(
        {"ops": "native", "dtype": "auto", "kv_cache_dtype": "bfloat16", "check_step_graph": True},
        id="native",
        marks=pytest.mark.skipif(not built(), reason="the native library is not built"),
    ),
]


@pytest.mark.parametrize("settings", TABLES)
def test_rows_of_all_kinds_in_one_batch_give_what_each_gives_alone(
    settings: dict[str, Any], bases: dict[str, Path], folders: dict[str, Path]
) -> None:
    names = ["h", None, "s", "p", "n"]
    with engine_of(bases["llama"], **settings) as engine:
        plain = [ids([engine.generate(input_ids=prompt, sampling_params=GREEDY)])[0] for prompt in PROMPTS]
        for name, folder in folders.items():
            engine.load_lora_adapter(name, str(folder))
        alone = [
            ids([engine.generate(input_ids=prompt, sampling_params=GREEDY, lora_path=name)])[0]
            for prompt, name in zip(PROMPTS, names, strict=True)
        ]
        together = ids(engine.generate(input_ids=PROMPTS, sampling_params=GREEDY, lora_path=names))
        assert together == alone and together[1] == plain[1]
        # One prompt with each: pages of one are never another's.
        long = list(range(20, 120))
        same: Any = engine.generate(input_ids=[long] * 5, sampling_params=GREEDY, lora_path=names)
        assert len({tuple(one) for one in ids(same)}) == 5
        assert [one["meta_info"]["cached_tokens"] for one in same] == [0] * 5
        again: Any = engine.generate(input_ids=long, sampling_params=GREEDY, lora_path="s")
        assert again["output_ids"] == ids(same)[2] and again["meta_info"]["cached_tokens"] > 0
        # Sampled rows, penalties and log probabilities go by whole rows of each one's own head.
        drawn = {"temperature": 0.9, "top_p": 0.8, "sampling_seed": 5, "max_new_tokens": 6, "repetition_penalty": 1.2}
        mixed: Any = engine.generate(input_ids=PROMPTS, sampling_params=drawn, lora_path=names, return_logprob=True)
        single: Any = [
            engine.generate(input_ids=prompt, sampling_params=drawn, lora_path=name, return_logprob=True)
            for prompt, name in zip(PROMPTS, names, strict=True)
        ]
        assert ids(mixed) == ids(single)


@pytest.mark.skipif(not built(), reason="the native library is not built")
def test_other_rows_have_the_bits_that_they_have_without(bases: dict[str, Path], folders: dict[str, Path]) -> None:
    def values(engine: Engine, **fields: Any) -> Any:
        found: Any = engine.generate(sampling_params=GREEDY, return_logprob=True, **fields)
        return [one["meta_info"]["output_token_logprobs"] for one in (found if isinstance(found, list) else [found])]

    with engine_of(bases["llama"], ops="invariant", dtype="auto", disable_radix_cache=True) as engine:
        for name, folder in folders.items():
            engine.load_lora_adapter(name, str(folder))
        (base,), (plain,) = (values(engine, input_ids=PROMPTS[0], lora_path=name) for name in (None, "p"))
        beside = values(engine, input_ids=[PROMPTS[0]] * 4, lora_path=["h", None, "p", "s"])
    assert beside[1] == base and beside[2] == plain and beside[0] != base


@pytest.mark.skipif(not built(), reason="the native library is not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_has_its_bits_in_any_company_and_as_part_of_a_prompt(
    dtype: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    kinds = {**{name: KINDS[name] for name in ("head and embedding", "tokens")}, "all": {}}
    kinds["all"] = {"target_modules": ["embed_tokens", "lm_head"], "r": 16, "lora_bias": False}
    kinds["all tokens"] = {"target_modules": ["q_proj"], "trainable_token_indices": list(range(4, VOCAB))}
    asked = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}

    def bits(answer: Any, part: str) -> list[float]:
        return [value for value, *_ in answer["meta_info"][f"{part}_token_logprobs"]]

    with engine_of(bases["llama"], ops="invariant", dtype=dtype, disable_radix_cache=True) as engine:
        for number, (name, kind) in enumerate(kinds.items()):
            adapter = write_adapter(bases["llama"], tmp_path / str(number), number, strong=2.0, **kind)
            engine.load_lora_adapter(name, str(adapter))
        for name in kinds:
            several: Any = engine.generate(
                input_ids=PROMPTS, sampling_params=asked, lora_path=name, return_logprob=True
            )
            for prompt, one in zip(PROMPTS, several, strict=True):
                alone: Any = engine.generate(
                    input_ids=prompt, sampling_params=asked, lora_path=name, return_logprob=True
                )
                assert bits(one, "output") == bits(alone, "output"), name
                whole = [*prompt, *one["output_ids"]]
                later: Any = engine.generate(
                    input_ids=whole, sampling_params={"max_new_tokens": 0}, lora_path=name, return_logprob=True,
                    logprob_start_len=0,
                )  # fmt: skip
                assert bits(later, "input")[len(prompt) :] == bits(one, "output"), name


def resized(base: Path, out: Path, more: int, **config: Any) -> torch.Tensor:
    """An adapter of a base with added tokens, as PEFT saves it; the log probabilities of its model behind TOKENS and
    the added ones."""
    import peft
    import transformers

    torch.manual_seed(4)
    make: Any = transformers.AutoModelForCausalLM
    model = make.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(VOCAB + more, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[VOCAB:].normal_(0.0, 1.0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    made = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
    made.save_pretrained(out, save_embedding_layers=True)
    with torch.inference_mode():
        return made.eval()(torch.tensor([[*TOKENS, *range(VOCAB, VOCAB + more)]])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("tied", {}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
    ids=["llama", "tied", "targets", "tied target"],
)
def test_added_tokens_are_the_adapters_alone(
    family: str, config: dict[str, Any], bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path
) -> None:
    engine, more = engines[family], 5
    want = resized(bases[family], tmp_path / "adapter", more, **config)
    engine.load_lora_adapter("longer", str(tmp_path / "adapter"))
    tokens = [*TOKENS, *range(VOCAB, VOCAB + more)]
    answer: Any = engine.generate(
        input_ids=tokens, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0,
        top_logprobs_num=VOCAB, lora_path="longer",
    )  # fmt: skip
    for row, pairs in enumerate(answer["meta_info"]["input_top_logprobs"][1:]):
        found = torch.tensor([value for value, *_ in pairs])
        torch.testing.assert_close(found, want[row][[one for _, one, *_ in pairs]], rtol=1e-4, atol=1e-4)
    # What it says may be an added token, and is what its model says; others beside it never say one.
    said: Any = engine.generate(
        input_ids=[tokens, TOKENS], sampling_params={**GREEDY, "max_new_tokens": 1}, lora_path=["longer", None]
    )
    assert said[0]["output_ids"] == [int(want[-1].argmax())]
    forced = {**GREEDY, "logit_bias": {str(VOCAB + 2): 100.0}, "presence_penalty": 0.5}
    both: Any = engine.generate(
        input_ids=[tokens, TOKENS], sampling_params=[forced, {**GREEDY, "presence_penalty": 0.5}],
        lora_path=["longer", None],
    )  # fmt: skip
    assert set(both[0]["output_ids"]) == {VOCAB + 2} and max(both[1]["output_ids"]) < VOCAB
    stopped: Any = engine.generate(
        input_ids=tokens, sampling_params={**forced, "stop_token_ids": [VOCAB + 2]}, lora_path="longer"
    )
    assert stopped["meta_info"]["finish_reason"]["type"] == "stop"
    masked: Any = engine.generate(
        input_ids=[tokens, TOKENS], sampling_params={"temperature": 0, "max_new_tokens": 4, "regex": "[a-z]{4,9}"},
        lora_path=["longer", None],
    )  # fmt: skip
    assert all(max(one["output_ids"]) < VOCAB and one["text"].isalpha() for one in masked)


def test_a_head_may_have_fewer_tokens_than_the_embedding(
    bases: dict[str, Path], engines: dict[str, Engine], folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = {f"{_AT}model.embed_tokens.weight": torch.randn(VOCAB + 3, 32)}
    engines["llama"].load_lora_adapter("narrow", _with(folders["p"], tmp_path / "narrow", rows))
    answer: Any = engines["llama"].generate(
        input_ids=[7, VOCAB + 1, 9], sampling_params={**GREEDY, "repetition_penalty": 1.3}, lora_path="narrow",
        return_logprob=True, logprob_start_len=0,
    )  # fmt: skip
    said, unsaid = (answer["meta_info"][key] for key in ("output_token_logprobs", "input_token_logprobs"))
    assert all(-100 < value <= 0 for value, *_ in said) and max(answer["output_ids"]) < VOCAB
    assert unsaid[1][0] < -1000 and -100 < unsaid[2][0] <= 0  # nobody says it; what follows it, they do


def test_tokens_of_others_are_refused(bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path) -> None:
    engine = engines["llama"]
    resized(bases["llama"], tmp_path / "adapter", 5)
    engine.load_lora_adapter("longer", str(tmp_path / "adapter"))
    engine.load_lora_adapter("same", str(write_adapter(bases["llama"], tmp_path / "same")))
    for name, token, most in ((None, VOCAB, VOCAB), ("same", VOCAB, VOCAB), ("longer", VOCAB + 5, VOCAB + 5)):
        with pytest.raises(BadRequest, match=rf"token id {token} is not in \[0, {most}\)"):
            engine.generate(input_ids=[5, token], sampling_params=GREEDY, lora_path=name)
        with pytest.raises(BadRequest, match=rf"stop_token_ids: token id {token} is not in"):
            engine.generate(input_ids=[5], sampling_params={**GREEDY, "stop_token_ids": [token]}, lora_path=name)


def test_a_place_is_given_up_with_all_that_it_has_and_taken_again(
    bases: dict[str, Path], folders: dict[str, Path]
) -> None:
    with engine_of(bases["llama"], max_loaded_loras=1) as engine:
        answers: dict[str, list[int]] = {}
        for _ in range(2):
            for name in ("h", "s", "n", "p"):
                engine.load_lora_adapter(name, str(folders[name]))
                said: Any = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, lora_path=name)
                assert answers.setdefault(name, said["output_ids"]) == said["output_ids"]
        assert len({tuple(one) for one in answers.values()}) == 4
        state = engine.get_server_info()["internal_states"][0]
        assert state["loras_loaded"] == 1
        engine.unload_lora_adapter("p")
        assert ids([engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, lora_path="s")])[0] == answers["s"]


def test_memory_for_adapters_counts_whole_matrices(bases: dict[str, Path], folders: dict[str, Path]) -> None:
    with engine_of(bases["llama"], lora_memory="60KB") as engine:  # two matrices of the vocabulary take 98 KB
        with pytest.raises(PhloemError, match="all may take 6"):
            engine.load_lora_adapter("s", str(folders["s"]))
        engine.load_lora_adapter("n", str(folders["n"]))
        assert engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, lora_path="n")


def test_they_come_as_tensors_and_over_http(bases: dict[str, Path], folders: dict[str, Path]) -> None:
    config = json.loads((folders["s"] / "adapter_config.json").read_text())
    with engine_of(bases["llama"]) as engine, http_door(engine) as url, httpx.Client(base_url=url, timeout=60) as http:
        engine.load_lora_adapter_from_tensors("sent", load_file(folders["s"] / "adapter_model.safetensors"), config)
        for name in ("s", "h"):
            answer = http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(folders[name])})
            assert answer.status_code == 200, answer.text
        body = {"input_ids": [PROMPTS[0]] * 4, "sampling_params": GREEDY, "lora_path": ["sent", "s", "h", None]}
        found = ids(http.post("/generate", json=body).json())
        assert found[0] == found[1] and len({tuple(one) for one in found}) == 3
        bad = http.post("/generate", json={"input_ids": [VOCAB], "sampling_params": GREEDY, "lora_path": "s"})
        assert bad.status_code == 400 and f"[0, {VOCAB})" in bad.text


def _with(good: Path, out: Path, tensors: dict[str, torch.Tensor | None], **config: Any) -> str:
    out.mkdir()
    settings = {**json.loads((good / "adapter_config.json").read_text()), **config}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    found = {**load_file(good / "adapter_model.safetensors"), **tensors}
    save_file({k: v for k, v in found.items() if v is not None}, out / "adapter_model.safetensors")
    return str(out)


_AT = "base_model.model."
_DELTA = f"{_AT}model.embed_tokens.token_adapter.trainable_tokens_delta"
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({f"{_AT}model.embed_tokens.weight": torch.ones(VOCAB - 1, 32)}, {}, r"another base.*embed_tokens\.weight"),
    ({f"{_AT}lm_head.weight": torch.ones(VOCAB + 3, 32)}, {}, "its head gives 387 tokens, its embedding knows 384"),
    ({f"{_AT}lm_head.weight": torch.ones(VOCAB, 31)}, {}, r"lm_head\.weight is \[384, 31\]"),
    ({f"{_AT}model.norm.weight": torch.ones(31)}, {}, r"model\.norm\.weight is \[31\]"),
    ({f"{_AT}model.layers.0.self_attn.k_proj.weight": torch.ones(32, 33)}, {}, r"k_proj\.weight is \[32, 33\]"),
    ({f"{_AT}model.layers.9.input_layernorm.weight": torch.ones(32)}, {}, r"model\.layers\.9\.input_layernorm \(whole"),
    ({f"{_AT}model.embed_tokens.lora_magnitude_vector.weight": torch.ones(32)}, {}, "lora_magnitude_vector alone"),
    (
        {f"{_AT}lm_head.lora_A.weight": torch.ones(4, 31), f"{_AT}lm_head.lora_B.weight": torch.ones(VOCAB, 4)},
        {},
        r"lm_head is of 31 inputs and 384 outputs",
    ),
    (
        {
            f"{_AT}model.embed_tokens.lora_embedding_A": torch.ones(4, VOCAB - 2),
            f"{_AT}model.embed_tokens.lora_embedding_B": torch.ones(32, 4),
        },
        {},
        "embed_tokens is of 382 inputs",
    ),
    ({_DELTA: torch.ones(2, 32)}, {"trainable_token_indices": [1, VOCAB]}, "trainable_token_indices has not as many"),
    ({_DELTA: torch.ones(2, 32)}, {"trainable_token_indices": [1]}, "trainable_token_indices has not as many"),
    ({_DELTA: torch.ones(2, 32)}, {"trainable_token_indices": [1, 1]}, "trainable_token_indices has not as many"),
    ({_DELTA: torch.ones(1, 31)}, {"trainable_token_indices": [1]}, "rows of 31 values"),
    ({_DELTA: torch.ones(1, 32)}, {}, "trainable_token_indices has not as many"),
    (
        {_DELTA: torch.full((1, 32), 1e60, dtype=torch.float64)},
        {"trainable_token_indices": [1]},
        r"embed_tokens.* has values that are no finite numbers, or beyond",
    ),
    (
        {f"{_AT}model.norm.weight": torch.full((32,), 1e60, dtype=torch.float64)},
        {},
        r"model\.norm.* has values that are no finite numbers, or beyond",
    ),
    (
        {f"{_AT}model.norm.trainable_tokens_delta": torch.ones(1, 32)},
        {"trainable_token_indices": [1]},
        r"model\.norm is no embedding",
    ),
]


@pytest.mark.parametrize(("tensors", "config", "names"), BAD)
def test_what_does_not_fit_is_refused_by_name_and_what_was_there_stays(
    tensors: dict[str, Any],
    config: dict[str, Any],
    names: str,
    engines: dict[str, Engine],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    engine = engines["llama"]
    engine.load_lora_adapter("kept", str(folders["h"]))
    before: Any = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, lora_path="kept")
    with pytest.raises(PhloemError, match=names):
        engine.load_lora_adapter("kept", _with(folders["p"], tmp_path / "bad", tensors, **config))
    after: Any = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, lora_path="kept")
    assert after["output_ids"] == before["output_ids"]
