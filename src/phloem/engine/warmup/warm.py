"""Kernels are compiled before an engine is ready: by a process beside the loading, then loaded by a few dummy steps.

The dummy steps are the guarantee, the process makes them fast. Without it (`Warming.reason`) they are run over the
shapes of `FEW`, and what those do not launch is compiled when a request first needs it, with a warning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.resolve import Decision
from phloem.engine.choices.sizing import run_largest_steps
from phloem.engine.warmup.shapes import lengths_of, run_shape, text_shapes
from phloem.kernels import chosen
from phloem.kvcache.pool import KVPool, fewest_pages
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.engine.choices.sizing import Need
    from phloem.engine.warmup.shapes import Shape
    from phloem.platforms import Platform
    from phloem.platforms._compiled import Compiled, Service

_log = log.get("engine.warm")

TABLES = ("triton", "invariant")  # op tables whose kernels are compiled at run time
MODULE = "phloem.speculation.ahead"
WAIT_SECONDS = 120.0  # for the process, when all else is done
FEW = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128, 256)


@dataclass
class Warming:
    """Kernels on their way. `reason`: why no process compiles them."""

    compiled: Compiled
    service: Service | None
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def finish(
        self,
        need: Need,
        device: torch.device,
        decisions: list[Decision],
        tell: Callable[[list[Shape]], None] | None = None,
    ) -> None:
        """Wait for the process, and launch every kernel once. `tell`: called before that with the shapes that are run,
        where other ranks run them too."""
        found, text = self.wait()
        shapes = few_shapes(need) if found is None else found
        if tell is not None:
            tell(shapes)
        self._run(lambda: run_all(need, device, shapes), len(shapes), text, decisions)

    def finish_texts(self, run: Callable[[list[int]], None], most: int, decisions: list[Decision]) -> None:
        """The same for a model that reads whole texts. `run`: computes texts of these lengths; `most`: tokens of a
        step."""
        found, text = self.wait()
        # Those of longer texts are loaded at the first of these: what one takes is not tried at the start.
        texts = [shape for shape in found or text_shapes(most, most) if shape[0] <= most]

        def run_texts() -> None:
            for shape in texts:
                run(lengths_of(shape))

        self._run(run_texts, len(texts), text, decisions)

    def wait(self) -> tuple[list[Shape] | None, str]:
        """(Shapes that launch all that the process has compiled, None: there was none, or it failed; what is said of
        it)."""
        begun = perf_counter()
        found, why = self.service.wait(WAIT_SECONDS) if self.service is not None else (None, self.reason)
        waited = perf_counter() - begun
        self.facts["waited"] = round(waited, 3)
        if found is None:
            return None, f"not compiled beside the loading: {why}"
        self.facts |= {key: found[key] for key in ("kernels", "cached", "seconds", "slowest", "errors")}
        new, seconds = found["kernels"] - found["cached"], found["seconds"]
        text = f"{new} of {found['kernels']} compiled beside the loading in {seconds:.1f} s"
        text += f", of which {waited:.1f} were waited for"
        for error in found["errors"]:
            _log.warning("a kernel was not compiled ahead: %s", error)
        return [(tokens, rows, prefix) for tokens, rows, prefix in found["shapes"]], text

    def _run(self, work: Callable[[], None], steps: int, text: str, decisions: list[Decision]) -> None:
        begun = perf_counter()
        work()
        took = perf_counter() - begun
        tally = self.compiled.tally.facts()
        self.facts |= {"steps": steps, "steps_seconds": round(took, 3), **tally}
        text += f"; {steps} dummy steps in {took:.1f} s took {tally['loaded']} of the cache and compiled "
        text += f"{tally['compiled']}"
        _log.info("kernels: %s", text)
        decisions.append(Decision("kernels", str(self.compiled.directory), text))

    def ready(self) -> None:
        """The engine answers: a compilation from now on is a fault."""
        self.compiled.tally.ready = True

    def told(self) -> dict[str, Any]:
        """For `/server_info`: what was compiled until now, how long it took, and what was chosen by a trial."""
        more = {"cache": str(self.compiled.directory), "chosen": chosen.told()}
        return self.facts | self.compiled.tally.facts() | more

    def close(self) -> None:
        """End the process, where the start has failed."""
        if self.service is not None:
            self.service.close()


def start(platform: Platform, plan: dict[str, Any], refusal: str | None) -> Warming | None:
    """Begin to compile; `refusal`: why not beside the loading. None where nothing is compiled at run time."""
    compiled = platform.compiled
    if compiled is None:
        return None
    compiled.begin()
    if refusal is not None:
        return Warming(compiled, None, refusal)
    try:
        return Warming(compiled, compiled.start(MODULE, plan))
    except OSError as error:
        return Warming(compiled, None, str(error))


def loaded(
    warming: Warming | None,
    need: Need,
    platform: Platform,
    decisions: list[Decision],
    tell: Callable[[list[Shape]], None] | None,
) -> bool:
    """`Warming.finish`, and whether there is anything to be loaded; other ranks are told (`tell`) in any case."""
    if warming is not None:
        warming.finish(need, platform.device, decisions, tell)
    elif tell is not None:
        tell([])
    return warming is not None


def few_shapes(need: Need) -> list[Shape]:
    """Shapes that launch most of what steps launch, where nobody has found out which launch all."""
    decode = [(rows, rows, 0) for rows in FEW if rows <= min(need.running, need.chunk)]
    decode += [(rows, rows, need.context - 1) for rows, _, _ in decode[:2] if need.context > 1]
    most = min(need.chunk, need.context)
    prompts = sorted({*(tokens for tokens in FEW if 1 < tokens <= most), most})
    return decode + [(tokens, 1, 0) for tokens in prompts if tokens > 1]


def run_all(need: Need, device: torch.device, shapes: list[Shape]) -> None:
    """Run them over two pages of memory."""
    with torch.inference_mode():
        memory = need.model.memory
        pool = KVPool(
            memory, fewest_pages(memory, need.page_size), need.page_size, need.kv_dtype, device, need.kv_scales
        )
        for shape in shapes:
            run_shape(need, pool, shape)


def rehearse(need: Need, platform: Platform, shapes: list[Shape], say: Callable[[int, int], None]) -> None:
    """A rank's part, beside the first, of what loads kernels and is measured (`Warming.finish`, `sizing.size_pool`): it
    says (free, all) bytes of its device, beside what the largest step takes."""
    if shapes:
        run_all(need, platform.device, shapes)
    taken = platform.measure(lambda: run_largest_steps(need, platform.device))
    free, total = platform.memory()
    say(free - (taken or 0), total)
