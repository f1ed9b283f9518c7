"""What a model that does not generate makes of a text: read from its architecture and its sentence-transformers files.

No torch here: the door knows from this which routes it serves, how long a text may be, and what stands before one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from phloem.checkpoint.families import family
from phloem.core.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.gguf_reader import GGUFFile

# embed: a vector. score: one number (a reranker, a reward model). classify: a number for each label. tokens: that for
# each token.
PooledTask = Literal["embed", "classify", "score", "tokens"]
Activation = Literal["none", "sigmoid", "softmax"]
# In this order their vectors are joined, where a model has several.
KINDS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last")
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_STORED = {1: "mean", 2: "cls", 3: "last"}  # values of `pooling_type` in GGUF files
_NAMES = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_HEADS = {"ForSequenceClassification": "classify", "ForTokenClassification": "tokens"}
_ACTIVATIONS: dict[str, Activation] = {"identity": "none", "sigmoid": "sigmoid", "softmax": "softmax"}
_BESIDE = ("sparse_linear.pt", "colbert_linear.pt")  # what BGE-M3 makes of a text beside one vector
_UNBOUNDED = 10**9  # what tokenizers say that know no limit
_MATRYOSHKA = re.compile(r"matryoshka|\bMRL\b", re.IGNORECASE)


class Described(Protocol):
    """What is read here of a checkpoint (`describe.Checkpoint`)."""

    @property
    def path(self) -> Path: ...

    @property
    def model_type(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def architectures(self) -> tuple[str, ...]: ...

    @property
    def context_length(self) -> int: ...

    @property
    def gguf(self) -> GGUFFile | None: ...


@dataclass(frozen=True)
class Dense:
    """A layer behind the pooling: `folder` has its weights, `linear.weight` [outputs, inputs] and perhaps a bias; or
    they are the `tensor` of a GGUF file."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str  # identity, tanh, relu, gelu, sigmoid
    tensor: str = ""


@dataclass(frozen=True)
class Judge:
    """A decoder that is asked whether a document answers a query: its score is how much likelier yes is than no."""

    yes: int  # token ids
    no: int
    # The format that Qwen3-Reranker was trained with; other decoders are asked in the same words.
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    before: str = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    after: str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    def question(self, query: str, instruction: str | None) -> str:
        """What stands before the document."""
        return f"{self.before}<Instruct>: {instruction or self.instruction}\n<Query>: {query}\n<Document>: "


@dataclass(frozen=True)
class Pooling:
    """What becomes of a text's hidden states, and what is known of the result. `kinds`: see KINDS; joined in order."""

    task: PooledTask
    kinds: tuple[str, ...] = ("cls",)
    normalize: bool = False
    dense: tuple[Dense, ...] = ()
    size: int = 0  # of the result
    labels: tuple[str, ...] = ()
    activation: Activation = "none"
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""  # the name of one of them
    dimensions: tuple[int, ...] | None = None  # shorter vectors: which; (): any; None: none
    lower: bool = False  # texts are made lower-case
    judge: Judge | None = None
    reason: str = ""

    @property
    def about(self) -> str:
        """For people."""
        if self.task == "embed":
            return f"{' and '.join(self.kinds)} pooling{', normalised' if self.normalize else ''}, {self.size} numbers"
        labels = "1 label" if len(self.labels) == 1 else f"{len(self.labels)} labels"
        return f"{labels}{' for each token' if self.task == 'tokens' else ''}, activation {self.activation}"


def pooling_of(found: Described, task: str) -> tuple[Pooling | None, int]:
    """How a checkpoint pools, or None for one that generates; and the most tokens that a text of it may have.

    Args:
        task: a task, or "auto": read off the architecture and the folder.

    Raises:
        ConfigError: for a task that the checkpoint cannot serve.
        ModelLoadError: for a module that is not known: left out, it would change the answers.
    """
    chosen, reason = _task(found, task)
    if chosen == "generate":
        return None, found.context_length
    folder = found.path if found.path.is_dir() else found.path.parent
    config = found.config
    if chosen == "score" and found.architectures and found.architectures[0].endswith("ForCausalLM"):
        return _judge(found, folder, reason), _limit(folder, found.context_length)
    if chosen != "embed":
        return _classifier(found, cast("PooledTask", chosen), reason), _limit(folder, found.context_length)
    modules = _modules(folder)
    kinds, dense, normalize = _from_modules(folder, modules) if modules else _alone(found, folder)
    prompts = _json(folder / "config_sentence_transformers.json")
    size = dense[-1].outputs if dense else config["hidden_size"] * len(kinds)
    more = [name for name in _BESIDE if (folder / name).exists()]
    reason = f"{reason}; dense vectors alone: {', '.join(more)} not served" if more else reason
    pooling = Pooling(
        task="embed",
        kinds=kinds,
        normalize=normalize,
        dense=dense,
        size=size,
        prompts={name: text for name, text in (prompts.get("prompts") or {}).items() if isinstance(text, str)},
        default_prompt=prompts.get("default_prompt_name") or "",
        dimensions=_dimensions({**config, **prompts}, folder),
        lower=bool(_sentence(folder).get("do_lower_case", False)),
        reason=reason if modules else f"{reason}; no modules.json: {kinds[0]} pooling, as such models are usually read",
    )
    return pooling, _limit(folder, found.context_length)


def _task(found: Described, task: str) -> tuple[str, str]:
    architecture = found.architectures[0] if found.architectures else ""
    # A decoder whose tokens see each other both ways is one too.
    encoder = family(found.model_type).encoder is not None or found.config.get("use_bidirectional_attention") is True
    if encoder and (task == "generate" or (task == "score" and architecture.endswith("ForCausalLM"))):
        raise ConfigError(f"task {task}: {found.model_type} is an encoder, which does not generate", param="task")
    head = next((kind for end, kind in _HEADS.items() if architecture.endswith(end)), "")
    if head == "classify" and len(_labels(found.config)) == 1:
        head = "score"
    if task != "auto":
        if task == "score" and architecture.endswith("ForCausalLM"):
            return task, "as asked: the model is asked whether a document answers a query"
        if task in ("classify", "score", "tokens") and not head:
            raise ConfigError(f"task {task}: {architecture or 'the model'} has no classification head", param="task")
        if task not in ("generate", "embed") and task != head:
            raise ConfigError(f"task {task}: {architecture} is for {head}", param="task")
        return task, "as asked"
    if head:
        return head, f"its architecture is {architecture}"
    folder = found.path if found.path.is_dir() else found.path.parent
    if found.gguf is None and ((folder / "modules.json").exists() or (folder / "1_Pooling").is_dir()):
        return "embed", "the folder says how its hidden states are pooled (sentence-transformers)"
    stored = found.config.get("pooling_type") if found.gguf is not None else None
    if stored == 4 and found.config.get("dense_head") and found.config.get("num_labels"):
        kind = "score" if found.config["num_labels"] == 1 else "classify"
        return kind, "the file has a head that ranks (pooling_type 4)"
    if stored == 4:
        raise ConfigError(
            "pooling_type 4: of rerankers in GGUF files RoBERTa's and XLM-R's are served, which have cls.weight; serve "
            "the safetensors checkpoint",
            param="model_path",
        )
    if stored in _STORED:
        return "embed", f"the file says how its hidden states are pooled (pooling_type {stored})"
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    bare = bare and family(found.model_type).diffusion is None  # Dream calls itself so, with its head
    if encoder or (
        bare and not found.config.get("tie_word_embeddings")
    ):  # a tied head is the embedding, which is there
        return "embed", f"its architecture is {architecture or found.model_type}, which has no head"
    return "generate", ""


def _classifier(found: Described, task: PooledTask, reason: str) -> Pooling:
    config, labels = found.config, _labels(found.config)
    encoder = family(found.model_type).encoder
    kind = "last" if encoder is None else str(config.get(str(encoder.get("pooling_key")), "cls"))
    return Pooling(
        task=task,
        kinds=(kind,),
        size=len(labels),
        labels=labels,
        activation=_activation(config, len(labels), encoder is not None),
        reason=reason,
    )


def _judge(found: Described, folder: Path, reason: str) -> Pooling:
    vocabulary = _json(folder / "tokenizer.json")
    words: dict[str, Any] = (vocabulary.get("model") or {}).get("vocab") or {}
    added = {str(token.get("content")): token.get("id") for token in vocabulary.get("added_tokens") or []}
    ids = [{**words, **added}.get(word) if isinstance(words, dict) else None for word in ("yes", "no")]
    if not all(isinstance(one, int) for one in ids):
        raise ConfigError(f"task score: the tokenizer of {folder} has no tokens 'yes' and 'no'", param="task")
    judge = Judge(int(ids[0] or 0), int(ids[1] or 0))
    return Pooling("score", ("last",), size=1, labels=("yes",), activation="sigmoid", judge=judge, reason=reason)


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    named = config.get("id2label")
    if isinstance(named, dict) and named:
        return tuple(str(named[key]) for key in sorted(cast("dict[str, Any]", named), key=int))
    return tuple(f"LABEL_{number}" for number in range(int(config.get("num_labels") or 2)))


def _activation(config: dict[str, Any], labels: int, encoder: bool) -> Activation:
    """What turns logits into scores: as the config says, else a sigmoid for one label and a softmax for several. A
    decoder's single number is a reward, which has no bounds."""
    named = config.get("sentence_transformers")
    said = cast("dict[str, Any]", named).get("activation_fn") if isinstance(named, dict) else None
    said = said or config.get("sbert_ce_default_activation_function") or config.get("function_to_apply")
    if said:
        last = str(said).rsplit(".", 1)[-1].lower()
        if last not in _ACTIVATIONS:
            raise ModelLoadError(f"activation {said!r} is not one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[last]
    kind = config.get("problem_type")
    if kind == "regression" or (labels == 1 and not encoder):
        return "none"
    return "sigmoid" if labels == 1 or kind == "multi_label_classification" else "softmax"


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    if not path.exists():
        pooling = {"type": "Pooling", "path": "1_Pooling"}
        return [{"type": "Transformer", "path": ""}, pooling] if (folder / "1_Pooling").is_dir() else []
    found: Any = _read(path)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in cast("list[Any]", found)):
        raise ModelLoadError(f"{path}: expected a list of modules")
    return cast("list[dict[str, Any]]", found)


def _from_modules(folder: Path, modules: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[Dense, ...], bool]:
    kinds: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalize = False
    for module in modules:
        kind, place = str(module.get("type", "")).rsplit(".", 1)[-1], folder / str(module.get("path", ""))
        if kind == "Pooling":
            kinds = _kinds(place / "config.json")
        elif kind == "Dense":
            if normalize:
                raise ModelLoadError(f"{folder / 'modules.json'}: a Dense module behind Normalize is not served")
            dense.append(_dense(place))
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "Dropout"):
            raise ModelLoadError(f"{folder / 'modules.json'}: the module {kind!r} is not served")
    if not kinds:
        raise ModelLoadError(f"{folder / 'modules.json'}: no Pooling module")
    return kinds, tuple(dense), normalize


def _kinds(path: Path) -> tuple[str, ...]:
    config = _json(path)
    if config.get("include_prompt") is False:
        raise ModelLoadError(f"{path}: include_prompt false (prompts left out of the pooling) is not served")
    named = config.get("pooling_mode")
    several = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    chosen = {_NAMES.get(str(name), str(name)) for name in cast("list[Any]", several)}
    chosen |= {kind for key, kind in _MODES.items() if config.get(key)}
    unknown = sorted(chosen - set(KINDS))
    if unknown or not chosen:
        raise ModelLoadError(f"{path}: pooling {', '.join(unknown) or 'mode'} is not one of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in chosen)


def _dense(folder: Path) -> Dense:
    config = _json(folder / "config.json")
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1].lower()
    if name not in ("identity", "tanh", "relu", "gelu", "sigmoid"):
        raise ModelLoadError(f"{folder / 'config.json'}: activation {name!r} is not served")
    try:
        return Dense(
            folder, int(config["in_features"]), int(config["out_features"]), bool(config.get("bias", True)), name
        )
    except KeyError as error:
        raise ModelLoadError(f"{folder / 'config.json'}: no {error.args[0]}") from None


def _alone(found: Described, folder: Path) -> tuple[tuple[str, ...], tuple[Dense, ...], bool]:
    """Without files that say it: decoders by their last token, or by all where these see both ways, normalised;
    encoders by their first."""
    del folder
    decoder, both = family(found.model_type).encoder is None, found.config.get("use_bidirectional_attention") is True
    kind = "cls" if not decoder else "mean" if both else "last"
    if found.gguf is not None:  # normalised, as what reads such files elsewhere gives them
        return (_STORED.get(found.config.get("pooling_type", 0)) or kind,), _behind(found, found.gguf), True
    return (kind,), (), decoder


def _behind(found: Described, gguf: GGUFFile) -> tuple[Dense, ...]:
    """EmbeddingGemma's dense layers, where a GGUF file has them: matrices alone."""
    tensors = [gguf.tensors[name] for name in ("dense_2.weight", "dense_3.weight") if name in gguf.tensors]
    size, layers = int(found.config["hidden_size"]), list[Dense]()
    for tensor in tensors:
        if len(tensor.shape) != 2 or tensor.shape[1] != size:
            raise ModelLoadError(f"{found.path}: {tensor.name} is {list(tensor.shape)}, expected {size} columns")
        size = tensor.shape[0]
        layers.append(Dense(found.path, tensor.shape[1], size, False, "identity", tensor.name))
    return tuple(layers)


def _sentence(folder: Path) -> dict[str, Any]:
    return next((_json(path) for path in sorted(folder.glob("sentence_*_config.json"))), {})


def _limit(folder: Path, most: int) -> int:
    """Tokens of a text: what the files say, but no more than there are positions."""
    said = _sentence(folder).get("max_seq_length")
    if said is None:
        said = _json(folder / "tokenizer_config.json").get("model_max_length")
    return min(most, int(said)) if isinstance(said, int | float) and 0 < said < _UNBOUNDED else most


def _dimensions(config: dict[str, Any], folder: Path) -> tuple[int, ...] | None:
    named = config.get("matryoshka_dimensions")
    if isinstance(named, list) and named:
        return tuple(int(size) for size in cast("list[Any]", named))
    card = folder / "README.md"
    says = config.get("is_matryoshka") or (
        card.exists() and _MATRYOSHKA.search(card.read_text("utf-8", errors="replace"))
    )
    return () if says else None


def _json(path: Path) -> dict[str, Any]:
    found = _read(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path}: expected a JSON object")
    return cast("dict[str, Any]", found)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from None
