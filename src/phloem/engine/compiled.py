"""Steps that a table compiles whole (`Ops.compiler`): cut and padded to few shapes, then called as functions.

Two functions give hidden states: rows of one token each, and one row of several tokens; a step with both calls them one
after the other, longer rows first, as rows of one token may be behind them in their text. A third gives logits. Sizes
are powers of two, so that few shapes are compiled, each when it is first wanted. Padding writes to page 0.

Tokens are chosen on the host, from logits: sampling, grammars and penalties are torch's there, as on a processor.

Legend: R rows, T tokens, P pages of a row, L wanted positions, N hidden size.
"""

from __future__ import annotations

import copy
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core import speculation
from phloem.core.errors import BadRequest, ConfigError, EngineDead
from phloem.core.resolve import Decision
from phloem.distributed.mesh import Mesh
from phloem.engine.apart import part
from phloem.engine.forward import run_forward
from phloem.engine.inputs import StepInputs, host_arrays, padded
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.layers.weight import Layer
from phloem.models import build_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.batch import Batch
    from phloem.core.config import Config
    from phloem.core.memory import MemorySpec
    from phloem.engine.inputs import Step
    from phloem.kernels.graph import StepCompiler
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, ForwardBatch
    from phloem.models import Model

FEWEST_TOKENS = 16  # of a row that is padded
FEWEST_PAGES = 16
_POSITIONS = 64  # of a model whose sizes alone are wanted
STATE = 4  # arrays of a group of states (`StepInputs.tensors`); of pages, a table and where each token goes


def check(config: Config, checkpoint: Checkpoint, device: str, decisions: list[Decision]) -> None:
    """Raises ConfigError for settings and checkpoints that are not served by compiled steps, naming the first."""
    runtime, model, cache = config.runtime, config.model, config.cache
    wanted = speculation.wanted(config).algorithm
    kt = config.experts
    asked = {
        "pp_size": runtime.pp_size > 1,
        "ep_size": runtime.ep_size > 1,
        "nnodes": config.nodes.nnodes > 1,
        "dp_size": runtime.dp_size > 1,
        "enable_lora": config.lora.enable_lora or config.lora.lora_paths,
        "speculative_algorithm": wanted not in (speculation.AUTO, speculation.NONE),
        "quantization": model.quantization,
        "kv_cache_dtype": cache.kv_cache_dtype != "auto",
        "enable_hierarchical_cache": cache.enable_hierarchical_cache,
        "disaggregation_mode": config.disagg.disaggregation_mode != "null",
        "enable_return_routed_experts": runtime.enable_return_routed_experts,
        "enable_deterministic_inference": runtime.enable_deterministic_inference,
        "kt_num_gpu_experts": kt.kt_num_gpu_experts is not None or kt.kt_method is not None,
        "kt_weight_path": kt.kt_weight_path is not None,
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(f"{name}: not served on device {device}, whose steps are compiled whole", param=name)
    kinds = {
        f"a model for {checkpoint.pooling.task if checkpoint.pooling else ''}": checkpoint.pooling is not None,
        "transformers' code": checkpoint.chosen.impl != "phloem",
        "a checkpoint with quantised weights": checkpoint.stored is not None,
    }
    for what, found in kinds.items():
        if found:
            raise ConfigError(f"{checkpoint.model_type}: {what} is not served on device {device}", param="device")
    if runtime.tp_size > 1:
        _skeleton(checkpoint, runtime.tp_size)
    if checkpoint.gguf is not None:
        decisions.append(Decision("weights", "unpacked", "this table multiplies plain matrices"))


def _skeleton(checkpoint: Checkpoint, size: int) -> Any:
    """A rank's share of the model, without weights, whose layers say along which axis each is cut.

    Raises:
        ModelLoadError: sizes that cannot be shared out, with those that could.
    """
    ctx = BuildContext(Ops(), torch.bfloat16, torch.device("meta"), mesh=Mesh.of(tp=size))
    return build_model(checkpoint.model_type, checkpoint.config, ctx, _POSITIONS)


def share_table(config: Config, ops: Ops, decisions: list[Decision]) -> Ops:
    """The table over `tp_size` devices. Raises ConfigError where there are fewer."""
    size = config.runtime.tp_size
    if size == 1 or ops.share is None:
        return ops
    decisions.append(Decision("tp_size", size, "one process: the compiler shares each step out among the devices"))
    return ops.share(size)


def share_weights(model: Model, checkpoint: Checkpoint, ops: Ops, size: int) -> None:
    """Put a loaded model's matrices on the devices, cut as their layers say of a mesh of `size`."""
    if ops.place is None or not isinstance(model, Layer):
        return
    cuts = {weight.names: weight.cuts for weight in _skeleton(checkpoint, size).weights()}
    for weight in model.weights():
        if weight.role == "matrix" and weight.value is not None:
            found = [cut.axis for each in cuts.get(weight.names, ()) for cut in each]
            weight.value = ops.place(weight.value, found[0] if found else None, weight.experts)


def check_model(model: Model, pool: KVPool, name: str, device: str, *, sees: bool) -> None:
    """The same of what shows when a model is there."""
    kinds = {group.kind for group in pool.groups}
    odd = {
        "attention to sounds is": "cross" in kinds,
        "blocks of diffusion are": any(spec.block for spec in model.attention_specs),
        "pictures are": sees,
    }
    for what, found in odd.items():
        if found:
            raise ConfigError(f"{name}: {what} not served on device {device}", param="device")


def bucket(count: int, fewest: int, most: int) -> int:
    """The size that `count` is padded to: a power of two, or `most`."""
    return max(count, min(max(fewest, 1 << max(count - 1, 0).bit_length()), most))


class CompiledModel:
    """A model whose head is compiled (`models.Model`). Its forward pass is begun by `CompiledSteps`."""

    def __init__(self, model: Model, compiler: StepCompiler, most: int) -> None:
        self.inner, self._most = model, most
        self._head = compiler.function("head", lambda arrays: model.head(arrays[0]))
        self._greedy = compiler.function("greedy head", lambda arrays: model.greedy(arrays[0]))
        self.attention_specs: list[AttentionSpec] = model.attention_specs
        self.memory: list[MemorySpec] = model.memory
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.inner.weight_bytes

    def forward(self, step: ForwardBatch) -> Tensor:
        raise NotImplementedError("steps are compiled whole (CompiledSteps)")

    def head(self, hidden_LD: Tensor, /) -> Tensor:
        return self._head([self._padded(hidden_LD)])[: len(hidden_LD)]

    def greedy(self, hidden_LD: Tensor, /) -> Tensor:
        return self._greedy([self._padded(hidden_LD)])[: len(hidden_LD)]

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int, /
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """None: whole rows are sampled from."""
        del hidden_LD, k, scale_LJ, norms

    def _padded(self, hidden_LD: Tensor) -> Tensor:
        # Log probabilities of a prompt want more positions than there are rows: of these too few sizes are compiled.
        count = len(hidden_LD)
        more = bucket(count, 1, self._most if count <= self._most else 1 << (count - 1).bit_length()) - count
        return torch.nn.functional.pad(hidden_LD, (0, 0, 0, more))

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        return self.inner.update_weights(tensors)

    def checkpoint_name(self, name: str, /) -> str | None:
        return self.inner.checkpoint_name(name)

    def weight_names(self) -> list[str]:
        return self.inner.weight_names()

    def get_weight(self, name: str, rows: int | None = None, /) -> Tensor:
        return self.inner.get_weight(name, rows)


class CompiledSteps:
    """A way of running steps (`forward.Way`) that takes all of them.

    `rows`, `tokens`, `pages`: of a decode step, of a row's new tokens, and of a row, at most.
    """

    def __init__(
        self,
        compiler: StepCompiler,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        rows: int,
        tokens: int,
        pages: int,
    ) -> None:
        self._model, self._backend, self._pool = model, backend, pool
        self._rows, self._tokens, self._pages = rows, tokens, pages
        # Which of a step's arrays say where each token goes.
        places, self._slots = 5, list[int]()
        for group in pool.groups:
            self._slots += [] if group.kind == "state" else [places + 1]
            places += STATE if group.kind == "state" else 2
        self._none = torch.empty(0, model.hidden_size, dtype=pool.dtype)
        caches = pool.move(compiler.cache)
        self.single = compiler.function("step of single tokens", self._pass, caches)
        self.several = compiler.function("step of one row", self._pass, caches)

    def _pass(self, arrays: list[Any]) -> Any:
        """The forward pass over stand-ins for tensors."""
        pages = max((table.shape[1] for table in arrays if table.ndim == 2), default=0)
        inputs = StepInputs(arrays, self._pool.groups, len(arrays[0]), pages * self._pool.page_size)
        pool = copy.copy(self._pool)
        return run_forward(self._model, self._backend, pool, inputs, inputs.logit_index)

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor:
        if not step.recordable:
            raise BadRequest("adapters, pictures and embeddings are not served by compiled steps")
        batch, index = step.known, step.logit_index
        ready()
        starts = np.cumsum(batch.query_lens) - batch.query_lens
        places, found = [np.zeros(0, np.int64)], [self._none]
        for row in np.flatnonzero(batch.query_lens > 1).tolist():
            at, end = int(starts[row]), int(starts[row] + batch.query_lens[row])
            mine = np.flatnonzero((index >= at) & (index < end))
            found.append(self._row(part(batch, np.array([row]), np.arange(at, end)), index[mine] - at))
            places.append(mine)
        ones = np.flatnonzero(batch.query_lens == 1)
        for some in (ones[at : at + self._rows] for at in range(0, len(ones), self._rows)):
            hidden = self._ones(part(batch, some, starts[some]))
            mine = np.flatnonzero(np.isin(index, starts[some]))
            found.append(hidden[torch.from_numpy(np.searchsorted(starts[some], index[mine]))])
            places.append(mine)
        order = np.argsort(np.concatenate(places), kind="stable")
        return torch.cat(found)[torch.from_numpy(order)]

    def _row(self, batch: Batch, wanted: NDArray[np.int64]) -> Tensor:
        """Hidden states of the wanted positions of one row."""
        count = batch.num_tokens
        tokens = bucket(count, FEWEST_TOKENS, self._tokens)
        # One position, or all of them: two shapes.
        index = np.arange(tokens) if len(wanted) > 1 else np.resize(wanted, 1)
        arrays = host_arrays(batch, np.zeros(count, np.int64), index, self._pool.page_size, self._pool.groups)
        for number in (0, 1, *self._slots):
            arrays[number] = np.pad(arrays[number], (0, tokens - count))
        hidden = self.several(self._tensors(arrays))
        return hidden[torch.from_numpy(wanted)] if len(wanted) > 1 else hidden[: len(wanted)]

    def _ones(self, batch: Batch) -> Tensor:
        """Hidden states of rows of one token each."""
        rows = bucket(batch.num_rows, 1, self._rows)
        each = np.arange(rows)
        whole = padded(batch, rows) if rows != batch.num_rows else batch
        arrays = host_arrays(whole, each, each, self._pool.page_size, self._pool.groups)
        return self.single(self._tensors(arrays))[: batch.num_rows]

    def _tensors(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Tables as wide as their bucket; ids and places in 32 bits."""
        made: list[NDArray[Any]] = []
        for array in arrays:
            if array.ndim == 2:
                wide = bucket(array.shape[1], FEWEST_PAGES, self._pages) - array.shape[1]
                array = np.pad(array, ((0, 0), (0, wide)))
            made.append(np.ascontiguousarray(array.astype(np.int32)))
        return [torch.from_numpy(array) for array in made]

    def prepare(self, decisions: list[Decision], name: str) -> None:
        """Compile the largest step of one row and of single tokens; the others are compiled when they are wanted.

        Raises:
            ConfigError: the model computes by something that is not an op, or such a step finds no memory.
        """
        begun = perf_counter()
        wide = bucket(-(-self._tokens // self._pool.page_size), FEWEST_PAGES, self._pages)
        try:
            for function, tokens, rows in ((self.several, self._tokens, 1), (self.single, self._rows, self._rows)):
                shapes: list[tuple[int, ...]] = [(tokens,), (tokens,), (rows + 1,), (rows,), (rows,)]
                for group in self._pool.groups:
                    shapes += [(rows,)] * STATE if group.kind == "state" else [(rows, wide), (tokens,)]
                arrays = [torch.zeros(shape, dtype=torch.int32) for shape in shapes]
                arrays[2] = torch.arange(rows + 1, dtype=torch.int32) * (tokens // rows)
                arrays[3] += tokens // rows
                function(arrays)
        except (AttributeError, TypeError, NotImplementedError) as error:
            why = f"{name} computes by more than ops, which cannot be compiled: {str(error).splitlines()[0]:.300}"
            raise ConfigError(why, param="device") from error
        except (EngineDead, RuntimeError) as error:
            if not is_out_of_memory(error.__cause__ or error):
                raise
            why = f"{name}: the largest step does not fit into memory beside weights and KV caches; a lower "
            why += f"--mem-fraction-static, --chunked-prefill-size or --max-running-requests: {first_line(error):.300}"
            raise ConfigError(why, param="mem_fraction_static") from error
        why = f"the largest two in {perf_counter() - begun:.1f} s before ready; others, by powers of two, on first use"
        decisions.append(Decision("compiled_steps", "on", why))
