"""The contract between door and scheduler: tagged msgspec structs, as msgpack between processes or handed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from phloem.core.caching import StepCaching
from phloem.core.errors import BadRequest
from phloem.core.media import Media
from phloem.core.request import Align, FinishReason, SamplingParams


def pack_ids(ids: list[int] | np.ndarray[Any, np.dtype[np.int32]]) -> bytes:
    """Token ids as little-endian int32: a long list as msgpack integers costs a millisecond."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(data, dtype="<i4").astype(np.int32)


class Message(msgspec.Struct, tag=True, omit_defaults=True, kw_only=True):
    """Base of everything that crosses the border."""


# door -> scheduler


class Submit(Message):
    """A request, tokenised. `n` and stop strings are the door's business and never reach the scheduler."""

    id: str
    input_ids: bytes
    sampling: SamplingParams
    priority: int = 0
    namespace: str = ""  # requests share cached prefixes only inside one namespace (`cache_salt`, `extra_key`, LoRA)
    return_logprob: bool = False
    logprob_start: int = -1  # first prompt position whose logprob is wanted; -1: none
    top_logprobs: int = 0
    token_ids_logprob: list[int] = []
    return_hidden: bool = False
    return_routed: bool = False  # which experts computed each token
    pooled: bool = False  # for a model that does not generate: `max_new_tokens` is 0, `Chunk.pooled` the answer
    second: int = 0  # token at which the second text of a pair begins; 0: there is one text
    audio: bytes = b""  # little-endian float32 log-mel features [mels, frames], for a model that hears
    align: Align | None = None  # its tokens are not continued: `max_new_tokens` is 0, `Chunk.pooled` the answer
    arrival: float = 0.0  # time.time() at the door
    adapter: str = ""  # the name of the one that it is computed with; "": none
    media: list[Media] = []  # pictures, whose tokens are those of `core.media.with_content`
    grammar_at_once: bool = False  # a constraint holds from the first token, also where the model could reason before
    dp_rank: int = -1  # the replica that it must go to; -1: whichever
    room: str = ""  # where prefill and decode servers meet over it; "": one server does both
    prefill_host: str = ""  # for decode: the bootstrap server of who computes the prompt
    prefill_port: int = 0
    call: str = ""  # the same for all prompts and continuations of one call; "": it has but one
    ttft: float = 0.0  # seconds to the first token, and between later ones, that the client asks for; 0: as they come
    itl: float = 0.0
    tier: str = ""  # its class, which may have targets of its own
    traced: bool = False  # chunks tell what was done for it, and when
    user: str = ""  # whom the client names, and a digest of the client's key: the queue may tell clients apart by them
    key: str = ""


class Pixels(msgspec.Struct):
    """A picture that comes with a request: rows of red, green, blue, a byte each."""

    width: int
    height: int
    data: bytes


class Wear(msgspec.Struct):
    """An adapter that a picture is drawn with, and how much of it."""

    name: str
    scale: float = 1.0


class Draw(Message):
    """One picture, or one film. What is None or 0 is the model's to say; `previews`: pictures on the way.

    A film is answered at once, with no step done, where it is taken up: whoever keeps it as a job knows by that.
    """

    id: str
    prompt: str
    seed: int
    width: int = 0
    height: int = 0
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    guidance_2: float | None = None  # in the second half of models that have two
    negative: str | None = None
    previews: int = 0
    step_cache: StepCaching | None = None  # None: as the server has it
    film: bool = False
    frames: int = 0  # of a film
    fps: float = 0.0  # at which it will be shown, for models that draw for a rate; 0: the model's own
    pictures: list[Pixels] = []  # what is to be changed, or how a film begins
    mask: Pixels | None = None  # where it is to be changed: white
    lora: list[Wear] | None = None  # adapters; None: as the server has them
    client: str = ""  # who asks, where clients share the machine out


class Abort(Message):
    """End a request (its pages are freed; no answer is sent). An empty id with `all` ends every one."""

    id: str = ""
    all: bool = False


class Control(Message):
    """An administrative call; answered by one `ControlReply` with the same id.

    Names: `flush_cache` (args: timeout seconds), `clear_hicache_storage` (data: pages),
    `state` (running and waiting counts, memory, throughput, cache),
    `pause` (args: mode abort | retract | in_place), `resume`, `abort_all`, `cache_tree` (args: max_nodes),
    `kv_events` (data: sequence, events: the whole tree),
    `expert_distribution` (args: action start | stop | dump; data: logical_count, by layer and expert),
    `capture` (args: texts, token ids; asked, `spec_capture` of each; data: captured, what was written of each),
    `get_weights_by_name` (args: name, rows; data: weight, nested lists), `load_lora_adapter` (args: name, path,
    pinned; data: loaded, path by name), `unload_lora_adapter` (args: name; data: loaded, users), `set_lora` of models
    that draw (args: adapters, [name, path or None, scale] each, or enabled, scale; data: loaded, active),
    `start_profile` (args: folder, prefix, start_step, num_steps, activities, with_stack, record_shapes; data: path),
    `stop_profile` (data: path).

    Of weights (`scheduler/weights.py`): `update_weights` (args: source and what `core.updates.Keeper.read` takes,
    version, flush, abort_all; data: tensors, version, epoch, aborted), `begin_update`, `end_update`, `abort_update`,
    `update_version` (args: version, abort_all), `init_group`, `destroy_group`,
    `check_weights` (args: action, skip; data: checksums),
    `release_memory` and `resume_memory` (args: tags; data: bytes, or unfit).
    """

    id: str
    name: str
    args: dict[str, Any] = {}


class Drain(Message):
    """Finish what runs within `timeout` seconds, then answer `Stopped` and leave."""

    timeout: float = 30.0


# scheduler -> door


class Logprobs(Message):
    """`values[i]` belongs to the i-th position; top and chosen hold (logprob, token id) pairs per position."""

    values: list[float] = []
    top: list[list[tuple[float, int]]] = []
    chosen: list[list[tuple[float, int]]] = []


Did = tuple[str, float, float, int]  # what, from when to when in seconds of `time.monotonic`, tokens or bytes


class Chunk(msgspec.Struct, omit_defaults=True, kw_only=True):
    """New tokens of one request."""

    id: str
    tokens: list[int] = []
    finish: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens found in the cache (on the first chunk and the last)
    cached_host: int = 0  # of these, those that were in host memory, and in a store
    cached_storage: int = 0
    queue_seconds: float = 0.0
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None  # once, with the first chunk
    pooled: bytes = b""  # with the last chunk: little-endian float32, of all tokens where each has its own
    # Where drafts are verified, on the first chunk and the last: forced tokens, drafts, and of how many steps none,
    # one, two, ... of them were accepted.
    drafts: list[int] = []
    passes: int = 0  # over canvases of a model of diffusion, so far (on the first chunk and the last)
    # Little-endian int16 [tokens, layers, experts of a token]: of those that have been computed since the last chunk.
    routed: bytes = b""
    hidden: list[bytes] = []  # per token, little-endian float32: the last layer's state that it was chosen from
    dp_rank: int = -1  # the replica that it is of, where there are several
    did: list[Did] = []  # for a traced request, since its last chunk (`scheduler/traced.py`)


class Tokens(Message):
    """One step's news for every request concerned: a single message a step.

    Most requests have one new token and nothing else to tell: `plain[i]` is that of request `rows[i]`. Where these are
    the requests of the message before, and that one had no chunks, `rows` is left out. They come before what `chunks`
    has of the same requests.
    """

    chunks: list[Chunk] = []
    rows: list[str] | None = None
    plain: list[int] = []


class Painted(Message):
    """News of one picture: a step more; a preview; or, with `done`, its pixels or the error that ended it.

    `pixels`: rows of red, green, blue, a byte each; those of a preview where `preview` is its index. Those of a film
    come before its end, a message each: `frame` of `frames`.
    """

    id: str
    step: int = 0
    steps: int = 0
    preview: int = -1
    width: int = 0
    height: int = 0
    pixels: bytes = b""
    frame: int = -1
    frames: int = 0
    done: bool = False
    error: str = ""
    status: int = 500
    param: str | None = None
    code: str | None = None
    queue_seconds: float = 0.0
    text_tokens: int = 0
    image_tokens: int = 0  # of the latents
    seen_tokens: int = 0  # of the pictures that came with it


class Stats(Message):
    """Sent about once a second while anything runs, and once when the engine goes idle."""

    running: int = 0
    waiting: int = 0
    used_tokens: int = 0
    evictable_tokens: int = 0
    available_tokens: int = 0
    total_tokens: int = 0
    gen_throughput: float = 0.0  # output tokens per second since the last Stats
    cache_hit_rate: float = 0.0  # cached prompt tokens over prompt tokens, since start
    evicted_tokens: int = 0
    preemptions: int = 0
    out_of_memory: int = 0  # steps that failed for lack of memory and were run again, since start
    step: int = 0
    outside_forward: float = 0.0  # share of step time outside the model's forward pass, since the last Stats
    spec_verify_calls: int = 0  # since start: rows with drafts, drafts, and those that were accepted
    spec_drafted: int = 0
    spec_accepted: int = 0
    spec_accept_length: float = 0.0  # tokens a decode step of a request has given, since start
    spec_accept_rate: float = 0.0  # accepted drafts over drafts, since start
    dllm_passes: int = 0  # over canvases of requests, since start
    dllm_tokens_per_forward: float = 0.0  # that they gave each, since start
    waiting_tokens: int = 0  # of prompts that wait, whatever of them is cached
    prefill_tokens: int = 0  # prompt tokens that were computed, and the seconds of their steps, since start
    prefill_seconds: float = 0.0
    pictures_encoded: int = 0  # since start: by the model's tower
    pictures_found: int = 0  # and those that the encoder cache had
    grammar_seconds: list[float] = []  # of each grammar that was compiled since the last Stats
    step_seconds: list[float] = []  # of pictures: each step since the last Stats
    pixel_throughput: float = 0.0  # pixels of finished pictures per second since the last Stats
    tiers: dict[str, float] = {}  # of cache tiers beyond the pool: what they hold, and what they have done


class Reweighted(Message):
    """Tokens behind this message are of other weights than those before it, or of weights with another name."""

    version: str
    unfit: str = ""  # why the weights cannot serve; "": they can
    dp_rank: int = -1  # of this replica alone


class Lost(Message):
    """These requests have ended with the replica that had them; others go on."""

    ids: list[str]
    error: str


class ControlReply(Message):
    id: str
    ok: bool = True
    message: str = ""
    data: dict[str, Any] = {}


class Progress(Message):
    """A phase of start-up ended: its name and how long it took."""

    phase: str
    seconds: float


class Ready(Message):
    """The engine can serve. `info`: max_total_num_tokens, page_size, vocab_size, context_length, decisions, phases."""

    info: dict[str, Any] = {}


class Failed(Message):
    """The engine could not start, or stopped for good: the exception's class name, its text, its trace, and the setting
    that it is about."""

    error: str
    kind: str = ""
    trace: str = ""
    param: str | None = None


class Stopped(Message):
    """The last message of an orderly end."""


class Heartbeat(Message):
    """Sent at least every second by the loop itself: its absence while a step runs means that the step hangs."""

    step: int = 0
    busy_seconds: float = 0.0  # how long the step in progress has been running; 0 when idle


ToEngine = Submit | Draw | Abort | Control | Drain
FromEngine = (
    Tokens | Painted | Stats | Reweighted | Lost | ControlReply | Progress | Ready | Failed | Stopped | Heartbeat
)


def _plain(value: Any) -> Any:
    """Numbers of a body that remember how they were written are floats to an engine."""
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: Message) -> bytes:
    """Raises BadRequest: an integer has more than 64 bits."""
    try:
        return _encoder.encode(message)
    except OverflowError:
        raise BadRequest("the request has an integer of more than 64 bits") from None


def decode_to_engine(data: bytes) -> ToEngine:
    return _to_engine.decode(data)


def refusal(data: bytes, why: str) -> FromEngine | None:
    """The answer to a message that `decode_to_engine` does not understand, so that nobody waits for ever.

    None where it has no id to answer to.
    """
    try:
        found = msgspec.msgpack.decode(data)
    except msgspec.DecodeError:
        return None
    name, kind = (found.get("id"), found.get("type")) if isinstance(found, dict) else (None, None)
    if not isinstance(name, str) or not name:
        return None
    text = f"the engine does not understand this request: {why}"
    if kind == "Control":
        return ControlReply(id=name, ok=False, message=text)
    if kind == "Submit":
        return Tokens(chunks=[Chunk(id=name, finish=FinishReason("abort", message=text, status_code=400))])
    if kind == "Draw":
        return Painted(id=name, done=True, error=text, status=400)
    return None


def decode_from_engine(data: bytes) -> FromEngine:
    return _from_engine.decode(data)


@dataclass
class Replica:
    """One engine of those behind a link, as the door sees it.

    `in_flight`: requests that it has; None: all that the door has. `problem`: why it does not serve.
    """

    rank: int = 0
    stats: Stats = field(default_factory=Stats)
    ready: dict[str, Any] | None = None
    in_flight: int | None = None
    problem: str | None = None


class EngineLink:
    """What the door holds of an engine, in this process or another (`launch/` makes one; tests fake one).

    `send` never blocks. `deliver` is awaited by exactly one task; a link has it, or `receive`, which it then uses.
    `alive` turns False for good when the engine ends.
    """

    def send(self, message: ToEngine) -> None:
        raise NotImplementedError

    async def receive(self) -> FromEngine:
        raise NotImplementedError

    async def deliver(self, take: Callable[[FromEngine], bool]) -> None:
        """Give `take` every message as it comes, until it answers False. Raises `EngineDead` when the engine ends."""
        while take(await self.receive()):
            pass

    @property
    def alive(self) -> bool:
        raise NotImplementedError

    @property
    def end(self) -> str:
        """Why it is not alive, as far as the link knows."""
        return "the engine process has ended"

    @property
    def replicas(self) -> list[Replica]:
        """The engines behind a link that has several; empty where it is the link of one."""
        return []

    def close(self) -> None:
        raise NotImplementedError


__all__ = [
    "Abort",
    "Chunk",
    "Control",
    "ControlReply",
    "Drain",
    "Draw",
    "EngineLink",
    "Failed",
    "FinishReason",
    "FromEngine",
    "Heartbeat",
    "Logprobs",
    "Lost",
    "Message",
    "Painted",
    "Pixels",
    "Progress",
    "Ready",
    "Replica",
    "Reweighted",
    "Stats",
    "Stopped",
    "Submit",
    "ToEngine",
    "Tokens",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
    "pack_ids",
    "unpack_ids",
]
