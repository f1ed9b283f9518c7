"""The HTTP app: the routers of `routes/` and of each API's folder, middleware, error shapes, the OpenAPI document."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from phloem.client.info import ModelInfo, version
from phloem.core.errors import PhloemError
from phloem.core.ranges import parse_bytes
from phloem.disagg.embeddings import MOST_ASKED, PATH
from phloem.server import openapi
from phloem.server.bodies import BodyGate, BodyLimits
from phloem.server.callers import Callers
from phloem.server.door import Door
from phloem.server.errors import on_http_error, on_invalid_query, on_phloem_error
from phloem.server.health import Health
from phloem.server.metrics import Metrics
from phloem.server.middleware import ApiKey, Head, Keys, RequestIds
from phloem.server.videos.folder import FilmFolder
from phloem.server.videos.store import VideoStore
from phloem.utils.registry import Registry
from phloem.utils.tracing import Traced

if TYPE_CHECKING:
    from fastapi import APIRouter

    from phloem.client.client import EngineClient
    from phloem.core.config import Config
    from phloem.utils.tracing import Tracer

WIDE_PATHS = frozenset({"/update_weights_from_tensor"})  # whose bodies bring weights

ROUTES: Registry[APIRouter] = Registry("phloem.server.routes", "group of routes", "router")


def routers() -> list[APIRouter]:
    """Of every file in `routes/`, and of `route.py` in each folder that has one: an API with more than its route."""
    home = Path(__file__).parent
    apis = sorted(path.parent.name for path in home.glob("*/route.py"))
    found = [ROUTES.get(name) for name in ROUTES.names()]
    return found + [importlib.import_module(f"phloem.server.{api}.route").router for api in apis]


def _videos(config: Config, info: ModelInfo, folder: FilmFolder | None) -> VideoStore:
    images = config.images
    if folder is None and info.draws and images.video_output_path is not None:
        folder = FilmFolder(images.video_output_path)
    return VideoStore(folder, parse_bytes(images.video_max_bytes, "video_max_bytes"), images.video_ttl)


def create_app(
    client: EngineClient,
    config: Config,
    info: ModelInfo,
    tracer: Tracer | None = None,
    films: FilmFolder | None = None,
) -> FastAPI:
    """The app of one server. `client.start()` is the caller's business, inside the event loop.

    `films`: where films are kept, where that was taken already. Raises ConfigError: it cannot be had.
    """
    app = FastAPI(
        title="Phloem",
        version=version(),
        description="A serving engine for LLMs. Null means unset, in every field of every body.",
        redoc_url=None,
    )
    client.flow.log_requests = config.server.log_requests
    prefixes = ("phloem:", "sglang:") if config.server.sglang_metric_names else ("phloem:",)
    app.state.door = Door(
        client=client,
        config=config,
        info=info,
        health=Health(client, config.schedule.watchdog_timeout),
        metrics=Metrics(client, info.served_model_name, prefixes),
        videos=_videos(config, info, films),
    )
    for router in routers():
        app.include_router(router)
    app.add_exception_handler(PhloemError, on_phloem_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_query)
    app.add_middleware(Head)
    server = config.server
    limits = BodyLimits(server.max_body_bytes, server.max_bodies_bytes, server.body_timeout)
    large = max(server.max_update_bytes, server.max_body_bytes)
    wide, wide_paths = BodyLimits(large, large, server.body_timeout), WIDE_PATHS
    if info.encodes:
        wide, wide_paths = BodyLimits(MOST_ASKED, 4 * MOST_ASKED, server.body_timeout), frozenset({PATH})
    app.add_middleware(BodyGate, limits=limits, wide=wide, wide_paths=wide_paths)
    app.add_middleware(
        ApiKey, keys=Keys(server.api_key or None, server.admin_api_key or None, server.allow_remote_updates)
    )
    origins = [origin.strip() for origin in config.server.cors_origins.split(",") if origin.strip()]
    if origins:  # outside the key: browsers ask for leave without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    fair = config.schedule.fair_queueing != "none" or config.images.image_policy == "fair"
    app.add_middleware(Callers, keys=fair)
    if tracer is not None:
        app.add_middleware(Traced, tracer=tracer)
    app.add_middleware(RequestIds)  # added last, so outermost
    app.openapi = lambda: openapi.document(app)
    return app
