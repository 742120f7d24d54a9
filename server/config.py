"""Every setting of the server, one frozen record per concern, built once in `server.main` and handed down whole."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelConfig:
    base: str
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda
    quantize: str = "none"  # none | int8 | nf4 | fp8


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one step and of the queue. Units: tokens, sequences, bytes."""

    max_model_len: int | None = None  # default: the base's own context
    max_batch_tokens: int = 512
    prompt_tokens: int | None = None  # of prompts in a step, beside other requests; default: 128 on a CPU, else all
    shares: tuple[tuple[str, float], ...] = ()  # (pattern of names, weight): of the service, where adapters compete
    max_running: int = 64
    max_waiting: int = 1024
    block_size: int = 16  # tokens per KV block
    kv_bytes: int = 1 << 30
    prefix_cache: bool = True
    threads: int | None = None
    graphs: bool = False  # decode steps as CUDA graphs


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Limits of what may be loaded. Bytes are counted as the adapter really takes them in memory."""

    max_rank: int = 256
    max_delta_error: float = 1e-2  # of a full-rank change's norm, by which the served low-rank one may be off
    max_virtual: int = 512  # virtual tokens
    max_terms: int = 16
    max_weight: float = 100.0  # |weight| of one term
    cache_bytes: int = 2 << 30
    max_concurrent_loads: int = 2
    default_alias: str = "latest"
    auto_threshold: float = 0.0  # added to each adapter's own threshold in semantic routing
    allow: tuple[str, ...] = ()  # patterns of the names that may be loaded; none: all
    disk_bytes: int = 10 << 30  # of what was fetched from a remote hub
    check_golden: bool = True


@dataclass(frozen=True, slots=True)
class HttpConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    lenient: bool = False
    max_body_bytes: int = 8 << 20
    max_choices: int = 16  # n
    drain_timeout_s: float = 30.0
    max_connections: int = 4096
    header_timeout_s: float = 10.0
    served_name: str | None = None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
