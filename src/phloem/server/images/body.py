"""Request bodies of pictures: OpenAI's fields, and those by which open models are drawn with."""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar, Literal

from phloem.client.request import CALLER, NOBODY, new_id
from phloem.core.caching import NAMES, StepCaching, step_caching
from phloem.core.errors import BadRequest
from phloem.core.messages import Draw, Wear
from phloem.protocol.body import Body, Later
from phloem.protocol.fields import HINT, Int32, Seed

QUALITY = "num_inference_steps says how carefully a picture is drawn"
MAX_N = 10
MAX_PREVIEWS = 3
MAX_IMAGES = 16  # of a request, as OpenAI has it
MAX_PROMPT = 32_000  # characters, as OpenAI has it
MAX_SCALE = 1000.0
MAX_LORAS = 8  # of a request
MAX_LORA_SCALE = 100.0
SEEDS = 1 << 31
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
_OF_FILMS = Later("video", (), "pictures have none; /v1/videos makes films")
_VIDEO = dict.fromkeys(("num_frames", "fps", "seconds", "guidance_scale_2", "input_reference"), _OF_FILMS)


class StepCacheBody(Body, kw_only=True):
    """`cache`: blocks are left out of steps that change little. What is None is the kind's to say."""

    kind: Literal["first_block", "teacache", "dbcache", "none"] = "first_block"
    threshold: float | None = None
    fn_compute_blocks: Int32 | None = None
    bn_compute_blocks: Int32 | None = None
    max_warmup_steps: Int32 | None = None
    max_continuous_cached_steps: Int32 | None = None
    coefficients: list[float] | None = None


class LoraBody(Body, kw_only=True):
    """`lora`: an adapter by its name, and how much of it. Several of them add up."""

    name: str | None = None
    scale: float = 1.0


class PictureFields(Body, kw_only=True):
    """What a picture and a film are asked for with."""

    prompt: str
    model: str | None = None
    size: str | None = None
    width: Int32 | None = None
    height: Int32 | None = None
    negative_prompt: str | None = None
    num_inference_steps: Int32 | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: Int32 | None = None
    flow_shift: float | None = None
    cache: StepCacheBody | None = None
    lora: str | LoraBody | list[str | LoraBody] | None = None
    user: str | None = None

    def check_fields(self) -> None:
        """Raises BadRequest."""
        for name, scale in (("guidance_scale", self.guidance_scale), ("true_cfg_scale", self.true_cfg_scale)):
            within(name, scale, 0, MAX_SCALE)
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if text is not None and len(text) > MAX_PROMPT:
                raise BadRequest(f"{name}: {len(text)} characters, at most {MAX_PROMPT} are read", param=name)

    def draw(self, key: str, seed: int) -> Draw:
        """What all drawings have."""
        width, height = self._size()
        return Draw(
            id=key,
            prompt=self.prompt,
            seed=seed,
            width=width,
            height=height,
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            true_cfg=self.true_cfg_scale,
            negative=self.negative_prompt,
            step_cache=self._caching(),
            lora=self._worn(),
            client=self.user or "",
        )

    def _worn(self) -> list[Wear] | None:
        """None: as the server has it; what names no adapter draws without. Raises BadRequest."""
        if self.lora is None:
            return None
        found: list[Wear] = []
        for one in self.lora if isinstance(self.lora, list) else [self.lora]:
            asked = LoraBody(name=one) if isinstance(one, str) else one
            if asked.name is None and asked.scale == 1.0:
                continue
            if not asked.name:
                raise BadRequest("lora: an adapter has a name", param="lora")
            within("lora.scale", asked.scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
            found.append(Wear(asked.name, asked.scale))
        if len(found) > MAX_LORAS or len({one.name for one in found}) < len(found):
            raise BadRequest(f"lora: at most {MAX_LORAS} adapters, each of them once", param="lora")
        return found

    def _caching(self) -> StepCaching | None:
        """Raises BadRequest."""
        if self.cache is None:
            return None
        given = {name: value for name in NAMES if (value := getattr(self.cache, name)) is not None}
        return step_caching(self.cache.kind, given)

    def _size(self) -> tuple[int, int]:
        """(width, height); 0: the model's own."""
        if (self.width is None) != (self.height is None):
            missing = "width" if self.width is None else "height"
            raise BadRequest(f"{missing}: width and height come together", param=missing)
        if self.width is not None and self.height is not None:
            if self.size not in (None, "auto", f"{self.width}x{self.height}"):
                raise BadRequest(f"size: {self.size!r:.40} and width, height say different things", param="size")
            for name, side in (("width", self.width), ("height", self.height)):
                if side < 1:
                    raise BadRequest(f"{name}: {side} is not above 0", param=name)
            return self.width, self.height
        if self.size in (None, "auto"):
            return 0, 0
        found = _SIZE.fullmatch(self.size or "")
        if found is None or not int(found[1]) or not int(found[2]):
            raise BadRequest(f"size: {self.size!r:.40} is not WIDTHxHEIGHT, such as 512x512", param="size")
        return int(found[1]), int(found[2])


class ImagesBody(PictureFields, kw_only=True):
    """`POST /v1/images/generations`."""

    n: Int32 | None = None
    seed: Seed | list[Seed] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Int32 | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    stream: bool | None = None
    partial_images: Int32 | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    num_frames: Int32 | None = None
    fps: Int32 | None = None
    seconds: Any = None
    guidance_scale_2: float | None = None
    input_reference: Any = None

    ignored: ClassVar[dict[str, str]] = {
        "quality": QUALITY,
        "style": HINT,
        "moderation": HINT,
    }
    later: ClassVar[dict[str, Later]] = {
        "response_format": Later("image_urls", ("b64_json",), "no pictures are kept: b64_json is served"),
        "background": Later("transparency", ("auto", "opaque")),
        "max_sequence_length": Later("max_sequence_length"),
        "flow_shift": Later("flow_shift"),
        **_VIDEO,
    }

    def draws(self) -> list[Draw]:
        """One for each picture. What depends on the model the engine checks.

        Raises:
            BadRequest: it names the field.
        """
        count = self.count()
        self._check()
        key, seeds = new_id("image-"), self._seeds(count)
        found = [self.draw(f"{key}-{at}", seed) for at, seed in enumerate(seeds)]
        for draw in found:
            draw.previews = self.partial_images or 0 if self.stream else 0
        return found

    def count(self) -> int:
        """How many pictures. Raises BadRequest."""
        count = 1 if self.n is None else self.n
        within("n", count, 1, MAX_N)
        return count

    def _check(self) -> None:
        within("partial_images", self.partial_images, 0, MAX_PREVIEWS)
        within("output_compression", self.output_compression, 0, 100)
        self.check_fields()
        if self.partial_images and not self.stream:
            raise BadRequest("partial_images: they are sent where stream is true", param="partial_images")

    def _seeds(self, count: int) -> list[int]:
        """Picture i of one seed has seed + i, so that the first is the one that the seed alone gives."""
        if isinstance(self.seed, list):
            if len(self.seed) != count:
                raise BadRequest(f"seed: {len(self.seed)} seeds for {count} pictures", param="seed")
            return self.seed
        first = random.randrange(SEEDS) if self.seed is None else self.seed
        if first + count > 1 << 63:
            raise BadRequest("seed: too large for so many pictures", param="seed")
        return [first + at for at in range(count)]


class ImageEditsBody(ImagesBody, kw_only=True):
    """`POST /v1/images/edits`, as a form or as JSON. `image`: files, or in JSON data URIs; `images`: objects with
    `image_url`."""

    image: Any = None
    images: Any = None
    mask: Any = None
    input_fidelity: str | None = None

    ignored: ClassVar[dict[str, str]] = {**ImagesBody.ignored, "input_fidelity": "the model says how closely it looks"}

    def sources(self) -> list[bytes | str]:
        """What clients name as pictures. Raises BadRequest."""
        if self.image is not None and self.images is not None:
            raise BadRequest("images: image says the same: send one", param="images")
        name, given = ("image", self.image) if self.images is None else ("images", self.images)
        found = [source_of(one, name) for one in (given if isinstance(given, list) else [given])]
        if not found:
            raise BadRequest(f"{name}: a picture is missing: a file, or a data URI", param=name)
        if len(found) > MAX_IMAGES:
            raise BadRequest(f"{name}: {len(found)} pictures, at most {MAX_IMAGES} are read", param=name)
        return found


def source_of(given: Any, where: str) -> bytes | str:
    """A file, or where it is: text or an object with `image_url`. Raises BadRequest."""
    if isinstance(given, dict):
        if set(given) != {"image_url"} or not isinstance(given["image_url"], str):
            why = "expected a file, or {'image_url': ...}: no files are kept here"
            raise BadRequest(f"{where}: {why}", param=where)
        return given["image_url"]
    if not isinstance(given, bytes | str) or not given:
        raise BadRequest(f"{where}: a picture is missing: a file, or a data URI", param=where)
    return given


def within(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:
        raise BadRequest(f"{name}: {value} is not in {least:g} to {most:g}", param=name)


def sign(draws: list[Draw], keys_alone: bool) -> None:
    """Whose they are, for `image_policy` fair: the user's that the body names, else the API key's."""
    key = CALLER.get(NOBODY).key
    for draw in draws:
        draw.client = key if keys_alone else draw.client or key


def wear(adapter: str, draws: list[Draw]) -> None:
    """The adapter that a model's name asks for; "": none. Raises BadRequest: `lora` asks for others."""
    for draw in draws if adapter else []:
        if draw.lora is not None and [one.name for one in draw.lora] != [adapter]:
            raise BadRequest(f"lora: model asks for adapter {adapter!r:.200}, and lora for others", param="lora")
        draw.lora = draw.lora or [Wear(adapter)]
