"""Request body of `/generate`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta

from phloem.protocol import known
from phloem.protocol.body import Body, Later
from phloem.protocol.fields import (
    COMMON_LATER,
    GRAMMAR,
    NEEDS_FORMAT,
    Count,
    Int32,
    Seed,
    SessionBody,
    StoppingFields,
    Strings,
)


class SamplingBody(StoppingFields, kw_only=True):
    """`sampling_params` of `/generate`."""

    max_new_tokens: Count | None = None
    min_new_tokens: Count | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    n: Int32 | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    sampling_seed: Seed | None = None
    stream_interval: Int32 | None = None
    beam_width: Int32 | None = None
    watermark: Any = None

    later: ClassVar[dict[str, Later]] = {
        "watermark": known.LATER["watermark"],
        **GRAMMAR,
        "beam_width": Later("beam_search", (0, 1)),
    }


class GenerateBody(Body, kw_only=True):
    """`POST /generate`. A list in `text` or `input_ids` (of lists) makes a batch; other fields may then be lists."""

    pooled: ClassVar[bool | None] = False
    text: Strings = None
    input_ids: list[Int32 | list[Int32]] | None = None
    input_embeds: list[Any] | None = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: Strings = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: Int32 | list[Int32] | None = None
    top_logprobs_num: Int32 | list[Int32] | None = None
    token_ids_logprob: list[Int32 | list[Int32] | None] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    return_hidden_states: bool | list[bool] | None = None
    spec_capture: dict[str, Any] | list[dict[str, Any]] | None = None
    session_params: SessionBody | list[SessionBody | None] | None = None
    lora_path: str | list[str | None] | None = None
    custom_logit_processor: str | list[str | None] | None = None
    priority: Int32 | None = None
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    service_tier: str | None = None
    user: str | None = None
    extra_key: str | list[str | None] | None = None
    cache_salt: str | list[str | None] | None = None
    routing_key: str | None = None
    conversation_id: str | None = None
    data_parallel_rank: Int32 | None = None
    routed_dp_rank: Int32 | None = None
    bootstrap_host: Strings = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    return_prompt_token_ids: bool | None = None
    require_reasoning: bool | None = None
    max_thinking_tokens: Int32 | None = None
    background: bool | None = None
    no_logs: bool | None = None
    custom_labels: dict[str, str] | None = None
    model: str | None = None
    session_id: str | None = None
    log_metrics: bool | None = None
    http_worker_ipc: str | None = None
    external_trace_header: dict[str, Any] | None = None
    received_time: float | None = None
    kv_hints: dict[str, Any] | list[Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    images_config: dict[str, Any] | None = None
    video_config: dict[str, Any] | None = None
    max_dynamic_patch: Int32 | None = None
    min_dynamic_patch: Int32 | None = None
    image_max_dynamic_patch: Int32 | None = None
    video_max_dynamic_patch: Int32 | None = None
    use_audio_in_video: bool | None = None
    watermark: Any = None
    return_bytes: bool | None = None
    return_entropy: bool | None = None
    return_indexer_topk: bool | None = None
    return_routed_experts: bool | list[bool] | None = None
    routed_experts_start_len: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    return_sampling_mask: bool | list[bool] | None = None
    sampling_logprobs_mode: Any = None
    return_flat_raw_top_logprobs: bool | None = None
    return_flat_raw_output_top_logprobs: bool | None = None
    return_flat_raw_top_logprobs_b64: bool | None = None
    mm_hashes: Any = None
    mm_content_hashes: Any = None
    modalities: list[str] | None = None
    lora_id: str | list[str | None] | None = None
    positional_embed_overrides: Any = None
    bootstrap_pair_key: Any = None
    decode_tp_size: Any = None
    disagg_prefill_dp_rank: Int32 | None = None
    need_wait_for_mm_inputs: bool | None = None
    num_items_assigned: dict[str, Any] | None = None
    encoder_urls: list[str] | None = None
    multi_item_delimiter_indices: Any = None
    token_indices_to_pool: Any = None

    ignored: ClassVar[dict[str, str]] = {
        "model": "gateways add it; one server serves one model",
        "routing_key": "read by gateways in front of the server",
        "conversation_id": "read by gateways; prefixes are found by their tokens",
        "no_logs": "texts are never logged",
        **known.GENERATE_IGNORED,
    }
    later: ClassVar[dict[str, Later]] = {
        **COMMON_LATER,
        "input_embeds": Later("input_embeds", ([],)),
        "image_data": Later("images", ([], "")),
        "video_data": Later("videos", ([], "")),
        "audio_data": Later("sounds", ([], "")),
        "require_reasoning": NEEDS_FORMAT,
        **known.GENERATE_LATER,
    }

    def refuse_later(self, features: frozenset[str], where: str = "") -> None:
        super().refuse_later(features, where)
        several = self.sampling_params if isinstance(self.sampling_params, list) else [self.sampling_params]
        for params in several:
            if params is not None:
                params.refuse_later(features, "sampling_params.")
