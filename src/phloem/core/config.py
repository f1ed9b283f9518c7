"""Every setting, once: frozen sections that the command line, YAML files and `Engine(...)` keywords are made from.

A field's default None (or "auto") means: `core/resolve.py` chooses and says why. Flat names are unique across sections,
so that `--host` and `host:` need no prefix. This is the one file that reads the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from phloem.core.errors import ConfigError
from phloem.core.ranges import EPLB_STEPS, check_ranges, check_ranks
from phloem.core.spellings import CP_NAMES, attention_groups, one_address, refuse_missing
from phloem.core.targets import Fair, Targets
from phloem.core.torchrun import as_torchrun_says


def opt(default: Any, text: str, *also: str) -> Any:
    """A field with its help. `also`: names that users of other engines know it by; they are read, and never written."""
    return field(default=default, metadata={"help": text, "also": also})


DType = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
A2A = Literal["none", "torch", "deepep", "deepep_low_latency"]
Policy = Literal["fcfs", "lpm", "priority", "deadline"]
Whitespace = Literal["compact", "flexible"]
Eviction = Literal["lru", "lfu", "fifo"]
LogLevel = Literal["debug", "info", "warning", "error"]
OnEngineDeath = Literal["restart", "exit"]
ImagePolicy = Literal["fcfs", "shortest", "fair"]
CpuLevel = Literal["auto", "portable", "avx2", "avxvnni", "avx512", "amx", "neon", "i8mm"]
LogprobsMode = Literal["raw", "temperature", "processed"]
ModelImpl = Literal["auto", "phloem", "transformers"]
TpComm = Literal["auto", "shm", "gloo", "nccl"]
WritePolicy = Literal["write_through", "write_through_selective", "write_back"]
Disaggregation = Literal["null", "prefill", "decode"]
PrefetchPolicy = Literal["best_effort", "wait_complete", "timeout"]
LoadBalance = Literal["auto", "round_robin", "total_requests", "total_tokens"]
RecorderMode = Literal["stat"]
Placement = Literal["uniform", "frequency", "front-loading", "random"]
Task = Literal["auto", "generate", "embed", "classify", "score", "tokens"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how its weights are read."""

    model_path: str = opt("demo", "Directory, GGUF file, hub id, or 'demo' for the embedded default model.")
    tokenizer_path: str | None = opt(None, "Tokenizer directory or file; default: the model's own.")
    served_model_name: str | None = opt(None, "Name under which clients ask for the model; default: the model path.")
    revision: str | None = opt(None, "Branch, tag or commit of a hub id.")
    task: Task = opt("auto", "What the model is for; auto reads it off the architecture and the folder.")
    load_format: LoadFormat = opt("auto", "How weights are read; 'dummy' draws random ones from the config alone.")
    dtype: DType = opt("auto", "Type of weights and KV cache; auto follows the checkpoint and the machine.")
    quantization: str | None = opt(None, "Quantise weights at load: int4, int8, fp8, mxfp4; default: as they are.")
    context_length: int | None = opt(None, "Longest prompt plus output in tokens; default: the model's own limit.")
    chat_template: str | None = opt(None, "File with a Jinja chat template; default: the model's own.")
    tool_call_parser: str | None = opt(None, "Format of tool calls; default: read off the chat template; 'none': off.")
    reasoning_parser: str | None = opt(None, "Format of reasoning; default: read off the chat template; 'none': off.")
    model_impl: ModelImpl = opt("auto", "Whose code runs the model; auto: Phloem's own, else that of transformers.")
    trust_remote_code: bool = opt(False, "Run code that comes with a checkpoint, where transformers' code is run.")
    skip_tokenizer_init: bool = opt(False, "Serve token ids only; no tokenizer is loaded.")
    logprobs_mode: LogprobsMode = opt(
        "raw", "Log probabilities of sampled tokens: before temperature, after it, as drawn."
    )
    weight_version: str = opt("default", "What the weights are called until an update names others.")
    random_seed: int | None = opt(None, "Seed for requests that bring none; default: drawn at start.")


@dataclass(frozen=True)
class CacheConfig:
    """KV memory and prefix cache."""

    max_total_tokens: int | None = opt(None, "KV pool size in tokens; overrides the memory fraction.")
    mem_fraction_static: float | None = opt(None, "Share of free memory for weights and KV pool, 0 to 1.")
    kv_memory: str | None = opt(None, "KV pool size in bytes, such as '2GiB'; overrides the memory fraction.")
    page_size: int | None = opt(None, "Tokens per KV page; default: what the attention backend prefers.")
    kv_cache_dtype: str = opt("auto", "Type of the KV cache: auto, or one that the attention backend takes.")
    disable_radix_cache: bool = opt(False, "Do not share computed prefixes between requests.")
    radix_eviction_policy: Eviction = opt("lru", "Which unused cached prefix goes first when pages run out.")
    kv_events_config: str | None = opt(
        None, 'Tell gateways what is cached: {"publisher": "zmq", "endpoint": "tcp://*:5557"}.'
    )
    enable_hierarchical_cache: bool = opt(
        False, "Keep computed pages beyond the pool, in host memory and a store (`docs/tiers.md`).", "enable_hicache"
    )
    hicache_ratio: float | None = opt(None, "Host memory for pages as a multiple of the KV pool.")
    hicache_size: float = opt(0.0, "The same in gigabytes, of each replica; above 0 it overrides the ratio.")
    hicache_write_policy: WritePolicy = opt(
        "write_through", "When pages are copied: when they are computed, found again, or make room."
    )
    hicache_storage_backend: str | None = opt(
        None, "Store behind host memory: file or nixl, which outlive the server, mooncake, or dynamic; default: none."
    )
    hicache_storage_prefetch_policy: PrefetchPolicy = opt(
        "timeout", "How long a request waits for pages of the store: until it could run, for all, or a while."
    )
    hicache_storage_backend_extra_config: str | None = opt(
        None, 'Settings of the store as JSON, or @FILE: {"path": "/var/cache/kv", "max_size": "50GiB"}.'
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """Who runs when."""

    max_running_requests: int | None = opt(None, "Most requests in one step; default: from the machine.")
    max_queued_requests: int = opt(4096, "Most waiting requests; beyond, a request is answered 503.")
    max_queue_seconds: float = opt(0.0, "Longest predicted wait for the first token; beyond, 503 at once. 0: any.")
    chunked_prefill_size: int | None = opt(None, "Token budget of one step: prompts are prefilled in such chunks.")
    enable_dynamic_chunking: bool = opt(
        False, "Chunks get the smaller the more of the prompt is before them, to take equal time."
    )
    schedule_policy: Policy = opt("lpm", "Who waits least: longest cached prefix, arrival, priority, or deadline.")
    slo: str | None = opt(None, 'What requests are promised, as JSON: {"ttft_ms": 500, "itl_ms": 50, "tiers": {...}}.')
    fair_queueing: Fair = opt("none", "Whose requests get equal parts while some wait: each API key's, or user's.")
    disable_overlap_schedule: bool = opt(False, "Plan a step only after the one before it has ended.")
    stream_interval: int = opt(1, "Send streamed tokens in groups of this many.")
    watchdog_timeout: float = opt(300.0, "Seconds after which a step that hangs is reported with all stacks.")


@dataclass(frozen=True)
class RuntimeConfig:
    """Machine and kernels."""

    device: str = opt("auto", "Platform to run on; auto takes the best one available.")
    attention_backend: str | None = opt(None, "Attention backend; default: the platform's first that accepts.")
    ops: str | None = opt(
        None,
        "Op table: 'reference' forces plain torch, 'invariant' gives a token the same bits whatever else is in the "
        "batch; default: the platform's fastest.",
    )
    threads: int | None = opt(
        None, "Compute threads, of each rank; default: one per core that the process may use, shared among ranks."
    )
    tp_size: int = opt(
        1,
        "Ranks that share each layer out, a process each (`docs/parallel.md`); of models that draw, each picture's "
        "tokens, a device each.",
        "tp",
        "tensor_parallel_size",
        "ulysses_degree",
        "sp_degree",
    )
    ep_size: int = opt(
        1, "Ranks of tp_size that have different experts; the rest share each expert out.", "ep", "expert_parallel_size"
    )
    pp_size: int = opt(
        1, "Stages that the layers are shared out among, each of tp_size ranks.", "pp", "pipeline_parallel_size"
    )
    dp_size: int = opt(
        1, "Replicas of the model behind one door, each with all of its ranks.", "dp", "data_parallel_size"
    )
    attn_dp_size: int = opt(
        1, "Groups of the ranks of tp_size that attend to requests of their own; other layers are shared out by all."
    )
    attn_cp_size: int = opt(
        1, "Ranks of tp_size that share out the tokens of a prompt; each keeps all of its keys and values.", *CP_NAMES
    )
    enable_dp_attention: bool = opt(
        False, "SGLang's spelling of attn_dp_size: dp_size then says how many groups, and there is one replica."
    )
    moe_a2a_backend: A2A = opt(
        "none", "How rows get to experts with attn_dp_size: to all ranks (none), or their own, by torch or by DeepEP."
    )
    load_balance_method: LoadBalance = opt(
        "auto", "Which replica a request goes to: in turn, or by requests or tokens; auto: tokens, and known prefixes."
    )
    tp_comm: TpComm = opt("auto", "By what ranks meet: memory that they share (shm), gloo, or (graphics cards) nccl.")
    base_gpu_id: int | None = opt(None, "Number of the first rank's graphics card, of those that are visible.")
    gpu_id_step: int = opt(1, "How far the next rank's graphics card is from that of the one before.")
    cpu_level: CpuLevel = opt(
        "auto",
        "Instruction set of the native CPU kernels; auto takes the best that the processor runs. PHLOEM_CPU_LEVEL sets "
        "it too.",
    )
    disable_step_graph: bool = opt(False, "Run every step eagerly, through Python.")
    disable_piecewise_graph: bool = opt(
        False, "Run prefill and mixed steps eagerly; decode steps stay recorded.", "disable_piecewise_cuda_graph"
    )
    piecewise_graph_max_tokens: int | None = opt(
        None, "Most tokens of a prefill step in recorded pieces.", "piecewise_cuda_graph_max_tokens"
    )
    record_graphs_before_ready: bool = opt(False, "Record all steps before answering, instead of on first use or idle.")
    disable_cascade_attention: bool = opt(
        False, "Read pages that requests share once for each of them, not once a step.", "disable_cascade_attn"
    )
    check_step_graph: bool = opt(False, "Debug: run recorded and eager steps side by side and compare.")
    enable_deterministic_inference: bool = opt(
        False, "A token gets the same bits whatever else is in the batch: as --ops invariant."
    )
    enable_return_routed_experts: bool = opt(
        False, "Answer requests for the experts that computed their tokens (return_routed_experts)."
    )
    enable_weights_cpu_backup: bool = opt(
        False, "Copy weights to disk before their memory is given back, so that they return whatever they are."
    )
    debug_invariants: bool = opt(False, "Debug: check the page accounting after every step.")


@dataclass(frozen=True)
class NodesConfig:
    """One model over several machines (`docs/parallel.md`)."""

    nnodes: int = opt(1, "Machines that the ranks of one model are shared out among, as many on each.")
    node_rank: int | None = opt(
        None, "Which of them this is: 0, the default, plans and answers HTTP; the others execute."
    )
    dist_init_addr: str | None = opt(
        None, "HOST:PORT at which node 0 listens; also --master-addr with --master-port.", "nccl_init_addr"
    )
    use_ray: bool = opt(False, "Let Ray choose the other machines and start their ranks; this one is node 0.")
    dist_timeout: float = opt(300.0, "Seconds that nodes wait for each other at the start.")
    dist_secret: str | None = opt(None, "What all nodes must know to be let in; PHLOEM_DIST_SECRET sets it too.")


@dataclass(frozen=True)
class ExpertsConfig:
    """Routed experts that the processor computes beside the device (`docs/experts.md`)."""

    kt_num_gpu_experts: int | None = opt(
        None, "Routed experts of each sparse layer that stay on the device; the processor computes the others. 0: all."
    )
    kt_weight_path: str | None = opt(None, "Where the processor's experts lie: the model itself, as it is.")
    kt_method: str | None = opt(
        None, "Form of the processor's experts: AMXINT4, AMXINT8, or the stored one; default: as stored."
    )
    kt_cpuinfer: int | None = opt(None, "Threads that compute experts; default: one per core.")
    kt_threadpool_count: int | None = opt(None, "Pools of these threads: 1.")
    kt_max_deferred_experts_per_token: int | None = opt(
        None, "Experts of each token that are added one sparse layer later; default 0. It changes the answers."
    )
    kt_gpu_prefill_token_threshold: int | None = opt(
        None, "Tokens of a step from which on all experts are copied to the device, layer by layer; default: never."
    )
    kt_expert_placement_strategy: Placement = opt("uniform", "Which experts stay on the device.")
    kt_enable_dynamic_expert_update: bool = opt(
        False, "Let experts that are chosen often take the places on the device, between steps."
    )
    init_expert_location: str | None = opt(
        None,
        "File with how often experts are chosen, by which they are placed on the device (strategy frequency) or over "
        "ep_size: JSON, or .pt as SGLang writes it.",
    )
    ep_num_redundant_experts: int = opt(
        0, "Copies of experts that are chosen often, beyond one of each, over ep_size (`docs/parallel.md`)."
    )
    enable_eplb: bool = opt(
        False, "Move experts among the ranks of ep_size, between steps, by how often each is chosen."
    )
    eplb_rebalance_num_iterations: int = opt(EPLB_STEPS, "Steps between two looks of enable_eplb.")
    expert_distribution_recorder_mode: RecorderMode | None = opt(
        None, "Count how often experts are chosen, where /start_expert_distribution_record asks for it."
    )


@dataclass(frozen=True)
class GrammarConfig:
    """Structured output."""

    grammar_backend: str | None = opt(None, "Grammar engine for every constraint; default: the best one for its kind.")
    grammar_whitespace: Whitespace = opt("compact", "Blanks between JSON tokens: none, or a bounded number of them.")
    grammar_timeout: float = opt(10.0, "Seconds that compiling one grammar may take.")
    disable_jump_forward: bool = opt(False, "Decode text that a grammar forces token by token.")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the model."""

    enable_lora: bool = opt(False, "Serve adapters (LoRA); implied by --lora-paths.")
    lora_paths: list[str] | None = opt(
        None, "Adapters to start with: NAME=PATH, PATH, or JSON with lora_name, lora_path, pinned.", "lora_modules"
    )
    max_lora_rank: int | None = opt(None, "Largest rank of an adapter; default: from those given and the machine.")
    max_loras_per_batch: int | None = opt(
        None, "Most different adapters in one step; default: as many as are loaded.", "max_loras"
    )
    max_loaded_loras: int | None = opt(
        None, "Most adapters in memory; beyond, the one unused for longest gives way until it is asked for.",
        "max_cpu_loras",
    )  # fmt: skip
    lora_memory: str | None = opt(None, "Most memory of all loaded adapters, such as '2GiB'.")


@dataclass(frozen=True)
class MediaConfig:
    """Pictures, videos, sounds and documents in requests (`docs/multimodal.md`)."""

    limit_mm_data_per_request: str | None = opt(
        None,
        'Most media of a request, as JSON: {"image": 16, "video": 4, "audio": 8, "page": 16}.',
        "limit_mm_per_prompt",
    )
    enable_mm_urls: bool = opt(False, "Fetch media from http and https addresses that clients name.")
    mm_file_root: str | None = opt(
        None, "Directory of files that clients may name as media; default: none.", "allowed_local_media_path"
    )
    mm_encoder_cache: str = opt("256MiB", "Most memory for what the model's tower made of earlier media.")


@dataclass(frozen=True)
class SpeculativeConfig:
    """Drafts that are verified (`docs/speculation.md`). Answers are the same with and without."""

    speculative_algorithm: str | None = opt(
        None,
        "What drafts: auto (suffix on a CPU), none, suffix, ngram, draft_model, eagle, eagle3, mtp, dflash (dspark). "
        "Other engines' names: standalone (draft_model), prompt_lookup (ngram), nextn and deepseek_mtp (mtp).",
    )
    speculative_num_steps: int | None = opt(None, "Drafts behind a token, at most: 23, of models 5, dflash 15, else 7.")
    speculative_num_draft_tokens: int | None = opt(None, "The same with the token before them: one more.")
    speculative_eagle_topk: int | None = opt(None, "Drafts of a model that may follow one token: above 1, trees.")
    speculative_draft_model_path: str | None = opt(
        None, "The model or the head that drafts, made for this model.", "speculative_draft_model"
    )
    speculative_token_map: str | None = opt(None, "Tokens that an EAGLE head says: a .pt or .json list of ids.")
    speculative_ngram_max_trie_depth: int | None = opt(None, "Tokens that are compared with earlier text; default 32.")
    speculative_ngram_capacity: int | None = opt(None, "Tokens of past answers to draft from; default 131072.")
    speculative_accept_threshold_single: float = opt(1.0, "Only 1.0: whatever is less changes the answers.")
    speculative_accept_threshold_acc: float = opt(1.0, "Only 1.0: whatever is less changes the answers.")
    disable_speculative_adaptive: bool = opt(False, "Verify all drafts always, whether that pays or not.")
    speculative_config: str | None = opt(None, 'The same as JSON: {"method": "suffix", "num_speculative_tokens": 7}.')
    enable_spec_capture: bool = opt(False, "Requests may ask for hidden states that a draft head is trained on.")
    spec_capture_dir: str | None = opt(None, "Folder that those states are written to, which the trainer reads.")


@dataclass(frozen=True)
class DllmConfig:
    """How a language model of diffusion fills its blocks."""

    dllm_algorithm: str | None = opt(
        None, "Which masked places a pass accepts; default: LowConfidence, by a threshold."
    )
    dllm_algorithm_config: str | None = opt(
        None, "YAML file, or JSON, with its settings: threshold, steps, block_size, mask_id."
    )


@dataclass(frozen=True)
class ImagesConfig:
    """Models that draw (`docs/images.md`)."""

    image_policy: ImagePolicy = opt(
        "fcfs", "Order of pictures: the oldest, the one with the least work left, or each client's in turn (fair)."
    )
    image_step_tokens: int | None = opt(None, "Latent tokens of one step; default: as many as fill it, by a probe.")
    image_defaults: str | None = opt(
        None,
        'What requests leave open, as JSON: {"size": "512x512", "steps": 8, "guidance_scale": 0, "max_pixels": N}; '
        'of films also "frames", "max_frames", "fps".',
    )
    image_step_cache: str | None = opt(
        None, "Leave blocks out of steps that change little: teacache, dbcache:0.12, first_block:0.08, or JSON."
    )
    video_output_path: str | None = opt(None, "Folder of films and jobs; default: gone at the end.", "output_path")
    video_max_bytes: str = opt("10GiB", "Most bytes of finished films; the oldest go first.")
    video_ttl: float = opt(86400.0, "Seconds for which a finished film, or why it failed, is kept.")
    enable_cfg_parallel: bool = opt(
        False, "Compute rows of negative prompts on a second device, or on the processor beside the others."
    )
    offload: bool = opt(False, "Keep parts of pictures' models in the host's memory while they are not used; slower.")
    vae_tiling: bool = opt(False, "Decode large pictures in tiles: less memory, faint seams.")


@dataclass(frozen=True)
class DisaggConfig:
    """Prompts computed by one server, answers by another, media by a third (`docs/disaggregation.md`)."""

    disaggregation_mode: Disaggregation = opt(
        "null", "What this server does: null, both; prefill, prompts alone; decode, answers alone."
    )
    disaggregation_transfer_backend: str | None = opt(
        None, "How pages get to decode servers: shm on one machine, tcp, nixl, mooncake; default: the first both have."
    )
    disaggregation_bootstrap_port: int = opt(
        8998, "Port at which decode servers find a prefill server; 0 takes a free one."
    )
    encoder_only: bool = opt(False, "Load the model's towers alone, and encode media for servers of language_only.")
    language_only: bool = opt(False, "Load no towers: the servers of encoder_urls encode media.")
    encoder_urls: list[str] | None = opt(None, "Encoder servers, separated by commas: http://10.0.0.2:30000.")


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP door."""

    host: str = opt("127.0.0.1", "Address to listen on.")
    port: int = opt(30000, "Port to listen on; 0 takes a free one.")
    api_key: str | None = opt(None, "Key that clients must send as a bearer token; PHLOEM_API_KEY sets it too.")
    admin_api_key: str | None = opt(
        None, "Key for calls that change the server: weights, adapters, pause; PHLOEM_ADMIN_API_KEY sets it too."
    )
    allow_remote_updates: bool = opt(False, "Let other machines change weights although no key is set.")
    max_update_bytes: int = opt(2 << 30, "Largest body of a request that brings weights.")
    cors_origins: str = opt("", "Origins, separated by commas, whose pages may call this server; * for all.")
    max_body_bytes: int = opt(32 * 1024 * 1024, "Largest request body.")
    max_bodies_bytes: int = opt(256 * 1024 * 1024, "Most bytes of all request bodies that are being read or decoded.")
    header_timeout: float = opt(30.0, "Seconds that a connection may take for a request's header.")
    body_timeout: float = opt(30.0, "Seconds for which a request's body may stop; slower than 64 KiB/s is cut too.")
    max_audio_seconds: float = opt(3600.0, "Longest sound file; each second takes 0.1 MB while it is transcribed.")
    max_prompts_per_request: int = opt(1024, "Most prompts in one batch request.")
    incremental_streaming_output: bool = opt(False, "/generate streams only what is new in each event.")
    on_engine_death: OnEngineDeath = opt("restart", "What the server does when its engine process dies.")
    engine_hang_timeout: float = opt(
        600.0, "Seconds after which an engine that hangs is ended, its requests answered 503; 0: never."
    )
    max_engine_restarts: int = opt(3, "Restarts within ten minutes before the server gives up and exits.")
    drain_timeout: float = opt(30.0, "Seconds that running requests get to finish after SIGTERM.")
    log_level: LogLevel = opt("info", "How much is logged.")
    log_requests: bool = opt(False, "Log a line per request: lengths, times, how it ended (never its text).")
    otlp_traces_endpoint: str | None = opt(
        None, "Send OpenTelemetry spans of requests to this collector: OTLP over HTTP, a URL or HOST:PORT."
    )
    enable_return_hidden_states: bool = opt(False, "Answer requests for hidden states (return_hidden_states).")
    greet: bool = opt(False, "When ready, ask the model one question through the door and print its answer.")
    sglang_metric_names: bool = opt(False, "Serve metrics under 'sglang:' names as well.")


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "schedule": ScheduleConfig,
    "runtime": RuntimeConfig,
    "nodes": NodesConfig,
    "experts": ExpertsConfig,
    "grammar": GrammarConfig,
    "lora": LoraConfig,
    "media": MediaConfig,
    "speculative": SpeculativeConfig,
    "dllm": DllmConfig,
    "images": ImagesConfig,
    "disagg": DisaggConfig,
    "server": ServerConfig,
}


@dataclass(frozen=True)
class Config:
    """All sections. Build it with `from_flat`, which explains what is wrong."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    nodes: NodesConfig = NodesConfig()
    experts: ExpertsConfig = ExpertsConfig()
    grammar: GrammarConfig = GrammarConfig()
    lora: LoraConfig = LoraConfig()
    media: MediaConfig = MediaConfig()
    speculative: SpeculativeConfig = SpeculativeConfig()
    dllm: DllmConfig = DllmConfig()
    images: ImagesConfig = ImagesConfig()
    disagg: DisaggConfig = DisaggConfig()
    server: ServerConfig = ServerConfig()

    @staticmethod
    def from_flat(values: dict[str, Any]) -> Config:
        """From flat names to checked sections.

        Raises:
            ConfigError: naming the field, the value seen, the values allowed and the nearest spelling.
        """
        known, others = flat_fields(), other_names()
        parts: dict[str, dict[str, Any]] = {}
        for name, value in one_address(values).items():
            key = name.replace("-", "_")
            key = others.get(key, key)
            refuse_missing(name)
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
                raise ConfigError(f"unknown setting {name!r}{hint}", param=name)
            section, kind = known[key]
            if key in _JSON and isinstance(value, dict):
                value = json.dumps(value)
            parts.setdefault(section, {})[key] = _convert(key, value, kind)
        attention_groups(parts.get("runtime", {}))
        sections = {name: cls(**parts.get(name, {})) for name, cls in SECTIONS.items()}
        config = Config(**sections)
        flat = config.flat()
        check_ranges(flat)
        check_ranks(flat)
        Targets.parse(config.schedule.slo)
        return config

    def flat(self) -> dict[str, Any]:
        """Every setting by its flat name."""
        return {
            spec.name: getattr(getattr(self, section.name), spec.name)
            for section in dataclasses.fields(self)
            for spec in dataclasses.fields(getattr(self, section.name))
        }

    def with_(self, **values: Any) -> Config:
        """A copy in which these flat names have other values."""
        return Config.from_flat({**self.flat(), **values})


# Settings whose text may be JSON: in YAML files they may be tables.
_JSON = (
    *("speculative_config", "kv_events_config", "dllm_algorithm_config", "slo"),
    "hicache_storage_backend_extra_config",
)


def flat_fields() -> dict[str, tuple[str, Any]]:
    """Flat name -> (section, type)."""
    found: dict[str, tuple[str, Any]] = {}
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        for spec in dataclasses.fields(cls):
            found[spec.name] = (section, hints[spec.name])
    return found


def other_names() -> dict[str, str]:
    """Other name -> flat name."""
    specs = [spec for cls in SECTIONS.values() for spec in dataclasses.fields(cls)]
    return {other: spec.name for spec in specs for other in spec.metadata["also"]}


def _convert(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        options = [str(item) for item in get_args(kind)] if get_origin(kind) is Literal else []
        if options:
            near = difflib.get_close_matches(str(value), options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(options)}{hint}", param=name) from None
        raise ConfigError(f"{name}: {value!r}: {error}", param=name) from None


SECRETS = ("api_key", "admin_api_key", "dist_secret")  # what is never shown


def read_environment(values: dict[str, Any]) -> dict[str, Any]:
    """Add what only the environment says: keys, so that they need not stand on a command line."""
    keys = {name: os.environ.get(f"PHLOEM_{name.upper()}") for name in SECRETS}
    said = {**values, **{name: key for name, key in keys.items() if key and not values.get(name)}}
    return as_torchrun_says(said, os.environ)


def cpu_level(requested: CpuLevel) -> tuple[CpuLevel, str]:
    """The instruction set that is asked for, by an option or by the environment, and who asks.

    Raises:
        ConfigError: if the environment names none that there is.
    """
    said = environment_of("PHLOEM_CPU_LEVEL")
    if requested != "auto" or said is None:
        return requested, "as asked"
    return _convert("PHLOEM_CPU_LEVEL", said, CpuLevel), "as the environment's PHLOEM_CPU_LEVEL asks"


TRACES = "SGLANG_TORCH_PROFILER_DIR"


def cache_home() -> Path:
    """Where files that can be made again are kept from one start to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phloem"


def traces_folder() -> Path:
    """Where profiles are written: what `TRACES` of the environment says, else where temporary files are."""
    return Path(environment_of(TRACES) or tempfile.gettempdir()).resolve()


def environment_of(name: str) -> str | None:
    """A variable of the environment; None: it is not there, or empty."""
    return os.environ.get(name) or None


def log_format() -> str:
    """What `PHLOEM_LOG_FORMAT` says of log lines: text or json. Raises ConfigError."""
    asked = environment_of("PHLOEM_LOG_FORMAT") or "text"
    if asked not in ("text", "json"):
        raise ConfigError(f"PHLOEM_LOG_FORMAT: {asked!r:.40} is not one of text, json")
    return asked


def child_environment(defaults: dict[str, str]) -> dict[str, str]:
    """The environment for a process that we start: ours, with these values where ours has none."""
    return {**defaults, **os.environ}


def let_ranks_end() -> None:
    """Torch's watch of NCCL ends no process, and lets none go on with what was never computed: that is ours to do."""
    os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
