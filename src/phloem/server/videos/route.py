"""`/v1/videos`: a film is asked for, looked after, fetched and deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from phloem.core.errors import BadRequest
from phloem.diffusion.request import Facts
from phloem.protocol.body import Parser
from phloem.server.door import door_of, json_response
from phloem.server.images.body import sign, source_of, wear
from phloem.server.images.given import pixels_of
from phloem.server.multipart import form_of
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.videos.body import VideosBody
from phloem.server.videos.run import begin
from phloem.server.videos.write import Video, VideoDeleted, VideoList

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from phloem.server.door import Door

router = APIRouter(tags=["openai"])
_parser = Parser(VideosBody)
_PATH = "/v1/videos/{video_id}"
_OBJECTS = frozenset({"input_reference", "cache", "lora"})
_FILE: dict[str, Any] = {"type": "string", "format": "binary"}


@router.post("/v1/videos", **describe(body=VideosBody, answer=Video, errors=(404, *NEEDS_ENGINE)))
async def create_video(request: Request) -> Response:
    """Begin a film; the answer is its job."""
    door = door_of(request)
    door.info.check_draws()
    body = await _read(door, request)
    adapter = door.check_model(body.model)
    facts = Facts(**door.client.picture_facts())
    draw, fps, seconds = body.film(facts)
    wear(adapter, [draw])
    if body.input_reference is not None:
        draw.pictures = [await pixels_of(door, source_of(body.input_reference, "input_reference"), "input_reference")]
    facts.check(draw)
    draw.width, draw.height = facts.size(draw)
    draw.frames = facts.length(draw)
    facts.count(draw)
    sign([draw], door.config.schedule.fair_queueing == "key")
    return json_response(await begin(door, draw, fps, seconds))


async def _read(door: Door, request: Request) -> VideosBody:
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        return await door.read(request, _parser)
    data = b"".join([part async for part in request.stream()])
    values = form_of(data, kind, frozenset({"input_reference"}), frozenset(), _OBJECTS)
    return _parser.convert(values, door.info.features, form=True)


@router.get("/v1/videos", **describe(answer=VideoList, errors=(400, 404)))
async def list_videos(
    request: Request,
    after: Annotated[str | None, Query(description="The last job that is known.")] = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time at which they were made.")] = "desc",
) -> Response:
    """Jobs, the newest first."""
    found, more = door_of(request).videos.page(after, limit, order == "desc")
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return json_response(VideoList(data=found, first_id=first, last_id=last, has_more=more))


@router.get(_PATH, **describe(answer=Video, errors=(404,)))
async def retrieve_video(request: Request, video_id: str) -> Response:
    """A job as it stands."""
    return json_response(door_of(request).videos.get(video_id).video)


@router.delete(_PATH, **describe(answer=VideoDeleted, errors=(404,)))
async def delete_video(request: Request, video_id: str) -> Response:
    """End a job at its next step, and remove its film."""
    store = door_of(request).videos
    store.get(video_id)
    store.remove(video_id)
    return json_response(VideoDeleted(id=video_id))


@router.get(_PATH + "/content", **describe(answer=_FILE, errors=(400, 404, 416)))
async def video_content(
    request: Request,
    video_id: str,
    variant: Annotated[str, Query(description="Only video: no thumbnails and sheets are made.")] = "video",
) -> Response:
    """The film of a completed job, as mp4; parts of it by `Range`."""
    store = door_of(request).videos
    video = store.get(video_id).video
    if variant != "video":
        raise BadRequest(f"variant: {variant!r:.40} is not made here, only 'video'", param="variant")
    if video.status != "completed":
        why = f": {video.error.message}" if video.error is not None else ", ask again when it is completed"
        raise BadRequest(f"the video is {video.status}{why}", param="video_id", code=f"video_{video.status}")
    return _Film(store.content(video_id), media_type="video/mp4", filename=f"{video_id}.mp4")


class _Film(FileResponse):
    """What it says of a `Range` in plain text is said as all errors are."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                asked = Headers(scope=scope).get("range", "")
                if message["status"] != 416:
                    raise BadRequest(f"Range: {asked!r:.100} is no range of bytes, such as bytes=0-99", param="Range")
                where = {"Content-Range": Headers(raw=message["headers"])["content-range"]}
                raise HTTPException(416, f"Range: {asked!r:.100} begins behind the film's end", headers=where)
            await send(message)

        await super().__call__(scope, receive, told)
