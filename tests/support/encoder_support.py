"""Encoder servers in this process, on real sockets, and items to ask them about."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.media import Media
from phloem.core.messages import Drain, Submit, pack_ids
from phloem.core.request import SamplingParams
from phloem.disagg.embeddings import Made, encode
from phloem.launch.thread import EngineThread
from phloem.server.app import create_app
from phloem.utils.sockets import bind

SETTINGS: dict[str, Any] = {"ops": "reference", "dtype": "float32", "threads": 1, "log_level": "error"}
FACTS = {"model": "fake", "dtype": "float32"}
WIDTH = 3


def item_of(seed: int, count: int = 2, start: int = 1) -> Media:
    pixels = bytes([seed]) * 48
    return Media(
        digest=hashlib.sha256(pixels).digest(),
        token=6,
        spans=[(start, count)],
        pixels=pixels,
        shape=(1, 4, 4, 3),
        scale=[1.0] * 3 + [0.0] * 3,
    )


def submit_of(*items: Media, name: str = "a") -> Submit:
    return Submit(id=name, input_ids=pack_ids([5] * 16), sampling=SamplingParams(), media=list(items))


def values_of(item: Media, width: int = WIDTH) -> np.ndarray[Any, Any]:
    """What the fake encoders make of an item: float32 [tokens, width]."""
    return np.full((item.count, width), item.pixels[0], dtype="<f4") + np.arange(item.count, dtype="<f4")[:, None]


def made_of(item: Media, **differs: Any) -> bytes:
    values = values_of(item)
    plain = {"digest": item.digest, "shape": values.shape, "kind": "float32", "data": values.tobytes()}
    return encode(Made(**{**plain, **differs}))


class EncoderServer:
    """A whole server of a checkpoint's tower, door and engine, in threads of this process."""

    def __init__(self, path: Path, **settings: Any) -> None:
        config = Config.from_flat({**SETTINGS, "model_path": str(path), "encoder_only": True, **settings})
        client, info, checkpoint = make_client(config)
        self.client, self.link = client, EngineThread(config, checkpoint)
        client.attach(self.link)
        self._sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        app = create_app(client, config, info)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        self._ready, self._failed = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(60), "it never became ready"
        assert not self._failed, self._failed

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.client.start()
        try:
            await self.client.wait_ready()
        except Exception as error:
            self._failed = str(error)
            return
        finally:
            self._ready.set()
        await self._server.serve(sockets=[self._sock])

    @property
    def counts(self) -> tuple[int, int]:
        """Items that the tower has made, and that were found."""
        stats = self.client.connection.stats
        return stats.pictures_encoded, stats.pictures_found

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._sock.close()
        self.link.send(Drain(timeout=0.0))
        self.link.close()

    def __enter__(self) -> EncoderServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
