"""Tiny random bases of every architecture, and the engine's parts driven step by step so that logits can be seen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from server.adapters.bank import Bank
from server.adapters.lowering.table import lower
from server.adapters.lowering.target import Lowered, Target
from server.config import ModelConfig
from server.engine.loop import ProbeLease, course_of
from server.engine.pack import NO_ROUTES, Packed, block_rows, pack_step
from server.engine.pack_routes import read_shares
from server.kernels import native
from server.model.load import load_network
from server.model.network import Network
from server.policy.blocks import BlockPool
from server.policy.schedule import Scheduler
from server.policy.schedule import Sequence as Scheduled
from server.primitives.graft import Graft, combined, prefixed
from server.primitives.prefix import Prefix
from server.primitives.routed_experts import Route
from server.records import RouteRow
from tests.oracle.kinds import Row, make_adapter, rows

os.environ["HF_HUB_OFFLINE"] = "1"

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.1,  # the stock 0.02 makes a network this small nearly linear
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "head_dim": 16},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 6, "head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    "phi": {},
    "phi3": {"sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# Proved with a few adapters each, in test_bases.py. Two layers, of both sorts where there are two.
TWO_SORTS = {
    "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
MORE_BASES: dict[str, dict[str, Any]] = {
    "gemma": {"num_hidden_layers": 2, "head_dim": 16},
    "gemma3_text": {**TWO_SORTS, "query_pre_attn_scalar": 16},
    "gpt_neox": {"num_hidden_layers": 2, "rotary_pct": 0.5},
    "opt": {"num_hidden_layers": 2, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo2": {"num_hidden_layers": 2},
    "granite": {
        "num_hidden_layers": 2, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
    "cohere2": {**TWO_SORTS, "logit_scale": 0.5},
    "starcoder2": {"num_hidden_layers": 2, "sliding_window": 6},
    "qwen3_moe": {
        "num_hidden_layers": 2, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        **TWO_SORTS, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
MULTI_HEAD = ("gpt2", "gpt_neox", "opt")  # as many KV heads as query heads: PEFT would believe a number of KV heads


@dataclass(frozen=True)
class TinyBase:
    architecture: str
    folder: Path

    @cached_property
    def _loaded(self) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager").eval()
        return model

    def fresh(self) -> nn.Module:
        """The untouched network, for PEFT: a copy, which takes a tenth of the time of loading it again."""
        return deepcopy(self._loaded)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyBase]:
    made: dict[str, TinyBase] = {}

    def make(architecture: str) -> TinyBase:
        if architecture not in made:
            torch.manual_seed(0)
            options = {**SMALL, **(ARCHITECTURES | MORE_BASES)[architecture]}
            if architecture in MULTI_HEAD:
                del options["num_key_value_heads"]
            config = CONFIG_MAPPING[architecture](**options)
            model = AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                # Stock biases start at zero and norms at one, which would hide how they are treated.
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.3)
                elif parameter.dim() == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            made[architecture] = TinyBase(architecture, folder)
        return made[architecture]

    return make


@dataclass(frozen=True)
class Adapter:
    """One row of the oracle on one base: as it was saved, and as PEFT loads it."""

    row: Row
    folder: Path
    peft: Any


class Adapters(Mapping[str, Adapter]):
    """Every row that can be put on an architecture, by its name; each is made when it is first asked for.

    What PEFT loaded must not be changed. `rows` tells of them without making any.
    """

    def __init__(self, base: TinyBase, root: Path) -> None:
        self._base, self._root = base, root
        self.rows = rows(base.architecture)
        self._seeds = {name: seed for seed, name in enumerate(self.rows)}
        self._made: dict[str, Adapter] = {}

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._made:
            row, folder = self.rows[name], self._root / name
            self._made[name] = Adapter(row, folder, make_adapter(self._base, row, folder, self._seeds[name]))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@pytest.fixture(scope="session")
def adapters(
    tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Adapters]:
    made: dict[str, Adapters] = {}

    def make(architecture: str) -> Adapters:
        if architecture not in made:
            made[architecture] = Adapters(tiny_base(architecture), tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return make


@dataclass
class Bench:
    """The engine without its thread: plan, pack, forward, commit, with the logits kept."""

    network: Network
    block_size: int = 4
    max_batch_tokens: int = 24
    max_running: int = 64
    blocks: int = 256
    max_rank: int = 64
    gathered: bool = True  # adapters by the native kernels, where they were built; else by torch's operations
    max_delta_error: float = 0.0  # so a change of full rank is served at full rank, which these bases allow
    steps: int = 0
    mixed_steps: int = 0
    widest_step: int = 0  # requests that had a token in one step
    cuts: int = 0  # chunks after which the prompt went on
    sequences: dict[int, Scheduled] = field(default_factory=dict)
    shares: dict[int, list[RouteRow]] = field(default_factory=dict)

    def target(self) -> Target:
        facts = self.network.facts
        return Target(
            facts.sites,
            facts.layers,
            facts.hidden_size,
            facts.dtype,
            facts.device,
            self.max_rank,
            64,
            self.network.weight,
            facts.norms,
            facts.embedding,
            facts.places,
            facts.parameters,
            self.max_delta_error,
            facts.decoder_layers,
        )

    def lower(self, folder: Path, kind: str) -> Lowered:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        return lower(kind, config, tensors, self.target())

    def graft(self, folder: Path, kind: str, digest: str = "") -> Graft:
        """What the adapter store does with a folder, without the hub."""
        lowered = self.lower(folder, kind)
        prefix = lowered.prefix
        if lowered.soft_prompt_VE is not None:
            prefix = self.network.compile_prefix(lowered.soft_prompt_VE, block_size=self.block_size)
        return lowered.graft(digest or str(folder), folder.name, prefix)

    def forward(self, packed: Packed, bank: Bank, terms: Sequence[tuple[Graft, float]]) -> Tensor:
        """The logits of a step, in which these terms are at work."""
        return self.network.forward(packed.batch)

    def joined(self, mixture: Sequence[tuple[Graft, float]]) -> Prefix | None:
        """What the adapter store does with several prefixes."""
        prefix: Prefix | None = None
        for graft in prefixed(mixture):
            own = graft.prefix
            if prefix is not None and graft.soft_prompt_VE is not None:
                own = self.network.compile_prefix(graft.soft_prompt_VE, block_size=self.block_size, after=prefix)
            assert own is not None
            prefix = own if prefix is None else prefix.then(own)
        return prefix

    def run(
        self,
        requests: Sequence[tuple[list[int], list[tuple[Graft, float]]]],
        new: int = 0,
        routes: Mapping[int, Route] = NO_ROUTES,
        scored: Set[int] | None = None,
    ) -> list[Tensor]:
        """All requests in one batch, `new` greedy tokens each: logits (positions, vocabulary) per request.

        `scored` are the requests, by their places, of which every position is wanted: all, where it is not given. Of
        the others the head computes what a server needs of them, the positions after which a token is drawn.
        `routes` by the request's place; who got what is then in `shares`.
        """
        pool = BlockPool(self.blocks)
        cache = self.network.new_cache(self.blocks, self.block_size)
        facts = self.network.facts
        gathered = self.gathered and native.serves(facts.device, facts.dtype)
        bank = Bank(facts.dtype, facts.groups, facts.numbers) if gathered else Bank(facts.dtype)
        scheduler = Scheduler(
            pool, block_size=self.block_size, max_batch_tokens=self.max_batch_tokens, max_running=self.max_running
        )
        grafts: dict[int, Sequence[tuple[Graft, float]]] = {}
        logits: dict[int, list[Tensor]] = {}
        for index, (ids, mixture) in enumerate(requests):
            lease = ProbeLease(combined(mixture))
            sequence = Scheduled(
                index, list(ids), len(ids), new, course_of(lease, ids), lease.virtual_tokens, reuse=False
            )
            scheduler.add(sequence)
            self.sequences[index] = sequence
            grafts[index], logits[index] = lease.grafts, []
        whole = frozenset(grafts if scored is None else scored)
        while scheduler.running or scheduler.waiting:
            step = scheduler.plan()
            assert step.chunks, "the scheduler stands still"
            cache.clear(step.fresh_blocks)
            for chunk in step.chunks:
                prefix = self.joined(grafts[chunk.sequence.id]) if chunk.preload else None
                if chunk.preload and prefix:
                    cache.load(
                        prefix, chunk.preload, block_rows(chunk.sequence.blocks, *chunk.preload, self.block_size)
                    )
            routed = {
                id_: routes[id_].heard(self.network.reading(requests[id_][0]))
                for id_ in (chunk.sequence.id for chunk in step.chunks)
                if id_ in routes
            }
            packed = pack_step(step, cache, bank, grafts, whole, routes=routed, traced=frozenset(routed))
            out = self.forward(packed, bank, [term for chunk in step.chunks for term in grafts[chunk.sequence.id]])
            if packed.routed is not None:
                for id_, read in read_shares(packed.routed, frozenset(routed), len(self.network.facts.layers)).items():
                    self.shares.setdefault(id_, []).extend(read)
            self.steps += 1
            self.mixed_steps += len(step.chunks) > 1
            self.cuts += sum(not chunk.completes for chunk in step.chunks)
            self.widest_step = max(self.widest_step, len(step.chunks))
            drawn = {}
            for chunk, first, count in packed.rows:
                logits[chunk.sequence.id].append(out[first : first + count])
                if chunk.completes:
                    drawn[chunk.sequence.id] = int(out[first + count - 1].argmax())
            for outcome in scheduler.commit(step, drawn):
                if outcome.finish is not None or new == 0:
                    scheduler.finish(outcome.sequence)
        return [torch.cat(logits[index]) for index in range(len(requests))]


@pytest.fixture(scope="session")
def bench(tiny_base: Callable[[str], TinyBase]) -> Callable[[str], Bench]:
    made: dict[str, Network] = {}

    def make(architecture: str) -> Bench:
        if architecture not in made:
            folder = tiny_base(architecture).folder
            made[architecture] = load_network(ModelConfig(base=architecture), folder, name=architecture)
        return Bench(made[architecture])

    return make


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
