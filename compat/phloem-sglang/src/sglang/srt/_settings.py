"""What becomes of each setting of SGLang: honoured, left out with a line in the log, or refused. The docs print this.

Rows: name, default, what becomes of it. `=` and a name: honoured, as Phloem's setting of that name; `-` and a reason:
left out; `!` and a reason: refused, unless it is the default or asks for nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Setting(NamedTuple):
    name: str
    default: Any
    fate: str  # = - or !
    text: str  # Phloem's name for it, or the reason


_OWN = "-Phloem chooses by itself, and says at start what and why"
_FILES = "!weights come from files, and then by updates"
_ROW = tuple[str, Any, str]
_MODEL: tuple[_ROW, ...] = (
    ("model_path", None, "=model_path"),
    ("tokenizer_path", None, "=tokenizer_path"),
    ("tokenizer_mode", "auto", "-there is one tokenizer"),
    ("tokenizer_worker_num", 1, "-the server tokenises by itself"),
    ("skip_tokenizer_init", False, "=skip_tokenizer_init"),
    ("load_format", "auto", "=load_format"),
    ("model_loader_extra_config", "{}", "!loaders take no settings"),
    ("trust_remote_code", False, "=trust_remote_code"),
    ("context_length", None, "=context_length"),
    ("is_embedding", False, "=task"),
    ("enable_multimodal", None, "-a model that sees takes pictures"),
    ("revision", None, "=revision"),
    ("model_impl", "auto", "=model_impl"),
    ("dtype", "auto", "=dtype"),
    ("quantization", None, "=quantization"),
    ("kv_cache_dtype", "auto", "=kv_cache_dtype"),
    ("json_model_override_args", "{}", "!a checkpoint's config is taken as it is"),
    ("download_dir", None, "-the hub's own cache is used (HF_HOME)"),
    ("served_model_name", None, "=served_model_name"),
    ("weight_version", "default", "=weight_version"),
    ("chat_template", None, "=chat_template"),
    ("tool_call_parser", None, "=tool_call_parser"),
    ("reasoning_parser", None, "=reasoning_parser"),
    ("custom_weight_loader", None, "!no code of a caller's is run"),
    ("preferred_sampling_params", None, "!generation_config.json says what a model prefers"),
    ("allow_auto_truncate", False, "!a prompt that is too long is refused"),
    ("random_seed", None, "=random_seed"),
    ("delete_ckpt_after_loading", False, "!checkpoints are not deleted"),
    ("enable_multithread_load", False, "-files are read by several threads"),
    ("enable_fast_load", False, "-files are read by several threads"),
    ("torchao_config", "", "!quantization says how weights are quantised"),
    ("enable_tokenizer_batch_encode", False, "-the server tokenises by itself"),
    ("disable_fast_image_processor", False, "-pictures are read by Phloem itself"),
    ("keep_mm_feature_on_device", False, "-pictures are read by Phloem itself"),
    ("remote_instance_weight_loader_start_seed_via_transfer_engine", False, _FILES),
    ("remote_instance_weight_loader_backend", None, _FILES),
    ("remote_instance_weight_loader_seed_instance_ip", None, _FILES),
    ("remote_instance_weight_loader_seed_instance_service_port", None, _FILES),
)
_SERVER: tuple[_ROW, ...] = (
    ("host", "127.0.0.1", "=host"),
    ("port", 30000, "=port"),
    ("api_key", None, "=api_key"),
    ("admin_api_key", None, "=admin_api_key"),
    ("skip_server_warmup", False, "-nothing is asked before a server is ready"),
    ("warmups", None, "-nothing is asked before a server is ready"),
    ("nccl_port", None, "-ranks meet by shared memory or gloo"),
    ("log_level", "info", "=log_level"),
    ("log_level_http", None, "-requests are logged by log_requests"),
    ("log_requests", False, "=log_requests"),
    ("log_requests_level", 2, "-texts are never logged"),
    ("decode_log_interval", 40, "-figures are in /metrics"),
    ("show_time_cost", False, "-figures are in /metrics"),
    ("enable_metrics", False, "-metrics are always served"),
    ("enable_cache_report", False, "-usage always says what was cached"),
    ("enable_trace", False, "-Phloem's otlp_traces_endpoint switches spans on, and says where they go"),
    ("crash_dump_folder", None, "-what fails is logged with its trace"),
    ("file_storage_path", "sglang_storage", "-no files are kept"),
    ("stream_interval", 1, "=stream_interval"),
    ("stream_output", False, "=incremental_streaming_output"),
    ("incremental_streaming_output", False, "=incremental_streaming_output"),
    ("watchdog_timeout", 300.0, "=watchdog_timeout"),
    ("enable_custom_logit_processor", False, "-processors are asked for by name, and always there"),
    ("enable_return_hidden_states", False, "=enable_return_hidden_states"),
    ("enable_return_routed_experts", False, "=enable_return_routed_experts"),
    ("kv_events_config", None, "=kv_events_config"),
    ("max_queued_requests", None, "=max_queued_requests"),
)
_ENGINE: tuple[_ROW, ...] = (
    ("device", None, "=device"),
    ("mem_fraction_static", None, "=mem_fraction_static"),
    ("max_running_requests", None, "=max_running_requests"),
    ("max_total_tokens", None, "=max_total_tokens"),
    ("chunked_prefill_size", None, "=chunked_prefill_size"),
    ("max_prefill_tokens", 16384, "-chunked_prefill_size bounds a step"),
    ("enable_mixed_chunk", False, "-prompts and decodes always share steps"),
    ("schedule_policy", "lpm", "=schedule_policy"),
    ("schedule_conservativeness", 1.0, "-pages are taken when they are needed"),
    ("page_size", None, "=page_size"),
    ("disable_radix_cache", False, "=disable_radix_cache"),
    ("radix_eviction_policy", "lru", "=radix_eviction_policy"),
    ("disable_overlap_schedule", False, "=disable_overlap_schedule"),
    ("disable_cuda_graph", False, "=disable_step_graph"),
    ("disable_cuda_graph_padding", False, _OWN),
    ("cuda_graph_bs", None, _OWN),
    ("cuda_graph_max_bs", None, _OWN),
    ("disable_piecewise_cuda_graph", False, "=disable_piecewise_graph"),
    ("enable_torch_compile", False, _OWN),
    ("attention_backend", None, "-names differ; Phloem chooses by itself, and says at start what and why"),
    ("prefill_attention_backend", None, _OWN),
    ("decode_attention_backend", None, _OWN),
    ("mm_attention_backend", None, _OWN),
    ("sampling_backend", None, _OWN),
    ("grammar_backend", None, "=grammar_backend"),
    ("constrained_json_whitespace_pattern", None, "!a schema's JSON is written as the grammar backend writes it"),
    ("disable_outlines_disk_cache", False, "-grammars are kept in memory"),
    ("triton_attention_reduce_in_fp32", False, _OWN),
    ("triton_attention_num_kv_splits", 8, _OWN),
    ("torch_compile_max_bs", 32, _OWN),
    ("num_continuous_decode_steps", 1, "-a step is launched while the one before it runs"),
    ("scheduler_recv_interval", 1, "-requests are looked for before each step"),
    ("enable_nan_detection", False, "-logits that are no numbers always end their request"),
    ("disable_shared_experts_fusion", False, _OWN),
    ("disable_chunked_prefix_cache", False, _OWN),
    ("flashinfer_mla_disable_ragged", False, _OWN),
    ("disable_custom_all_reduce", False, _OWN),
    ("enable_p2p_check", False, _OWN),
    ("enable_nccl_nvls", False, _OWN),
    ("enable_symm_mem", False, _OWN),
    ("enable_mscclpp", False, _OWN),
    ("enable_two_batch_overlap", False, _OWN),
    ("enable_single_batch_overlap", False, _OWN),
    ("moe_runner_backend", "auto", _OWN),
    ("enable_deterministic_inference", False, "=enable_deterministic_inference"),
    ("rl_on_policy_target", None, "=enable_deterministic_inference"),
    ("enable_memory_saver", False, "-memory can always be given back (release_memory_occupation)"),
    ("enable_weights_cpu_backup", False, "=enable_weights_cpu_backup"),
    ("enable_draft_weights_cpu_backup", False, "-drafts' weights are not given back"),
    ("cpu_offload_gb", 0, "!weights are on one device"),
    ("enable_hierarchical_cache", False, "=enable_hierarchical_cache"),
    ("hicache_ratio", 2.0, "=hicache_ratio"),
    ("hicache_size", 0, "=hicache_size"),
    ("hicache_write_policy", "write_through", "=hicache_write_policy"),
    ("hicache_storage_backend", None, "=hicache_storage_backend"),
    ("hicache_storage_prefetch_policy", "timeout", "=hicache_storage_prefetch_policy"),
    ("hicache_storage_backend_extra_config", None, "=hicache_storage_backend_extra_config"),
    ("limit_mm_data_per_request", None, "=limit_mm_data_per_request"),
    ("encoder_only", False, "!encoder servers are processes of their own: `phloem serve --encoder-only`"),
    ("language_only", False, "=language_only"),
    ("encoder_urls", (), "=encoder_urls"),
)
_PARALLEL: tuple[_ROW, ...] = (
    ("tp_size", 1, "=tp_size"),
    ("pp_size", 1, "=pp_size"),
    ("dp_size", 1, "=dp_size"),
    ("ep_size", 1, "=ep_size"),
    ("enable_dp_attention", False, "=enable_dp_attention"),
    ("enable_dp_lm_head", False, "!the head is shared out among all ranks"),
    ("enable_eplb", False, "=enable_eplb"),
    ("enable_ep_moe", False, "-ep_size says it"),
    ("prefill_round_robin_balance", False, "-load_balance_method says it"),
    ("moe_a2a_backend", "none", "=moe_a2a_backend"),
    ("load_balance_method", "auto", "=load_balance_method"),
    ("nnodes", 1, "=nnodes"),
    ("node_rank", 0, "=node_rank"),
    ("dist_init_addr", None, "=dist_init_addr"),
    ("dist_timeout", None, "=dist_timeout"),
    ("base_gpu_id", 0, "=base_gpu_id"),
    ("gpu_id_step", 1, "=gpu_id_step"),
)
_LORA: tuple[_ROW, ...] = (
    ("enable_lora", None, "=enable_lora"),
    ("max_lora_rank", None, "=max_lora_rank"),
    ("lora_target_modules", None, "-each adapter says which modules it changes"),
    ("lora_paths", None, "=lora_paths"),
    ("max_loaded_loras", None, "=max_loaded_loras"),
    ("max_loras_per_batch", 8, "=max_loras_per_batch"),
    ("lora_backend", "csgmv", _OWN),
    ("lora_eviction_policy", "lru", "-the adapter unused for longest gives way"),
    ("max_lora_chunk_size", 16, _OWN),
    ("enable_lora_overlap_loading", None, "-adapters are always read beside the steps"),
    ("lora_strict_loading", False, "-what an adapter lacks or has too much is always refused"),
)
_DRAFTS: tuple[_ROW, ...] = (
    ("speculative_algorithm", None, "=speculative_algorithm"),
    ("speculative_draft_model_path", None, "=speculative_draft_model_path"),
    ("speculative_draft_model_revision", None, "!drafts come from a folder"),
    ("speculative_num_steps", None, "=speculative_num_steps"),
    ("speculative_eagle_topk", None, "=speculative_eagle_topk"),
    ("speculative_num_draft_tokens", None, "=speculative_num_draft_tokens"),
    ("speculative_accept_threshold_single", 1.0, "=speculative_accept_threshold_single"),
    ("speculative_accept_threshold_acc", 1.0, "=speculative_accept_threshold_acc"),
    ("speculative_token_map", None, "=speculative_token_map"),
    ("speculative_attention_mode", "prefill", _OWN),
)
_SPLIT: tuple[_ROW, ...] = (
    ("disaggregation_mode", "null", "=disaggregation_mode"),
    ("disaggregation_transfer_backend", "mooncake", "=disaggregation_transfer_backend"),
    ("disaggregation_bootstrap_port", 8998, "=disaggregation_bootstrap_port"),
    ("disaggregation_ib_device", None, "-pages go by memory that is shared, or by TCP"),
    ("disaggregation_decode_tp", None, "-servers tell each other how many ranks they have"),
)
_EXPERTS: tuple[_ROW, ...] = (
    ("kt_num_gpu_experts", None, "=kt_num_gpu_experts"),
    ("kt_weight_path", None, "=kt_weight_path"),
    ("kt_method", "AMXINT4", "=kt_method"),
    ("kt_cpuinfer", None, "=kt_cpuinfer"),
    ("kt_threadpool_count", 2, "-there is one pool of threads"),
    ("kt_max_deferred_experts_per_token", None, "=kt_max_deferred_experts_per_token"),
    ("kt_gpu_prefill_token_threshold", None, "=kt_gpu_prefill_token_threshold"),
    ("kt_expert_placement_strategy", "uniform", "=kt_expert_placement_strategy"),
    ("kt_enable_dynamic_expert_update", False, "=kt_enable_dynamic_expert_update"),
    ("init_expert_location", "trivial", "=init_expert_location"),
)
_DIFFUSION: tuple[_ROW, ...] = (
    ("dllm_algorithm", None, "=dllm_algorithm"),
    ("dllm_algorithm_config", None, "=dllm_algorithm_config"),
)
SETTINGS = tuple(
    Setting(name, default, fate[0], fate[1:])
    for rows in (_MODEL, _SERVER, _ENGINE, _PARALLEL, _LORA, _DRAFTS, _SPLIT, _EXPERTS, _DIFFUSION)
    for name, default, fate in rows
)


def table() -> str:
    """All settings as Markdown."""
    said = {"=": "`{}`", "-": "left out: {}", "!": "refused: {}"}
    rows = [f"| `{one.name}` | `{one.default!r}` | {said[one.fate].format(one.text)} |" for one in SETTINGS]
    return "\n".join(["| setting | default | what becomes of it |", "| --- | --- | --- |", *rows])
