"""Tiny checkpoints whose sizes can be shared out among 2 and 4 ranks, and ranks of such a model in threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_support import Engine

from phloem.checkpoint.describe import Checkpoint
from phloem.core.batch import Batch
from phloem.core.config import Config
from phloem.core.errors import EngineDead
from phloem.distributed.comm import Comm, Threads
from phloem.distributed.groups import Groups
from phloem.distributed.mesh import Mesh
from phloem.engine.ranks.parallel import End, Team, Told, decode_told, encode_told, mesh_of, ranks_of
from phloem.engine.ranks.plans import Plan, Unpacking
from phloem.engine.ranks.stages import Together
from phloem.engine.worker import build_executor
from phloem.launch.ranks import decision_of
from phloem.testing.checkpoints import tiny_checkpoint

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
# They have no head size of their own.
HEADS_OF_EIGHT = (
    "qwen2", "phi3", "olmo2", "olmo3", "granite", "smollm3", "exaone4", "cohere", "cohere2", "starcoder2", "stablelm",
    "phi", "gpt_neox", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "qwen2_moe", "olmoe", "granitemoe",
    "granitemoeshared", "granitemoehybrid", "bamba", "falcon_h1", "jamba", "opt", "falcon",
)  # fmt: skip

DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba2": {
        **dict.fromkeys(SIZES), "hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 4, "state_size": 16,
    },
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 4},
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "kimi_linear": {"linear_num_heads": 8},
    "qwen3_5_moe_text": DELTA,
    "bamba": {"mamba_n_groups": 4},
    "granitemoehybrid": {"mamba_n_groups": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64, "mamba_n_groups": 4},
    # Every rank has the whole indexer: here a small one.
    "deepseek_v32": {"index_n_heads": 2, "index_head_dim": 8},
    "glm_moe_dsa": {"index_n_heads": 2, "index_head_dim": 8},
}  # fmt: skip


def checkpoint(name: str, path: Path) -> Path:
    sizes = {**SIZES, "head_dim": None, "hidden_size": 64} if name in HEADS_OF_EIGHT else SIZES
    sizes = {**SIZES, "head_dim": None} if name in ("qwen2_vl", "qwen2_5_vl") else sizes  # as wide as their towers
    sizes = {"n_head": 8, "n_embd": 64} if name == "gpt2" else sizes
    sizes = {**SIZES, "head_dim": 8, "hidden_size": 64} if name == "helium" else sizes
    sizes = {**sizes, **RECURRENT.get(name, {})}
    experts = {"num_experts": 8, "num_local_experts": 8} if "moe" in name else {}
    experts = {"num_local_experts": 8} if name in ("mixtral", "gpt_oss", "minimax_m2", "llama4_text") else experts
    experts = (
        {"moe_num_experts": 8}
        if name == "ernie4_5_moe"
        else {}
        if name in ("glm4_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")
        else experts
    )
    return tiny_checkpoint(name, path, **sizes, **experts)


def together(size: int, work: Callable[[Comm], Any]) -> list[Any]:
    """What `work` gives on each of `size` ranks in threads. Raises what the first rank to fail has raised."""
    return _threads(Threads.group(size), work)


def _threads(ends: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
    found: list[Any] = [None] * len(ends)
    errors: list[BaseException] = []

    def run(comm: Any) -> None:
        try:
            found[comm.rank] = work(comm)
        except BaseException as error:
            errors.append(error)
            comm.abort()

    threads = [threading.Thread(target=run, args=(comm,), daemon=True) for comm in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank waits for ever"
    if errors:
        raise errors[0]
    return found


def engine_of(path: Path, comm: Comm, ep: int = 1) -> Engine:
    """One rank's engine."""
    return Engine(path, mesh=Mesh.of(comm.rank, tp=comm.size, ep=ep), comm=comm)


class Stages:
    """One rank's model in a pipeline, with the face of the whole, called on all ranks together."""

    def __init__(self, whole: Together) -> None:
        self._whole = whole

    def forward(self, step: Any) -> Any:
        return self._whole.forward(step)

    def head(self, hidden: Any) -> Any:
        return self._whole.chosen(hidden, "logits")


def engine_in(path: Path, groups: Groups, pp: int, tp: int, ep: int = 1) -> Engine:
    """One rank's engine in a pipeline."""
    engine = Engine(path, mesh=Mesh.of(groups.rank, pp=pp, tp=tp, ep=ep), comm=groups.tp)
    engine.model = Stages(Together(engine.model, groups))  # pyright: ignore[reportAttributeAccessIssue]
    return engine


def staged(pp: int, tp: int, work: Callable[[Groups], Any]) -> list[Any]:
    """As `together`, for the ranks of a pipeline."""
    return _threads(Groups.threads(pp, tp), work)


def staged_groups(dp: int, tp: int, work: Callable[[Groups], Any]) -> list[Any]:
    """As `together`, for `dp` groups of `tp` ranks that attend to rows of their own."""
    return _threads(Groups.threads(1, dp * tp, dp=dp), work)


def planned(told: Sequence[Told]) -> list[Batch]:
    """The batches among what a rank was told, as it has them."""
    unpacking = Unpacking()
    return [unpacking.unpack(one) for one in told if isinstance(one, Plan)]


class ThreadRanks:
    """Ranks 1 and up of an engine in threads of this process (`launch.ranks.Ranks`)."""

    def __init__(self, config: Config, checkpoint: Checkpoint) -> None:
        size = ranks_of(config)
        runtime = config.runtime
        ends = Groups.threads(runtime.pp_size, runtime.tp_size, dp=runtime.attn_dp_size * runtime.attn_cp_size)
        self.told: list[Told] = []  # all that was said
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._boxes: list[queue.SimpleQueue[Told]] = [queue.SimpleQueue() for _ in range(size - 1)]
        ready = threading.Barrier(size)
        decision = decision_of(config, "threads", "one process")
        self.team = Team(mesh_of(config, 0), ends[0], self.tell, lambda _: (ready.wait(60), None)[1], decision)

        def run(end: Groups, box: queue.SimpleQueue[Told]) -> None:
            mesh = mesh_of(config, end.rank)
            team = Team(mesh, end, self.tell, lambda _: (ready.wait(60), None)[1], decision)
            try:
                build_executor(config, checkpoint, team, box.get).run(box.get)
            except BaseException as error:
                self.error = error
                ready.abort()
                for other in ends:
                    other.abort()

        pairs = zip(ends[1:], self._boxes, strict=True)
        self.threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in pairs]
        for thread in self.threads:
            thread.start()

    def tell(self, told: Told) -> None:
        self.check()
        with self._lock:
            self.told.append(told)
            for box in self._boxes:
                box.put(decode_told(encode_told(told)))

    def check(self) -> None:
        if self.error is not None:
            raise EngineDead(f"a rank has gone: {self.error}")

    def hung(self, seconds: float) -> None:
        """They meet on the host, and find it by themselves."""

    def explain(self, error: EngineDead) -> EngineDead:
        return error

    def close(self, phase: str = "drained", why: str = "") -> None:
        for box in self._boxes:
            box.put(End())
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
