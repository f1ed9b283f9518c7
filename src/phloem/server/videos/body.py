"""Request bodies of films: OpenAI's fields, and those by which open models are asked."""

from __future__ import annotations

import random
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

from phloem.client.request import new_id
from phloem.core.errors import BadRequest
from phloem.protocol.body import Later
from phloem.protocol.fields import Int32, Seed
from phloem.server.images.body import MAX_SCALE, QUALITY, SEEDS, PictureFields, within

if TYPE_CHECKING:
    from phloem.core.messages import Draw
    from phloem.diffusion.request import Facts

MIN_FPS, MAX_FPS = 0.1, 240  # files know rates as fractions, and none near 0
MAX_SECONDS = 3600.0


class VideosBody(PictureFields, kw_only=True):
    """`POST /v1/videos`, as JSON or as a form. `input_reference`: a file; in JSON a data URI, or an object with
    `image_url`."""

    seconds: str | float | None = None
    num_frames: Int32 | None = None
    fps: float | None = None
    seed: Seed | None = None
    guidance_scale_2: float | None = None
    input_reference: Any = None
    n: Int32 | None = None
    quality: str | None = None

    ignored: ClassVar[dict[str, str]] = {"quality": QUALITY}
    later: ClassVar[dict[str, Later]] = {
        "n": Later("several_films", (1,), "a job is one film"),
        "max_sequence_length": Later("max_sequence_length"),
        "flow_shift": Later("flow_shift"),
    }

    def film(self, facts: Facts) -> tuple[Draw, float, str]:
        """(what is drawn; frames a second; how long it is, as the client said it). What depends on more of the
        model the engine checks.

        Raises:
            BadRequest: it names the field.
        """
        self.check_fields()
        within("guidance_scale_2", self.guidance_scale_2, 0, MAX_SCALE)
        if self.fps is not None and not MIN_FPS <= self.fps <= MAX_FPS:
            raise BadRequest(f"fps: {self.fps} is not in {MIN_FPS} to {MAX_FPS}", param="fps")
        if self.num_frames is not None and self.num_frames < 1:
            raise BadRequest(f"num_frames: {self.num_frames} is not above 0", param="num_frames")
        fps = self.fps or facts.fps
        draw = self.draw(new_id("video_"), random.randrange(SEEDS) if self.seed is None else self.seed)
        draw.film, draw.guidance_2, draw.frames = True, self.guidance_scale_2, self.num_frames or 0
        draw.fps = fps
        if self.seconds is None:
            return draw, fps, f"{(draw.frames or facts.frames) / fps:g}"
        if self.num_frames is not None:
            raise BadRequest("seconds: num_frames says how long the film is as well: send one", param="seconds")
        draw.frames = self._frames(facts, fps)
        return draw, fps, self.seconds.strip() if isinstance(self.seconds, str) else f"{self.seconds:g}"

    def _frames(self, facts: Facts, fps: float) -> int:
        """So many as come nearest to the time asked for, of the numbers that the model makes."""
        try:
            seconds = float("" if self.seconds is None else self.seconds)
        except ValueError:
            raise BadRequest(f"seconds: {self.seconds!r:.40} is no number", param="seconds") from None
        if not isfinite(seconds) or not 0 < seconds <= MAX_SECONDS:
            raise BadRequest(f"seconds: {self.seconds!r:.40} is not in 0 to {MAX_SECONDS:g}", param="seconds")
        grid = facts.frame_grid
        frames = max(0, round((seconds * fps - 1) / grid)) * grid + 1
        if frames > facts.max_frames:
            most = f"at most {facts.max_frames / fps:g} at {fps:g} frames a second ({facts.max_frames} frames)"
            raise BadRequest(f"seconds: {seconds:g}: this server allows {most}", param="seconds")
        return frames
