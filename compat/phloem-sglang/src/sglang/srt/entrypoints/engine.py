"""`Engine` with SGLang's keywords: Phloem's engine, with the object that callers reach into."""

from __future__ import annotations

from typing import Any

from phloem.core.errors import BadRequest
from phloem.llm import Engine as PhloemEngine
from sglang._missing import missing, refuse
from sglang.srt.entrypoints.EngineBase import EngineBase
from sglang.srt.managers.io_struct import FlushCacheReqOutput
from sglang.srt.managers.tokenizer_manager import TokenizerManager, blobs_of
from sglang.srt.server_args import PortArgs, ServerArgs, server_args_of


class Engine(PhloemEngine, EngineBase):
    """A model in this process. Keywords: fields of `ServerArgs`, or `server_args`; beside these, Phloem's own.

    Methods that are not described here are Phloem's, with the names and arguments that SGLang's have.

    Raises:
        phloem.core.errors.ConfigError: a setting is unknown, or asks for what is not there.
    """

    server_args_class = ServerArgs

    def __init__(self, **settings: Any) -> None:
        given = settings.pop("server_args", None)
        if given is None:
            given, own = server_args_of({"log_level": "error", **settings})
        else:
            own = settings
        self.server_args: ServerArgs = given
        super().__init__(**{**given.settings(), **own})
        self.tokenizer_manager = TokenizerManager(self)
        self.scheduler_info = self._scheduler_info()
        self.port_args = PortArgs()

    def _scheduler_info(self) -> dict[str, Any]:
        total = self.ready.get("max_total_num_tokens", 0)
        return {"status": "ready", "max_total_num_tokens": total, "max_req_input_len": self.info.context_length - 1}

    def update_weights_from_tensor(
        self,
        named_tensors: Any,
        load_format: str | None = None,
        flush_cache: bool = True,
        *,
        weight_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> tuple[bool, str]:
        """Tensors by name, as they are; or a request of `io_struct` with what `MultiprocessingSerializer` made, or with
        safetensors (`load_format`)."""
        texts = getattr(named_tensors, "serialized_named_tensors", None)
        if texts is None:
            return super().update_weights_from_tensor(
                named_tensors,
                load_format,
                flush_cache,
                weight_version=weight_version,
                abort_all_requests=abort_all_requests,
            )
        body = named_tensors
        return self._update(
            source="blobs",
            blobs=blobs_of(texts),
            load_format=body.load_format,
            version=body.weight_version,
            flush=body.flush_cache is not False,
            abort_all=bool(body.abort_all_requests),
        )

    def load_sent_lora_adapter(self, asked: Any) -> dict[str, str]:
        """A request of `io_struct`, with tensors that were serialised. Gives path by name of all.

        Raises:
            phloem.core.errors.PhloemError: they are no adapter for this model, or ask for what is not there.
        """
        for name in ("added_tokens_config", "expected_checksums"):
            if getattr(asked, name):
                raise BadRequest(f"{name} is not supported", param=name)
        whole = asked.serialized_tensors
        texts = asked.serialized_named_tensors or (
            [] if whole is None else whole if isinstance(whole, list) else [whole]
        )
        sent = {"config": asked.config_dict, "blobs": blobs_of(texts), "load_format": asked.load_format}
        return self._load_sent(asked.lora_name, sent, asked.pinned)

    def collective_rpc(self, method: str, **_: Any) -> None:
        refuse(f"Engine.collective_rpc({method!r})", "no code of a caller's is run in the engine")

    def save_sharded_model(self, **_: Any) -> None:
        refuse("Engine.save_sharded_model", "weights are not written: the trainer has them")

    @classmethod
    def _launch_subprocesses(cls, server_args: ServerArgs, **_: Any) -> tuple[Any, Any, dict[str, Any], PortArgs]:
        """(tokenizer manager, template manager, what the scheduler says, ports) of an engine in this process."""
        engine = cls(server_args=server_args)
        return engine.tokenizer_manager, engine.chat_template, engine.scheduler_info, engine.port_args


def _set_envs_and_config(server_args: ServerArgs) -> None:
    """Nothing to do. Callers put another one in its place, which is not called either."""


def init_tokenizer_manager(server_args: ServerArgs, port_args: PortArgs, *_: Any) -> tuple[TokenizerManager, Any]:
    """A tokenizer manager brings its engine here."""
    manager, templates, *_rest = Engine._launch_subprocesses(server_args)
    return manager, templates


def run_scheduler_process(*_: Any, **__: Any) -> None:
    refuse("run_scheduler_process", "an engine starts its own processes")


def run_detokenizer_process(*_: Any, **__: Any) -> None:
    refuse("run_detokenizer_process", "an engine starts its own processes")


__all__ = ["Engine", "FlushCacheReqOutput", "PortArgs", "ServerArgs"]
__getattr__ = missing(__name__)
