"""Tensors that a client sends, on their way to the engine: out of base64, and through files where they are large."""

from __future__ import annotations

import asyncio
import binascii
import os
import tempfile
from base64 import b64decode
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest, PhloemError
from phloem.utils.leftovers import prefix

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

SMALL = 1 << 20  # bytes of a payload that the engine is sent; more goes through a file


async def decoded(texts: list[str], name: str) -> list[bytes]:
    """`name`: the field that they came in. Raises BadRequest: they are not base64."""

    def work() -> list[bytes]:
        try:
            return [b64decode(text, validate=True) for text in texts]
        except (binascii.Error, ValueError):
            raise BadRequest(f"{name} are not base64", param=name) from None

    return await asyncio.to_thread(work)


@asynccontextmanager
async def on_their_way(blobs: list[bytes]) -> AsyncGenerator[dict[str, Any]]:
    """What the engine is told of them: `blobs`, or `files` that are there until it has answered. The list is emptied
    then: the loop of the engine has better to do than to receive large ones.

    Raises:
        PhloemError: there is no room for the files.
    """
    if sum(map(len, blobs)) <= SMALL:
        yield {"blobs": blobs}
        return
    paths: list[str] = []
    try:
        await asyncio.to_thread(_written, blobs, paths)
        blobs.clear()
        yield {"files": paths}
    finally:
        for path in paths:
            os.unlink(path)


def _written(blobs: list[bytes], paths: list[str]) -> None:
    """Their paths, also of one that is half written, go to `paths`."""
    try:
        for blob in blobs:
            descriptor, path = tempfile.mkstemp(prefix=prefix("weights"))
            paths.append(path)
            with open(descriptor, "wb") as file:
                file.write(blob)
    except OSError as error:
        raise PhloemError(f"the payload cannot be put into {tempfile.gettempdir()}: {error.strerror}") from None
