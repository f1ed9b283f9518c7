"""What scripts/gpu_check.py does on a card that is lent for half an hour, in three calls of ten minutes: `--plan`.

Needs nothing but Python. Seconds are of one H200 where nothing else is said; `basis` says how they are known. A section
is begun only if so many seconds are left, and ended at `LIMIT` times as many.
"""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 3.0
CALL_SECONDS = 500.0  # of a call's 600: the rest is for packages, what ends late, and writing
CARRIED = 64 << 20
ENGINE = ("triton", "msgspec", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "psutil", "regex")
SERVER = (*ENGINE, "fastapi", "uvicorn", "httptools", "prometheus_client", "tyro")
# Beside what images with torch, Triton and transformers have; kilobytes of wheels for Python 3.12 on x86-64.
WHEELS = {
    "msgspec": 237,
    "llguidance": 3073,
    "gguf": 119,
    "httptools": 553,
    "fastapi": 160,
    "starlette": 81,
    "pydantic": 495,
    "pydantic-core": 2265,
    "annotated-types": 14,
    "typing-inspection": 15,
    "uvicorn": 88,
    "tyro": 218,
    "docstring-parser": 23,
    "typeguard": 38,
    "websockets": 227,
    "watchfiles": 459,
    "python-dotenv": 24,
    "opentelemetry-api": 61,
}


@dataclass(frozen=True)
class Section:
    """`call`: in which of the three calls it runs. `gib`: memory of a card on which it can say anything."""

    name: str
    call: int
    seconds: float
    gib: float
    packages: tuple[str, ...]
    what: str
    basis: str


_GUESS = "estimated"
_LIST = (
    Section("kernels", 1, 120, 8, ("triton", "msgspec"), "every kernel against plain torch, each apart from the others",
            "297 compilations of 0.7 s of a core (measured on Zen 4), six at a time; running them estimated"),
    Section("models", 1, 60, 8, ("triton", "msgspec"), "tiny models: eager steps, recorded ones, pieces, in two types",
            f"{_GUESS}: as the kernels, half of them compiled by then"),
    Section("floors", 1, 15, 14, ("msgspec",), "a copy of 4 GiB, products of 8,192",
            "3 s of measuring, and the start of torch"),
    Section("llama", 1, 90, 22, ENGINE, "decode of 1 to 256 rows, early launches and not, prefill, pieces, runner, "
            "requests at random", "0.5 s a measurement, 12 s of requests; compiling estimated"),
    Section("qwen", 1, 120, 66, ENGINE, "as llama, with experts and the trial of many rows",
            "as llama; 57 GiB of weights; compiling estimated"),
    Section("experts", 1, 45, 14, ("triton", "msgspec"), "the kernels of many rows of experts beside each other",
            f"{_GUESS}: five forms, two types, 0.2 s each, compiling"),
    Section("cold", 2, 130, 22, ENGINE, "a start without any cache of kernels, one with it; first round over second",
            "first day: 31 s to ready with all graphs, two rounds of 4 s; twice; compiling estimated"),
    Section("peers", 2, 150, 38, SERVER, "this engine and those that are installed, same client, by turns; the goals",
            "first day: 13 to 31 s to ready, 30 s of rounds; each peer 140 to 155 s to ready more"),
    Section("shared", 2, 110, 38, SERVER, "shared pages read once, and for every row",
            "first day: 13 to 31 s to ready, 2 s a round; two servers"),
    Section("llama-fp8", 2, 45, 22, ENGINE, "as llama in float8, without requests", f"{_GUESS}, after llama"),
    Section("qwen-fp8", 2, 60, 46, ENGINE, "as qwen in float8, without requests", f"{_GUESS}, after qwen"),
    Section("switches", 3, 290, 22, ENGINE, "rounds as set, with PHLOEM_PDL=off, PHLOEM_MOE_TRIAL=off, of both models",
            "five starts of 30 s with kernels kept, rounds of 4 s; the first of each model compiles"),
    Section("ranks", 3, 75, 14, ENGINE, "what the way of several ranks costs one; two, where there are two cards",
            f"{_GUESS}: one process, 7 turns of 24 steps, two engines of 8 layers"),
    Section("transformers", 3, 100, 38, ("msgspec", "transformers"), "a static cache and compiled steps, beside llama",
            f"{_GUESS}: torch.compile takes most of it"),
)  # fmt: skip
SECTIONS = {section.name: section for section in _LIST}
PEER_SECONDS = 200.0  # more for each engine that is compared


def of_call(call: int) -> list[str]:
    return [name for name, section in SECTIONS.items() if section.call == call]


def fits(section: Section, gib: float) -> str:
    """Why a section says nothing on a card with so much memory; "" if it does."""
    return "" if gib >= section.gib else f"needs a card of {section.gib:.0f} GiB, this one has {gib:.0f}"


def plan(commit: str = "COMMIT") -> list[str]:
    """The plan as a page."""
    total = sum(WHEELS.values()) * 1000
    lines = ["# Half an hour of a card", ""]
    lines += [
        f"Three calls, each ended after {CALL_SECONDS:.0f} s, what is most worth knowing first; what does not fit"
    ]
    lines += ["into one is told as skipped. Each writes one .json and one .md, anew after every section.", ""]
    for call in (1, 2, 3):
        names = of_call(call)
        lines += [f"## Call {call}: about {sum(SECTIONS[name].seconds for name in names):.0f} s", ""]
        lines += [f"    python3 scripts/gpu_check.py --call {call} --commit {commit} --out RESULTS", ""]
        lines += ["| section | s | GiB | what | seconds known from |", "| --- | ---: | ---: | --- | --- |"]
        for name in names:
            one = SECTIONS[name]
            lines.append(f"| {name} | {one.seconds:.0f} | {one.gib:.0f} | {one.what} | {one.basis} |")
        lines.append("")
    lines += ["Where kernels are wrong, `--only kernels --checks NAMES` shows them again, in any call.", ""]
    lines += [f"## Wheels to carry: {total / 1e6:.1f} MB of {CARRIED / 1e6:.0f}", ""]
    lines += ["For Python 3.12 on Linux x86-64, beside torch 2.11, Triton 3.6, transformers and what these bring:", ""]
    lines += ["    " + " ".join(list(WHEELS)[:9]), "    " + " ".join(list(WHEELS)[9:]), ""]
    lines += [
        "    python3 -m pip install -q --no-index --no-deps --target SITE WHEELS/*.whl; export PYTHONPATH=SITE",
        "",
    ]
    lines += ["Without msgspec nothing but the start runs; without the others, sections that need them are left out."]
    lines += [
        f"Each peer takes about {PEER_SECONDS:.0f} s more, and packages that do not fit beside these: without them the"
    ]
    lines += ["figures of the first day stand beside ours, as of another run."]
    return lines
