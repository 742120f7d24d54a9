"""From a model folder to a Network that has proved itself.

Any Hugging Face causal language model is taken whose attention goes through transformers' AttentionInterface. Before it
serves, a probe must show that our attention was called once per layer and that two prompts, packed together in
chunks, get the logits that the untouched network gives them one by one. A base that fails is refused with the reason:
transformers only logs a warning for architectures that ignore the interface, and answers wrongly.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from server.config import ModelConfig
from server.errors import StartupRefused
from server.model import attention
from server.model.attention import ShapeRecorder, UnsupportedAttention
from server.model.checkpoints import OURS, PARTS, brought, read_codes, unquantized
from server.model.experts import graft_experts
from server.model.fused import fuse
from server.model.grafted import graft_network, linear_inputs, weight_bytes
from server.model.layers import announce_layers, find_layers
from server.model.network import BaseFacts, Batch, Network, span_plan
from server.model.norms import norm_inputs
from server.model.places import Places, find_anatomy
from server.model.quantize import hold, loader_options, multiplied_with
from server.primitives.site import Active

log = logging.getLogger(__name__)

PROBE_TOKENS = 12
# Relative to the largest logit. Half precision accumulates in another order in the packed products.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
# Against plain products with the weights as they are held: a number just between two codes of int8 may round to either.
# On a GPU bitsandbytes' fused products round scales and sums (NF4 by 0.3 % of the weights).
QUANTIZED_PROBE_TOLERANCE = 1e-1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PER_FORWARD_ROPE = ("dynamic", "longrope")


def load_network(config: ModelConfig, folder: Path, *, name: str) -> Network:
    """Load, graft and prove the base in `folder`. Raises: StartupRefused."""
    device = _device(config.device)
    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StartupRefused(f"base {name}: {error}") from error
    dtype = _dtype(config.dtype, shape, device)
    _refuse_rope(shape, name)
    quantized = brought(shape, config.quantize)
    coded = quantized is not None and quantized["quant_method"] in OURS
    options = loader_options(config.quantize, dtype, device)
    if coded:
        options["config"] = unquantized(shape)
    elif quantized is not None:
        options["device_map"] = str(device)
    stock = _stock(folder, name, dtype, device, options)
    if not stock._can_set_attn_implementation():  # type: ignore[operator]
        raise StartupRefused(f"base {name}: architecture {shape.model_type} has its own attention, not transformers'")
    probes = _probes(shape.vocab_size)
    held = hold(config.quantize, stock, device)
    if coded:
        assert quantized is not None
        held |= read_codes(folder, quantized, stock)
    with (
        torch.inference_mode(),
        multiplied_with(stock, held),
        norm_inputs(stock) as seen,
        linear_inputs(stock) as inputs,
    ):
        expected = [stock(input_ids=ids.to(device)[None], use_cache=False).logits[0].float() for ids in probes]
    AttentionInterface.register(attention.NAME, attention.attend)
    stock.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    active = Active()
    with multiplied_with(stock, held):
        recorder = _record(stock, probes[0].to(device), name)
    depth = int(shape.get_text_config().num_hidden_layers)
    if sorted(recorder.layers) != list(range(depth)):
        raise StartupRefused(f"base {name}: attention ran in layers {sorted(recorder.layers)}, the base has {depth}")
    with torch.no_grad():
        lengths = [len(ids) for ids in probes]
        sites = graft_network(stock, active, seen, lengths, inputs=inputs, stored=_stored(shape), held=held)
    # After the grafting: what adds to the stream is then a module with everything that adapters change in it.
    again = partial(_record, stock, probes[0].to(device), name)
    places = Places(find_anatomy(stock, recorder.modules, again), active)
    decoder_layers = find_layers(stock, depth)
    announce_layers(stock, decoder_layers, active)
    facts = BaseFacts(
        name=name,
        layers=tuple(recorder.layers[layer] for layer in range(depth)),
        sites=sites.linears,
        norms=sites.norms,
        embedding=sites.embedding,
        places=places.names,
        hidden_size=stock.get_input_embeddings().weight.shape[1],  # type: ignore[operator]
        vocab_size=expected[0].shape[-1],
        context=int(shape.get_text_config().max_position_embeddings),
        end_ids=_end_ids(stock),
        dtype=dtype,
        device=device,
        quantized=config.quantize != "none" or quantized is not None,
        parameters=graft_experts(stock, active),
        decoder_layers=decoder_layers,
        groups=sites.groups,
        numbers=sites.numbers,
        weight_bytes=weight_bytes(stock),
    )
    network = Network(stock, facts, active, places)
    undo = fuse(stock, device, dtype)
    try:
        _prove(network, probes, expected)
    except StartupRefused as error:
        log.info("the native attention and MLP are not what this base computes, it keeps its own: %s", error)
        undo()
        _prove(network, probes, expected)
    return network


def _stock(
    folder: Path, name: str, dtype: torch.dtype, device: torch.device, options: Mapping[str, object]
) -> nn.Module:
    try:
        stock, told = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise StartupRefused(f"base {name} cannot be loaded: {error}") from error
    if "config" in options:
        _check_whole(name, told)
    model: nn.Module = stock.eval().requires_grad_(False)
    return model if "device_map" in options else model.to(device)


def _check_whole(name: str, told: Mapping[str, Any]) -> None:
    """Only codes may have been left over, and only weights that codes stand for may be missing."""
    left = {key for key in told["unexpected_keys"] if key.rpartition(".")[2] not in PARTS}
    coded = {key.rpartition(".")[0] for key in told["unexpected_keys"]} - left
    absent = {key for key in told["missing_keys"] if key.removesuffix(".weight") not in coded}
    if left or absent:
        raise StartupRefused(f"base {name}: {min(left | absent)} of the checkpoint does not fit the architecture")


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise StartupRefused("--device cuda: torch sees no CUDA device on this machine")
    if asked not in ("cpu", "cuda"):
        raise StartupRefused(f"--device {asked}: known are auto, cpu, cuda")
    return torch.device(asked)


def _dtype(asked: str, shape: PretrainedConfig, device: torch.device) -> torch.dtype:
    """What was asked for; by default the checkpoint's own, unless this CPU has no products in it."""
    if asked in DTYPES:
        return DTYPES[asked]
    if asked != "auto":
        raise StartupRefused(f"--dtype {asked}: known are auto, {', '.join(DTYPES)}")
    own = _stored(shape)
    if device.type == "cpu" and own != torch.float32:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if own == torch.bfloat16 and fast else torch.float32
    return own


def _stored(shape: PretrainedConfig) -> torch.dtype:
    """The dtype of the checkpoint."""
    dtype: torch.dtype = shape.get_text_config().dtype or torch.float32
    return dtype


def _refuse_rope(shape: PretrainedConfig, name: str) -> None:
    rope = getattr(shape.get_text_config(), "rope_parameters", None) or {}
    for scaling in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if scaling.get("rope_type") in PER_FORWARD_ROPE:
            raise StartupRefused(
                f"base {name}: rope_type {scaling['rope_type']} chooses frequencies by the longest sequence of the "
                "batch, so neighbours would change each other's answers"
            )


def _probes(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in (PROBE_TOKENS, PROBE_TOKENS - 3)]


def _record(stock: nn.Module, ids_T: Tensor, name: str) -> ShapeRecorder:
    recorder = ShapeRecorder()
    positions = torch.arange(len(ids_T), device=ids_T.device)
    try:
        with torch.inference_mode():
            stock(input_ids=ids_T[None], position_ids=positions[None], use_cache=False, graft_plan=recorder)
    except (UnsupportedAttention, TypeError) as error:
        raise StartupRefused(f"base {name}: {error}") from error
    return recorder


def _prove(network: Network, probes: list[Tensor], expected: list[Tensor]) -> None:
    """Both prompts packed, the first in two chunks, against the untouched network. Raises: StartupRefused."""
    facts = network.facts
    cache = network.new_cache(2, PROBE_TOKENS)
    first, second = (ids.to(facts.device) for ids in probes)
    cut = PROBE_TOKENS // 2
    # The last step wants few of its rows: a network that gives all the same would answer from the wrong ones.
    steps = [
        (torch.cat([first[:cut], second]), [(cut, cut, [0]), (len(second), len(second), [1])], cut + len(second)),
        (first[cut:], [(len(first) - cut, len(first), [0])], 2),
    ]
    got = []
    for ids, chunks, kept in steps:
        plan = span_plan(cache, chunks)
        positions = torch.cat([torch.arange(length - count, length) for count, length, _ in chunks]).to(facts.device)
        wanted = torch.arange(len(ids), device=facts.device)[-kept:]
        try:
            got.append(network.forward(Batch(ids, positions, plan, wanted, None, {})))
        except UnsupportedAttention as error:
            raise StartupRefused(f"base {facts.name}: {error}") from error
        if plan.seen != len(facts.layers):
            raise StartupRefused(
                f"base {facts.name}: attention was called {plan.seen} times for {len(facts.layers)} layers"
            )
    if [len(logits) for logits in got] != [kept for _, _, kept in steps]:
        raise StartupRefused(f"base {facts.name}: this architecture does not keep to the logits that are wanted")
    pairs = [(got[0][:cut], expected[0][:cut]), (got[1], expected[0][-2:]), (got[0][cut:], expected[1])]
    error_ = max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)
    limit = QUANTIZED_PROBE_TOLERANCE if facts.quantized else PROBE_TOLERANCE[facts.dtype]
    if not error_ <= limit:
        raise StartupRefused(
            f"base {facts.name}: packed logits differ from transformers' own by {error_:.1e} (limit {limit:g}); "
            "this architecture is not served"
        )
    log.info(
        "base %s proved: packed logits differ by %.1e (limit %g); its weights take %.1f MiB",
        facts.name,
        error_,
        limit,
        facts.weight_bytes / 2**20,
    )


def _end_ids(stock: nn.Module) -> frozenset[int]:
    ids: Any = stock.generation_config.eos_token_id  # type: ignore[union-attr]
    if ids is None:
        ids = stock.config.eos_token_id  # type: ignore[union-attr]
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
