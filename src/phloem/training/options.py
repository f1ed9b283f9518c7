"""What a training is told: one flat set of settings, as flags or as YAML in the sections that SpecForge has."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from phloem.core.config import opt
from phloem.core.errors import ConfigError
from phloem.core.ranges import parse_bytes
from phloem.core.speculation import MOST_DRAFTS

LONGEST = 1 << 20  # tokens of a text: tables of positions and masks grow with them


@dataclass(frozen=True)
class Options:
    """Of `phloem train-draft`. Names are SpecForge's where it has them."""

    target_model_path: str = opt("", "The model that the head drafts for: a folder, a .gguf file, a hub id, or demo.")
    train_data_path: str = opt("", "JSONL with 'messages', 'conversations' or 'text' in each line.")
    eval_data_path: str = opt("", "Held-out rows of the same kinds; default: taken from the end of the training rows.")
    output_dir: str = opt("draft_head", "Where checkpoints, metrics and the plot go.")
    method: Literal["eagle3", "dflash"] = opt("eagle3", "What is trained: an EAGLE-3 head, or a DFlash drafter.")
    draft_model_config: str = opt("", "A head's config.json, whose sizes are taken; default: those of the model.")
    draft_vocab_size: int = opt(8192, "Tokens that the head can say: the most frequent ones of the training text.")
    init: Literal["target", "random"] = opt(
        "target", "Begin with the model's own head, last norm and last auxiliary state, or with noise."
    )

    chat_template: str = opt("", "A Jinja file; default: the model's own template.")
    train_only_last_turn: bool = opt(False, "Learn from the last answer of each conversation alone.")
    max_length: int = opt(1024, "Longer conversations are cut, in tokens.")
    generate: int = opt(0, "The model answers the first N training prompts itself, and that is learned. 0: no.")
    generate_tokens: int = opt(256, "The longest such answer, in tokens.")
    generate_temperature: float = opt(0.7, "At which it answers; held-out prompts are always answered at 0.")
    hidden_states_dir: str = opt("", "Keep the model's states here; default: computed anew for each batch.")
    hidden_states_bytes: str = opt("8GB", "The most that those files may take; what is beyond is computed anew.")
    hidden_states_dtype: Literal["bfloat16", "float32"] = opt("bfloat16", "Of the states in those files.")

    capture_url: str = opt("", "A server with --enable-spec-capture that computes the states while it serves.")
    capture_dir: str = opt("", "The server's --spec-capture-dir, as it is seen here.")
    vocab_mapping_path: str = opt("", "The head's vocabulary: a .pt or .safetensors file with d2t, t2d; a token map.")
    draft_model_path: str = opt("", "A trained head to begin with, whose sizes and vocabulary are kept.")
    lora_rank: int = opt(0, "Train low-rank additions to that head alone, and write their sum. 0: all weights.")
    lora_alpha: float = opt(0.0, "Additions weigh alpha / rank; 0: twice the rank.")

    num_epochs: int = opt(2, "How often the whole training text is seen.")
    max_num_steps: int = opt(0, "End after so many steps. 0: after num_epochs.")
    max_minutes: float = opt(0.0, "End after so many minutes of training, with a checkpoint. 0: no such end.")
    batch_size: int = opt(2, "Conversations of a step, packed without padding.")
    learning_rate: float = opt(1e-4, "The highest.")
    warmup_ratio: float = opt(0.015, "Share of the steps in which the rate rises; then it falls as a cosine.")
    min_lr_ratio: float = opt(0.0, "Share of the rate that is left at the end.")
    max_grad_norm: float = opt(0.5, "Gradients are cut to this length.")
    weight_decay: float = opt(0.0, "AdamW's.")
    adam_beta2: float = opt(0.95, "AdamW's second decay.")
    ttt_length: int = opt(7, "Rounds of training-time test: the head reads its own result in all but the first.")
    ttt_decay: float = opt(0.8, "Weight of each round's loss, beside that of the one before.")
    block_size: int = opt(16, "Of dflash: places of a block, the token before the drafts among them.")
    draft_num_hidden_layers: int = opt(5, "Of dflash: layers, and so many states of the model are read, 3 at least.")
    mask_token_id: int = opt(-1, "Of dflash: what stands for tokens to come. -1: the highest that no text has.")
    num_anchors: int = opt(512, "Of dflash: blocks of a text in one step, at places drawn anew each time.")
    loss_decay_gamma: float = opt(7.0, "Of dflash: a place weighs exp(-1 / gamma) of the one before. 0: all alike.")
    dtype: Literal["auto", "float32", "bfloat16"] = opt(
        "auto", "Of products; weights and their sums are float32. auto: bfloat16 where the device multiplies it fast."
    )
    attention: Literal["dense", "flex"] = opt("dense", "Of the head: dense masks, or torch's flex attention on a GPU.")
    device: str = opt("auto", "Where the model and the head run.")
    threads: int | None = opt(None, "Threads of the processor; default: one for each core.")
    seed: int = opt(0, "Of the order of the text, of the weights' noise and of generation.")

    eval_prompts: int = opt(16, "Held-out prompts; on each the head drafts for the model's own greedy answer.")
    eval_tokens: int = opt(128, "The longest such answer, in tokens.")
    eval_interval: int = opt(200, "Steps between two such looks; also before the first step and at the end.")
    num_draft_tokens: int = opt(
        0, "Drafts of a step in these looks (--speculative-num-steps of the server); default: 3, of dflash a block's."
    )
    log_interval: int = opt(10, "Steps between two lines of metrics.jsonl.")
    save_interval: int = opt(500, "Steps between two checkpoints; also at the end.")
    keep_checkpoints: int = opt(2, "Older ones are removed.")
    save_dtype: Literal["float32", "bfloat16", "float16"] = opt("float32", "Of the weights in the head's file.")
    resume: bool = opt(False, "Go on from the last checkpoint in output_dir.")

    @property
    def looked_drafts(self) -> int:
        """Drafts of a step in looks, at most."""
        return self.num_draft_tokens or (3 if self.method == "eagle3" else MOST_DRAFTS)

    @property
    def state_bytes(self) -> int:
        return parse_bytes(self.hidden_states_bytes, "hidden_states_bytes")

    def check(self) -> None:
        """Raises ConfigError for what can never work."""
        for name in ("target_model_path", "train_data_path"):
            if not str(dataclasses.asdict(self)[name]):
                raise ConfigError(f"{name} is needed (--{name.replace('_', '-')})", param=name)
        least = {
            **dict.fromkeys(("draft_vocab_size", "batch_size", "ttt_length", "num_epochs"), 1),
            **dict.fromkeys(("num_anchors", "draft_num_hidden_layers"), 1),
            **dict.fromkeys(("num_draft_tokens", "loss_decay_gamma"), 0),
            **dict.fromkeys(("eval_interval", "log_interval", "save_interval", "keep_checkpoints"), 1),
            **dict.fromkeys(("generate_tokens", "eval_tokens"), 2),
            **dict.fromkeys(("generate", "max_num_steps", "max_minutes", "eval_prompts", "generate_temperature"), 0),
            **dict.fromkeys(("warmup_ratio", "min_lr_ratio", "weight_decay", "ttt_decay"), 0),
            **dict.fromkeys(("lora_rank", "lora_alpha"), 0),
            "max_length": 4,
        }
        for name, lowest in least.items():
            value = dataclasses.asdict(self)[name]
            if not lowest <= value < math.inf:
                raise ConfigError(f"{name} is {value}: expected {lowest} or more", param=name)
        self._check_pairs()
        for name in ("learning_rate", "max_grad_norm"):
            value = dataclasses.asdict(self)[name]
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}: expected more than 0", param=name)
        for name in ("warmup_ratio", "min_lr_ratio"):
            if dataclasses.asdict(self)[name] > 1:
                raise ConfigError(f"{name}: expected a share between 0 and 1", param=name)
        for name in ("max_length", "eval_tokens"):
            value = dataclasses.asdict(self)[name]
            if value > LONGEST:
                raise ConfigError(f"{name} is {value}: expected {LONGEST} or less", param=name)
        if not -(2**62) <= self.seed < 2**62:
            raise ConfigError(f"seed is {self.seed}: expected a number of 63 bits", param="seed")
        if not 0 <= self.adam_beta2 < 1:
            raise ConfigError("adam_beta2: expected a share below 1", param="adam_beta2")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}: expected 1 or more", param="threads")
        if self.state_bytes < 0:
            raise ConfigError(f"hidden_states_bytes is {self.hidden_states_bytes}: expected 0 or more")

    def _check_pairs(self) -> None:
        values = dataclasses.asdict(self)
        if self.method == "dflash":
            given = [name for name in ("capture_url", "lora_rank", "vocab_mapping_path") if values[name]]
            given += ["attention"] if self.attention != "dense" else []
            if given:
                raise ConfigError(f"{given[0]}: not with method dflash, of EAGLE-3 heads alone", param=given[0])
        pairs = (("capture_url", "capture_dir"), ("capture_dir", "capture_url"), ("lora_rank", "draft_model_path"))
        for name, other in (*pairs, ("lora_alpha", "lora_rank")):
            if values[name] and not values[other]:
                raise ConfigError(f"{name} needs {other}", param=other)
        if self.draft_model_path and (self.vocab_mapping_path or self.draft_model_config):
            name = "vocab_mapping_path" if self.vocab_mapping_path else "draft_model_config"
            raise ConfigError(f"{name}: a head that is trained on keeps its own", param=name)


NAMES = {field.name: field for field in dataclasses.fields(Options)}
SECTIONS = ("model", "data", "training", "tracking", "runtime")
# How the same settings are called elsewhere.
ALIASES = {
    "strategy": "method",
    "algorithm": "method",
    "num_hidden_layers": "draft_num_hidden_layers",
    "num_draft_layers": "draft_num_hidden_layers",
    "speculative_token_map": "vocab_mapping_path",
    "draft_checkpoint_path": "draft_model_path",
    "draft_config": "draft_model_config",
    "hidden_states_path": "hidden_states_dir",
    "train_hidden_states_path": "hidden_states_dir",
    "total_steps": "max_num_steps",
    "max_steps": "max_num_steps",
    "micro_batch_size": "batch_size",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
}


def from_file(values: dict[str, Any], path: Path) -> Options:
    """Settings of a YAML file: flat, or in SECTIONS.

    Raises:
        ConfigError: for a name that is none, one that is given twice, or a value of another kind.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        section = cast("dict[Any, Any]", value) if isinstance(value, dict) else None
        if section is not None and name not in SECTIONS:
            raise ConfigError(f"{path}: unknown section {name!r}; known: {', '.join(SECTIONS)}")
        for inner, given in ({name: value} if section is None else section).items():
            key = str(inner).replace("-", "_")
            key = ALIASES.get(key, key)
            if key not in NAMES:
                near = difflib.get_close_matches(key, [*NAMES, *ALIASES], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{path}: unknown setting {inner!r}{hint}", param=key)
            if key in flat:
                raise ConfigError(f"{path}: {key!r} is given twice", param=key)
            flat[key] = _value(key, given, path)
    return Options(**flat)


def _value(key: str, value: Any, path: Path) -> Any:
    """A value of its setting's kind; YAML takes `1e-4` for a text, and a null for a default."""
    default = NAMES[key].default
    if value is None:
        return default
    kind = int if key == "threads" else type(default)
    try:
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # bytes, as a number
        if isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
            return _among(key, value)
    except ValueError as error:
        raise ConfigError(f"{path}: {key}: {error}", param=key) from None
    raise ConfigError(f"{path}: {key} is {value!r}: expected {kind.__name__}", param=key)


CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("eagle3", "dflash"),
    "init": ("target", "random"),
    "hidden_states_dtype": ("bfloat16", "float32"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attention": ("dense", "flex"),
    "save_dtype": ("float32", "bfloat16", "float16"),
}


def _among(key: str, value: Any) -> Any:
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{value!r} is none of {', '.join(CHOICES[key])}")
    return value
