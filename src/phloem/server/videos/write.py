"""Answers of films, in OpenAI's shapes. `seed`, `num_frames` and `fps` are ours."""

from __future__ import annotations

from typing import Literal

from phloem.protocol.answers import Answer


class VideoError(Answer, kw_only=True):
    code: str
    message: str


class Video(Answer, kw_only=True):
    """A job. It is written beside its film as it stands, and read again when a server starts."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0  # percent
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoError | None = None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None = None
    seed: int
    num_frames: int
    fps: float

    @property
    def running(self) -> bool:
        return self.status in ("queued", "in_progress")


class VideoList(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(Answer, kw_only=True):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True
