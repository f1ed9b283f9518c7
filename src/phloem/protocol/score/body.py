"""Request body of `/v1/score`."""

from __future__ import annotations

from typing import ClassVar

from phloem.protocol.body import Body
from phloem.protocol.fields import HINT, Int32


class ScoreBody(Body, kw_only=True):
    """`POST /v1/score`: how likely each label token is behind query and item."""

    query: str | list[Int32] | None = None
    items: str | list[str | Int32 | list[Int32]] | None = None
    label_token_ids: list[Int32] | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None
    model: str | None = None
    user: str | None = None
    rid: str | None = None
    priority: Int32 | None = None

    ignored: ClassVar[dict[str, str]] = {"user": HINT}
