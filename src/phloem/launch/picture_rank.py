"""The process of one rank of a model that draws: `python -m phloem.launch.picture_rank`, its order on standard input.

It has the denoiser and the VAE's settings, computes the passes that the first rank sends it, and tells how each ended.
"""

from __future__ import annotations

import queue
import sys
import threading
from pathlib import Path

import torch

from phloem import platforms
from phloem.checkpoint.describe import described
from phloem.core.config import Config
from phloem.core.errors import EngineDead
from phloem.diffusion import models, wire
from phloem.diffusion.quantised import quantise
from phloem.diffusion.sequence import SECONDS, Share
from phloem.distributed.choose import connect
from phloem.engine.memory import first_line
from phloem.launch.picture_ranks import device_of
from phloem.launch.pictures import defaults, dtype_of, threads_of
from phloem.launch.rank_pipe import RankPipe, carried_out, ordered


class PictureRank:
    """A painter without what reads prompts and pictures.

    Raises:
        ConfigError, ModelLoadError: as `launch.pictures.PictureCore`.
    """

    def __init__(self, config: Config, rank: int, comm: str) -> None:
        self._rank, self._size, self._name = rank, config.runtime.tp_size, comm
        self._platform, _ = platforms.choose(config.runtime.device, threads_of(config))
        device, (dtype, _) = device_of(self._platform, rank, self._size), dtype_of(config, self._platform)
        pictures = described(config.model).pictures
        assert pictures is not None
        pipe = models.load(pictures, device, dtype, tiling=False, encoders=False)
        if config.model.quantization is not None:
            quantise(pipe, config.model.quantization)
        painter, _ = models.choose(pipe, device, dtype, defaults(config.images.image_defaults))
        assert isinstance(painter, models.Family)
        self._painter = painter
        self._share: Share | None = None
        self._reader = wire.Reader(device, dtype, painter.wearing.prepare)

    def run(self, pipe: RankPipe) -> None:
        """Until nothing comes any more. Raises EngineDead where the others do not come."""
        orders: queue.SimpleQueue[wire.Pass | wire.Meet | wire.End] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(pipe, orders), name="phloem-orders", daemon=True).start()
        while not isinstance(order := orders.get(), wire.End):
            if isinstance(order, wire.Meet):
                self._meet(order)
            else:
                what, why = self._computed(order)
                pipe.say(what, why, number=order.number)

    def _listen(self, pipe: RankPipe, orders: queue.SimpleQueue[wire.Pass | wire.Meet | wire.End]) -> None:
        """In a thread, as a pass may wait for a rank that will not come: not every comm tells by itself."""
        try:
            while (data := pipe.next()) is not None:
                order = wire.decode(data)
                if isinstance(order, wire.Leave | wire.End):
                    self._leave()
                if not isinstance(order, wire.Leave):
                    orders.put(order)
        finally:
            self._leave()
            orders.put(wire.End())  # whatever it is that nothing comes any more of

    def _leave(self) -> None:
        if self._share is not None:
            self._share.comm.abort()

    def _meet(self, order: wire.Meet) -> None:
        comm = connect(self._name, self._rank, self._size, Path(order.place), SECONDS)
        self._reader.forget()
        if self._share is None:
            self._share = Share(self._painter, comm)
        self._share.comm = comm

    def _computed(self, order: wire.Pass) -> tuple[str, str]:
        """(`done` or `broke`, why: nothing where it is another rank's fault)."""
        assert self._share is not None
        try:
            with torch.inference_mode():
                self._painter.forward(self._reader.rows(order))
        except EngineDead:
            return "broke", ""
        except Exception as error:
            self._share.comm.abort()  # the others would wait for this one
            self._platform.empty_cache()
            return "broke", first_line(error)
        return "done", ""


def main() -> int:
    found = ordered()
    if found is None:
        return 1
    order, config, rank = found
    pipe = RankPipe(order["pipe"])

    def work() -> None:
        drawer = PictureRank(config, rank, order["comm"])
        pipe.say("loaded")
        drawer.run(pipe)

    return carried_out(work, pipe)


if __name__ == "__main__":
    sys.exit(main())
