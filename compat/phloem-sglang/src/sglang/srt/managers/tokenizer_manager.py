"""The object through which callers in the same process talk to an engine."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import PhloemError
from sglang._missing import missing
from sglang.srt.managers import io_struct as ask

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine


class ServerStatus(Enum):
    Up = "Up"
    Starting = "Starting"
    UnHealthy = "UnHealthy"


class TokenizerManager:
    """Calls of SGLang's object of this name, over an engine in this process. May be used from any event loop.

    `obj` is a request of `io_struct`; the second argument, SGLang's HTTP request, is not looked at.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.server_args = engine, engine.server_args
        self.server_status = ServerStatus.Up
        self.tokenizer, self.model_path = engine.tokenizer, engine.server_args.model_path
        self.served_model_name = engine.info.served_model_name
        self.is_pause = False

    def auto_create_handle_loop(self) -> None:
        """Nothing to do: the engine's own loop runs."""

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        """Answers as `/generate` gives them: one, or a list of a batch; growing ones with `stream`.

        Raises:
            phloem.core.errors.BadRequest: a field is wrong, or asks for what is not there.
        """
        del request
        fields = ask.asked(obj)
        prompt, params = fields.pop("text", None), fields.pop("sampling_params", None)
        found = await self.engine.async_generate(prompt, params, **fields)
        if fields.get("stream"):
            async for answer in found:
                yield self._with_experts(answer)
        else:
            yield [self._with_experts(one) for one in found] if isinstance(found, list) else self._with_experts(found)

    def _with_experts(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Where the caller tokenises by itself (`skip_tokenizer_init`) verl reads the experts as a tensor, int32
        [tokens, layers, top_k]; everywhere else as text, by `extract_routed_experts_from_meta_info`."""
        meta = answer["meta_info"]
        if self.server_args.skip_tokenizer_init and "routed_experts" in meta:
            (size,) = (value for name, value, _ in self.engine.ready["decisions"] if name == "routed_experts")
            layers, k = map(int, size.split(" x "))
            flat = torch.frombuffer(bytearray(b64decode(meta["routed_experts"])), dtype=torch.int32)
            meta["routed_experts"] = flat.view(-1, layers, k)
        return answer

    def abort_request(self, rid: str = "", abort_all: bool = False, **_: Any) -> None:
        self.engine.abort_request(rid, abort_all)

    async def flush_cache(self, timeout_s: float = 0.0) -> ask.FlushCacheReqOutput:
        return ask.FlushCacheReqOutput(await asyncio.to_thread(self.engine.flush_cache, timeout_s))

    async def pause_generation(self, obj: Any = None, request: Any = None) -> None:
        await asyncio.to_thread(self.engine.pause_generation, "abort" if obj is None else obj.mode)
        self.is_pause = True

    async def continue_generation(self, obj: Any = None, request: Any = None) -> None:
        await asyncio.to_thread(self.engine.continue_generation)
        self.is_pause = False

    async def release_memory_occupation(self, obj: Any = None, request: Any = None) -> None:
        await asyncio.to_thread(self.engine.release_memory_occupation, None if obj is None else obj.tags)

    async def resume_memory_occupation(self, obj: Any = None, request: Any = None) -> None:
        await asyncio.to_thread(self.engine.resume_memory_occupation, None if obj is None else obj.tags)

    async def update_weights_from_tensor(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        """(whether, and what was done or is wrong): as every update here, nothing is raised for a bad payload."""
        return await self._update("update_weights_from_tensor", obj)

    async def update_weights_from_disk(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return await self._update("update_weights_from_disk", **_of(obj, "model_path load_format flush_cache"))

    async def update_weights_from_distributed(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        names = "names dtypes shapes group_name flush_cache load_format"
        return await self._update("update_weights_from_distributed", **_of(obj, names))

    async def update_weights_from_ipc(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        return await self._update("update_weights_from_ipc", **_of(obj, "zmq_handles flush_cache"))

    async def init_weights_update_group(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        names = ("master_address", "master_port", "rank_offset", "world_size", "group_name", "backend")
        return await self._update("init_weights_update_group", **{name: getattr(obj, name) for name in names})

    async def destroy_weights_update_group(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        given = {} if obj.group_name is None else {"group_name": obj.group_name}
        return await self._update("destroy_weights_update_group", **given)

    async def update_weight_version(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        args = (obj.new_version, obj.abort_all_requests is not False)
        return await self._update("update_weight_version", *args)

    async def _update(self, call: str, *args: Any, **fields: Any) -> tuple[bool, str]:
        try:
            return await asyncio.to_thread(getattr(self.engine, call), *args, **fields)
        except PhloemError as error:
            return False, error.message

    async def load_lora_adapter(self, obj: Any, request: Any = None) -> ask.LoRAUpdateOutput:
        return await self._adapters(self.engine.load_lora_adapter, obj.lora_name, obj.lora_path, obj.pinned)

    async def unload_lora_adapter(self, obj: Any, request: Any = None) -> ask.LoRAUpdateOutput:
        return await self._adapters(self.engine.unload_lora_adapter, obj.lora_name)

    async def _adapters(self, call: Any, *args: Any) -> ask.LoRAUpdateOutput:
        try:
            return ask.LoRAUpdateOutput(True, None, await asyncio.to_thread(call, *args))
        except PhloemError as error:
            return ask.LoRAUpdateOutput(False, error.message)

    async def load_lora_adapter_from_tensors(self, obj: Any, request: Any = None) -> ask.LoRAUpdateOutput:
        return await self._adapters(self.engine.load_sent_lora_adapter, obj)

    async def load_lora_adapter_from_distributed(self, obj: Any, request: Any = None) -> ask.LoRAUpdateOutput:
        """Rank 0 of a trainer's group broadcasts what `obj` announces. `upsert` is how it always is here."""
        if obj.added_tokens_config:
            return ask.LoRAUpdateOutput(False, "added_tokens_config is not supported")
        group = {} if obj.group_name is None else {"group_name": obj.group_name}
        args = (obj.lora_name, obj.config_dict, obj.names, obj.dtypes, obj.shapes)
        call = partial(self.engine.load_lora_adapter_from_distributed, *args, pinned=obj.pinned, **group)
        return await self._adapters(call)

    async def start_profile(self, *args: Any, **fields: Any) -> None:
        await asyncio.to_thread(self.engine.start_profile, *args, **fields)

    async def stop_profile(self) -> None:
        await asyncio.to_thread(self.engine.stop_profile)


def _of(obj: Any, names: str) -> dict[str, Any]:
    """These fields and what every update has, where they are set."""
    wanted = (*names.split(), "weight_version", "abort_all_requests")
    return {name: value for name in wanted if (value := getattr(obj, name)) is not None}


def blobs_of(texts: list[Any]) -> list[bytes]:
    """Payloads, in base64 or as they are."""
    return [b64decode(text) if isinstance(text, str) else bytes(text) for text in texts]


__getattr__ = missing(__name__)
