"""Engines with cache tiers, asked one prompt after the other."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from phloem.checkpoint.describe import described
from phloem.core.config import Config
from phloem.core.messages import Control, ControlReply, Drain, FromEngine, Submit, ToEngine, Tokens, pack_ids
from phloem.core.request import SamplingParams
from phloem.launch.core import EngineCore

EXTRA = "hicache_storage_backend_extra_config"


def settings(model: Path, store: Path, **values: Any) -> Config:
    return Config.from_flat(
        {
            "model_path": str(model),
            "enable_hicache": True,
            "hicache_storage_backend": "file",
            EXTRA: json.dumps({"path": str(store), "max_size": "64MiB", "prefetch_threshold": 1}),
            "dtype": "float32",
            "ops": "reference",
            "page_size": 16,
            "max_total_tokens": 512,
            "skip_tokenizer_init": True,
            "debug_invariants": True,
            **values,
        }
    )


class Asked:
    """An engine core that is asked for these prompts one after the other, then drained."""

    def __init__(self, config: Config, prompts: list[list[int]], calls: tuple[Control, ...] = ()) -> None:
        self.texts: list[list[int]] = []
        self.sources: list[tuple[int, int, int]] = []
        self.replies: list[ControlReply] = []
        self._left: list[ToEngine] = [*calls]
        self._left += [
            Submit(id=f"r{at}", input_ids=pack_ids(ids), sampling=SamplingParams(max_new_tokens=6, temperature=0))
            for at, ids in enumerate(prompts)
        ]
        self._wanted = False
        core = EngineCore(config, described(config.model), self._take)
        self.decisions = {name: (value, reason) for name, value, reason in core.info["decisions"]}
        try:
            core.run(self._poll)
            self.state = core.scheduler.state()
            core.scheduler.check()
        finally:
            core.close()

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, ControlReply):
            self.replies.append(message)
            self._wanted = False
        for chunk in message.chunks if isinstance(message, Tokens) else ():
            if len(self.texts) == len(self.sources):
                self.texts.append([])
            self.texts[-1] += chunk.tokens
            if chunk.finish is not None:
                assert chunk.finish.type == "length", chunk.finish
                host, storage = chunk.cached_host, chunk.cached_storage
                self.sources.append((chunk.cached_tokens - host - storage, host, storage))
                self._wanted = False

    def _poll(self, timeout: float | None) -> list[ToEngine]:
        if self._wanted:
            time.sleep(min(timeout or 0, 0.001))
            return []
        self._wanted = True
        return [self._left.pop(0)] if self._left else [Drain(timeout=5.0)]


def call(name: str, **args: Any) -> Control:
    return Control(id=name, name=name, args=args)


def prompts_of(count: int, length: int = 200) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 90) for _ in range(length)] for _ in range(count)]
