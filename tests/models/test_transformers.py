"""Models that run transformers' code over our pages: equal to transformers by itself, or refused with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_door import http_door
from model_support import CPU, PAGE, PROMPT, check_modes, close, reference, their_greedy
from model_support import Engine as Steps
from pools import pool_for

from phloem import Engine
from phloem.attention import AttentionNeed, choose
from phloem.checkpoint.describe import describe
from phloem.checkpoint.fallback import causal_classes
from phloem.checkpoint.families import FAMILIES
from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models._transformers import load_foreign
from phloem.quant import Method
from phloem.testing.checkpoints import random_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
# What is special: see the reasons. Those that have a file by now are forced.
SOME = ["sliding_attention", "full_attention", "sliding_attention"]
MIXED = {"sliding_window": 6, "layer_types": SOME}
KINDS: dict[str, dict[str, Any]] = {
    "olmo": {"clip_qkv": 1.0},  # norms without weights, clipped projections
    "persimmon": {"num_key_value_heads": None, "head_dim": None},  # one matrix of q, k and v, norms of heads
    "vaultgemma": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20},  # windows, caps, a scaled table
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},  # experts in stacked parameters
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 512, "n_inner": 64},  # learned positions
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},  # sinks
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},  # a window that masks alone have
    "jetmoe": {"kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 2},  # experts of q and k
    "afmoe": {**MIXED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},  # gates
    "nanochat": {},  # norms without weights behind the rotation
    "minicpm3": {  # latent attention written out: keys that are wider than values
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "dim_model_base": 16,
    },
    "modernbert-decoder": {"num_key_value_heads": None, "local_attention": 12, "layer_types": SOME},  # half a window
    "diffllama": {"head_dim": 8},  # two calls in each layer, whose difference it takes
    "granite_swa": {**MIXED, "layer_rope_theta": [1e4, 0, 500.0]},  # multipliers; each layer turns otherwise, or not
    "dots1": {  # groups of experts beside a shared one, behind a dense layer
        **MIXED, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    },
    "hy_v3": {  # a correction of the router's scores
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "gemma4_text": {"head_dim": 8, "sliding_window": 6, "vocab_size_per_layer_input": 384},  # layers of two head sizes
    "llama": {"head_dim": 16},
}  # fmt: skip
ALONE = [name for name in KINDS if name.replace("-", "_") not in FAMILIES.names()]
FAST = ["olmo", "vaultgemma"]
COUNT = 24


class Foreign(Steps):
    """The smallest runner, over transformers' code."""

    def __init__(
        self, path: Path, dtype: torch.dtype = torch.float32, ops: Ops | None = None, quant: Method | None = None
    ) -> None:
        self.ops = ops or Ops()
        self.checkpoint = describe(str(path), model_impl="transformers")
        self.model: Any = load_foreign(self.checkpoint, BuildContext(self.ops, dtype, CPU, quant=quant), None)
        self.pool = pool_for(self.model.memory, 256, PAGE, dtype, CPU)
        need = AttentionNeed(self.model.attention_specs, dtype, CPU)
        self.attention = choose(["cpu", "reference"], need, self.ops).backend
        self.free = list(range(1, 256))
        self.states = {}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept: dict[str, Path] = {}

    def get(name: str, **more: Any) -> Path:
        if name not in kept:
            settings = {**SIZES, **KINDS.get(name, {}), **more}
            kept[name] = random_checkpoint(name, tmp_path_factory.mktemp(name), settings)
        return kept[name]

    return get


@pytest.mark.some(6)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in KINDS])
def test_logits_are_those_of_transformers(written: Any, name: str) -> None:
    check_modes(written(name), reference(written(name), PROMPT), kind=Foreign)


def test_ten_of_them_have_no_file_here() -> None:
    """Those that get one are to be replaced by others."""
    assert len(ALONE) >= 10, ALONE
    assert set(ALONE) <= set(causal_classes())


def test_packed_texts_do_not_see_each_other(written: Any) -> None:
    """Each row of a step has the logits that it has alone."""
    steps = Foreign(written("olmo"))
    texts = [PROMPT[:7], PROMPT[3:16], PROMPT[:1], PROMPT]
    together = steps.step([(text, steps.pages(len(text)), 0) for text in texts])
    alone = [steps.step([(text, steps.pages(len(text)), 0)]) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_windows_heads_and_sinks_are_those_of_the_calls(written: Any) -> None:
    specs = Foreign(written("gpt_oss")).model.attention_specs
    assert {spec.window for spec in specs} == {0, 6}
    assert all(spec.sinks and (spec.heads, spec.kv_heads, spec.head_size) == (4, 2, 16) for spec in specs)
    caps = Foreign(written("vaultgemma")).model.attention_specs
    assert {spec.window for spec in caps} == {0, 6}
    assert all(abs(spec.scale - 20**-0.5) < 1e-9 for spec in caps)


@pytest.mark.some(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALONE, "vaultgemma", "llama"])
def test_greedy_tokens_are_those_of_transformers(written: Any, name: str) -> None:
    """Through the whole engine: chunks, a batch, a prefix hit, and preemption for want of pages."""
    path = written(name)
    prompts = [PROMPT, PROMPT[:9], PROMPT[5:]]
    wanted = [their_greedy(path, prompt, COUNT) for prompt in prompts]
    sampling = {"max_new_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    settings: dict[str, Any] = {
        "dtype": "float32",
        "chunked_prefill_size": 16,
        "page_size": 4,
        "debug_invariants": True,
        "threads": 1,
    }
    settings |= {"model_path": str(path), "model_impl": "transformers", "context_length": 96, "max_total_tokens": 96}
    with Engine(**settings) as engine:
        first: Any = engine.generate(input_ids=PROMPT, sampling_params=sampling)
        again: Any = engine.generate(input_ids=prompts, sampling_params=sampling)
        state = engine.get_server_info()["internal_states"][0]
    assert first["output_ids"] == wanted[0]
    assert [one["output_ids"] for one in again] == wanted
    assert again[0]["meta_info"]["cached_tokens"] >= len(PROMPT) // 4 * 4 - 4
    assert state["preemptions"] > 0


@pytest.mark.slow
def test_over_http_with_a_grammar_and_drawn_tokens(written: Any) -> None:
    """One server: greedy text, draws that seeds repeat, and a constraint, on the platform's own table."""
    body: dict[str, Any] = {"model": "default", "prompt": "Sap moves", "max_tokens": 16, "temperature": 0}
    with Engine(model_path=str(written("persimmon")), dtype="float32", max_total_tokens=2048) as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode("Sap moves")
        wanted = their_greedy(written("persimmon"), ids, 16)
        wanted = wanted[: wanted.index(3)] if 3 in wanted else wanted
        decisions = {name: (value, why) for name, value, why in engine.get_server_info()["decisions"]}
        with http_door(engine) as url:

            def post(**more: Any) -> str:
                answer = httpx.post(f"{url}/v1/completions", json={**body, **more}, timeout=60)
                assert answer.status_code == 200, answer.text
                return answer.json()["choices"][0]["text"]

            assert post() == engine.tokenizer.decode(wanted)
            drawn = {"temperature": 1.0, "seed": 7}
            assert post(**drawn) == post(**drawn)
            assert re.fullmatch("[0-9]{3}", post(regex="[0-9]{3}"))
    assert decisions["model_impl"][0] == "transformers" and "PersimmonForCausalLM" in decisions["model_impl"][1]
    assert decisions["step_graphs"] == ("off", "transformers' code is called op by op")


@pytest.mark.slow
def test_matrices_are_packed_and_quantised_by_the_table(written: Any) -> None:
    """bfloat16 weights under the CPU's own kernels are near; 4 bits take less memory and are somewhat near."""
    from phloem.kernels import native
    from phloem.quant import method_for

    try:
        ops = native.table(1)
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    path, theirs = written("olmo"), reference(written("olmo"), PROMPT)
    plain = Foreign(path, torch.bfloat16, ops)
    assert (plain.whole(PROMPT) - theirs).abs().max() < 0.05 * theirs.abs().max()
    few = Foreign(path, torch.bfloat16, ops, method_for("int4", None))
    assert (few.whole(PROMPT) - theirs).abs().max() < 0.6 * theirs.abs().max()
    assert few.model.weight_bytes < 0.5 * plain.model.weight_bytes


def test_a_family_with_a_file_is_served_by_it_unless_somebody_asks(written: Any) -> None:
    path = written("llama")
    assert describe(str(path)).chosen.impl == "phloem"
    asked = describe(str(path), model_impl="transformers").chosen
    assert (asked.impl, "as asked" in asked.reason) == ("transformers", True)
    other = describe(str(written("persimmon"))).chosen
    assert (other.impl, "PersimmonForCausalLM" in other.reason) == ("transformers", True)
    with pytest.raises(ModelLoadError, match="unknown model type 'persimmon'"):
        describe(str(written("persimmon")), model_impl="phloem")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "nobody_knows"}, "has no class of it for text"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "--trust-remote-code"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' turns all texts"),
        ({"is_encoder_decoder": True}, "encoder beside its decoder"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"architectures": ["PersimmonForSequenceClassification"]}, "it is a PersimmonForSequenceClassification"),
        ({"quantization_config": {"quant_method": "fp8"}}, "plain weights alone"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_configuration(
    written: Any, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    whole = json.loads((written("persimmon") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**whole, **change}))
    (tmp_path / "model.safetensors").symlink_to(written("persimmon") / "model.safetensors")
    with pytest.raises(ModelLoadError, match=why):
        describe(str(tmp_path))


REFUSED = {
    "bloom": ({"n_head": 4, "n_layer": 2}, "take no attention from elsewhere"),
    "recurrent_gemma": ({"lru_width": 32, "head_dim": 8, "attention_window_size": 8}, "outside attention|more than"),
    "llama4_text": ({"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8}, "chunked_attention"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_cannot_are_refused_with_the_reason(written: Any, name: str) -> None:
    settings, why = REFUSED[name]
    path = written(name, **settings)
    with pytest.raises(ModelLoadError, match=why):
        Foreign(path)


def test_weights_have_the_names_of_their_state_and_can_be_replaced(written: Any) -> None:
    steps, stored = Foreign(written("olmo")), Foreign(written("olmo"))
    names = steps.model.weight_names()
    assert len(names) == len(set(names)) and "model.layers.1.self_attn.q_proj.weight" in names
    for name in names:
        steps.model.update_weights([(name, torch.zeros_like(stored.model.get_weight(name)))])
    assert float(steps.whole(PROMPT).abs().max()) == 0.0
    for name in names:
        steps.model.update_weights([(name, stored.model.get_weight(name))])
    close(steps.whole(PROMPT), reference(written("olmo"), PROMPT))
    with pytest.raises(ModelLoadError, match="no weight is called"):
        steps.model.update_weights([("model.nothing", torch.zeros(1))])


def test_tensors_that_are_missing_are_named(written: Any, tmp_path: Path) -> None:
    from model_support import edited

    lost = "model.layers.1.mlp.up_proj.weight"
    path = edited(written("olmo"), tmp_path / "few", lambda all_: {k: v for k, v in all_.items() if k != lost})
    with pytest.raises(ModelLoadError, match=r"1 tensors are missing: model\.layers.1.mlp.up_proj.weight"):
        Foreign(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.to(torch.int8), r"1 tensors are in a type that stands for no weights by itself.*\bis I8"),
        (lambda w: w.to(torch.float8_e4m3fn), "is F8_E4M3"),
        (lambda w: w[:-1].clone(), r"have another shape: model.layers.1.mlp.up_proj.weight is \["),
    ],
)
def test_tensors_that_are_no_weights_or_of_another_shape_are_named(
    written: Any, tmp_path: Path, change: Any, told: str
) -> None:
    from model_support import edited

    odd = "model.layers.1.mlp.up_proj.weight"
    path = edited(written("olmo"), tmp_path / "odd", lambda all_: {**all_, odd: change(all_[odd])})
    with pytest.raises(ModelLoadError, match=told):
        Foreign(path)


def test_scales_that_nobody_uses_are_refused(written: Any, tmp_path: Path) -> None:
    from model_support import edited

    scale = {"model.layers.1.mlp.up_proj.weight_scale": torch.ones(1)}
    path = edited(written("olmo"), tmp_path / "scaled", lambda all_: {**all_, **scale})
    with pytest.raises(ModelLoadError, match=r"a format that is not supported: .*weight_scale"):
        Foreign(path)
