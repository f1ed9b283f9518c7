"""The engine of a folder that draws: the studio on its pipeline, in the place of the scheduler on its runner."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from phloem import platforms
from phloem.core.adapters import adapter_spec
from phloem.core.caching import NONE, StepCaching, parsed
from phloem.core.errors import BadRequest, ConfigError, PhloemError
from phloem.core.messages import (
    Abort,
    Control,
    ControlReply,
    Drain,
    Draw,
    FromEngine,
    Heartbeat,
    Stopped,
    Submit,
    ToEngine,
)
from phloem.core.ranges import parse_bytes
from phloem.core.resolve import Decision
from phloem.diffusion import models, probe
from phloem.diffusion.cfg_parallel import Beside
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import Family
from phloem.diffusion.quantised import quantise
from phloem.diffusion.sequence import SequenceParallel
from phloem.diffusion.worn import Wardrobe
from phloem.launch.picture_ranks import PictureRanks, device_of
from phloem.launch.starting import Starting
from phloem.utils import log
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config, ImagesConfig, LoraConfig
    from phloem.diffusion.twin import Company
    from phloem.platforms import Platform

_log = log.get("launch")

BEAT = 1.0  # seconds
SIZE = re.compile(r"0*([1-9]\d{0,5})x0*([1-9]\d{0,5})", re.ASCII)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class PictureCore:
    """Built and run by one thread; `send` is called from that thread alone.

    Raises:
        ConfigError: a setting cannot be served.
        ModelLoadError: the folder is no pipeline.
    """

    def __init__(self, config: Config, checkpoint: Checkpoint, send: Callable[[FromEngine], None]) -> None:
        assert checkpoint.pictures is not None
        starting = Starting(send)
        images, schedule = config.images, config.schedule
        wanted = defaults(images.image_defaults)
        ranks = config.runtime.tp_size
        platform, chosen = platforms.choose(config.runtime.device, threads_of(config))
        dtype, why = dtype_of(config, platform)
        pipe = models.load(checkpoint.pictures, platform.device, dtype, images.vae_tiling)
        smaller = _smaller(pipe, config.model.quantization)
        starting.end("weights")
        painter, who = models.choose(pipe, platform.device, dtype, wanted, images.offload)
        if wanted:
            check_fit(painter)
        beside, shared = _company(config, painter, platform)
        wardrobe = _wardrobe(config.lora, pipe, painter)
        step_cache = _step_cache(images.image_step_cache, painter, ranks)
        decisions = [chosen, Decision("dtype", str(dtype).removeprefix("torch."), why), *smaller, who, *shared]
        alone = config.runtime.ops == "invariant" or config.runtime.enable_deterministic_inference
        budget, reason = _budget(images, painter, platform, alone, beside)
        starting.end("warm-up")
        decisions += [
            Decision("image_step_tokens", budget, reason),
            Decision("image_policy", images.image_policy, "as asked or by default"),
        ]
        settings = Settings(
            budget=budget,
            policy=images.image_policy,
            most=schedule.max_running_requests or 64,
            most_waiting=schedule.max_queued_requests,
            alone=alone,
            step_cache=step_cache,
        )
        self._send = send
        self._stopping: float | None = None  # when to stop at the latest
        self._beaten = self._counted = 0.0
        self._dirty = False  # something was done since the last statistics
        self.studio = Studio(painter, settings, send, platform.empty_cache)
        self.studio.wardrobe, self.studio.beside = wardrobe, beside
        self.info: dict[str, Any] = {
            "pictures": msgspec.to_builtins(painter.facts),
            "max_running_requests": settings.most,
            "decisions": [[d.name, d.value, d.reason] for d in decisions],
            "phases": starting.seconds,
            "lora_adapters": None if wardrobe is None else wardrobe.loaded(),
        }
        self._begin_steps = platform.begin_steps

    def run(self, poll: Callable[[float | None], list[ToEngine]], rest: Callable[[], None] | None = None) -> None:
        """Draw until told to drain, or until the door has gone."""

        def receive(timeout: float | None) -> None:
            for message in poll(timeout):
                self._take(message)

        while True:
            busy = bool(self.studio.jobs)
            try:
                receive(0 if busy else BEAT)
            except EOFError:
                return
            self._report()
            if self._stopping is not None and (not self.studio.jobs or monotonic() >= self._stopping):
                self._send(Stopped())
                return
            self.studio.step(lambda: self._between(receive))

    def _between(self, receive: Callable[[float | None], None]) -> None:
        receive(0)
        self._report()

    def close(self) -> None:
        self.studio.jobs.clear()
        if self.studio.beside is not None:
            self.studio.beside.close()

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Draw):
            self.studio.submit(message)
        elif isinstance(message, Abort):
            self.studio.abort(message.id, message.all)
        elif isinstance(message, Drain):
            self._stopping = monotonic() + message.timeout
        elif isinstance(message, Control):
            self._control(message)
        elif isinstance(message, Submit):
            raise ConfigError("a request for text has come to an engine of pictures")

    def _control(self, call: Control) -> None:
        if call.name == "state":
            self._send(ControlReply(id=call.id, data={"running": len(self.studio.jobs)}))
        elif call.name == "abort_all":
            self.studio.abort("", everything=True)
            self._send(ControlReply(id=call.id))
        elif call.name in ("load_lora_adapter", "unload_lora_adapter", "set_lora"):
            try:
                self._send(self._adapters(call))
            except PhloemError as error:
                self._send(ControlReply(id=call.id, ok=False, message=error.message))
            except Exception as error:  # nothing that a file may hold ends the engine
                _log.exception("%s failed", call.name)
                self._send(ControlReply(id=call.id, ok=False, message=f"{type(error).__name__}: {error!s:.300}"))
        else:
            self._send(ControlReply(id=call.id, ok=False, message=f"a model that draws has no {call.name!r}"))

    def _adapters(self, call: Control) -> ControlReply:
        """Between two steps. Raises BadRequest."""
        wardrobe, args = self.studio.wardrobe, call.args
        if wardrobe is None:
            raise BadRequest("this model takes no adapters: its pipeline runs whole")
        name = str(args.get("name") or "")
        message = ""
        if call.name == "set_lora":
            wardrobe.use(args)
        elif call.name == "unload_lora_adapter":
            users = wardrobe.unload(name, [job.worn for job in self.studio.jobs.values()])
            message = f"unloaded; {users} pictures that have begun with it end with it" if users else "unloaded"
        elif args.get("sent") is not None:
            raise BadRequest("serialized_named_tensors: models that draw take adapters from files")
        else:
            wardrobe.load(name, str(args.get("path") or ""))
            message = f"adapter {name} is loaded"
        return ControlReply(
            id=call.id, message=message, data={"loaded": wardrobe.loaded(), "active": wardrobe.active()}
        )

    def _report(self) -> None:
        now, busy = monotonic(), bool(self.studio.jobs)
        if now - self._beaten >= BEAT:
            self._beaten = now
            self._send(Heartbeat(step=self.studio.steps))
        self._dirty = self._dirty or busy
        if self._dirty and (not busy or now - self._counted >= BEAT):
            self._counted, self._dirty = now, busy
            self._send(self.studio.stats())


def _wardrobe(config: LoraConfig, pipe: Any, painter: models.Painter) -> Wardrobe | None:
    """The adapters to start with; None where the model takes none. Raises ConfigError."""
    given = [adapter_spec(text) for text in config.lora_paths or []]
    if not isinstance(painter, Family):
        if given or config.enable_lora:
            raise ConfigError("lora_paths: this model takes no adapters: its pipeline runs whole", param="lora_paths")
        return None
    memory = None if config.lora_memory is None else parse_bytes(config.lora_memory, "lora_memory")
    made = Wardrobe(pipe, painter.wearing, config.max_loaded_loras, memory)
    for spec in given:
        if spec.name in made.loaded():
            raise ConfigError(f"lora_paths: several adapters are called {spec.name!r}", param="lora_paths")
        try:
            made.load(spec.name, spec.path)
        except BadRequest as error:
            raise ConfigError(f"lora_paths: {spec.name}: {error.message}", param="lora_paths") from None
    return made


def _budget(
    images: ImagesConfig, painter: models.Painter, platform: Platform, alone: bool, company: Company | None
) -> tuple[int, str]:
    """Latent tokens of a step, and why."""
    if alone:
        return 0, "ops invariant: each picture in steps of its own"
    if images.image_step_tokens is not None:
        return images.image_step_tokens, "as asked"
    if isinstance(painter, Family):
        return probe.budget(painter, lambda: None if platform.facts.on_host else _synchronize(), company)
    return 0, "one picture at a time"


def threads_of(config: Config) -> int | None:
    """Compute threads of a rank on a processor; None: as many as there are cores."""
    ranks = config.runtime.tp_size
    return config.runtime.threads or (max(1, available_cores() // ranks) if ranks > 1 else None)


def dtype_of(config: Config, platform: Platform) -> tuple[torch.dtype, str]:
    """Of weights and states, and why."""
    asked = config.model.dtype
    return (DTYPES[asked], "as asked") if asked != "auto" else platform.dtype(None)


def refuse_ranks(config: Config) -> None:
    """What no model that draws has. Raises ConfigError."""
    runtime = config.runtime
    asked = {"pp_size": runtime.pp_size, "ep_size": runtime.ep_size, "attn_dp_size": runtime.attn_dp_size}
    for name, size in {**asked, "nnodes": config.nodes.nnodes}.items():
        if size > 1 or (name == "nnodes" and config.nodes.node_rank):
            raise ConfigError(f"{name}: a model that draws has ranks of tp_size alone, on one machine", param=name)


def _company(config: Config, painter: models.Painter, platform: Platform) -> tuple[Company | None, list[Decision]]:
    """Who computes with the painter, where anybody does. Raises ConfigError."""
    images, ranks = config.images, config.runtime.tp_size
    if ranks > 1 and images.enable_cfg_parallel:
        raise ConfigError("enable_cfg_parallel: not with tp_size above 1", param="enable_cfg_parallel")
    if ranks > 1:
        return _sequence(config, painter, platform)
    return _beside(images, painter, platform) if images.enable_cfg_parallel else None, []


def _sequence(config: Config, painter: models.Painter, platform: Platform) -> tuple[Company, list[Decision]]:
    """Raises ConfigError."""
    where, ranks = "tp_size", config.runtime.tp_size
    if not isinstance(painter, Family):
        raise ConfigError(f"{where}: this model's pipeline runs whole", param=where)
    if config.images.offload:
        raise ConfigError(f"{where}: ranks keep copies of the transformer on their devices, offload none", param=where)
    devices = [device_of(platform, rank, ranks) for rank in range(1, ranks)]
    try:
        if config.runtime.tp_comm == "auto":
            return SequenceParallel(painter, devices), [Decision(where, ranks, "as asked: threads of this process")]
        found = PictureRanks(config, painter)
    except PhloemError as error:
        raise ConfigError(f"{where}: {error.message}", param=where) from None
    return found, [Decision(where, ranks, f"as asked: {found.reason}")]


def _beside(images: ImagesConfig, painter: models.Painter, platform: Platform) -> Beside:
    """Raises ConfigError."""
    where = "enable_cfg_parallel"
    if not isinstance(painter, Family):
        raise ConfigError(f"{where}: this model's pipeline runs whole", param=where)
    if images.offload:
        raise ConfigError(f"{where}: it keeps a copy of the transformer on the device, and offload none", param=where)
    if platform.facts.on_host:
        return Beside(painter, platform.device)
    count = torch.accelerator.device_count()
    if count < 2:
        raise ConfigError(f"{where}: it needs a second device, and {count} is there", param=where)
    kind, _, index = str(platform.device).partition(":")
    return Beside(painter, torch.device(f"{kind}:{(int(index or 0) + 1) % count}"))


def _smaller(pipe: Any, kind: str | None) -> list[Decision]:
    """Raises ConfigError."""
    return [] if kind is None else [Decision("quantization", kind, quantise(pipe, kind))]


def _step_cache(text: str | None, painter: models.Painter, ranks: int) -> StepCaching:
    """Raises ConfigError."""
    where = "image_step_cache"
    try:
        found = NONE if text is None else parsed(text, where)
    except BadRequest as error:
        raise ConfigError(error.message, param=where) from None
    if not found.threshold:
        return found
    if ranks > 1:
        raise ConfigError(f"{where}: not with tp_size above 1, whose ranks each see a part of a step", param=where)
    if not isinstance(painter, Family) or not painter.facts.caches:
        raise ConfigError(f"{where}: {text} asks for one, and this model has no step cache", param=where)
    try:
        painter.check_cache(found)
    except BadRequest as error:
        raise ConfigError(f"{where}: {error.message}", param=where) from None
    return found


def _synchronize() -> None:
    torch.accelerator.synchronize()


def check_fit(painter: models.Painter) -> None:
    """Whether a request that leaves everything open can be drawn. Raises ConfigError."""
    draw = Draw(id="", prompt="", seed=0)
    try:
        painter.facts.size(draw)
        painter.facts.count(draw)
        painter.facts.length(draw)
        painter.guidance(draw)
    except BadRequest as error:
        raise ConfigError(f"image_defaults: {error.message}", param="image_defaults") from None


def defaults(text: str | None) -> dict[str, Any]:
    """`image_defaults`, checked: size, steps, guidance_scale, max_pixels. Raises ConfigError."""
    if not text:
        return {}
    where = "image_defaults"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}", param=where) from None
    known: dict[str, Any] = {"size": str, "steps": int, "guidance_scale": int | float, "max_pixels": int}
    known |= {"frames": int, "max_frames": int, "fps": int | float}
    least: dict[str, float] = {"steps": 1, "guidance_scale": 0, "max_pixels": 1}
    least |= {"frames": 1, "max_frames": 1, "fps": 0.1}
    most = {"guidance_scale": 1000, "fps": 240}  # as of requests
    if not isinstance(found, dict) or set(found) - set(known):
        raise ConfigError(f"{where}: expected a JSON object with {', '.join(known)}", param=where)
    for name, value in found.items():
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name} cannot be {value!r}", param=where)
        if name != "size" and not least[name] <= value <= most.get(name, sys.maxsize):
            raise ConfigError(f"{where}: {name} cannot be {value!r:.40}", param=where)
    if "size" in found:
        sides = SIZE.fullmatch(found["size"])
        if sides is None:
            raise ConfigError(f"{where}: size is {found['size']!r:.40}, expected such as 512x512", param=where)
        found["size"] = (int(sides[1]), int(sides[2]))
    return found
