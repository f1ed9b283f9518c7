"""What the clients and gateways of SGLang 0.5.23 send beside the fields that are served, by the routes' own names.

A value that asks for nothing is accepted, whoever fills in all defaults; one that asks for what is not here is refused.
"""

from __future__ import annotations

from phloem.protocol.body import Later

CACHES = "prefixes are found by their tokens"
MEDIA = "it says how images, video or sound are read: pictures are read as the model's own settings say"
INTERNAL = "for processes of the server that it was made for"

# Of every route that generates.
IGNORED: dict[str, str] = {
    "session_id": CACHES,
    "custom_labels": "metrics carry no labels of single requests",
    "mm_processor_kwargs": MEDIA,
    "images_config": MEDIA,
}
LATER: dict[str, Later] = {
    "watermark": Later("watermark", ({}, False, {"enabled": False})),
    "routed_dp_rank": Later("data_parallel", (0,)),
    "disagg_prefill_dp_rank": Later("disaggregation"),
    "return_routed_experts": Later("routed_experts_of_text", (False,), "experts are told by /generate alone"),
    "routed_experts_start_len": Later("routed_experts_of_text", (0,), "experts are told by /generate alone"),
}
_EXPERTS = "the server was started without --enable-return-routed-experts"

# Of `/generate` and chat completions.
MEDIA_IGNORED: dict[str, str] = {
    "video_config": MEDIA,
    "max_dynamic_patch": MEDIA,
    "min_dynamic_patch": MEDIA,
    "return_flat_raw_top_logprobs_b64": "how flat logprobs are written; the fields that ask for them are refused",
}
MEDIA_LATER: dict[str, Later] = {
    "use_audio_in_video": Later("sounds_in_videos", (False,), "this model does not hear videos"),
    "return_sampling_mask": Later("sampling_mask", (False,)),
    "sampling_logprobs_mode": Later("sampling_mask"),
    "return_flat_raw_output_top_logprobs": Later("flat_logprobs", (False,)),
}

GENERATE_IGNORED: dict[str, str] = {
    **IGNORED,
    **MEDIA_IGNORED,
    "log_metrics": "metrics count every request",
    "image_max_dynamic_patch": MEDIA,
    "video_max_dynamic_patch": MEDIA,
    "http_worker_ipc": INTERNAL,
    "external_trace_header": "no traces are written",
    "received_time": INTERNAL,
    "kv_hints": CACHES,
}
GENERATE_LATER: dict[str, Later] = {
    "spec_capture": Later("spec_capture", (), "no states are captured: start with --enable-spec-capture"),
    **LATER,
    **MEDIA_LATER,
    "return_routed_experts": Later("routed_experts", (False,), _EXPERTS),
    "routed_experts_start_len": Later("routed_experts", (0,), _EXPERTS),
    "return_bytes": Later("images", (False,)),
    "return_entropy": Later("entropy", (False,)),
    "return_indexer_topk": Later("indexer_topk", (False,)),
    "return_flat_raw_top_logprobs": Later("flat_logprobs", (False,)),
    "mm_hashes": Later("images"),
    "mm_content_hashes": Later("images"),
    "modalities": Later("modalities", ("text",)),
    "lora_id": Later("lora_id", ("",)),
    "positional_embed_overrides": Later("input_embeds"),
    "bootstrap_pair_key": Later("disaggregation"),
    "decode_tp_size": Later("disaggregation"),
    "need_wait_for_mm_inputs": Later("disaggregation", (False,)),
    "num_items_assigned": Later("disaggregation", ({},)),
    "encoder_urls": Later("disaggregation"),
    "multi_item_delimiter_indices": Later("multi_item"),
    "token_indices_to_pool": Later("pooling"),
}
CHAT_LATER: dict[str, Later] = {
    **MEDIA_LATER,
    "return_routed_experts": Later("routed_experts", (False,), _EXPERTS),
    "routed_experts_start_len": Later("routed_experts", (0,), _EXPERTS),
    "return_input_ids_in_sglext": Later("token_ids", (False,)),
    "return_output_ids_in_sglext": Later("token_ids", (False,)),
    "task": Later("tasks"),
}
OPENAI_LATER: dict[str, Later] = {
    **LATER,
    "return_spec_tokens_details": Later("speculation", (False,)),
}
