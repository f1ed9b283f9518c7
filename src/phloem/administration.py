"""What administers an engine in this process: cache, pauses, adapters, weights, memory. `Engine` is built on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.core.adapters import SENT
from phloem.core.config import traces_folder
from phloem.core.errors import BadRequest
from phloem.protocol import weights as ask
from phloem.utils.profiler import ACTIVITIES

if TYPE_CHECKING:
    from phloem.client.client import EngineClient
    from phloem.core.messages import ControlReply
    from phloem.launch.door import EngineDoor

SECONDS = 3600.0  # for an update


class Administered:
    """Base of `Engine`: calls that go through its door. Calls that change weights have SGLang's names, raise what is
    wrong, and give (True, what was done)."""

    _client: EngineClient
    _door: EngineDoor

    def flush_cache(self, timeout: float = 0.0) -> bool:
        """Forget every cached prefix; False while requests run (waits up to `timeout` seconds for them)."""
        return self._door.run(self._client.control("flush_cache", deadline=timeout + 60.0, timeout=timeout)).ok

    def clear_hicache_storage_backend(self) -> int:
        """Forget what the store behind the cache has (`hicache_storage_backend`); gives how many pages that were."""
        reply = self._door.run(self._client.control("clear_hicache_storage", deadline=60.0))
        self._check(reply)
        return int(reply.data.get("pages", 0))

    def start_expert_distribution_record(self) -> None:
        """Count from now on which experts tokens choose (`expert_distribution_recorder_mode`)."""
        self._record_experts("start")

    def stop_expert_distribution_record(self) -> None:
        """Count no more; what was counted stays until the next start."""
        self._record_experts("stop")

    def dump_expert_distribution_record(self) -> list[list[int]]:
        """How often each expert was chosen, by sparse layer."""
        return self._record_experts("dump").get("logical_count", [])

    def _record_experts(self, action: str) -> dict[str, Any]:
        reply = self._door.run(self._client.control("expert_distribution", deadline=60.0, action=action))
        self._check(reply)
        return reply.data

    def abort_request(self, rid: str = "", abort_all: bool = False) -> int:
        """End requests by id; gives how many."""

        async def abort() -> int:
            return self._client.abort(rid, everything=abort_all)

        return self._door.run(abort())

    def pause_generation(self, mode: str = "abort") -> None:
        """Stop launching steps. `mode`: abort what runs, retract it into the queue, or freeze it in place."""
        self._check(self._door.run(self._client.control("pause", mode=mode)))

    def continue_generation(self) -> None:
        self._check(self._door.run(self._client.control("resume")))

    def start_profile(
        self,
        output_dir: str | None = None,
        start_step: int | None = None,
        num_steps: int | None = None,
        activities: Sequence[str] | None = None,
        with_stack: bool | None = None,
        record_shapes: bool | None = None,
        *,
        profile_prefix: str = "",
    ) -> str:
        """Trace the steps from `start_step` (default: now) on, for `num_steps` or until `stop_profile`; gives the file.

        Args:
            output_dir: default: the environment's SGLANG_TORCH_PROFILER_DIR, else that for temporary files.
            activities: of CPU, GPU and MEM; default: the first two.

        Raises:
            BadRequest: a trace is being made already.
        """
        unknown = [name for name in activities or () if name not in ACTIVITIES]
        if unknown:
            raise BadRequest(f"unknown activity {unknown[0]!r}; known: {', '.join(ACTIVITIES)}", param="activities")
        reply = self._control(
            "start_profile",
            folder=str(Path(output_dir).absolute() if output_dir else traces_folder()),
            prefix=profile_prefix,
            start_step=start_step or 0,
            num_steps=num_steps or 0,
            activities=list(activities or ACTIVITIES[:2]),
            with_stack=bool(with_stack),
            record_shapes=bool(record_shapes),
        )
        return reply.data["path"]

    def stop_profile(self) -> str:
        """End the trace, and give its file, which is written then. Raises BadRequest: there is none."""
        return self._control("stop_profile").data["path"]

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> dict[str, str]:
        """Load an adapter from a PEFT folder, or a new version of one: `lora_path=lora_name` of `generate`. Gives the
        folders of all by name.

        Raises:
            BadRequest: the folder holds no adapter for this model; the text names what is wrong.
        """
        reply = self._door.run(self._client.load_adapter(lora_name, lora_path, pinned))
        self._check(reply)
        return reply.data["loaded"]

    def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: Iterable[tuple[str, Any]] | dict[str, Any],
        config_dict: dict[str, Any],
        pinned: bool = False,
    ) -> dict[str, str]:
        """Load an adapter, or a new version of one, from tensors as PEFT names them (copies are kept); `config_dict`:
        what adapter_config.json would hold. Gives the folders of all by name.

        Raises:
            BadRequest: they are no adapter for this model; the text names what is wrong.
        """
        found = list(tensors.items()) if isinstance(tensors, dict) else list(tensors)
        return self._load_sent(lora_name, {"config": config_dict, "tensors": found}, pinned)

    def load_lora_adapter_from_distributed(
        self,
        lora_name: str,
        config_dict: dict[str, Any],
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str = ask.GROUP,
        load_format: str | None = None,
        pinned: bool = False,
    ) -> dict[str, str]:
        """Load an adapter, or a new version of one, from what rank 0 of a group broadcasts, in this order. Gives the
        folders of all by name.

        Raises:
            BadRequest: there is no such group, or the tensors are no adapter for this model.
        """
        listed, sizes = list(names), [list(shape) for shape in shapes]
        announced = ask.announcement(listed, [str(dtype) for dtype in dtypes], sizes, group_name, load_format)
        return self._load_sent(lora_name, {"config": config_dict, "broadcast": announced}, pinned)

    def _load_sent(self, lora_name: str, sent: dict[str, Any], pinned: bool) -> dict[str, str]:
        """`sent`: fields of `core.adapters.Sent`."""
        reply = self._door.run(self._client.load_adapter(lora_name, SENT + lora_name, pinned, sent))
        self._check(reply)
        return reply.data["loaded"]

    def unload_lora_adapter(self, lora_name: str) -> dict[str, str]:
        """Forget an adapter; requests that have begun with it end with it. Gives the folders of the rest by name.

        Raises:
            BadRequest: there is no such adapter.
        """
        reply = self._door.run(self._client.unload_adapter(lora_name))
        self._check(reply)
        return reply.data["loaded"]

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first rows of the weight that the checkpoint calls `name`, as numbers. Read between two steps.

        Raises:
            BadRequest: there is no such weight.
        """
        reply = self._door.run(self._client.control("get_weights_by_name", name=name, rows=truncate_size))
        self._check(reply)
        return reply.data["weight"]

    @staticmethod
    def _check(reply: Any) -> None:
        if not reply.ok:
            raise BadRequest(reply.message, param=reply.data.get("param"), code="refused")

    # weights

    def update_weights_from_tensor(
        self,
        named_tensors: Iterable[tuple[str, Any]] | dict[str, Any],
        load_format: str | None = None,
        flush_cache: bool = True,
        *,
        weight_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> tuple[bool, str]:
        """New values for some weights or all, by the checkpoint's names. They are read where they are.

        `load_format`: None, or `flattened_bucket` for {"flattened_tensor": bytes, "metadata": [name, shape, dtype,
        start_idx, end_idx of each]}.

        Raises:
            BadRequest: a name, shape or type is wrong; nothing has been changed.
        """
        tensors: Any = named_tensors  # what is none at all is refused where it is read
        if isinstance(tensors, Iterable) and not isinstance(tensors, dict):
            tensors = list(tensors)
        args = {"source": "tensors", "tensors": tensors, "load_format": load_format}
        return self._update(**args, version=weight_version, flush=flush_cache, abort_all=abort_all_requests)

    def update_weights_from_disk(
        self,
        model_path: str,
        load_format: str | None = None,
        flush_cache: bool = True,
        *,
        weight_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> tuple[bool, str]:
        """The weights of another checkpoint of the same model, read beside running steps.

        Raises:
            BadRequest: the checkpoint is missing something, or another model's; nothing has been changed.
        """
        args = {"source": "disk", "path": model_path, "load_format": load_format}
        return self._update(**args, version=weight_version, flush=flush_cache, abort_all=abort_all_requests)

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = ask.GROUP,
        backend: str = "gloo",
        timeout: float | None = None,
    ) -> tuple[bool, str]:
        """Join the group in which the trainer, rank 0, broadcasts; waits until all of it are there. `timeout`: seconds
        for that, and for each tensor that is announced later, up to 3600; None: 300."""
        body = ask.InitGroupBody(
            master_address=master_address,
            master_port=master_port,
            rank_offset=rank_offset,
            world_size=world_size,
            group_name=group_name,
            backend=backend,
            timeout=timeout,
        )
        return self._did("init_group", **ask.group(body))

    def destroy_weights_update_group(self, group_name: str = ask.GROUP) -> tuple[bool, str]:
        return self._did("destroy_group", name=group_name)

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str = ask.GROUP,
        flush_cache: bool = True,
        load_format: str | None = None,
        *,
        weight_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> tuple[bool, str]:
        """Receive tensors from rank 0 of a group, in this order; nothing is written before all of them are there."""
        body = ask.FromDistributedBody(
            names=list(names),
            dtypes=[str(dtype) for dtype in dtypes],
            shapes=[list(shape) for shape in shapes],
            group_name=group_name,
            flush_cache=flush_cache,
            load_format=load_format,
            weight_version=weight_version,
            abort_all_requests=abort_all_requests,
        )
        return self._update(**ask.distributed(body))

    def update_weights_from_ipc(
        self,
        zmq_handles: dict[str, str],
        flush_cache: bool = True,
        *,
        weight_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> tuple[bool, str]:
        """Receive tensors in buckets of memory that a sender on this machine lends (checkpoint-engine): {device: socket
        of ZeroMQ at which it speaks}. Nothing is written before all of them are there."""
        body = ask.FromIpcBody(
            zmq_handles=zmq_handles,
            flush_cache=flush_cache,
            weight_version=weight_version,
            abort_all_requests=abort_all_requests,
        )
        return self._update(**ask.ipc(body))

    def begin_weight_update(self) -> tuple[bool, str]:
        """Collect what comes, in any number of calls, until `end_weight_update`: it serves whole or not at all."""
        return self._did("begin_update")

    def end_weight_update(
        self, flush_cache: bool = True, *, weight_version: str | None = None, abort_all_requests: bool = False
    ) -> tuple[bool, str]:
        return self._did("end_update", version=weight_version, flush=flush_cache, abort_all=abort_all_requests)

    def abort_weight_update(self) -> tuple[bool, str]:
        """Forget what was collected since `begin_weight_update`; the weights stay what they are."""
        return self._did("abort_update")

    def update_weight_version(self, new_version: str, abort_all_requests: bool = True) -> tuple[bool, str]:
        """Name the weights anew."""
        return self._did("update_version", version=new_version, abort_all=abort_all_requests)

    def get_weight_version(self) -> str:
        return self._client.weight_version

    def weights_checker(self, action: str, skip_tensor_list: Sequence[str] = ()) -> dict[str, str]:
        """`checksum`: digests by name. `snapshot` remembers them, `compare` raises where others have come, `reset`
        puts random values in place."""
        return self._control("check_weights", action=action, skip=list(skip_tensor_list)).data.get("checksums", {})

    # memory

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> int:
        """Give memory back to the system: of weights, kv_cache, cuda_graph, or all; bytes. Requests wait meanwhile.

        Raises:
            BadRequest: requests are running.
        """
        return self._control("release_memory", tags=None if tags is None else list(tags)).data["bytes"]

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> str:
        """Take it again, with the weights that were there; gives why they cannot serve before new ones come, or ""."""
        return self._control("resume_memory", tags=None if tags is None else list(tags)).data["unfit"]

    def _update(self, **args: Any) -> tuple[bool, str]:
        return self._did("update_weights", **args)

    def _did(self, call: str, /, **args: Any) -> tuple[bool, str]:
        return True, self._control(call, **args).message

    def _control(self, call: str, /, **args: Any) -> ControlReply:
        reply = self._door.run(self._client.control(call, SECONDS, **args))
        self._check(reply)
        return reply
