"""From settings to a trained head: text, vocabulary, states, steps."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ConfigError, PhloemError
from phloem.text.template import load_template
from phloem.text.tokenizer import load_tokenizer
from phloem.training import checkpoints
from phloem.training.answers import Answerer, fitting
from phloem.training.checkpoints import Map
from phloem.training.data import Reader, coverage, draft_vocabulary, read_rows
from phloem.training.remote import Remote
from phloem.training.report import Metrics, plot
from phloem.training.seeing import Eyes, has_pictures, reader_of
from phloem.training.states import Library, batches_of
from phloem.training.target import Target, described, drafter_config, free_token, head_config
from phloem.training.trainer import HeldOut, Trainer

if TYPE_CHECKING:
    from collections.abc import Generator

    from phloem.training.data import Asked, Row, Sample
    from phloem.training.options import Options
    from phloem.training.report import Bars

LONGEST = 1 << 10  # drafts of a step: no bound
GENERATED, HELD_OUT, SETTINGS = "generated.jsonl", "held_out.jsonl", "settings.json"


@dataclasses.dataclass
class Texts:
    """What is learned, and held-out answers as (tokens of the prompt, whole text)."""

    samples: list[Sample]
    held_out: list[tuple[int, Sample]]


def train(options: Options, bars: Bars) -> int:
    """Train, or go on. Gives the exit status: 130 after Ctrl-C, with a checkpoint.

    Raises:
        PhloemError: what is wrong with the settings, the text, the model or the disk.
    """
    options.check()
    output = Path(options.output_dir)
    last = _last(options, output)
    asked = options.draft_model_config or options.draft_model_path
    given = checkpoints.read_config(asked) if asked else {}
    blocks, model = options.method == "dflash", described(options.target_model_path)
    sizes = drafter_config(model, options, given) if blocks else head_config(model, options.draft_vocab_size, given)
    words = None if blocks else _words(options, sizes)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {output}: {error.strerror}", param="output_dir") from None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    texts = _texts(options, output, bars)
    if blocks:
        layers = _with_mask(sizes, texts.samples)
    else:
        layers = ()
        words = words or Map(*draft_vocabulary(texts.samples, sizes["draft_vocab_size"], sizes["vocab_size"]))
    bars.say(_told(texts.samples, words, sizes))
    target = Target(options.target_model_path, options.device, options.threads, layers)
    if options.capture_url:
        target.remote = Remote(options.capture_url, Path(options.capture_dir), target.layers, target.model.hidden_size)
    folder = Path(options.hidden_states_dir) if options.hidden_states_dir else None
    kept = options.state_bytes, options.hidden_states_dtype
    library = Library(target, texts.samples, folder, *kept)
    library.fill(bars.begin("states"))
    if folder is not None:
        bars.say(f"states of {library.kept} of {len(texts.samples)} texts are in {folder}")
    trainer = Trainer(options, target, library, len(texts.samples), words, sizes)
    settings = dataclasses.asdict(options)
    if last is not None:
        trainer.resume(last, settings)
        if trainer.step >= trainer.total:
            bars.say(f"{last}: all {trainer.total} steps are done")
            return 0
        bars.say(f"goes on from {last}")
    (output / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    return _Run(trainer, _held_out(target, texts), output, settings, bars).go()


def _with_mask(sizes: dict[str, Any], samples: list[Sample]) -> tuple[int, ...]:
    """The layers whose inputs a drafter of blocks reads; its masks' token goes into `sizes`. Raises ConfigError."""
    said = sizes["dflash_config"]
    if said["mask_token_id"] is None:
        said["mask_token_id"] = free_token(samples, sizes["vocab_size"])
    return tuple(one + 1 for one in said["target_layer_ids"])


def _told(samples: list[Sample], words: Map | None, sizes: dict[str, Any]) -> str:
    """What is learned, for people."""
    tokens, said = sum(len(one.ids) for one in samples), sum(sum(one.mask) for one in samples)
    found = f"{len(samples)} texts, {tokens} tokens, {said} of them to learn from; "
    if words is None:
        said_of = sizes["dflash_config"]
        read = f"outputs of layers {said_of['target_layer_ids']}, mask {said_of['mask_token_id']}"
        return f"{found}blocks of {sizes['block_size']}, {read}"
    covered = coverage(samples, words.t2d_V)
    return f"{found}the draft vocabulary of {len(words.d2t_D)} has {covered:.1%} of those"


def _words(options: Options, sizes: dict[str, Any]) -> Map | None:
    """The vocabulary that is given; its size goes into `sizes`. None: the text's most frequent tokens. ConfigError."""
    path = options.vocab_mapping_path or options.draft_model_path
    if not path:
        return None
    file = Path(path) if options.vocab_mapping_path else Path(path) / checkpoints.WEIGHTS
    words = checkpoints.read_map(file, sizes["vocab_size"])
    sizes["draft_vocab_size"] = len(words.d2t_D)
    return words


def _last(options: Options, output: Path) -> Path | None:
    """The checkpoint to go on from. Raises ConfigError where there is none, or where one would be written over."""
    found = checkpoints.found_in(output) if output.is_dir() else []
    if options.resume:
        if not found:
            raise ConfigError(f"resume: there is no checkpoint in {output}", param="resume")
        return found[-1]
    if found:
        message = f"{output} has checkpoints: --resume goes on from {found[-1].name}, or name another --output-dir"
        raise ConfigError(message, param="output_dir")
    return None


# texts


def _texts(options: Options, output: Path, bars: Bars) -> Texts:
    checkpoint = described(options.target_model_path)
    tokenizer = load_tokenizer(checkpoint)
    template = load_template(checkpoint, Path(options.chat_template) if options.chat_template else None, tokenizer)
    longest = min(options.max_length, checkpoint.context_length)
    path = looked_path = Path(options.train_data_path)
    rows = read_rows(path)
    if options.eval_data_path:
        looked_path = Path(options.eval_data_path)
        looked = read_rows(looked_path)[: options.eval_prompts or None]
    else:  # drawn once, so that a file in an order of its own has them of each kind
        chosen = set(random.Random(options.seed).sample(range(len(rows)), min(options.eval_prompts, len(rows) // 2)))
        looked = [row for number, row in enumerate(rows) if number in chosen]
        rows = [row for number, row in enumerate(rows) if number not in chosen]
    pictured = any(has_pictures(row.messages) for row in [*rows, *looked])
    sees = reader_of(options.target_model_path) if pictured else None
    eyes = None if sees is None else Eyes(sees, template, [path.parent, looked_path.parent])
    reader = Reader(tokenizer, template, longest, checkpoint.vocab_size, options.train_only_last_turn, eyes)
    answerer = Answerer(_engine_settings(options))
    try:
        if options.generate:
            rows = rows[: options.generate]
            sampling = {"temperature": options.generate_temperature, "max_new_tokens": options.generate_tokens}
            sampling["sampling_seed"] = options.seed
            prompts = reader.prompts(rows, str(path))
            rows = _answered(answerer, output / GENERATED, reader.max_length, (prompts, rows), sampling, bars)
            path = output / GENERATED
        samples = reader.samples(rows, str(path))
        for why, count in reader.left_out.items():
            bars.say(f"{count} rows are left out: {why}")
        sampling = {"temperature": 0.0, "max_new_tokens": options.eval_tokens, "sampling_seed": 0}
        if looked:
            asked = reader.prompts(looked, str(looked_path)), looked
            looked = _answered(answerer, output / HELD_OUT, reader.max_length, asked, sampling, bars)
        held_out = [(len(row.output_ids), reader.whole(row)) for row in looked if len(row.output_ids) > 1]
    finally:
        answerer.close()
        if sees is not None:
            sees.close()
    return Texts(samples, [(len(sample.ids) - said, sample) for said, sample in held_out])


def _answered(
    answerer: Answerer,
    path: Path,
    room: int,
    asked: tuple[list[Asked], list[Row]],
    sampling: dict[str, Any],
    bars: Bars,
) -> list[Row]:
    """Prompts, of these rows, with the model's own answers."""
    prompts, rows = fitting(*asked, room)
    answerer.write(path, prompts, rows, sampling, bars.begin(path.stem.replace("_", " ")))
    return [row for row in read_rows(path) if row.output_ids]


def _engine_settings(options: Options) -> dict[str, Any]:
    settings: dict[str, Any] = {"model_path": options.target_model_path, "device": options.device}
    return settings if options.threads is None else {**settings, "threads": options.threads}


def _held_out(target: Target, texts: Texts) -> list[HeldOut]:
    samples = [sample for _, sample in texts.held_out]
    states = [
        one
        for numbers in batches_of([len(sample.ids) for sample in samples])
        for one in target.states([samples[number] for number in numbers])
    ]
    return [HeldOut(one, prompt) for one, (prompt, _) in zip(states, texts.held_out, strict=True)]


# steps


class _Run:
    """Steps until the end, with what is told on the way."""

    def __init__(
        self, trainer: Trainer, held_out: list[HeldOut], output: Path, settings: dict[str, Any], bars: Bars
    ) -> None:
        self._trainer, self._held_out, self._output = trainer, held_out, output
        self._settings, self._bars, self._options = settings, bars, trainer.options
        self._metrics = Metrics(output, trainer.step if trainer.step else -1)
        self._accept = ""

    def go(self) -> int:
        trainer, options = self._trainer, self._options
        told = self._bars.begin("training")
        if not trainer.step:
            self._look()
        begun, saved = trainer.seconds, (-1, self._output)
        with _stopped() as stopped:
            while trainer.step < trainer.total and not stopped.is_set():
                lesson, norm = trainer.learn()
                step, ended = trainer.step, trainer.step == trainer.total
                words = f"loss {lesson.value:.3f}  acc {lesson.accuracies[0]:.2f}{self._accept}"
                told(step, trainer.total, words)
                if step % options.log_interval == 0 or ended:
                    self._log(lesson, norm)
                if options.max_minutes and trainer.seconds - begun >= options.max_minutes * 60:
                    break
                if not ended and step % options.eval_interval == 0:
                    self._look()
                if not ended and step % options.save_interval == 0:
                    saved = trainer.step, trainer.save(self._output, self._settings)
            # Written again, it would not be there for a moment.
            folder = saved[1] if saved[0] == trainer.step else trainer.save(self._output, self._settings)
            if not stopped.is_set():
                self._bars.say(f"{folder} is written; a last look and the plot follow")
                self._look()
        self._plot()
        self._bars.say(f"{folder}: {trainer.step} of {trainer.total} steps in {trainer.seconds:.0f} s{self._accept}")
        return 130 if stopped.is_set() else 0

    def _log(self, lesson: Any, norm: float) -> None:
        trainer = self._trainer
        self._metrics.add(
            {
                "step": trainer.step,
                "epoch": trainer.step / trainer.steps_per_epoch,
                "lr": trainer.rate(trainer.step - 1),
                "loss": lesson.value,
                "losses": lesson.losses,
                "accuracy": lesson.accuracies,
                "acceptance": lesson.acceptances,
                "grad_norm": norm,
                "tokens": trainer.seen,
                "seconds": round(trainer.seconds, 3),
            }
        )

    def _look(self) -> None:
        if not self._held_out:
            return
        trainer = self._trainer
        found = trainer.look(self._held_out)
        survival = found.survival(min(self._options.looked_drafts, trainer.config.get("block_size", LONGEST) - 1))
        self._metrics.add(
            {
                "step": trainer.step,
                "accept_length": found.length,
                "accepted_at": survival,
                "verify_steps": found.steps,
                "tokens": found.tokens,
                "seconds": round(trainer.seconds, 3),
            }
        )
        self._accept = f"  accept length {found.length:.2f}"
        share = ", ".join(f"{one:.0%}" for one in survival)
        self._bars.say(f"step {trainer.step}, {trainer.seconds:.0f} s:{self._accept} (drafts accepted: {share})")

    def _plot(self) -> None:
        try:
            plot(self._output)
        except PhloemError as error:
            self._bars.say(error.message)


@contextmanager
def _stopped() -> Generator[threading.Event]:
    """Ctrl-C and SIGTERM end the training behind the step that runs; a second Ctrl-C ends it at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        del number, frame
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
