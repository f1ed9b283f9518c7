"""Which experts made an answer."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang._missing import missing


def extract_routed_experts_from_meta_info(data: dict[str, Any]) -> NDArray[np.int32]:
    """The experts of an answer of `/generate`, flat: [tokens * layers * top_k].

    Raises:
        KeyError: the answer has none: `return_routed_experts` was not asked for.
    """
    return np.frombuffer(b64decode(data["meta_info"]["routed_experts"]), dtype="<i4")


__getattr__ = missing(__name__)
