"""Every file of every registry keeps its contract. Files are found by reading the folders: a new one is tested as such.

What each does with its inputs is tested in its room; here stands what the house expects of any of them.
"""

from __future__ import annotations

import ast
import inspect
import random
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disagg_support import transport_of
from fastapi import APIRouter
from house import FILES, SRC, parse
from linear_cases import Source
from store_stand_ins import stand_in
from tier_support import keys_of, rows_of
from vision_support import picture, seeing, seeing_checkpoint

from phloem import attention, models, platforms
from phloem.attention import BACKENDS, AttentionNeed
from phloem.checkpoint.describe import describe
from phloem.checkpoint.families import family
from phloem.checkpoint.quant_config import readers
from phloem.cli import COMMANDS
from phloem.cli.bench import BENCHMARKS
from phloem.core.errors import BadRequest
from phloem.core.memory import Cross, Kept, Latent, MemorySpec, Paged, State
from phloem.core.speculation import MODELS, Wanted
from phloem.diffusion.family import Family
from phloem.diffusion.models import FAMILIES as PAINTERS
from phloem.disagg.transports import TRANSPORTS, Transport
from phloem.disagg.wire import Link
from phloem.engine.processors import PROCESSORS, Processor
from phloem.grammar._base import EngineOptions, Regex, Vocabulary
from phloem.grammar._manager import ENGINES
from phloem.kernels.ops import Ops
from phloem.kvcache.layouts import LAYOUTS, layout_of
from phloem.kvcache.tiers import BLOCK, TIERS, Place
from phloem.lang.backends import BACKENDS as LANG_BACKENDS
from phloem.lang.backends._base import Backend
from phloem.layers.context import AttentionSpec, BuildContext
from phloem.models import FAMILIES
from phloem.models._pooled import load_pooled
from phloem.multimodal import PROCESSORS as PICTURES
from phloem.multimodal import Facts
from phloem.multimodal._settings import settings_in
from phloem.platforms import AVAILABLE, PLATFORMS
from phloem.quant import METHODS, Method
from phloem.router.ask import Ask
from phloem.router.cached import Cached
from phloem.router.policies import POLICIES
from phloem.router.policies._base import Policy
from phloem.router.settings import Settings
from phloem.router.worker import Worker
from phloem.server.app import ROUTES, routers
from phloem.speculation import texts
from phloem.speculation.drafters import DRAFTERS, Draft, Loader, loader, of_texts
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.text.formats import THINKING, TOOLS, thinking_format, tool_format
from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser
from phloem.text.tools._base import Text, ToolParser, Unspeakable
from phloem.text.tools._json import JsonReader

CPU = torch.device("cpu")
REGISTRIES: list[Any] = [
    BACKENDS, BENCHMARKS, COMMANDS, DRAFTERS, ENGINES, FAMILIES, LANG_BACKENDS, LAYOUTS, METHODS, PLATFORMS, POLICIES,
    PROCESSORS, ROUTES, THINKING, TIERS, TOOLS, TRANSPORTS, PAINTERS, PICTURES,
]  # fmt: skip


def each(registry: Any) -> Any:
    # Its library takes seconds to import.
    marks = {"xgrammar": pytest.mark.slow}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks.get(name, ())) for name in registry.names()])


def members(protocol: type) -> set[str]:
    """Names that a protocol asks for."""
    methods = {name for name, value in vars(protocol).items() if callable(value) or isinstance(value, property)}
    return {name for name in methods | set(protocol.__annotations__) if not name.startswith("_")}


def test_every_registry_of_the_house_has_its_contract_here() -> None:
    packages: set[str] = set()
    for path in (path for path in FILES if "= Registry(" in path.read_text()):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Registry":
                packages.add(ast.literal_eval(node.args[0]))
    assert packages == {registry.package for registry in REGISTRIES}


@pytest.mark.parametrize(
    ("registry", "name"), [(found, name) for found in REGISTRIES for name in found.names()], ids=lambda x: str(x)[:40]
)
def test_a_file_says_what_it_is_and_has_its_symbol(registry: Any, name: str) -> None:
    path = SRC.parent / f"{registry.package}.{name}".replace(".", "/")
    assert ast.get_docstring(parse(path.with_suffix(".py"))), f"{path}.py has no docstring"
    if registry is not ENGINES or name != "xgrammar" or pytest.importorskip("xgrammar"):
        found = registry.get(name)
        assert callable(found) or isinstance(found, APIRouter | Method)


@each(POLICIES)
async def test_policies(name: str) -> None:
    """One of those that may be asked, with a reason, for every request; whatever comes and goes."""
    policy = POLICIES.get(name)(Settings(), Cached(), random.Random(1))
    assert isinstance(policy, Policy)
    workers = [Worker.at(f"http://w{at}:80", Settings(), at) for at in range(4)]
    asks = [Ask("/generate"), Ask("/generate", "m", 1e6, 1e6, "s", prompt=b"x" * 5000), Ask("/generate", ids=[1, 2, 3])]
    for some in (workers, workers[:1], workers[2:]):
        for ask in asks * 3:
            chosen = policy.choose(ask, some)
            assert chosen.worker in some and chosen.why and 0 <= chosen.cached <= ask.tokens
            policy.sent(ask, chosen.worker)
        policy.gone(some[-1])


@each(TRANSPORTS)
def test_transports(name: str) -> None:
    """Rows that one side fills are those that the other finds."""
    way = transport_of(name)
    assert members(Transport) <= set(dir(way)) and way.name == name
    listening, address = way.listen("127.0.0.1")
    with listening, ThreadPoolExecutor(1) as other:
        coming = other.submit(listening.accept)
        ours = Link(way.connect(address, "127.0.0.1", 10))
        theirs = Link(coming.result()[0])
        receiver = way.receiver(64, 3)
        making = other.submit(way.sender, theirs, 64, 3, 10)
        receiver.greet(ours, 10)
        sender = making.result()
        for at, row in enumerate(sender.rows(0, 3)):
            row[:] = np.arange(64, dtype=np.uint8) + at
        pushing = other.submit(sender.push, theirs, 0, 3, 10)
        receiver.take(ours, 0, 3, 10)
        pushing.result()
        assert all((receiver.row(at) == np.arange(64, dtype=np.uint8) + at).all() for at in range(3))
        sender.close()
        receiver.close()
        ours.sock.close()
        theirs.sock.close()


@each(TIERS)
def test_tiers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leading run of what was written comes back, and what was dropped ends it."""
    if name in ("mooncake", "nixl"):
        for stores in stand_in(name, monkeypatch, tmp_path):
            keeps_leading_runs(name, tmp_path, stores.extra)
        return
    module = tmp_path / "store.py"
    module.write_text(
        "class Store(dict):\n"
        "    def __init__(self, settings): self.settings = settings\n"
        "    def exists(self, key): return key in self\n"
        "    def get(self, key, target): return target.copy_(self[key]) if key in self else None\n"
        "    def set(self, key, value): self[key] = value.clone()\n"
        "    def delete(self, key): self.pop(key, None)\n"
    )
    keeps_leading_runs(name, tmp_path, {"module_path": str(module), "class_name": "Store"} if name == "dynamic" else {})


def keeps_leading_runs(name: str, tmp_path: Path, extra: dict[str, Any]) -> None:
    settings = vars(TIERS.module(name)).get("SETTINGS", ())
    assert settings is None or set(settings) >= set(extra)
    tier = TIERS.get(name)(Place(BLOCK, 1 << 20, tmp_path, extra))
    assert tier.name == name and isinstance(tier.instant, bool)
    keys, rows, found = keys_of(9), rows_of(9), rows_of(9, seed=2)
    assert tier.exists(keys) == tier.read(keys, found) == tier.exists([]) == 0
    assert tier.write(keys, rows) == 9 == tier.exists(keys) and tier.read(keys, found) == 9
    assert all(np.array_equal(one, other) for one, other in zip(rows, found, strict=True))
    assert tier.exists([*keys_of(1, 5), *keys]) == 0
    tier.drop(keys[4:5])
    assert tier.exists(keys) == tier.read(keys, found) == 4
    assert tier.write(keys, rows) == 9 == tier.exists(keys)
    assert all(isinstance(value, int | float) for value in tier.stats().values())
    tier.clear()
    assert tier.exists(keys) == 0 and tier.write(keys[:2], rows[:2]) == 2
    tier.close()


@each(DRAFTERS)
def test_drafters(name: str) -> None:
    """Silent where nothing is known, no more tokens than asked for, and the text is left as it is. Of models it is
    known before anything is loaded what they read."""
    if name in MODELS:
        assert issubclass(DRAFTERS.get(name), Loader) and loader(name).shift in (0, 1)
        return
    drafter = of_texts(name)(Wanted())
    assert drafter.draft(texts.Text("a", "", [], 0, easy=True), 7) is None
    known = [5, 6, 7, 8, 9] * 4
    text = texts.Text("b", "", list(known), 5, easy=True)
    for room in (1, 7):
        draft = drafter.draft(text, room)
        assert isinstance(draft, Draft) and 1 <= len(draft.tokens) <= room and draft.source and draft.matched >= 1
    assert text.tokens == known
    drafter.ended(text)
    assert all(isinstance(value, int) for value in drafter.facts().values())


@each(BACKENDS)
def test_attention_backends(name: str) -> None:
    spec = AttentionSpec(heads=4, kv_heads=2, head_size=16, scale=0.25, pool=0)
    backend = BACKENDS.get(name)(Ops(), [spec], CPU, torch.float32)
    assert backend.name == name and backend.page_size > 0
    assert isinstance(backend.decline(AttentionNeed([spec], torch.float32, CPU)), str | None)
    assert members(attention.AttentionBackend) <= set(dir(backend))


@pytest.mark.some(28)
@each(FAMILIES)
def test_models(name: str, tmp_path: Any) -> None:
    from phloem.checkpoint.describe import describe
    from phloem.checkpoint.families import family

    if family(name).tiny is None:  # another family under a new name
        assert FAMILIES.get(name).__module__ != f"phloem.models.{name}"
        return
    checkpoint = describe(str(tiny_checkpoint(name, tmp_path)))
    assert checkpoint.model_type == name
    if checkpoint.pooling is not None:
        pooled = load_pooled(checkpoint, BuildContext(Ops(), torch.float32, CPU))
        assert members(models.Body) <= set(dir(pooled.body)) | set(vars(pooled.body))
        assert pooled.body.vocab_size == checkpoint.vocab_size and pooled.weight_bytes > 0
        return
    model = models.load_model(checkpoint, BuildContext(Ops(), torch.float32, CPU))
    assert members(models.Model) <= set(dir(model)) | set(vars(model))
    assert model.vocab_size == checkpoint.vocab_size and model.weight_bytes > 0
    assert all(model.get_weight(slot).numel() for slot in model.weight_names())


@each(METHODS)
def test_quantisation_methods(name: str) -> None:
    found = METHODS.get(name)
    assert found.name == name and (found.wrap is not None or found.configure is not None)
    reads = {method for method, file in readers().items() if file == name}
    assert bool(reads) == (found.configure is not None), "QUANT_METHODS and `configure` go together"
    if found.wrap is None:
        return
    values = torch.randn(48, 96, generator=torch.Generator().manual_seed(1)) * 0.02
    source = Source.dense_of(values)
    source.name = "model.layers.0.mlp.up_proj.weight"
    made = found.wrap(source)
    assert made.shape == (48, 96)
    error = made.dense(torch.float32) - values
    assert error.norm() < (0.12 if name == "mxfp4" else 0.1) * values.norm()  # powers of two are coarse scales


@each(TOOLS)
def test_tool_formats(name: str) -> None:
    kind = TOOLS.get(name)
    assert issubclass(kind, ToolParser) and tool_format(name) == name
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    words = "Plain words, and nothing of a call."
    assert kind(tools).parse(words).text == words
    parser = kind(tools)
    events = [event for letter in words for event in parser.push(letter)] + parser.finish()
    assert "".join(event.text for event in events if isinstance(event, Text)) == words
    try:
        assert kind(tools).structure(required=True)
    except Unspeakable:
        assert not kind.trigger


@each(THINKING)
def test_thinking_formats(name: str) -> None:
    kind = THINKING.get(name)
    assert issubclass(kind, ThinkingParser) and thinking_format(name) == name and kind.start and kind.end
    answer = f"{kind.start}I think.{kind.end}" + ("" if kind.channel is None else "<|channel|>final<|message|>") + "So."
    whole = kind().parse(answer)
    parser = kind()
    pieces = [parser.push(letter) for letter in answer] + [parser.finish()]
    assert tuple("".join(parts) for parts in zip(*pieces, strict=True)) == whole
    assert "I think." in "".join(whole) and whole[1].endswith("So.")


@each(PROCESSORS)
def test_logit_processors(name: str) -> None:
    kind = PROCESSORS.get(name)
    assert issubclass(kind, Processor) and kind.__doc__ and kind.apply_ is not Processor.apply_
    assert kind.keys, "a processor without parameters needs no request to name it"
    with pytest.raises(BadRequest, match="no_such_key"):
        kind({"no_such_key": 1}, 100)


@each(ENGINES)
def test_grammar_engines(name: str) -> None:
    pytest.importorskip(name)
    tokens = [*(letter.encode() for letter in string.printable), b"<end>"]
    eos = len(tokens) - 1
    vocabulary = Vocabulary(
        tokens, frozenset({eos}), (eos,), len(tokens), lambda text: [*map(string.printable.index, text)]
    )
    engine = ENGINES.get(name)(vocabulary, EngineOptions())
    try:
        assert engine.name == name and engine.decline(Regex("[ab]c")) is None
        matcher = engine.compile(Regex("[ab]c")).matcher()
        mask = vocabulary.new_mask()
        matcher.fill(mask)
        allowed = [i for i in range(len(tokens)) if mask[i // 32] >> (i % 32) & 1]
        assert [tokens[i] for i in allowed] == [b"a", b"b"]
    finally:
        engine.close()


@each(PLATFORMS)
def test_platforms(name: str) -> None:
    available, reason = AVAILABLE.get(name)()
    assert reason
    if not available:
        pytest.skip(reason)
    platform = PLATFORMS.get(name)(1)
    assert members(platforms.Platform) <= set(dir(platform)) and platform.name == name
    free, total = platform.memory()
    assert 0 < free <= total
    assert "reference" in platform.attention_backends(), "a model that no other backend takes must be served"
    assert set(platform.attention_backends()) <= set(BACKENDS.names())
    ops, why = platform.table(None)
    assert isinstance(ops, Ops) and why


@each(LANG_BACKENDS)
def test_backends_of_the_language(name: str) -> None:
    kind = LANG_BACKENDS.get(name)
    assert issubclass(kind, Backend) and kind.generate is not Backend.generate


@pytest.mark.parametrize(
    ("registry", "name"), [(found, name) for found in (COMMANDS, BENCHMARKS) for name in found.names()]
)
def test_commands_tell_their_options(registry: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = registry.get(name)
    assert len(inspect.signature(main).parameters) == 1
    try:
        status = main(["--help"])
    except SystemExit as ended:
        status = ended.code
    assert status in (0, None) and "usage" in capsys.readouterr().out.lower()


def test_groups_of_routes_lead_somewhere() -> None:
    paths = [route.path for router in routers() for route in router.routes]  # pyright: ignore[reportAttributeAccessIssue]
    assert all(router.routes for router in routers())
    assert "/v1/chat/completions" in paths and "/generate" in paths


@each(LAYOUTS)
def test_a_memory_layout_makes_what_it_counts(name: str) -> None:
    specs: list[MemorySpec] = [
        Paged(2, 8, 8),
        Latent(16, 4),
        Cross(2, 8, 8, 5),
        State((((2, 3), "float32"), ((4,), "float32"))),
        Kept(6, "bfloat16"),
    ]
    of = {layout_of(spec, torch.float32).__class__.__module__.split(".")[-1]: spec for spec in specs}
    layout = layout_of(of[name], torch.float32)
    made = layout.make(3, 4, CPU)
    entries = 3 if isinstance(of[name], State) else 3 * 4
    assert layout.bytes * entries == sum(tensor.nbytes for tensor in made.stored)
    assert (made.keys is None) == isinstance(of[name], State) and bool(made.states) == isinstance(of[name], State)


@pytest.mark.slow
@each(PICTURES)
def test_a_picture_processor_says_what_stands_in_the_prompt(name: str, tmp_path: Path) -> None:
    users = [facts for kind in FAMILIES.names() if (facts := family(kind).vision or {}).get("processor") == name]
    if all(facts.get("kind") == "audio" or "audio" in facts for facts in users):
        return  # it hears: tests/multimodal/test_hearing.py; or is of a tower of transformers': test_foreign_towers.py
    kinds = [kind for kind in seeing() if family(kind.partition("-")[0]).vision["processor"] == name]
    assert kinds, f"no family of tests/support/vision_support.py sees by {name}"
    for kind in kinds:
        path = seeing_checkpoint(kind, tmp_path / kind)
        checkpoint = describe(str(path))
        facts = Facts(checkpoint.config, settings_in(path)[0], lambda token: f"<|{token}|>")
        processor = PICTURES.get(name)(facts)["image"]
        for width, height in ((16, 16), (40, 12), (7, 31)):
            made = processor.make(picture(1, width, height))
            assert made.pixels.dtype == np.uint8 and made.pixels.shape[-1] == 3 and made.pixels.ndim == 4
            assert made.text.count(processor.placeholder) == len(made.runs) and min(made.runs) > 0
            assert processor.mark and processor.mark in processor.inline


PAGES = {
    "adding-a-model": ("models", "build"),
    "adding-a-backend": ("attention", BACKENDS.symbol),
    "adding-a-quantisation": ("quant", METHODS.symbol),
    "adding-a-tool-format": ("text/tools", TOOLS.symbol),
    "adding-a-platform": ("platforms", PLATFORMS.symbol),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_a_file_that_the_registry_would_take(page: str) -> None:
    room, symbol = PAGES[page]
    text = (SRC.parents[1] / "docs" / f"{page}.md").read_text()
    shown = ast.parse(text.split("```python\n", 1)[1].split("```", 1)[0])
    assert ast.get_docstring(shown)
    names = {getattr(node, "name", "") for node in shown.body}
    for node in shown.body:
        names |= {ast.unparse(target) for target in node.targets} if isinstance(node, ast.Assign) else set()
    assert symbol in names and f"`src/phloem/{room}/" in text


def test_the_format_that_its_page_shows_reads_the_call_that_it_describes() -> None:
    text = (SRC.parents[1] / "docs" / "adding-a-tool-format.md").read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    found: dict[str, Any] = {"JsonReader": JsonReader, "Shown": Shown, "Steps": Iterator}
    exec(code, found)
    parsed = found["Parser"]([]).parse(found["__doc__"].split("`")[1])
    assert [(call.name, call.arguments) for call in parsed.calls] == [("f", '{"a": 1}')] and not parsed.text.strip()


@each(PAINTERS)
def test_a_family_of_pictures_is_a_painter_with_its_own_pass(name: str) -> None:
    painter = PAINTERS.get(name)
    assert issubclass(painter, Family)
    for own in ("encode", "forward"):
        assert getattr(painter, own) is not getattr(Family, own)
    # Of a film the noise depends on more than a size.
    assert painter.noise is not Family.noise or painter.prepare is not Family.prepare
