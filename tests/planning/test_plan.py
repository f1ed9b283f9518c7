"""Plans against what was published, what is known of models, and by hand."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phloem.cli import main
from phloem.cli.plan import main as plan_main
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.planning.layouts import Layout, layouts, memory, refusal, stages
from phloem.planning.machines import GIB, MACHINES, machine
from phloem.planning.plan import Load, plan
from phloem.planning.shape import Shape, read_shape
from phloem.planning.steps import Costs, Efficiency, Work

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
QWEN3_235B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
    "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
}  # fmt: skip


def written(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    return read_shape(written(tmp_path_factory.mktemp("v3"), DEEPSEEK))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    return read_shape(written(tmp_path_factory.mktemp("llama"), LLAMA_8B))


# shapes


@pytest.mark.slow
def test_parameters_and_kv_bytes_are_those_that_are_known(tmp_path: Path, deepseek: Shape, llama: Shape) -> None:
    assert round(llama.parameters) == 8_030_261_248 and llama.kv_bytes() == 2 * 32 * 8 * 128 * 2
    assert round(deepseek.parameters / 1e9, 1) == 671.0 and deepseek.kv_bytes() == 61 * (512 + 64) * 2
    assert 36e9 < deepseek.active < 38e9 and (deepseek.experts, deepseek.top_k) == (256, 8)
    qwen = read_shape(written(tmp_path, QWEN3_235B))
    assert round(qwen.parameters / 1e9, 1) == 235.1 and 21.5e9 < qwen.active < 22.5e9


def test_layers_with_a_window_keep_no_more_than_it(tmp_path: Path) -> None:
    shape = read_shape(written(tmp_path, GEMMA3_1B))
    token = 2 * 256 * 2  # one KV head, keys and values of two bytes
    assert shape.kv_bytes(100) == 26 * 100 * token
    assert shape.kv_bytes(10_000) == (4 * 10_000 + 22 * 512) * token  # every sixth layer is a full one
    assert shape.tied and shape.parameters < 1.01e9


def test_recurrent_layers_have_a_state_that_does_not_grow(tmp_path: Path) -> None:
    path = written(tmp_path, {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": 65536, "hidden_size": 1024,
        "intermediate_size": 6656, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
        "layer_types": ["conv", "conv", "full_attention", "conv"], "max_position_embeddings": 128000,
        "torch_dtype": "bfloat16",
    })  # fmt: skip
    shape = read_shape(path)
    assert shape.kv_bytes(1000) == 1000 * 2 * 8 * 64 * 2 and shape.state_bytes > 0
    assert sum(layer.state > 0 for layer in shape.layers) == 3


def test_weights_take_what_their_format_says(tmp_path: Path, llama: Shape) -> None:
    assert llama.weight_bytes == pytest.approx(2 * llama.parameters, rel=1e-3)
    path = written(tmp_path / "a", LLAMA_8B)
    ends = 2 * 2 * 128256 * 4096  # embedding and head stay as they are
    inner = llama.parameters - ends / 2
    assert read_shape(path, quantization="fp8").weight_bytes == pytest.approx(inner + ends, rel=1e-3)
    awq = {**LLAMA_8B, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    four = read_shape(written(tmp_path / "b", awq))
    assert four.weight_bytes == pytest.approx(inner * (4 + 20 / 128) / 8 + ends, rel=1e-3)
    kept = {"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}
    part = read_shape(written(tmp_path / "c", {**LLAMA_8B, "quantization_config": kept})).weight_bytes
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert part == pytest.approx(inner + attention + ends, rel=1e-3)
    assert read_shape(path, "fp8").kv_bytes() == llama.kv_bytes() / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "qwen3_next", "gpt_oss", "mamba2"])
def test_every_weight_of_a_checkpoint_is_counted_once(name: str, tmp_path: Path) -> None:
    from phloem.checkpoint.describe import read_safetensors_header
    from phloem.testing.checkpoints import tiny_checkpoint

    path = tiny_checkpoint(name, tmp_path / name)
    sizes = [entry["shape"] for entry in read_safetensors_header(path / "model.safetensors").values()]
    total = 0
    for shape in sizes:
        count = 1
        for size in shape:
            count *= size
        total += count
    log = logging.getLogger("phloem.models")
    before = log.level
    assert read_shape(str(path)).parameters == total
    assert log.level == before, "what comes after a plan still warns"


def test_a_hub_caches_directory_stands_for_its_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name"
    written(folder / "snapshots" / "abc", LLAMA_8B)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc\n")
    assert read_shape(str(folder)).family == "llama"
    with pytest.raises(ModelLoadError, match=r"no snapshot here has a config\.json"):
        (tmp_path / "models--org--none" / "snapshots").mkdir(parents=True)
        read_shape(str(tmp_path / "models--org--none"))


def test_a_configuration_without_what_is_needed_says_what(tmp_path: Path) -> None:
    lacking = {name: value for name, value in LLAMA_8B.items() if name != "hidden_size"}
    with pytest.raises(ModelLoadError, match="hidden_size is None"):
        read_shape(written(tmp_path / "a", lacking))
    with pytest.raises(ModelLoadError, match="no such file"):
        read_shape(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="plans are for models that generate"):
        bert = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 100, "hidden_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0}  # fmt: skip
        read_shape(written(tmp_path / "b", bert))
    with pytest.raises(ConfigError, match="quantization 'int3' is not known; known: bf16"):
        read_shape(written(tmp_path / "c", LLAMA_8B), quantization="int3")
    with pytest.raises(ConfigError, match="kv_cache_dtype 'fp4' is not known"):
        read_shape(written(tmp_path / "c", LLAMA_8B), kv_type="fp4")


# machines and layouts


def test_a_gpu_is_known_or_given_in_numbers() -> None:
    assert machine("H100") == MACHINES["h100"]
    assert machine("h100", memory_gib=40).memory_gib == 40
    own = machine("custom", memory_gib=24, bandwidth=1000, bf16=100)
    assert own.rate("fp8") == own.rate("fp4") == 100e12  # it has no such units
    with pytest.raises(ConfigError, match="did you mean h200"):
        machine("h200x")
    with pytest.raises(ConfigError, match="gpu custom: bandwidth, bf16 must be given"):
        machine("custom", memory_gib=24)
    for value in (-1, 0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ConfigError, match=re.escape(f"memory_gib: {value:g} must be above 0")):
            machine("h100", memory_gib=value)


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("--hit nan", "hit: nan is not a number"),
        ("--hit 1", r"hit: 1 must be in \[0, 1\)"),
        ("--mem-fraction inf", "mem_fraction: inf is not a number"),
        ("--mem-fraction 0", r"mem_fraction: 0 must be in \(0, 1\]"),
        ("--itl-ms nan", "itl_ms: nan is not a number"),
        ("--itl-ms -1", "itl_ms: -1 must be 0 or more"),
        ("--overlap 1.5", r"overlap: 1.5 must be in \[0, 1\]"),
        ("--net nan", "net: nan is not a number"),
        ("--redundant-experts -1", "redundant_experts: -1 must be 0 or more"),
        ("--gpus 0", "gpus: 0 must be above 0"),
        ("--gpus 1000000000000007", "gpus: 1000000000000007 are more than"),
        ("--top 0", "top: 0 must be above 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(argument: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^{why}"):
        plan_main(["nowhere", *argument.split()])
    with pytest.raises(ConfigError, match="itl: nan is not a number"):
        Load(itl=float("nan")).checked()


def test_layouts_use_every_gpu_and_divide_every_size(deepseek: Shape, llama: Shape) -> None:
    found = list(layouts(deepseek, 16))
    assert len(found) == len(set(found)) > 50
    assert all(at.world == 16 and 128 % at.attn_tp == 0 and 256 % at.ep == 0 for at in found)
    assert {(at.tp, at.pp, at.dp) for at in layouts(llama, 4)} == {
        (1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)
    }  # fmt: skip


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(deepseek: Shape, llama: Shape) -> None:
    assert refusal(llama, Layout(tp=3)) == "32 heads over 3 ranks of attention; valid: 1, 2, 4, 8, 16, 32"
    assert refusal(llama, Layout(tp=16)) == ""  # each KV head lies on two ranks
    assert "experts over ep 3; valid: 1, 2, 4" in refusal(deepseek, Layout(tp=3, ep=3, attn_dp=3))
    assert refusal(deepseek, Layout(tp=72, ep=72, attn_dp=72), redundant=32) == ""
    with pytest.raises(ConfigError, match="layout 'tp=x': expected one of tp, pp, ep, dp, attn_dp"):
        Layout.parse("tp=x")


def test_ranks_share_the_weights_out(deepseek: Shape, llama: Shape) -> None:
    def taken(shape: Shape, layout: Layout) -> float:
        return memory(shape, layout, stages(shape, layout.pp), 80 * GIB, 4096, 8192).weights

    one = taken(llama, Layout())
    assert one == pytest.approx(llama.weight_bytes)
    assert taken(llama, Layout(tp=4)) == pytest.approx(one / 4, rel=1e-3)
    assert taken(llama, Layout(tp=4, dp=2)) == taken(llama, Layout(tp=4))
    assert one / 2 < taken(llama, Layout(pp=2)) < 0.6 * one
    experts = 58 * 256 * 3 * 7168 * 2048
    everywhere = sum(layer.weights["whole"].bytes for layer in deepseek.layers)  # routers, norms, what makes latents
    apart, together = (taken(deepseek, Layout(tp=8, ep=8, attn_dp=dp)) for dp in (8, 1))
    assert apart - together == pytest.approx((deepseek.weight_bytes - experts - everywhere) * 7 / 8, rel=1e-3)


def test_what_does_not_fit_is_refused_with_its_size(deepseek: Shape, llama: Shape) -> None:
    with pytest.raises(ConfigError, match=r"627\.\d GiB of weights; no layout of 8 x h100 .* 72\.7 GiB"):
        plan(deepseek, MACHINES["h100"], 8, Load())
    assert plan(deepseek, MACHINES["h200"], 8, Load()).prices
    with pytest.raises(ConfigError, match="more than the model's context of 8192"):
        plan(llama, MACHINES["h100"], 1, Load(prompt=8192, output=1))
    with pytest.raises(ConfigError, match="requests a rank do not fit"):
        plan(llama, MACHINES["h100"], 1, Load(batch=100_000))
    with pytest.raises(ConfigError, match="takes more than 1 ms even with a single request"):
        plan(llama, MACHINES["h100"], 1, Load(itl=0.001))
    with pytest.raises(ConfigError, match="hit: 1 must be in"):
        plan(llama, MACHINES["h100"], 1, Load(hit=1.0))
    with pytest.raises(ConfigError, match="it takes 3 of 4"):
        plan(replace(llama, heads=96, kv_heads=3), MACHINES["h100"], 4, Load(), only=Layout(tp=3))


# times


def test_a_decode_step_of_one_row_takes_what_reading_the_weights_takes(llama: Shape) -> None:
    rates = Efficiency(step=0, layer=0)
    costs = Costs(llama, Layout(), stages(llama, 1), MACHINES["h100"], rates)
    read = llama.weight_bytes - 2 * 128256 * 4096  # the embedding is a look-up
    by_hand = (read + 1000 * llama.kv_bytes()) / (3350e9 * rates.bandwidth)
    assert costs.seconds(Work.decode(1, 1000)) == pytest.approx(by_hand, rel=0.01)


def test_a_long_prefill_takes_what_its_products_take(llama: Shape) -> None:
    rates = Efficiency(step=0, layer=0, half=0)
    costs = Costs(llama, Layout(), stages(llama, 1), MACHINES["h100"], rates)
    inner = llama.parameters - 2 * 128256 * 4096
    products = 2 * inner * 8192 / (989e12 * rates.products)
    attention = 32 * 4 * 32 * 128 * 8192 * 4096 / (989e12 * rates.attention)
    found = costs.seconds(Work.prefill(8192, 4096))
    assert found == pytest.approx(products + attention, rel=0.02)


def test_more_work_takes_longer_and_better_machines_less(deepseek: Shape) -> None:
    layout = Layout(tp=16, ep=16, attn_dp=16)
    parts, h100 = stages(deepseek, 1), MACHINES["h100"]
    costs = Costs(deepseek, layout, parts, h100, Efficiency())
    times = [costs.seconds(Work.decode(rows, 2000)) for rows in (1, 8, 64, 256, 1024)]
    assert times == sorted(times) and times[-1] < 1024 * times[0]
    for better in (replace(h100, bandwidth=6700), replace(h100, net=100), replace(h100, bf16=1978, fp8=3958)):
        assert Costs(deepseek, layout, parts, better, Efficiency()).seconds(Work.decode(256, 2000)) < times[3]
    hidden = Costs(deepseek, layout, parts, h100, Efficiency(overlap=1.0)).slowest(Work.decode(256, 2000))
    assert "all-to-all" not in hidden.seconds


def test_terms_add_up_and_name_what_bounds_them(deepseek: Shape) -> None:
    costs = Costs(deepseek, Layout(tp=72, ep=72, attn_dp=72), stages(deepseek, 1), MACHINES["h100"], Efficiency(), 32)
    terms = costs.slowest(Work.decode(256, 2000))
    assert terms.total == pytest.approx(sum(terms.seconds.values())) and set(terms.seconds) == set(terms.bounds)
    assert terms.largest == "all-to-all (link)"
    assert costs.slowest(Work.decode(1, 2000)).bounds["experts"] == "memory"


def test_a_limit_of_the_time_of_a_token_is_kept(llama: Shape) -> None:
    free = plan(llama, MACHINES["h100"], 8, Load())
    bound = plan(llama, MACHINES["h100"], 8, Load(itl=0.012))
    assert max(item.itl for item in free.prices) > 0.02
    assert all(item.itl <= 0.012 for item in bound.prices) and bound.prices[0].rows > 1
    rates = [item.requests for item in free.prices]
    assert rates == sorted(rates, reverse=True)


# What DeepSeek (V3/R1 inference system overview, 2025) and SGLang (large-scale EP on 96 H100, 2025; GB200 NVL72, parts
# 1 and 2, 2025) have published, tokens a second of a GPU. DeepSeek's prefill counts cached tokens: 56.3 % of them.
EP32, EP144 = Layout(tp=32, ep=32, attn_dp=32), Layout(tp=144, ep=144, attn_dp=144)
EP72, EP48 = Layout(tp=72, ep=72, attn_dp=72), Layout(tp=48, ep=48, attn_dp=48)
SHORT = Load(prompt=2000, output=100, redundant=32)
LONG = Load(prompt=4800, output=380, redundant=32)
FP4 = {"expert_quantization": "nvfp4", "kv_type": "fp8"}
PUBLISHED = {
    "deepseek prefill": ("h800", EP32, replace(LONG, hit=0.563), {}, "prefill_rate", 73_700 / 8 * (1 - 0.563)),
    "deepseek decode": ("h800", EP144, replace(LONG, batch=144 * 88), {}, "decode_rate", 14_800 / 8),
    "sglang h100 prefill": ("h100", EP32, SHORT, {}, "prefill_rate", 52_300 / 8),
    "sglang h100 decode": ("h100", EP72, replace(SHORT, batch=72 * 256), {}, "decode_rate", 2_785),
    "sglang gb200 prefill": ("gb200", EP48, SHORT, {}, "prefill_rate", 18_471),
    "sglang gb200 decode": ("gb200", EP48, replace(SHORT, batch=48 * 768), {}, "decode_rate", 9_087),
    "sglang gb200 prefill, nvfp4": ("gb200", EP48, SHORT, FP4, "prefill_rate", 26_156),
    "sglang gb200 decode, nvfp4": ("gb200", EP48, replace(SHORT, batch=48 * 1024), FP4, "decode_rate", 13_386),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_predictions_are_within_a_factor_of_what_was_published(name: str, tmp_path: Path) -> None:
    gpu, layout, load, forms, field, published = PUBLISHED[name]
    shape = read_shape(written(tmp_path, DEEPSEEK), **forms)
    [price] = plan(shape, MACHINES[gpu], layout.world, load, only=layout).prices
    predicted = getattr(price, field) / layout.world
    assert 1 / 1.5 < predicted / published < 1.5, f"{predicted:.0f} against {published:.0f}"


# the command


def test_the_command_tells_the_same_to_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, LLAMA_8B)
    assert main(["plan", path, "--gpus", "4", "--json", "--top", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["parameters"] == 8_030_261_248 and len(told["layouts"]) == 3 and told["fitting"] == 6
    best = told["layouts"][0]
    assert best["output_tok_per_s"] >= told["layouts"][1]["output_tok_per_s"]
    assert sum(best["decode_terms_ms"].values()) * best["layout"]["pp"] == pytest.approx(best["itl_ms"], rel=1e-3)
    assert main(["plan", "--model", path, "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert "8.03 B parameters" in text and f"{best['output_tok_per_s']:,.0f}" in text and "6 layouts fit" in text
    assert f"({best['bound']['decode'].split('(')[1]}" in text


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, LLAMA_8B)
    for args, said in (
        ([], "which model?"),
        ([path, "--gpus", "0"], "gpus: 0 must be above 0"),
        ([path, "--gpu", "h1000"], "did you mean h100?"),
        ([path, "--layout", "tp=2"], "it takes 2 of 1"),
        ([path, "--prompt", "0"], "prompt: 0 must be above 0"),
    ):
        assert main(["plan", *args]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
