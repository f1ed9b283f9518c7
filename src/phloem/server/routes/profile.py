"""Traces of what the engine does, written where the server runs (docs/production.md)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar

from fastapi import APIRouter, Request
from msgspec import Meta
from starlette.responses import Response

from phloem.core.config import TRACES, traces_folder
from phloem.core.errors import BadRequest
from phloem.core.messages import ControlReply
from phloem.protocol.answers import ControlAnswer
from phloem.protocol.body import Body, Later, Parser
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.routes.control import refused
from phloem.utils.profiler import ACTIVITIES

WRITING_SECONDS = 300.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Steps = Annotated[int, Meta(ge=1, le=1_000_000)]


class ProfileBody(Body, kw_only=True):
    """`POST /start_profile`. `output_dir`: a folder in the server's own (`SGLANG_TORCH_PROFILER_DIR`, else that for
    temporary files). Without `num_steps` it goes on until `/stop_profile`."""

    output_dir: str | None = None
    start_step: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    num_steps: Steps | None = None
    activities: list[str] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_prefix: str | None = None
    profile_id: str | None = None
    profile_by_stage: bool | None = None
    profile_stages: list[str] | None = None
    merge_profiles: bool | None = None

    ignored: ClassVar[dict[str, str]] = {"profile_id": "the file's name holds the time and the process"}
    later: ClassVar[dict[str, Later]] = {
        "profile_by_stage": Later("profile_stages", (False,), "each step in a trace says what it computes"),
        "profile_stages": Later("profile_stages", ([],), "each step in a trace says what it computes"),
        "merge_profiles": Later("profile_merge", (False,), "the trace is of one process"),
    }


class ProfileAnswer(ControlAnswer, kw_only=True):
    """`path`: the trace, for ui.perfetto.dev or chrome://tracing."""

    path: str


router = APIRouter(tags=["control"])
_body = Parser(ProfileBody)


def folder_of(asked: str | None) -> Path:
    """The folder, which is there. Raises BadRequest: it cannot be, or is outside of the folder for traces."""
    root = traces_folder()
    try:
        folder = (root / (asked or "")).resolve()
        if folder.is_relative_to(root):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        why = f"is not in {root}, the folder for traces: start the server with {TRACES} set"
    except (ValueError, OSError, RuntimeError) as error:
        why = f"cannot be made: {error}"
    raise BadRequest(f"output_dir {asked!r:.200} {why:.400}", param="output_dir")


def _arguments(body: ProfileBody) -> dict[str, object]:
    activities = [name.upper() for name in body.activities or ("CPU", "GPU")]
    for name in activities:
        if name not in ACTIVITIES:
            raise BadRequest(f"unknown activity {name!r:.100}; known: {', '.join(ACTIVITIES)}", param="activities")
    if body.profile_prefix and not _NAME.fullmatch(body.profile_prefix):
        raise BadRequest("profile_prefix is no plain name of a file", param="profile_prefix")
    return {
        "folder": str(folder_of(body.output_dir)),
        "prefix": body.profile_prefix or "",
        "start_step": body.start_step or 0,
        "num_steps": body.num_steps or 0,
        "activities": activities,
        "with_stack": bool(body.with_stack),
        "record_shapes": bool(body.record_shapes),
    }


def _answer(reply: ControlReply) -> Response:
    refused(reply)
    return json_response(ProfileAnswer(success=True, message=reply.message, path=str(reply.data.get("path", ""))))


@router.get("/start_profile", **describe(answer=ProfileAnswer, errors=(400, *NEEDS_ENGINE)))
@router.post(
    "/start_profile", **describe(body=ProfileBody, answer=ProfileAnswer, body_required=False, errors=NEEDS_ENGINE)
)
async def start_profile(request: Request) -> Response:
    """Trace the engine's steps with torch's profiler, into a file on the server."""
    door = door_of(request)
    body = await door.read(request, _body, empty=b"{}")
    return _answer(await door.client.control("start_profile", WRITING_SECONDS, **_arguments(body)))


@router.get("/stop_profile", **describe(answer=ProfileAnswer, errors=(400, *NEEDS_ENGINE)))
@router.post("/stop_profile", **describe(answer=ProfileAnswer, errors=(400, *NEEDS_ENGINE)))
async def stop_profile(request: Request) -> Response:
    """End the trace; answered when its file is written."""
    return _answer(await door_of(request).client.control("stop_profile", WRITING_SECONDS))
