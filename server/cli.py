"""`hub serve`: flags in, one frozen configuration out. torch is imported only when the command runs."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from server.config import AdapterConfig, EngineConfig, HttpConfig, ModelConfig, ServerConfig

_MODEL, _ENGINE, _ADAPTERS, _HTTP = ModelConfig(base=""), EngineConfig(), AdapterConfig(), HttpConfig()

MAX_SHARE = 1000


def register(app: typer.Typer) -> None:
    """Add this package's commands to the one command line."""
    app.command("serve", context_settings={"auto_envvar_prefix": "MULTIGRAFT_SERVE"})(serve)


def serve(
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder, or a Hugging Face id.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = _MODEL.dtype,
    quantize: Annotated[
        str, typer.Option(help="none, int8, nf4 or fp8: bits of the base's weights.")
    ] = _MODEL.quantize,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _MODEL.device,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _HTTP.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = _HTTP.port,
    served_name: Annotated[
        str | None, typer.Option(help="The base's id in requests (default: as --base, of a folder its name).")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of one request, prompt and answer (default: the base's).", min=1)
    ] = None,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step; longer prompts are cut into chunks.", min=1)
    ] = _ENGINE.max_batch_tokens,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Of these for prompts if several requests are open, or 2 a decode (default: 128 on CPUs, else all).",
            min=1,
        ),
    ] = _ENGINE.prompt_tokens,
    share: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT, such as 'team/*=4': how much of a busy server its requests get beside others' (1); "
            "the first that fits; may be repeated."
        ),
    ] = None,
    max_running: Annotated[int, typer.Option(help="Requests in one batch.", min=1)] = _ENGINE.max_running,
    max_waiting: Annotated[
        int, typer.Option(help="Requests waiting for a place in the batch; beyond it they get 503.", min=0)
    ] = _ENGINE.max_waiting,
    kv_bytes: Annotated[int, typer.Option(help="Bytes of the KV cache.", min=1)] = _ENGINE.kv_bytes,
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.", min=1, max=1024)] = _ENGINE.block_size,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse the KV of equal beginnings.")] = _ENGINE.prefix_cache,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one product (default: torch's).", min=1)] = None,
    graphs: Annotated[
        bool, typer.Option(help="Replay decode steps as CUDA graphs, each compared with the plain step when it begins.")
    ] = _ENGINE.graphs,
    max_rank: Annotated[int, typer.Option(help="Largest rank of a LoRA adapter.", min=1)] = _ADAPTERS.max_rank,
    max_delta_error: Annotated[
        float,
        typer.Option(
            help="Largest relative error of a full-rank change (LoKr, HiRA, ...) at low rank; 0: only exact.",
            min=0,
            max=1,
        ),
    ] = _ADAPTERS.max_delta_error,
    max_virtual: Annotated[
        int, typer.Option(help="Most virtual tokens of a prefix or soft prompt.", min=1)
    ] = _ADAPTERS.max_virtual,
    max_terms: Annotated[int, typer.Option(help="Most adapters of one request.", min=1)] = _ADAPTERS.max_terms,
    max_weight: Annotated[
        float, typer.Option(help="Largest weight of an adapter in a mixture, either sign.", min=0)
    ] = _ADAPTERS.max_weight,
    adapter_bytes: Annotated[
        int, typer.Option(help="Bytes of all resident adapters; the least recently used leave first.", min=1)
    ] = _ADAPTERS.cache_bytes,
    default_alias: Annotated[str, typer.Option(help="What a bare name means.")] = _ADAPTERS.default_alias,
    allow: Annotated[
        list[str] | None, typer.Option(help="Only names that fit, such as 'team/*', may be loaded; may be repeated.")
    ] = None,
    auto_threshold: Annotated[
        float,
        typer.Option(
            help="Model auto: added to the score that each adapter asks of a prompt; above 0 leaves more to the base.",
            min=-2,
            max=2,
        ),
    ] = _ADAPTERS.auto_threshold,
    disk_bytes: Annotated[
        int, typer.Option(help="Bytes on this disk of what was fetched from a remote hub.", min=0)
    ] = _ADAPTERS.disk_bytes,
    check_golden: Annotated[
        bool, typer.Option(help="Replay a version's golden rows before it takes traffic.")
    ] = _ADAPTERS.check_golden,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of a request's body.", min=1)] = _HTTP.max_body_bytes,
    max_choices: Annotated[int, typer.Option(help="Largest n of a request.", min=1)] = _HTTP.max_choices,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get after SIGTERM.", min=0)
    ] = _HTTP.drain_timeout_s,
    max_connections: Annotated[
        int, typer.Option(help="Open connections; those that say nothing leave first.", min=1)
    ] = _HTTP.max_connections,
    lenient: Annotated[
        bool, typer.Option(help="Accept unknown fields and list them in x-multigraft-ignored.")
    ] = _HTTP.lenient,
) -> None:
    """Serve a base model and every adapter of the hub that fits it.

    MULTIGRAFT_API_KEY, when set, is asked of every request; MULTIGRAFT_ADMIN_KEY opens the routes that load, pin and
    evict adapters, which are closed without it. HUB_URL and HUB_TOKEN name a remote hub to fetch from and to follow.
    Every option is read from MULTIGRAFT_SERVE_OPTION, too.
    """
    shares = tuple(map(_share, share or ()))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("alembic", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    config = ServerConfig(
        model=ModelConfig(base=base, dtype=dtype, device=device, quantize=quantize),
        engine=EngineConfig(
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
            prompt_tokens=prompt_tokens,
            shares=shares,
            max_running=max_running,
            max_waiting=max_waiting,
            block_size=block_size,
            kv_bytes=kv_bytes,
            prefix_cache=prefix_cache,
            threads=threads,
            graphs=graphs,
        ),
        adapters=AdapterConfig(
            max_rank=max_rank,
            max_delta_error=max_delta_error,
            max_virtual=max_virtual,
            max_terms=max_terms,
            max_weight=max_weight,
            cache_bytes=adapter_bytes,
            default_alias=default_alias,
            auto_threshold=auto_threshold,
            allow=tuple(allow or ()),
            disk_bytes=disk_bytes,
            check_golden=check_golden,
        ),
        http=HttpConfig(
            host=host,
            port=port,
            api_key=os.environ.get("MULTIGRAFT_API_KEY") or None,
            admin_key=os.environ.get("MULTIGRAFT_ADMIN_KEY") or None,
            lenient=lenient,
            max_body_bytes=max_body_bytes,
            max_choices=max_choices,
            drain_timeout_s=drain_timeout,
            max_connections=max_connections,
            served_name=served_name,
        ),
    )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see docs/decisions/0009
    from server.errors import StartupRefused
    from server.main import run

    try:
        run(config)
    except StartupRefused as error:
        typer.echo(f"hub serve: {error}", err=True)
        raise typer.Exit(1) from None


def _share(text: str) -> tuple[str, float]:
    """`NAME=WEIGHT`. Raises: BadParameter."""
    pattern, _, written = text.rpartition("=")
    try:
        weight = float(written)
    except ValueError:
        weight = 0.0
    if not pattern or not 0 < weight <= MAX_SHARE:
        raise typer.BadParameter(f"{text} is not NAME=WEIGHT with a weight above 0 and up to {MAX_SHARE}")
    return pattern, weight
